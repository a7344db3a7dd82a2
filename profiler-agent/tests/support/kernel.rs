//! What tests need to know of the kernel they run on.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::fs;

/// Its version, the first two numbers.
pub fn version() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok()).expect("a number");
    (next(), next())
}

/// Locked memory that is enough for an agent without CAP_SYS_RESOURCE, as prlimit takes it: what services begin with, and
/// before Linux 5.11, where maps count, as much as there is.
pub fn locked_memory() -> &'static str {
    if version() >= (5, 11) { "--memlock=8388608:8388608" } else { "--memlock=unlimited:unlimited" }
}
