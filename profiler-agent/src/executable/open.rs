//! Opening what another process has mapped, without trusting its paths.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::ExecutableError;
use crate::addr::Addr;

/// A file mapping of a process, as `/proc/<pid>/maps` states it.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile<'a> {
    pub(crate) pid: u32,
    pub(crate) range: Range<Addr>,
    /// Of the file system, major and minor. Some give others to `stat` (btrfs).
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    /// As the process names it, unescaped and without ` (deleted)`.
    pub(crate) path: &'a Path,
}

/// A handle of a regular file that cannot be read yet.
pub(super) struct Found {
    handle: OwnedFd,
    pub(super) stat: rustix::fs::Stat,
}

impl MappedFile<'_> {
    /// Finds the file without opening it for reading, and only a regular one: a device may act on being opened, and a
    /// pipe would block.
    ///
    /// First the mapping itself, which is right even when the file is deleted, replaced or in another mount
    /// namespace (CAP_SYS_ADMIN, or CAP_CHECKPOINT_RESTORE from Linux 5.9); else the path inside the root of the
    /// process, taken only if it still is the mapped inode.
    ///
    /// Source: proc_pid_map_files(5), openat2(2) RESOLVE_IN_ROOT.
    pub(super) fn find(&self, proc_root: &Path) -> Result<Found, ExecutableError> {
        match self.open_mapping(proc_root) {
            Ok(handle) => self.found(handle, None),
            Err(denied) if denied.kind() == io::ErrorKind::PermissionDenied => {
                let handle = self.open_in_root(proc_root).map_err(|source| self.open_error(source))?;
                self.found(handle, Some(self.inode))
            }
            Err(source) => Err(self.open_error(source)),
        }
    }

    /// Opens what was found for reading.
    pub(super) fn open(&self, found: &Found) -> Result<File, ExecutableError> {
        reopen(&found.handle).map_err(|source| self.open_error(source))
    }

    fn process_dir(&self, proc_root: &Path) -> PathBuf {
        proc_root.join(self.pid.to_string())
    }

    fn open_mapping(&self, proc_root: &Path) -> io::Result<OwnedFd> {
        let Range { start, end } = &self.range;
        let link = self.process_dir(proc_root).join(format!("map_files/{:x}-{:x}", start.0, end.0));
        Ok(rustix::fs::open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn open_in_root(&self, proc_root: &Path) -> io::Result<OwnedFd> {
        path_in_root(&self.process_dir(proc_root).join("root"), self.path)
    }

    /// What a path handle leads to, once it is known to be a regular file.
    fn found(&self, handle: OwnedFd, expected_inode: Option<u64>) -> Result<Found, ExecutableError> {
        let stat = regular(&handle).map_err(|source| self.open_error(source))?;
        let Some(stat) = stat else {
            return Err(ExecutableError::NotRegular { pid: self.pid, path: self.path.into() });
        };
        if let Some(mapped) = expected_inode.filter(|&mapped| mapped != stat.st_ino) {
            let (pid, path) = (self.pid, self.path.into());
            return Err(ExecutableError::Replaced { pid, path, mapped, found: stat.st_ino });
        }
        Ok(Found { handle, stat })
    }

    fn open_error(&self, source: io::Error) -> ExecutableError {
        ExecutableError::Open { pid: self.pid, path: self.path.into(), source }
    }
}

/// Opens a regular file by its path below `root`, which symbolic links, `..` and mounts of `/proc` do not lead out of;
/// `None` when the path names anything else: a device may act on being opened, and a pipe would block.
///
/// Source: openat2(2), RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS.
pub(crate) fn open_in_root(root: &Path, path: &Path) -> io::Result<Option<(File, rustix::fs::Stat)>> {
    let handle = path_in_root(root, path)?;
    regular(&handle)?.map(|stat| Ok((reopen(&handle)?, stat))).transpose()
}

fn path_in_root(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// What a path handle leads to; `None` when it is no regular file.
fn regular(handle: &OwnedFd) -> io::Result<Option<rustix::fs::Stat>> {
    let stat = rustix::fs::fstat(handle)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file().then_some(stat))
}

/// The readable file behind a path handle.
fn reopen(handle: &OwnedFd) -> io::Result<File> {
    // The link of our own descriptor leads to exactly the file that was looked at.
    let link = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(link, flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    /// A `/proc` whose process 7 has its root at `<proc>/7/root`, and whose map_files may not be followed.
    fn proc_without_map_files() -> tempfile::TempDir {
        let proc_root = tempfile::tempdir().unwrap();
        let root = proc_root.path().join("7/root");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::write(root.join("bin/program"), "content").unwrap();
        proc_root
    }

    fn open_in_root(proc_root: &Path, path: &str, inode: u64) -> Result<File, ExecutableError> {
        let (range, device, path) = (Addr(0)..Addr(1), (0, 0), Path::new(path));
        let mapped = MappedFile { pid: 7, range, device, inode, path };
        let handle = mapped.open_in_root(proc_root).map_err(|source| mapped.open_error(source))?;
        mapped.open(&mapped.found(handle, Some(inode))?)
    }

    #[test]
    fn links_of_a_process_stay_inside_its_root() {
        let proc_root = proc_without_map_files();
        let root = proc_root.path().join("7/root");
        symlink("/bin/program", root.join("absolute")).unwrap();
        symlink("../../../../../bin/program", root.join("climbing")).unwrap();
        let inode = std::fs::metadata(root.join("bin/program")).unwrap().ino();

        for path in ["/bin/program", "/absolute", "/climbing", "/../../bin/program"] {
            let file = open_in_root(proc_root.path(), path, inode).unwrap();
            assert_eq!(file.metadata().unwrap().ino(), inode, "{path}");
        }
        let outside = open_in_root(proc_root.path(), "/etc/passwd", inode).unwrap_err();
        assert!(matches!(outside, ExecutableError::Open { .. }), "{outside}");
    }

    #[test]
    fn a_replaced_file_is_refused() {
        let proc_root = proc_without_map_files();
        let error = open_in_root(proc_root.path(), "/bin/program", 1).unwrap_err();
        assert!(matches!(error, ExecutableError::Replaced { mapped: 1, .. }), "{error}");
    }

    #[test]
    fn directories_pipes_and_devices_are_refused_without_being_opened() {
        let proc_root = proc_without_map_files();
        let root = proc_root.path().join("7/root");
        let fifo = root.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        for name in ["fifo", "bin"] {
            let inode = std::fs::metadata(root.join(name)).unwrap().ino();
            let error = open_in_root(proc_root.path(), name, inode).unwrap_err();
            assert!(matches!(error, ExecutableError::NotRegular { .. }), "{name}: {error}");
        }
    }
}
