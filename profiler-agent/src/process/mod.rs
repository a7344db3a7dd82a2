//! Processes by pid and start time: what they map, and which series they belong to.

mod generated;
mod image;
pub(crate) mod maps;

use std::{
    collections::{HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

pub(crate) use generated::{GeneratedCode, PerfMapError};
use image::ImageCounts;
pub(crate) use image::{Backing, ImageReader, Mapping};
use profiler_common::unwind::mappings::NS_PER_TICK;

use crate::{
    addr::Addr,
    drain::Fork,
    label::{Labeler, SeriesLabels, Subject, owner},
    unwind::TableRequests,
};

/// A process that was not sampled for this long is forgotten and read anew when it comes back.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Time between two readings of one process's mappings: an address outside of all of them may be a fresh `dlopen`, or
/// garbage at the end of a stack. Also between two tries at a process that could not be read.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);
/// Labels are read again after this long: a process may be moved to another cgroup.
const LABELS_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two requests for one process's unwind tables, while its samples come without.
const TABLES_INTERVAL: Duration = Duration::from_secs(5);
/// A process that has ended is forgotten after this long: the last samples of its end come behind the event.
const EXITED_MAX: Duration = Duration::from_secs(2);

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    start_ns: u64,
    /// The labels that identify its profiles.
    pub(crate) series: SeriesLabels,
    /// Ascending and disjoint.
    mappings: Arc<[Mapping]>,
    /// Code without a file.
    pub(crate) generated: Arc<GeneratedCode>,
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

    /// A child of this process, as it is at the fork.
    fn forked(&self, start_ns: u64, now: Instant) -> Self {
        Self {
            start_ns,
            series: self.series.clone(),
            mappings: Arc::clone(&self.mappings),
            generated: Arc::clone(&self.generated),
            is_read: true,
            cgroup_id: self.cgroup_id,
            mappings_read: self.mappings_read,
            labels_read: self.labels_read,
            tables_requested: now,
            last_sampled: now,
        }
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
    /// Processes that have ended, by when that was told.
    exited: VecDeque<(Instant, u32, u64)>,
    counts: ProcessCounts,
    /// A process takes about 2 KiB here.
    processes_max: usize,
}

impl Processes {
    /// An empty table for so many processes.
    pub(crate) fn new(
        images: ImageReader,
        labeler: Labeler,
        tables: Option<TableRequests>,
        processes_max: usize,
    ) -> Self {
        Self {
            by_pid: HashMap::new(),
            images,
            labeler,
            tables,
            exited: VecDeque::new(),
            counts: ProcessCounts::default(),
            processes_max,
        }
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
            process.mappings = mappings.into();
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

    /// A process was forked: until it execs it is as its parent, so that its samples have their labels and mappings
    /// however soon it ends.
    pub(crate) fn fork(&mut self, fork: Fork) {
        let Fork { parent, child, start_ns } = fork;
        if let Some(tables) = &self.tables {
            tables.forked(child);
        }
        // What is known of the parent is of the parent's present image; children do not push others out.
        let Some(parent) = self.by_pid.get(&parent).filter(|parent| parent.is_read) else { return };
        if self.by_pid.len() < self.processes_max {
            let child_process = parent.forked(start_ns, Instant::now());
            self.by_pid.insert(child, child_process);
        }
    }

    /// The process has ended.
    pub(crate) fn exit(&mut self, pid: u32, start_ns: u64) {
        if let Some(tables) = &self.tables {
            tables.exited(pid, start_ns);
        }
        if self.exited.len() >= self.processes_max {
            self.forget_first_exited();
        }
        if self.by_pid.contains_key(&pid) {
            self.exited.push_back((Instant::now(), pid, start_ns));
        }
    }

    /// Forgets processes that have ended and whose last samples have come.
    pub(crate) fn forget_exited(&mut self) {
        while self.exited.front().is_some_and(|(since, ..)| since.elapsed() >= EXITED_MAX) {
            self.forget_first_exited();
        }
    }

    fn forget_first_exited(&mut self) {
        let Some((_, pid, start_ns)) = self.exited.pop_front() else { return };
        // The pid may be another process's by now.
        if self.by_pid.get(&pid).is_some_and(|process| process.start_ns == start_ns) {
            self.by_pid.remove(&pid);
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

    /// Labels all processes by another labeler from now on.
    pub(crate) fn set_labeler(&mut self, labeler: Labeler) {
        self.labeler = labeler;
        self.forget_all();
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
        if self.by_pid.len() < self.processes_max {
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
        let exe = series.get("exe").unwrap_or_default();
        let generated = Arc::new(GeneratedCode::new(sampled.pid, sampled.start_ns, exe));
        Process { series, mappings: mappings.into(), generated, is_read: true, ..self.unread(sampled, now) }
    }

    /// A process of which only the sample is known.
    fn unread(&self, sampled: Sampled<'_>, now: Instant) -> Process {
        let Sampled { pid, start_ns, cgroup_id, comm } = sampled;
        let series = self.labeler.series(&Subject { comm, ..Subject::default() });
        Process {
            start_ns,
            series,
            mappings: Arc::default(),
            generated: Arc::new(GeneratedCode::new(pid, start_ns, comm)),
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
    use super::*;
    use crate::executable::ExecutableCache;

    fn processes() -> Processes {
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(64)));
        Processes::new(images, Labeler::new("n", &[]), None, 64)
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
    fn a_child_that_is_gone_at_once_has_its_parents_labels_and_mappings() {
        let mut processes = processes();
        let (parent, child) = (std::process::id(), u32::MAX - 1);
        let here =
            Addr(a_child_that_is_gone_at_once_has_its_parents_labels_and_mappings as fn() as usize as u64);
        let expect = processes.get(sampled(parent, 0, "parent")).series.clone();
        processes.fork(Fork { parent, child, start_ns: 9 });
        processes.exit(child, 9);
        processes.forget_exited();
        let process = processes.get(sampled(child, 9, "child"));
        assert_eq!(process.series, expect);
        assert!(process.mapping(here).is_some(), "it has the code of its parent");
        assert_eq!(processes.counts().gone, 0);
    }

    #[test]
    fn a_process_that_has_ended_is_forgotten_unless_its_pid_is_anothers() {
        let mut processes = processes();
        let (parent, child) = (std::process::id(), u32::MAX - 1);
        processes.get(sampled(parent, 0, "parent"));
        processes.fork(Fork { parent, child, start_ns: 9 });
        processes.exit(child, 9);
        processes.fork(Fork { parent, child, start_ns: 10 });
        processes.forget_first_exited();
        assert!(processes.known(child).is_some(), "the pid is another's by now");
        processes.exit(child, 10);
        processes.forget_first_exited();
        assert!(processes.known(child).is_none());
        assert!(processes.exited.is_empty());
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
