//! The allocators of this host.

use profiler_common::heap::Call;
use profiler_heap::{Allocator, scan};

/// Those that are installed, by where Debian puts them.
const PATHS: [&str; 5] = [
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/usr/lib/x86_64-linux-musl/libc.so",
    "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2",
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/x86_64-linux-gnu/libmimalloc.so.2.0",
];

fn show(path: &str, allocator: &Allocator) {
    for point in &allocator.points {
        println!(
            "{path}: {:<32} {:<16?} {:#x} {:#x} {}",
            point.name, point.call, point.offset, point.arguments, point.flags
        );
    }
    for (name, refusal) in &allocator.refused {
        println!("{path}: {name:<32} {refusal}");
    }
}

#[test]
fn every_installed_allocator_can_be_probed() {
    let mut found = 0;
    for path in PATHS {
        let Ok(file) = std::fs::read(path) else {
            eprintln!("SKIP {path}: not installed");
            continue;
        };
        let allocator = scan(&file).unwrap_or_else(|error| panic!("{path}: {error}"));
        show(path, &allocator);
        for call in [Call::Allocate, Call::AllocateArray, Call::Reallocate, Call::AllocateInto, Call::Free] {
            assert!(allocator.points.iter().any(|point| point.call == call), "{path}: {call:?}");
        }
        // It calls realloc, which is probed.
        let refused = allocator.refused.iter().filter(|(name, _)| name != "reallocarray");
        assert_eq!(refused.count(), 0, "{path}: {:?}", allocator.refused);
        found += 1;
    }
    assert!(found > 0, "a host has a C library");
}
