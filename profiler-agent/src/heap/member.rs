//! Which processes belong together: a family, a cgroup.

use std::{fs, path::Path};

/// Parents that are looked at.
const GENERATIONS_MAX: usize = 256;

/// Whether a process is `ancestor`, or was started by it, by what it started, and so on. One whose parent has ended is not
/// found: it was given another. Of a recorded family the kernel side knows it (`HeapProgram::is_of_family`).
pub(super) fn is_of_family(proc_root: &Path, pid: u32, ancestor: u32) -> bool {
    let parents = std::iter::successors(Some(pid), |&pid| parent(proc_root, pid));
    parents.take(GENERATIONS_MAX).any(|pid| pid == ancestor)
}

/// Whether a process is in a cgroup of the v2 hierarchy, or in one below it.
pub(super) fn is_in_cgroup(proc_root: &Path, pid: u32, cgroup: &str) -> bool {
    let text = fs::read_to_string(proc_root.join(format!("{pid}/cgroup"))).unwrap_or_default();
    let own = text.lines().find_map(|line| line.strip_prefix("0::"));
    own.and_then(|own| own.strip_prefix(cgroup.trim_end_matches('/')))
        .is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// Source: proc_pid_stat(5): field 4, the second behind the name.
fn parent(proc_root: &Path, pid: u32) -> Option<u32> {
    let stat = fs::read(proc_root.join(format!("{pid}/stat"))).ok()?;
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let behind = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let parent = behind.split_ascii_whitespace().nth(1)?.parse().ok()?;
    (parent != 0).then_some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(root: &Path, pid: u32, parent: u32, cgroup: &str) {
        let directory = root.join(pid.to_string());
        fs::create_dir(&directory).expect("a directory");
        fs::write(directory.join("stat"), format!("{pid} (a) S) S {parent} 1 1")).expect("a file");
        fs::write(directory.join("cgroup"), format!("1:cpu:/x\n0::{cgroup}\n")).expect("a file");
    }

    #[test]
    fn a_family_is_a_process_with_all_that_it_started() {
        let root = tempfile::tempdir().expect("a directory");
        for (pid, parent) in [(1, 0), (10, 1), (20, 10), (30, 20), (40, 1)] {
            process(root.path(), pid, parent, "/");
        }
        let family = |pid| is_of_family(root.path(), pid, 10);
        assert_eq!([10, 20, 30, 1, 40, 99].map(family), [true, true, true, false, false, false]);
    }

    #[test]
    fn a_cgroup_holds_those_below_it() {
        let root = tempfile::tempdir().expect("a directory");
        for (pid, cgroup) in [(1, "/a.slice"), (2, "/a.slice/b"), (3, "/a.slice2"), (4, "/")] {
            process(root.path(), pid, 1, cgroup);
        }
        let is_in = |pid| is_in_cgroup(root.path(), pid, "/a.slice");
        assert_eq!([1, 2, 3, 4, 9].map(is_in), [true, true, false, false, false]);
        assert!(is_in_cgroup(root.path(), 4, "/"));
    }
}
