//! Processes by pid and start time: what they map, and which series they belong to.

mod image;
pub(crate) mod maps;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub(crate) use image::{Backing, ImageReader, Mapping};
use profiler_common::unwind::mappings::NS_PER_TICK;

use crate::{
    addr::Addr,
    label::{Labeler, SeriesLabels, Subject, owner},
    unwind::TableRequests,
};

/// Processes remembered. A process takes about 2 KiB here.
const PROCESSES_MAX: usize = 16_384;
/// A process that was not sampled for this long is forgotten and read anew when it comes back.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Time between two readings of one process's mappings: an address outside of all of them may be a fresh `dlopen`, or
/// garbage at the end of a stack.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two requests for one process's unwind tables, while its samples come without.
const TABLES_INTERVAL: Duration = Duration::from_secs(5);

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    start_ns: u64,
    /// The labels that identify its profiles.
    pub(crate) series: SeriesLabels,
    /// Ascending and disjoint.
    mappings: Vec<Mapping>,
    mappings_read: Instant,
    tables_requested: Instant,
    last_sampled: Instant,
}

impl Process {
    /// The range that holds an address.
    pub(crate) fn mapping(&self, addr: Addr) -> Option<&Mapping> {
        let behind = self.mappings.partition_point(|mapping| mapping.start <= addr);
        self.mappings.get(behind.checked_sub(1)?).filter(|mapping| addr < mapping.end)
    }
}

/// The process table. Owned by the worker thread; reading `/proc` is its own doing, the drain does not wait for it.
pub(crate) struct Processes {
    by_pid: HashMap<u32, Process>,
    images: ImageReader,
    labeler: Labeler,
    /// `None` where frame pointers are to be used.
    tables: Option<TableRequests>,
    gone: u64,
}

impl Processes {
    /// An empty table.
    pub(crate) fn new(images: ImageReader, labeler: Labeler, tables: Option<TableRequests>) -> Self {
        Self { by_pid: HashMap::new(), images, labeler, tables, gone: 0 }
    }

    /// The process that a sample was taken of, read now when it is new.
    ///
    /// `start_ns` tells a process from an earlier one of the same pid; 0 is "unknown" and equals any.
    pub(crate) fn get(&mut self, pid: u32, start_ns: u64, comm: &str) -> &Process {
        let now = Instant::now();
        let known = self.by_pid.get(&pid).is_some_and(|known| known.start_ns == start_ns);
        if !known {
            self.make_room();
            let process = self.read(pid, start_ns, comm, now);
            self.by_pid.insert(pid, process);
            self.request_tables(pid);
        }
        let process = self.by_pid.get_mut(&pid).expect("it was there or has just been inserted");
        process.last_sampled = now;
        process
    }

    /// Reads the mappings again, after an address was found in none of them. Gives the process when that was due.
    pub(crate) fn reread(&mut self, pid: u32) -> Option<&Process> {
        let due = self.by_pid.get(&pid)?.mappings_read.elapsed() >= REREAD_INTERVAL;
        if !due {
            return None;
        }
        self.request_tables(pid);
        let mappings = self.images.mappings(pid);
        let process = self.by_pid.get_mut(&pid)?;
        if !mappings.is_empty() {
            process.mappings = mappings;
        }
        process.mappings_read = Instant::now();
        Some(process)
    }

    /// The process has a new image.
    pub(crate) fn exec(&mut self, pid: u32) {
        // Others get theirs with their first sample: most programs end before.
        if self.by_pid.remove(&pid).is_some() {
            self.request_tables(pid);
        }
    }

    /// A sample of the process lacked tables: asks for them, unless that was done of late.
    pub(crate) fn lacks_tables(&mut self, pid: u32) {
        let Some(process) = self.by_pid.get_mut(&pid) else { return };
        if process.tables_requested.elapsed() >= TABLES_INTERVAL {
            process.tables_requested = Instant::now();
            self.request_tables(pid);
        }
    }

    fn request_tables(&self, pid: u32) {
        if let Some(tables) = &self.tables {
            tables.request(pid);
        }
    }

    /// Forgets processes that were not sampled for a while.
    pub(crate) fn forget_idle(&mut self) {
        self.by_pid.retain(|_, process| process.last_sampled.elapsed() < IDLE_MAX);
    }

    /// Processes known now.
    pub(crate) fn len(&self) -> usize {
        self.by_pid.len()
    }

    /// Processes that were gone before they could be read.
    pub(crate) fn gone(&self) -> u64 {
        self.gone
    }

    /// Mappings whose file could not be opened or is no usable ELF file.
    pub(crate) fn unusable_files(&self) -> u64 {
        self.images.unusable_files()
    }

    /// Executables open now.
    pub(crate) fn executables(&self) -> usize {
        self.images.executables()
    }

    /// Containers among the known processes.
    pub(crate) fn containers(&self) -> usize {
        let ids: std::collections::HashSet<_> =
            self.by_pid.values().filter_map(|process| process.series.get("container_id")).collect();
        ids.len()
    }

    fn make_room(&mut self) {
        if self.by_pid.len() < PROCESSES_MAX {
            return;
        }
        let longest_idle =
            self.by_pid.iter().min_by_key(|(_, process)| process.last_sampled).map(|(&pid, _)| pid);
        if let Some(pid) = longest_idle {
            self.by_pid.remove(&pid);
        }
    }

    fn read(&mut self, pid: u32, start_ns: u64, comm: &str, now: Instant) -> Process {
        let directory = self.directory(pid);
        let alive = is_same_process(self.images.start_ticks(pid), start_ns);
        let (series, mappings) = if alive {
            (self.read_labels(&directory, comm), self.images.mappings(pid))
        } else {
            self.gone += 1;
            let is_kernel_thread = false;
            (self.labeler.series(&Subject { comm, is_kernel_thread, ..Subject::default() }), Vec::new())
        };
        Process { start_ns, series, mappings, mappings_read: now, tables_requested: now, last_sampled: now }
    }

    fn directory(&self, pid: u32) -> PathBuf {
        self.images.directory(pid)
    }

    fn read_labels(&self, directory: &Path, comm: &str) -> SeriesLabels {
        let exe = fs::read_link(directory.join("exe")).unwrap_or_default();
        let cgroup = fs::read_to_string(directory.join("cgroup")).unwrap_or_default();
        let is_kernel_thread = exe.as_os_str().is_empty() && is_kernel_thread(directory);
        let exe = exe.to_string_lossy();
        self.labeler.series(&Subject { exe: &exe, is_kernel_thread, comm, owner: owner(&cgroup) })
    }
}

/// Whether the process that has the pid now, if any, is the one that was sampled.
fn is_same_process(start_ticks: Option<u64>, start_ns: u64) -> bool {
    start_ticks.is_some_and(|ticks| start_ns == 0 || ticks == start_ns / NS_PER_TICK)
}

/// Whether a task without an executable is a kernel thread rather than one that is exiting. Source: proc_pid_stat(5),
/// flags; include/linux/sched.h: PF_KTHREAD.
fn is_kernel_thread(directory: &Path) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let stat = fs::read_to_string(directory.join("stat")).unwrap_or_default();
    stat_field(&stat, STAT_FLAGS)
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// Fields of `/proc/<pid>/stat`, numbered as in proc_pid_stat(5).
const STAT_FLAGS: usize = 9;
const STAT_STARTTIME: usize = 22;

/// A field behind the name, which may itself hold spaces and parentheses.
fn stat_field(stat: &str, number: usize) -> Option<&str> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_ascii_whitespace().nth(number.checked_sub(3)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::executable::ExecutableCache;

    fn processes() -> Processes {
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(64)));
        Processes::new(images, Labeler::new("n", &[]), None)
    }

    #[test]
    fn this_process_is_known_by_its_executable_and_maps_its_own_code() {
        let mut processes = processes();
        let here = this_process_is_known_by_its_executable_and_maps_its_own_code as fn() as usize as u64;
        let process = processes.get(std::process::id(), 0, "ignored");
        let exe = std::env::current_exe().expect("a test has a file");
        assert_eq!(process.series.get("exe"), exe.file_name().and_then(|name| name.to_str()));
        let mapping = process.mapping(Addr(here)).expect("own code is mapped");
        assert!(
            matches!(&mapping.backing, Backing::Executable(found) if exe.ends_with(&*found.name())),
            "{mapping:?}"
        );
        assert!(process.mapping(Addr(1)).is_none());
    }

    #[test]
    fn a_process_that_is_gone_keeps_its_name_and_is_counted() {
        let mut processes = processes();
        let process = processes.get(u32::MAX - 1, 5, "short");
        assert_eq!(process.series.get("exe"), Some("short"));
        assert_eq!(processes.gone(), 1);
    }

    #[test]
    fn another_start_time_is_another_process() {
        let mut processes = processes();
        let pid = std::process::id();
        processes.get(pid, 0, "a");
        assert_eq!(processes.gone(), 0);
        processes.get(pid, 1, "earlier process of this pid");
        assert_eq!(processes.gone(), 1, "the pid now belongs to another process");
        assert_eq!(processes.len(), 1);
    }

    #[test]
    fn fields_are_found_behind_a_name_with_parentheses() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 0 0 0 0 1 2 0 0 20 0 1 0 4242 0";
        assert_eq!(stat_field(stat, STAT_FLAGS), Some("4194560"));
        assert_eq!(stat_field(stat, STAT_STARTTIME), Some("4242"));
        assert_eq!(stat_field("", STAT_FLAGS), None);
    }

    #[test]
    fn kernel_threads_are_told_apart() {
        assert!(is_kernel_thread(Path::new("/proc/2")), "kthreadd");
        assert!(!is_kernel_thread(Path::new("/proc/self")));
    }
}
