//! Code that a process has generated, and the file in which it may say what it has generated.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use profiler_common::unwind::mappings::NS_PER_TICK;

use super::stat::Stat;
use crate::{
    executable::open_in_root,
    languages::{self, Language},
    sys::clock::WallClock,
};

/// What a perf map may be older than the process that writes it: clocks of file systems tick in 4 ms, and somebody may
/// have corrected the wall clock.
const OLDER_MAX_NS: u64 = 2_000_000_000;

/// The generated code of one process: whose it is, without a hold on anything of it.
#[derive(Debug)]
pub(crate) struct GeneratedCode {
    id: u32,
    pid: u32,
    /// Start of the process on the boot clock; 0 when unknown.
    start_ns: u64,
    /// What it is written in, where that is known by its executable.
    language: Option<&'static Language>,
    /// The code as far as it is known: another number each time more of it is. Never used by two processes.
    version: AtomicU32,
}

impl GeneratedCode {
    /// Of a process that started at a time on the boot clock and runs an executable of this name.
    pub(crate) fn new(pid: u32, start_ns: u64, exe: &str) -> Self {
        let id = next_version();
        Self { id, pid, start_ns, language: languages::of_executable(exe), version: AtomicU32::new(id) }
    }

    /// Number of the process's code within one run of the agent.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The language whose code that is, where it is known.
    pub(crate) fn language(&self) -> Option<&'static Language> {
        self.language
    }

    /// The name of a frame in it that nothing names.
    pub(crate) fn unnamed(&self) -> &'static str {
        self.language.map_or("[jit]", |language| language.unnamed)
    }

    /// What is known of the code now: equal addresses of one version are the same function.
    pub(crate) fn version(&self) -> u32 {
        self.version.load(Relaxed)
    }

    /// More of the code is known, or other code took its place.
    pub(crate) fn take_new_version(&self) {
        self.version.store(next_version(), Relaxed);
    }

    /// Opens what the process calls `/tmp/perf-<its pid>.map`: inside its own root and pid namespace, a regular file of
    /// its own user or of root, written since it started.
    ///
    /// Source: linux: tools/perf/Documentation/jit-interface.txt.
    pub(crate) fn open_perf_map(&self, proc_root: &Path) -> Result<File, PerfMapError> {
        let directory = proc_root.join(self.pid.to_string());
        let owner = fs::metadata(&directory)?.uid();
        let path = PathBuf::from(format!("/tmp/perf-{}.map", own_pid(&directory)?));
        let (file, stat) = open_in_root(&directory.join("root"), &path)?.ok_or(PerfMapError::NotRegular)?;
        if stat.st_uid != owner && stat.st_uid != 0 {
            return Err(PerfMapError::Foreign);
        }
        let modified = file.metadata()?;
        let modified_ns =
            modified.mtime().saturating_mul(1_000_000_000).saturating_add(modified.mtime_nsec());
        let started_ns = WallClock::now().at(self.start_ns);
        if modified_ns.cast_unsigned().saturating_add(OLDER_MAX_NS) < started_ns && self.start_ns != 0 {
            return Err(PerfMapError::Stale);
        }
        // Last: what was opened by the pid was of this process if the pid is its own still.
        let started = Stat::read(&directory).map(|stat| stat.start_ticks);
        if self.start_ns != 0 && started != Some(self.start_ns / NS_PER_TICK) {
            return Err(PerfMapError::Open(io::ErrorKind::NotFound.into()));
        }
        Ok(file)
    }
}

/// Why a process has no perf map.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PerfMapError {
    /// There is none, the process is gone, or it may not be looked at.
    #[error("open the perf map")]
    Open(#[from] io::Error),
    #[error("the perf map is not a regular file")]
    NotRegular,
    #[error("the perf map belongs to another user")]
    Foreign,
    #[error("the perf map is of an earlier process")]
    Stale,
}

fn next_version() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Relaxed)
}

/// The pid by which the process knows itself. Source: proc_pid_status(5), NSpid.
fn own_pid(directory: &Path) -> io::Result<u32> {
    let status = fs::read(directory.join("status"))?;
    let line = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"NSpid:"));
    let innermost =
        line.and_then(|pids| std::str::from_utf8(pids).ok()?.split_ascii_whitespace().last()?.parse().ok());
    innermost.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    /// A `/proc` with process 70, which is 7 in its own pid namespace, and its root.
    fn proc_root() -> (tempfile::TempDir, PathBuf) {
        let proc_root = tempfile::tempdir().unwrap();
        let process = proc_root.path().join("70");
        let tmp = process.join("root/tmp");
        fs::create_dir_all(&tmp).unwrap();
        fs::write(process.join("status"), "Name:\tx\nNSpid:\t70\t7\nNSpgid:\t70\t7\n").unwrap();
        fs::write(proc_root.path().join("outside"), "1000 10 outside\n").unwrap();
        (proc_root, tmp.join("perf-7.map"))
    }

    #[track_caller]
    fn check(proc_root: &Path, is_expected: fn(&Result<File, PerfMapError>) -> bool) {
        let opened = GeneratedCode::new(70, 0, "node").open_perf_map(proc_root);
        assert!(is_expected(&opened), "{opened:?}");
    }

    #[test]
    fn a_map_is_found_in_the_root_of_the_process_by_its_own_pid() {
        let (proc_root, map) = proc_root();
        check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::Open(_))));
        fs::write(&map, "").unwrap();
        check(proc_root.path(), Result::is_ok);
    }

    #[test]
    fn a_pipe_is_refused_and_does_not_block() {
        let (proc_root, map) = proc_root();
        mknodat(CWD, &map, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::NotRegular)));
    }

    #[test]
    fn directories_and_devices_are_refused() {
        let (proc_root, map) = proc_root();
        fs::create_dir(&map).unwrap();
        check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::NotRegular)));
        fs::remove_dir(&map).unwrap();
        // Only root may make a device; /dev/null's numbers.
        if mknodat(CWD, &map, FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).is_ok() {
            check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::NotRegular)));
        }
    }

    #[test]
    fn links_that_lead_outside_find_nothing() {
        let (proc_root, map) = proc_root();
        for target in ["../../../outside", "/outside", proc_root.path().join("outside").to_str().unwrap()] {
            symlink(target, &map).unwrap();
            check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::Open(_))));
            fs::remove_file(&map).unwrap();
        }
        symlink("/tmp/other", &map).unwrap();
        fs::write(map.with_file_name("other"), "").unwrap();
        check(proc_root.path(), Result::is_ok);
    }

    #[test]
    fn a_map_from_before_the_process_is_stale() {
        let directory = tempfile::tempdir().unwrap();
        let process = directory.path().join("70");
        let map = process.join("root/tmp/perf-70.map");
        fs::create_dir_all(map.parent().unwrap()).unwrap();
        fs::write(process.join("status"), "NSpid:\t70\n").unwrap();
        let file = File::create(&map).unwrap();
        let start_ns = crate::sys::clock::boot_ns();
        let ticks = start_ns / NS_PER_TICK;
        let stat = format!("70 (x) S{} {ticks} 0", " 0".repeat(18));
        fs::write(process.join("stat"), stat).unwrap();
        let code = GeneratedCode::new(70, start_ns, "node");
        code.open_perf_map(directory.path()).expect("written after the process has started");

        let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        file.set_modified(hour_ago).unwrap();
        let opened = code.open_perf_map(directory.path());
        assert!(matches!(opened, Err(PerfMapError::Stale)), "{opened:?}");
    }

    #[test]
    fn a_map_of_another_user_is_refused() {
        let (proc_root, map) = proc_root();
        fs::write(&map, "").unwrap();
        // Only root can give files away; without that right there is no way to make such a file.
        if std::os::unix::fs::chown(&map, Some(4242), None).is_ok() {
            check(proc_root.path(), |opened| matches!(opened, Err(PerfMapError::Foreign)));
        }
    }
}
