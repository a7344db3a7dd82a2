//! Processes by pid and start time: what they map, and which series they belong to.

mod image;
pub(crate) mod maps;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use image::ImageCounts;
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
/// garbage at the end of a stack. Also between two tries at a process that could not be read.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);
/// Labels are read again after this long: a process may be moved to another cgroup.
const LABELS_INTERVAL: Duration = Duration::from_secs(10);
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
    /// It could be looked at; else its labels are made from its name.
    is_read: bool,
    cgroup_id: u64,
    mappings_read: Instant,
    labels_read: Instant,
    tables_requested: Instant,
    last_sampled: Instant,
}

/// What is known of the process that a sample was taken of.
enum Known {
    No,
    Yes,
    OldLabels,
}

impl Process {
    fn known(&self, sampled: Sampled<'_>, now: Instant) -> Known {
        let try_again = !self.is_read && now - self.labels_read >= REREAD_INTERVAL;
        if self.start_ns != sampled.start_ns || try_again {
            return Known::No;
        }
        let moved = self.cgroup_id != sampled.cgroup_id;
        if self.is_read && (moved || now - self.labels_read >= LABELS_INTERVAL) {
            return Known::OldLabels;
        }
        Known::Yes
    }

    /// The range that holds an address.
    pub(crate) fn mapping(&self, addr: Addr) -> Option<&Mapping> {
        let behind = self.mappings.partition_point(|mapping| mapping.start <= addr);
        self.mappings.get(behind.checked_sub(1)?).filter(|mapping| addr < mapping.end)
    }
}

/// Whose sample it is, as the kernel side says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampled<'a> {
    /// Process id in the initial pid namespace.
    pub(crate) pid: u32,
    /// Start on the boot clock, in nanoseconds: tells a process from an earlier one of the same pid. 0 is "unknown".
    pub(crate) start_ns: u64,
    /// Id of the task's cgroup in the v2 hierarchy.
    pub(crate) cgroup_id: u64,
    /// Name of the process.
    pub(crate) comm: &'a str,
}

/// What the table has met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessCounts {
    /// Processes that were gone before they could be read.
    pub(crate) gone: u64,
    /// Mappings whose file could not be opened or is no usable ELF file.
    pub(crate) unusable_files: u64,
    /// Processes with more executable ranges than are kept.
    pub(crate) ranges_cut: u64,
    /// Processes forgotten to make room.
    pub(crate) evicted: u64,
}

/// The process table. Owned by the worker thread; reading `/proc` is its own doing, the drain does not wait for it.
pub(crate) struct Processes {
    by_pid: HashMap<u32, Process>,
    images: ImageReader,
    labeler: Labeler,
    /// `None` where frame pointers are to be used.
    tables: Option<TableRequests>,
    counts: ProcessCounts,
}

impl Processes {
    /// An empty table.
    pub(crate) fn new(images: ImageReader, labeler: Labeler, tables: Option<TableRequests>) -> Self {
        Self { by_pid: HashMap::new(), images, labeler, tables, counts: ProcessCounts::default() }
    }

    /// The process that a sample was taken of, read now when it is new, or when what is known of it may be old.
    pub(crate) fn get(&mut self, sampled: Sampled<'_>) -> &Process {
        let now = Instant::now();
        let state = self.by_pid.get(&sampled.pid).map_or(Known::No, |process| process.known(sampled, now));
        match state {
            Known::Yes => {}
            Known::No => {
                self.make_room();
                let process = self.read(sampled, now);
                self.by_pid.insert(sampled.pid, process);
                self.request_tables(sampled.pid);
            }
            Known::OldLabels => self.read_labels_again(sampled, now),
        }
        let process = self.by_pid.get_mut(&sampled.pid).expect("it was there or has just been inserted");
        process.last_sampled = now;
        process
    }

    /// The process of a sample that was taken before the exec that made its image what `/proc` shows by now. Unless it
    /// was known before, all that is known is its name.
    pub(crate) fn get_before_exec(&mut self, sampled: Sampled<'_>) -> &Process {
        let known = self.by_pid.get(&sampled.pid).is_some_and(|process| process.start_ns == sampled.start_ns);
        if !known {
            let process = self.unread(sampled, Instant::now());
            self.by_pid.insert(sampled.pid, process);
        }
        self.by_pid.get(&sampled.pid).expect("it was there or has just been inserted")
    }

    /// The labels that a process would have now; reads nothing else of it and remembers nothing.
    pub(crate) fn series_of(&self, pid: u32) -> SeriesLabels {
        let directory = self.directory(pid);
        let comm = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        self.read_labels(&directory, comm.trim_end())
    }

    /// What is known of a process.
    pub(crate) fn known(&self, pid: u32) -> Option<&Process> {
        self.by_pid.get(&pid)
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

    /// Exec records were lost: whatever is known may be of an earlier image.
    pub(crate) fn forget_all(&mut self) {
        self.by_pid.clear();
    }

    /// Forgets processes that were not sampled for a while.
    pub(crate) fn forget_idle(&mut self) {
        self.by_pid.retain(|_, process| process.last_sampled.elapsed() < IDLE_MAX);
    }

    /// Processes known now.
    pub(crate) fn len(&self) -> usize {
        self.by_pid.len()
    }

    /// What the table has met so far.
    pub(crate) fn counts(&self) -> ProcessCounts {
        let ImageCounts { unusable_files, ranges_cut } = self.images.counts();
        ProcessCounts { unusable_files, ranges_cut, ..self.counts }
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
            self.counts.evicted += 1;
        }
    }

    /// Reads a process, and then whether it is still the one that was sampled.
    fn read(&mut self, sampled: Sampled<'_>, now: Instant) -> Process {
        let directory = self.directory(sampled.pid);
        let series = self.read_labels(&directory, sampled.comm);
        let mappings = self.images.mappings(sampled.pid);
        if !self.is_same_process(sampled) {
            self.counts.gone += 1;
            return self.unread(sampled, now);
        }
        Process { series, mappings, is_read: true, ..self.unread(sampled, now) }
    }

    /// A process of which only the sample is known.
    fn unread(&self, sampled: Sampled<'_>, now: Instant) -> Process {
        let Sampled { pid: _, start_ns, cgroup_id, comm } = sampled;
        let series = self.labeler.series(&Subject { comm, ..Subject::default() });
        Process {
            start_ns,
            series,
            mappings: Vec::new(),
            is_read: false,
            cgroup_id,
            mappings_read: now,
            labels_read: now,
            tables_requested: now,
            last_sampled: now,
        }
    }

    /// Whether the process that has the pid now, if any, is the one that was sampled.
    fn is_same_process(&self, sampled: Sampled<'_>) -> bool {
        let started = self.images.start_ticks(sampled.pid);
        started.is_some_and(|ticks| sampled.start_ns == 0 || ticks == sampled.start_ns / NS_PER_TICK)
    }

    fn read_labels_again(&mut self, sampled: Sampled<'_>, now: Instant) {
        let directory = self.directory(sampled.pid);
        let series = self.read_labels(&directory, sampled.comm);
        let is_same = self.is_same_process(sampled);
        let Some(process) = self.by_pid.get_mut(&sampled.pid) else { return };
        (process.labels_read, process.cgroup_id) = (now, sampled.cgroup_id);
        // One that has exited meanwhile keeps what it had.
        if is_same {
            process.series = series;
        }
    }

    fn directory(&self, pid: u32) -> PathBuf {
        self.images.directory(pid)
    }

    fn read_labels(&self, directory: &Path, comm: &str) -> SeriesLabels {
        let exe = fs::read_link(directory.join("exe")).unwrap_or_default();
        let cgroup = fs::read(directory.join("cgroup")).unwrap_or_default();
        let cgroup = String::from_utf8_lossy(&cgroup);
        let is_kernel_thread = exe.as_os_str().is_empty() && is_kernel_thread(directory);
        let exe = exe.to_string_lossy();
        self.labeler.series(&Subject { exe: &exe, is_kernel_thread, comm, owner: owner(&cgroup) })
    }
}

/// Whether a task without an executable is a kernel thread rather than one that is exiting. Source: proc_pid_stat(5),
/// flags; include/linux/sched.h: PF_KTHREAD.
fn is_kernel_thread(directory: &Path) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    stat_number(directory, STAT_FLAGS).is_some_and(|flags| flags & PF_KTHREAD != 0)
}

fn stat_number(directory: &Path, field: usize) -> Option<u64> {
    let stat = fs::read(directory.join("stat")).ok()?;
    stat_field(&stat, field)?.parse().ok()
}

/// Fields of `/proc/<pid>/stat`, numbered as in proc_pid_stat(5).
const STAT_FLAGS: usize = 9;
const STAT_STARTTIME: usize = 22;

/// A field behind the name, which may itself hold spaces, parentheses and bytes that are no text.
fn stat_field(stat: &[u8], number: usize) -> Option<&str> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let behind_name = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
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

    fn sampled(pid: u32, start_ns: u64, comm: &str) -> Sampled<'_> {
        Sampled { pid, start_ns, cgroup_id: 1, comm }
    }

    #[test]
    fn a_sample_from_before_an_exec_does_not_get_the_new_image() {
        let mut processes = processes();
        let pid = std::process::id();
        let process = processes.get_before_exec(sampled(pid, 0, "old image"));
        assert_eq!(process.series.get("exe"), Some("old image"));
        processes.exec(pid);
        assert_ne!(processes.get(sampled(pid, 0, "x")).series.get("exe"), Some("old image"));
    }

    #[test]
    fn this_process_is_known_by_its_executable_and_maps_its_own_code() {
        let mut processes = processes();
        let here = this_process_is_known_by_its_executable_and_maps_its_own_code as fn() as usize as u64;
        let process = processes.get(sampled(std::process::id(), 0, "ignored"));
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
        let process = processes.get(sampled(u32::MAX - 1, 5, "short"));
        assert_eq!(process.series.get("exe"), Some("short"));
        assert_eq!(processes.counts().gone, 1);
    }

    #[test]
    fn another_start_time_is_another_process() {
        let mut processes = processes();
        let pid = std::process::id();
        processes.get(sampled(pid, 0, "a"));
        assert_eq!(processes.counts().gone, 0);
        processes.get(sampled(pid, 1, "earlier process of this pid"));
        assert_eq!(processes.counts().gone, 1, "the pid now belongs to another process");
        assert_eq!(processes.len(), 1);
    }

    #[test]
    fn fields_are_found_behind_a_name_with_parentheses() {
        let stat = b"7 (a) b (c\xff)) S 1 7 7 0 -1 4194560 0 0 0 0 1 2 0 0 20 0 1 0 4242 0";
        assert_eq!(stat_field(stat, STAT_FLAGS), Some("4194560"));
        assert_eq!(stat_field(stat, STAT_STARTTIME), Some("4242"));
        assert_eq!(stat_field(b"", STAT_FLAGS), None);
    }

    #[test]
    fn kernel_threads_are_told_apart() {
        assert!(is_kernel_thread(Path::new("/proc/2")), "kthreadd");
        assert!(!is_kernel_thread(Path::new("/proc/self")));
    }
}
