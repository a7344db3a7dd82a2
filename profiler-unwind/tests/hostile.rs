//! A file with ten million function entries: bounded memory, and one error. In a program of its own, whose peak of memory
//! is the test's.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "small_files/elf_file.rs"]
mod elf_file;

use std::fs;

use elf_file::{ElfFile, Frames};
use profiler_unwind::{UnwindError, from_elf, limits};

/// Function entries of the file, five times what is ever taken.
const FDES: u64 = 10_000_000;

/// Bytes of a function: no padding is left between two.
const FUNCTION_BYTES: u64 = 16;

/// What a file may cost of memory at most: a function's bounds and rows in 24 bytes for as many as are taken, twice while
/// the list of them grows, and a tenth for the rest.
const BYTES_MAX: u64 = limits::FDES_MAX as u64 * 24 * 2 * 11 / 10;

#[test]
fn ten_million_entries_cost_bounded_memory_and_one_error() {
    let file = file();
    // Source: proc_pid_clear_refs(5): the peak begins anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak_bytes();
    let error = from_elf(&file).unwrap_err();
    let cost = peak_bytes() - before;
    assert!(matches!(error, UnwindError::TooManyFdes { .. }), "{error:?}");
    assert!(cost < BYTES_MAX, "{cost} bytes, more than {BYTES_MAX}");
}

/// All of its functions are alive, and each has a row that its neighbors do not.
fn file() -> Vec<u8> {
    let mut frames = Frames::eh().cie("", 16, &[0x0c, 7, 8, 0x90, 1]).finish();
    frames.truncate(frames.len() - 4);
    let code = 0x1000..0x1000 + FDES * FUNCTION_BYTES;
    for start in code.clone().step_by(FUNCTION_BYTES as usize) {
        let cie = frames.len() as u32 + 4;
        frames.extend(24u32.to_le_bytes());
        frames.extend(cie.to_le_bytes());
        frames.extend(start.to_le_bytes());
        frames.extend(FUNCTION_BYTES.to_le_bytes());
        // DW_CFA_def_cfa_offset.
        frames.extend([0x0e, 8 + (start / FUNCTION_BYTES % 8) as u8 * 8, 0, 0]);
    }
    frames.extend([0; 4]);
    ElfFile { code, eh_frame: frames, ..ElfFile::default() }.bytes()
}

/// The most that was resident since the peak was begun.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}
