//! One agent per node: the lock, and the switch that detaches it.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::config::Config;

/// Bytes read of a lock file, which holds a pid.
const PID_BYTES_MAX: u64 = 32;

/// Why there is no lock to take.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("create {path} (choose with --run-dir)")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("lock {path} (choose with --run-dir)")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The lock of this node's agent, or of one of its instances. Held until it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// What became of a try.
#[derive(Debug)]
pub(crate) enum Try {
    /// It is ours.
    Taken(Lock),
    /// Another agent has it: its pid, when that can be read.
    Held(Option<u32>),
}

impl Lock {
    /// Takes the lock if nobody has it. The file is only ever locked, never removed, so that all lock the same one.
    pub(crate) fn try_take(run_dir: &Path, instance: Option<&str>) -> Result<Try, LockError> {
        let create = fs::DirBuilder::new().recursive(true).mode(0o755).create(run_dir);
        create.map_err(|source| LockError::Directory { path: run_dir.to_owned(), source })?;
        let path = run_dir.join(lock_name(instance));
        let failed = |source| LockError::File { path: path.clone(), source };
        let mut options = OpenOptions::new();
        // The directory may be writable by others: no link out of it is followed, no FIFO is waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        options.read(true).write(true).create(true).truncate(false).mode(0o644).custom_flags(flags);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {
                write_pid(&mut file).map_err(failed)?;
                Ok(Try::Taken(Self { _file: file }))
            }
            Err(TryLockError::WouldBlock) => Ok(Try::Held(read_pid(&file))),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

fn lock_name(instance: Option<&str>) -> String {
    instance.map_or_else(|| "agent.lock".to_owned(), |name| format!("agent-{name}.lock"))
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(PID_BYTES_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Why nothing is to be attached to the kernel, if so: `enabled = false`, or the file `off` in the run directory.
pub(crate) fn pause_reason(config: &Config) -> Option<String> {
    if !config.enabled {
        return Some("enabled = false".to_owned());
    }
    let off = config.run_dir.join("off");
    // A link that leads nowhere is there as well.
    fs::symlink_metadata(&off).is_ok().then(|| format!("{} exists", off.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn take(run_dir: &Path, instance: Option<&str>) -> Option<Lock> {
        match Lock::try_take(run_dir, instance).expect("a directory of the test's own") {
            Try::Taken(lock) => Some(lock),
            Try::Held(pid) => {
                assert_eq!(pid, Some(std::process::id()));
                None
            }
        }
    }

    #[test]
    fn a_second_agent_gets_the_lock_when_the_first_one_ends() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let run_dir = directory.path().join("run/profiler");
        let first = take(&run_dir, None).expect("nobody has it");
        assert!(take(&run_dir, None).is_none());
        drop(first);
        assert!(take(&run_dir, None).is_some());
    }

    #[test]
    fn instances_have_locks_of_their_own() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let _node = take(directory.path(), None).expect("nobody has it");
        let _one = take(directory.path(), Some("one")).expect("nobody has it");
        assert!(take(directory.path(), Some("one")).is_none());
        assert!(take(directory.path(), Some("two")).is_some());
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let target = directory.path().join("precious");
        fs::write(&target, "kept").expect("write");
        std::os::unix::fs::symlink(&target, directory.path().join("agent.lock")).expect("link");
        Lock::try_take(directory.path(), None).expect_err("refused");
        assert_eq!(fs::read_to_string(&target).expect("read"), "kept");
    }
}
