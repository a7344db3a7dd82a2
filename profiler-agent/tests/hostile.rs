//! A program whose unwind information has no end costs one counted error: it is profiled by frame pointers, and so is
//! every other program by its tables.

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use support::{Agent, Program, testprogs};

const WINDOW: Duration = Duration::from_secs(2);

/// CPU time that is enough to look at, in nanoseconds: 100 samples.
const ENOUGH_NS: i64 = 1_000_000_000;

/// Function entries, more than are ever taken of one file.
const FDES: u32 = 3_000_000;

const REFUSED: &str = "profiler_agent_unwind_table_errors_total{reason=\"too_large\"}";
const DROPPED: &str = "profiler_agent_samples_dropped_total";

#[test]
#[ignore = "needs root and BPF"]
fn endless_unwind_information_is_one_counted_error_and_nobody_elses() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("hostile");
    write_hostile(&testprogs().join("burn"), &path);
    let hostile = [0, 1].map(|_| Program::start_command(&mut Command::new(&path)));
    let sound = Program::start("deep_gcc", &[]);
    let agent = Agent::start(&["-F", "99", "--cpu-budget", "off", "--window", "2s"]);
    agent.wait_for_tables();
    agent.wait_for_names();
    let from = SystemTime::now() + WINDOW;
    let enough = |program: &Program| {
        let selector = format!("{{pid=\"{}\"}}", program.pid());
        agent.wait_for(&format!("enough samples of {selector}"), || {
            let merged = agent.merge_since(&selector, from);
            (merged.total > ENOUGH_NS).then_some(merged)
        })
    };
    hostile.iter().for_each(|program| drop(enough(program)));
    let merged = enough(&sound);
    let share = merged.share_from(&["_start", "clone3", "__clone3"]);
    assert!(share >= 0.99, "{share:.4} to the root, not {:?}", merged.roots());
    assert_eq!(agent.metric(REFUSED), Some(1.0), "two processes, one file");
    assert_eq!(agent.metric(DROPPED), Some(0.0));
    agent.stop();
}

/// A program with a section table that leads to more function entries than any program has.
fn write_hostile(program: &Path, to: &Path) {
    let mut file = fs::read(program).expect("a test program");
    let names = b"\0.eh_frame\0.shstrtab\0";
    let names_at = file.len() as u64;
    file.extend_from_slice(names);
    file.resize(file.len().next_multiple_of(8), 0);
    let frames_at = file.len() as u64;
    file.extend(entries());
    let frames_bytes = file.len() as u64 - frames_at;
    file.resize(file.len().next_multiple_of(8), 0);
    let headers_at = file.len() as u64;
    // name, type, flags, address, offset, size, link and info, alignment, entry size (elf(5), Elf64_Shdr).
    for (name, kind, at, bytes) in
        [(0, 0, 0, 0), (1, 1, frames_at, frames_bytes), (11, 3, names_at, names.len() as u64)]
    {
        file.extend(u32::to_le_bytes(name));
        file.extend(u32::to_le_bytes(kind));
        for word in [0, 0, at, bytes, 0, 1, 0] {
            file.extend(u64::to_le_bytes(word));
        }
    }
    // e_shoff; e_shentsize, e_shnum, e_shstrndx.
    file[0x28..0x30].copy_from_slice(&headers_at.to_le_bytes());
    for (at, value) in [(0x3a, 64u16), (0x3c, 3), (0x3e, 2)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    fs::write(to, file).expect("write the program");
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("make it a program");
}

/// A CIE without augmentation, and the entries of functions of 16 bytes that all lie at one place.
fn entries() -> Vec<u8> {
    // Length, id 0, version 1, "", alignments 1 and -8, return address 16; CFA = rsp + 8, return address at CFA - 8.
    let mut entries = vec![16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1, 0, 0];
    for _ in 0..FDES {
        let cie = entries.len() as u32 + 4;
        entries.extend(20u32.to_le_bytes());
        entries.extend(cie.to_le_bytes());
        entries.extend(0x1000u64.to_le_bytes());
        entries.extend(16u64.to_le_bytes());
    }
    entries
}
