//! What a process has mapped as code, as `/proc` tells it.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    ops::Range,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::debug;

use super::{
    maps::{MapsEntry, executable_ranges},
    stat::Stat,
};
use crate::{
    addr::{Addr, FileOffset},
    executable::{Executable, ExecutableCache, MappedFile},
    vdso,
};

/// Executable ranges of one process. JITs that split their code cache reach hundreds.
pub(super) const RANGES_MAX: usize = 4096;
/// Threads that are looked at for one that lives.
const THREADS_MAX: usize = 64;
/// Bytes of `/proc/<pid>/maps` that are read: 65,000 lines.
const MAPS_BYTES_MAX: u64 = 8 << 20;

/// What lies behind an executable range.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// An ELF file.
    Executable(Arc<Executable>),
    /// Memory without a file: generated code.
    Anonymous,
    /// Memory that the kernel names (`[vdso]`), or a file that could not be used, by its name.
    Unnamed(Arc<str>),
}

/// One executable range of a process.
#[derive(Clone, Debug)]
pub(crate) struct Mapping {
    pub(super) start: Addr,
    pub(super) end: Addr,
    pub(super) offset: FileOffset,
    pub(crate) backing: Backing,
}

impl Mapping {
    /// First address, and first address behind.
    pub(crate) fn range(&self) -> Range<Addr> {
        self.start..self.end
    }

    /// The byte of the file that lies at the first address.
    pub(crate) fn offset(&self) -> FileOffset {
        self.offset
    }

    /// The byte of the file that lies at an address of the range.
    pub(crate) fn file_offset(&self, addr: Addr) -> FileOffset {
        FileOffset(addr.0.wrapping_sub(self.start.0).wrapping_add(self.offset.0))
    }
}

/// What a reader has met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ImageCounts {
    /// Mappings whose file could not be opened or is no usable ELF file.
    pub(super) unusable_files: u64,
    /// Processes with more executable ranges than are kept.
    pub(super) ranges_cut: u64,
}

/// Reads the mappings of processes. Each thread that does has one; they share the executables.
pub(crate) struct ImageReader {
    proc_root: PathBuf,
    executables: Arc<ExecutableCache>,
    counts: ImageCounts,
}

/// Every process there is.
pub(crate) fn pids(proc_root: &Path) -> io::Result<Vec<u32>> {
    let entries = fs::read_dir(proc_root)?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

impl ImageReader {
    /// Reads processes below `proc_root`.
    pub(crate) fn new(proc_root: PathBuf, executables: Arc<ExecutableCache>) -> Self {
        Self { proc_root, executables, counts: ImageCounts::default() }
    }

    /// What was met so far.
    pub(super) fn counts(&self) -> ImageCounts {
        self.counts
    }

    /// Executables open now.
    pub(crate) fn executables(&self) -> usize {
        self.executables.len()
    }

    /// The one executable that copies of it are, which reads them: for threads that are not on the way of samples.
    pub(crate) fn settled(&self, executable: &Arc<Executable>) -> Arc<Executable> {
        self.executables.settle_copies(executable)
    }

    /// The process's directory below `/proc`.
    pub(crate) fn directory(&self, pid: u32) -> PathBuf {
        self.proc_root.join(pid.to_string())
    }

    /// Every process there is.
    pub(crate) fn pids(&self) -> Vec<u32> {
        pids(&self.proc_root).unwrap_or_default()
    }

    /// When the process with this pid started, in clock ticks since boot; `None` when there is none.
    pub(crate) fn start_ticks(&self, pid: u32) -> Option<u64> {
        self.stat(pid).map(|stat| stat.start_ticks)
    }

    /// The state of the process with this pid; `None` when there is none.
    pub(super) fn stat(&self, pid: u32) -> Option<Stat> {
        Stat::read(&self.directory(pid))
    }

    /// The executable ranges, ascending; none for a kernel thread or a process that is gone.
    pub(crate) fn mappings(&mut self, pid: u32) -> Vec<Mapping> {
        let mut maps = self.read_maps(pid);
        let mut pid = pid;
        if maps.is_empty()
            && let Some(thread) = self.living_thread(pid)
        {
            (maps, pid) = (self.read_maps(thread), thread);
        }
        let mut ranges = executable_ranges(&maps);
        let mappings = ranges.by_ref().take(RANGES_MAX).map(|entry| self.mapping(pid, &entry)).collect();
        self.counts.ranges_cut += u64::from(ranges.next().is_some());
        mappings
    }

    fn read_maps(&self, pid: u32) -> Vec<u8> {
        let mut maps = Vec::new();
        if let Ok(file) = fs::File::open(self.directory(pid).join("maps")) {
            // A process that exits while it is read gives what came before.
            let _ = file.take(MAPS_BYTES_MAX).read_to_end(&mut maps);
        }
        maps
    }

    /// Path of the executable, as the process sees it; `None` for a kernel thread or a process that is gone.
    pub(super) fn exe(&self, pid: u32) -> Option<PathBuf> {
        let exe = |pid| fs::read_link(self.directory(pid).join("exe")).ok();
        exe(pid).or_else(|| exe(self.living_thread(pid)?))
    }

    /// A thread of a process whose main thread has exited before the others: that one has no memory any more, and
    /// `/proc/<thread>` shows what `/proc/<pid>` did. Source: proc_pid_task(5).
    pub(super) fn living_thread(&self, pid: u32) -> Option<u32> {
        let threads = fs::read_dir(self.directory(pid).join("task")).ok()?;
        let others = threads
            .take(THREADS_MAX)
            .filter_map(|thread| thread.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&thread| thread != pid);
        others.into_iter().find(|&thread| fs::read_link(self.directory(thread).join("exe")).is_ok())
    }

    /// The range of an entry, with what lies behind it.
    pub(super) fn mapping(&mut self, pid: u32, entry: &MapsEntry<'_>) -> Mapping {
        let &MapsEntry { start, end, offset, .. } = entry;
        Mapping { start, end, offset, backing: self.backing(pid, entry) }
    }

    fn backing(&mut self, pid: u32, entry: &MapsEntry<'_>) -> Backing {
        let &MapsEntry { start, end, offset: _, device, inode, path } = entry;
        if inode == 0 {
            // `[anon:NAME]` is what a process calls its own memory: prctl(2), PR_SET_VMA_ANON_NAME.
            let is_anonymous = path.is_empty() || path.starts_with(b"[anon");
            let is_of_32_bits = path == vdso::NAME.as_bytes() && u32::try_from(start.0).is_ok();
            return if is_anonymous {
                Backing::Anonymous
            } else if is_of_32_bits {
                Backing::Unnamed(vdso::NAME_32.into())
            } else {
                Backing::Unnamed(String::from_utf8_lossy(path).into())
            };
        }
        let path = Path::new(OsStr::from_bytes(path.strip_suffix(b" (deleted)").unwrap_or(path)));
        let mapped = MappedFile { pid, range: start..end, device, inode, path };
        match self.executables.open(&self.proc_root, &mapped) {
            Ok(executable) => Backing::Executable(executable),
            Err(error) => {
                self.counts.unusable_files += 1;
                debug!(error = &error as &dyn std::error::Error, pid, "frames of this file stay addresses");
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                Backing::Unnamed(name.into())
            }
        }
    }
}
