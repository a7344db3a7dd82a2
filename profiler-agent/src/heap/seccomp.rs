//! Whether a process is under a seccomp filter.

use std::{fs, path::Path};

/// Threads looked at: filters are taken up by all threads of a process, as a rule.
const THREADS_MAX: usize = 1024;

/// Whether any thread of the process below this directory of `/proc` is.
pub(super) fn is_filtered(directory: &Path) -> bool {
    let threads = fs::read_dir(directory.join("task")).into_iter().flatten().flatten().take(THREADS_MAX);
    let status = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("status")).ok();
    threads.filter_map(status).any(|status| says_filtered(&status))
}

/// Source: proc_pid_status(5): `Seccomp:` 0 off, 1 strict, 2 filter.
fn says_filtered(status: &str) -> bool {
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read_from_the_status() {
        assert!(!says_filtered("Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n"));
        assert!(says_filtered("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(says_filtered("Seccomp:\t1\n"));
        assert!(!says_filtered("Name:\tx\n"), "a kernel without it");
    }

    #[test]
    fn one_thread_is_enough() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for (thread, mode) in [("7", 0), ("8", 2)] {
            let directory = root.path().join("task").join(thread);
            fs::create_dir_all(&directory).expect("create");
            assert!(!is_filtered(root.path()));
            fs::write(directory.join("status"), format!("Seccomp:\t{mode}\n")).expect("write");
        }
        assert!(is_filtered(root.path()));
    }
}
