//! `/proc/<pid>/stat`.

use std::{fs, path::Path};

/// What is used of it. Source: proc_pid_stat(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    flags: u64,
    /// When the process started, in clock ticks since boot.
    pub(super) start_ticks: u64,
}

/// Source: include/linux/sched.h.
const PF_EXITING: u64 = 0x0000_0004;
const PF_KTHREAD: u64 = 0x0020_0000;

/// Fields, numbered as in proc_pid_stat(5).
const FLAGS: usize = 9;
const STARTTIME: usize = 22;

impl Stat {
    /// Reads the file in the directory of a process; `None` when that is gone.
    pub(super) fn read(directory: &Path) -> Option<Self> {
        Self::parse(&fs::read(directory.join("stat")).ok()?)
    }

    fn parse(stat: &[u8]) -> Option<Self> {
        let number = |field| field_of(stat, field)?.parse().ok();
        Some(Self { flags: number(FLAGS)?, start_ticks: number(STARTTIME)? })
    }

    /// The main thread has no memory and, to v1, no cgroup any more; others may go on.
    pub(super) fn is_exiting(self) -> bool {
        self.flags & PF_EXITING != 0
    }

    /// It runs in the kernel only.
    pub(super) fn is_kernel_thread(self) -> bool {
        self.flags & PF_KTHREAD != 0
    }
}

/// A field behind the name, which may itself hold spaces, parentheses and bytes that are no text.
fn field_of(stat: &[u8], number: usize) -> Option<&str> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let behind_name = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    behind_name.split_ascii_whitespace().nth(number.checked_sub(3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_a_name_with_parentheses() {
        let stat = b"7 (a) b (c\xff)) S 1 7 7 0 -1 4194564 0 0 0 0 1 2 0 0 20 0 1 0 4242 0";
        let stat = Stat::parse(stat).expect("all fields are there");
        assert_eq!(stat, Stat { flags: 4_194_564, start_ticks: 4242 });
        assert!(stat.is_exiting() && !stat.is_kernel_thread());
        assert_eq!(Stat::parse(b""), None);
        assert_eq!(Stat::parse(b"7 (a) S 1"), None);
    }

    #[test]
    fn kernel_threads_are_told_apart() {
        let is_kernel_thread = |pid| Stat::read(&Path::new("/proc").join(pid)).map(Stat::is_kernel_thread);
        assert_eq!(is_kernel_thread("2"), Some(true), "kthreadd");
        assert_eq!(is_kernel_thread("self"), Some(false));
        assert_eq!(is_kernel_thread("0"), None);
    }
}
