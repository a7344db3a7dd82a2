//! Any bytes as `/proc/<pid>/maps`: whatever a process has called its files, a range is told by its own line alone.
#![no_main]

#[path = "../../profiler-agent/src/addr.rs"]
#[allow(dead_code, reason = "the agent uses all of it")]
mod addr;
#[path = "../../profiler-agent/src/process/maps.rs"]
mod maps;

use libfuzzer_sys::fuzz_target;
use maps::executable_ranges;

fuzz_target!(|bytes: &[u8]| {
    let lines = bytes.split(|&byte| byte == b'\n');
    let by_line: Vec<_> = lines.flat_map(executable_ranges).collect();
    assert!(executable_ranges(bytes).eq(by_line));
    for entry in executable_ranges(bytes) {
        assert!(!entry.path.contains(&b'\n'));
    }
});
