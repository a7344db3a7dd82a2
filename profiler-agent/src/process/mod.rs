//! Processes by pid and start time: what they map, and which series they belong to.

mod fresh;
mod generated;
mod image;
pub(crate) mod maps;
mod splice;
mod stat;

use std::{
    collections::{HashMap, VecDeque},
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use fresh::{Fresh, New};
pub(crate) use generated::{GeneratedCode, PerfMapError};
use image::ImageCounts;
pub(crate) use image::{Backing, ImageReader, Mapping, pids};
use maps::MapsEntry;
use profiler_common::unwind::mappings::NS_PER_TICK;
use stat::Stat;

use crate::{
    addr::{Addr, FileOffset},
    drain::Fork,
    label::{CgroupNames, Labeler, NameCounts, Owner, SeriesLabels, Subject, owner},
    sys::{clock, perf_record::Mapped, threads::process_cpu_time},
    unwind::{Lives, TableRequests},
};

/// Share of the processes known that is forgotten at once when there is no room for more: looking for the longest unused
/// costs a look at all.
const EVICTED_SHARE: usize = 8;
/// A process that was not sampled for this long is forgotten and read anew when it comes back.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// A process is read before its first sample once it has used the CPU for such a part of the sampling period: one of so many
/// is sampled before.
const BUSY_PARTS: u64 = 20;
/// Time between two readings of one process's mappings: an address outside of all of them may be a fresh `dlopen`, or
/// garbage at the end of a stack. It is the first one for a process that may still be starting, and doubles up to the
/// second one.
const REREAD_INTERVAL_MIN: Duration = Duration::from_millis(10);
const REREAD_INTERVAL: Duration = Duration::from_secs(1);
/// Labels are read again after this long where a cgroup's id does not say who runs in it: a process may be moved to
/// another cgroup.
const LABELS_INTERVAL: Duration = Duration::from_secs(10);
/// The same when a sample's cgroup is another than the last one's: threads may be in different ones.
const MOVED_INTERVAL: Duration = Duration::from_millis(100);
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
    program: Program,
    /// Ascending and disjoint.
    mappings: Arc<[Mapping]>,
    /// Code without a file.
    pub(crate) generated: Arc<GeneratedCode>,
    /// It could be looked at; else its labels are made from its name.
    is_read: bool,
    /// Its labels are by the id of its cgroup, which says all.
    is_labeled_by_id: bool,
    cgroup_id: u64,
    mappings_read: Instant,
    /// The same on the boot clock: what was mapped before is among them.
    mappings_read_ns: u64,
    reread_interval: Duration,
    /// It may have mappings that are not known: they are read again with its next sample.
    lacks_mappings: bool,
    labels_read: Instant,
    /// `None` before the first time.
    tables_requested: Option<Instant>,
    is_sampled: bool,
    last_sampled: Instant,
}

/// What a process runs.
#[derive(Clone, Debug, Default)]
struct Program {
    /// Path of its executable as it sees it; empty when it has none, or when that could not be read.
    exe: String,
    is_kernel_thread: bool,
}

/// What a process runs, and whose it is.
struct Identity {
    program: Program,
    owner: Arc<Owner>,
    /// The id of its cgroup says so.
    is_by_id: bool,
}

/// What is known of the process that a sample was taken of.
enum Known {
    No,
    Yes,
    OldLabels,
    OldCgroup,
}

impl Process {
    fn known(&self, sampled: Sampled<'_>, now: Instant) -> Known {
        let try_again = !self.is_read && now - self.labels_read >= REREAD_INTERVAL;
        if self.start_ns != sampled.start_ns || try_again {
            return Known::No;
        }
        if self.cgroup_id != sampled.cgroup_id {
            return Known::OldCgroup;
        }
        let is_old = !self.is_labeled_by_id && now - self.labels_read >= LABELS_INTERVAL;
        if self.is_read && is_old { Known::OldLabels } else { Known::Yes }
    }

    /// A child of this process, as it is at the fork.
    fn forked(&self, start_ns: u64, now: Instant) -> Self {
        Self {
            start_ns,
            series: self.series.clone(),
            program: self.program.clone(),
            mappings: Arc::clone(&self.mappings),
            generated: Arc::clone(&self.generated),
            is_read: true,
            is_labeled_by_id: self.is_labeled_by_id,
            cgroup_id: self.cgroup_id,
            mappings_read: self.mappings_read,
            mappings_read_ns: self.mappings_read_ns,
            reread_interval: self.reread_interval,
            lacks_mappings: self.lacks_mappings,
            labels_read: self.labels_read,
            tables_requested: Some(now),
            is_sampled: false,
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
    /// Id of the task's cgroup.
    pub(crate) cgroup_id: u64,
    /// Name of the process.
    pub(crate) comm: &'a str,
}

/// A process with a new image, as the kernel side says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exec {
    /// As in [`Sampled`].
    pub(crate) pid: u32,
    /// As in [`Sampled`].
    pub(crate) start_ns: u64,
    /// As in [`Sampled`].
    pub(crate) cgroup_id: u64,
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
    /// New images that were not read before their first sample, there being too many.
    pub(crate) read_late: u64,
    /// New images that were not read before their first sample, having hardly run.
    pub(crate) left_idle: u64,
    /// New mappings that were added to what is known of their processes.
    pub(crate) mappings_added: u64,
    /// New mappings there was no CPU time or no room for: their processes are read again with their next sample.
    pub(crate) mappings_deferred: u64,
}

/// The process table. Owned by the worker thread; reading `/proc` is its own doing, the drain does not wait for it.
pub(crate) struct Processes {
    by_pid: HashMap<u32, Process>,
    images: ImageReader,
    labeler: Labeler,
    names: CgroupNames,
    fresh: Fresh,
    /// `None` where frame pointers are to be used.
    tables: Option<TableRequests>,
    /// What [`Self::tell_lives`] tells.
    lives: Lives,
    /// Processes that have ended, by when that was told.
    exited: VecDeque<(Instant, u32, u64)>,
    counts: ProcessCounts,
    /// A process takes about 2 KiB here.
    processes_max: usize,
    /// CPU time of a process that is worth reading before its first sample.
    busy_min: Duration,
}

impl Processes {
    /// An empty table for so many processes.
    pub(crate) fn new(
        images: ImageReader,
        labeler: Labeler,
        names: CgroupNames,
        tables: Option<TableRequests>,
        processes_max: usize,
    ) -> Self {
        let (by_pid, fresh, lives, exited, counts) = Default::default();
        let busy_min = Duration::ZERO;
        Self { by_pid, images, labeler, names, fresh, tables, lives, exited, counts, processes_max, busy_min }
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
                self.request_tables_of(sampled.pid, now);
            }
            Known::OldLabels => self.read_labels_again(sampled, now),
            Known::OldCgroup => self.follow(sampled, now),
        }
        if self.by_pid.get(&sampled.pid).is_some_and(|process| process.lacks_mappings) {
            // Where that is not due yet, the next sample will.
            let _ = self.reread_after(sampled.pid, REREAD_INTERVAL);
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
        } else {
            self.follow_into_cgroup(sampled);
        }
        self.by_pid.get(&sampled.pid).expect("it was there or has just been inserted")
    }

    /// The labels that a process would have now; reads nothing else of it and remembers nothing.
    pub(crate) fn series_of(&self, pid: u32) -> SeriesLabels {
        let comm = fs::read_to_string(self.images.directory(pid).join("comm")).unwrap_or_default();
        self.series(&self.program(pid), comm.trim_end(), self.read_owner(pid))
    }

    /// What is known of a process.
    pub(crate) fn known(&self, pid: u32) -> Option<&Process> {
        self.by_pid.get(&pid)
    }

    /// Reads the mappings again, after an address was found in none of them. Gives the process when that was due.
    pub(crate) fn reread(&mut self, pid: u32) -> Option<&Process> {
        let interval = self.by_pid.get(&pid)?.reread_interval;
        self.reread_after(pid, interval)
    }

    /// The same, when the last reading is so long ago.
    fn reread_after(&mut self, pid: u32, interval: Duration) -> Option<&Process> {
        let process = self.by_pid.get(&pid)?;
        if process.mappings_read.elapsed() < interval {
            return None;
        }
        self.request_tables(pid);
        let read_ns = clock::boot_ns();
        let mappings = self.images.mappings(pid);
        let process = self.by_pid.get_mut(&pid)?;
        if !mappings.is_empty() {
            process.mappings = mappings.into();
        }
        (process.mappings_read_ns, process.lacks_mappings) = (read_ns, false);
        process.mappings_read = Instant::now();
        process.reread_interval = (process.reread_interval * 2).min(REREAD_INTERVAL);
        Some(process)
    }

    /// Whether a new mapping says something of a process that is known: of others, all is read with their first sample.
    pub(crate) fn is_news(&self, mapped: &Mapped<'_>) -> bool {
        let &Mapped { pid, time_ns, start, end, inode, .. } = mapped;
        self.by_pid.get(&pid).is_some_and(|process| {
            let is_old = time_ns < process.mappings_read_ns || !process.is_read || process.lacks_mappings;
            let is_known = inode == 0 && splice::is_known_memory(&process.mappings, Addr(start), Addr(end));
            !is_old && !is_known
        })
    }

    /// Adds a mapping that [`Self::is_news`] to what is known of its process, and to its unwind tables.
    pub(crate) fn add_mapping(&mut self, mapped: &Mapped<'_>) {
        let &Mapped { pid, time_ns: _, start, end, offset, device, inode, path } = mapped;
        let entry =
            MapsEntry { start: Addr(start), end: Addr(end), offset: FileOffset(offset), device, inode, path };
        let mapping = self.images.mapping(pid, &entry);
        let Some(process) = self.by_pid.get_mut(&pid) else { return };
        if process.mappings.len() >= image::RANGES_MAX {
            return self.defer_mapping(pid);
        }
        process.mappings = splice::with(&process.mappings, mapping.clone());
        self.counts.mappings_added += 1;
        // Nobody has asked for the tables of a process that was never sampled.
        if let Some(tables) = self.tables.as_ref().filter(|_| process.tables_requested.is_some()) {
            process.tables_requested = Some(Instant::now());
            tables.mapped(pid, mapping);
        }
    }

    /// Leaves new mappings of a process to its next sample.
    pub(crate) fn defer_mapping(&mut self, pid: u32) {
        self.counts.mappings_deferred += 1;
        if let Some(process) = self.by_pid.get_mut(&pid) {
            process.lacks_mappings = true;
        }
    }

    /// News of mappings were lost: whoever is sampled next is read again.
    pub(crate) fn doubt_mappings(&mut self) {
        self.by_pid.values_mut().for_each(|process| process.lacks_mappings = true);
    }

    /// The process has a new image.
    pub(crate) fn exec(&mut self, exec: Exec, now: Instant) {
        let Exec { pid, start_ns: _, cgroup_id } = exec;
        self.names.learn(cgroup_id);
        let was_known = self.by_pid.remove(&pid).is_some();
        self.fresh.add(New { exec, was_known }, now);
    }

    /// A process was forked: until it execs it is as its parent, so that its samples have their labels and mappings
    /// however soon it ends.
    pub(crate) fn fork(&mut self, fork: Fork) {
        let Fork { parent, child, start_ns } = fork;
        self.lives.fork(child, start_ns);
        // What is known of the parent is of the parent's present image; children do not push others out.
        let Some(parent) = self.by_pid.get(&parent).filter(|parent| parent.is_read) else { return };
        if self.by_pid.len() < self.processes_max {
            let child_process = parent.forked(start_ns, Instant::now());
            self.by_pid.insert(child, child_process);
        }
    }

    /// The process has ended.
    pub(crate) fn exit(&mut self, pid: u32, start_ns: u64) {
        self.lives.exit(pid, start_ns);
        if self.exited.len() >= self.processes_max {
            self.forget_first_exited();
        }
        if self.by_pid.contains_key(&pid) {
            self.exited.push_back((Instant::now(), pid, start_ns));
        }
    }

    /// Tells those who make unwind tables of the forks and ends since the last time.
    pub(crate) fn tell_lives(&mut self) {
        match &self.tables {
            Some(tables) => tables.tell(&mut self.lives),
            None => self.lives = Lives::default(),
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

    /// A cgroup was made: learns its name while it is there.
    pub(crate) fn cgroup_made(&mut self, id: u64) {
        self.names.learn(id);
    }

    /// When [`Self::read_fresh`] has something to do.
    pub(crate) fn next_fresh(&self) -> Option<Instant> {
        self.fresh.next()
    }

    /// Samples come with so much CPU time of a process between them.
    pub(crate) fn set_period(&mut self, period_ns: u64) {
        self.busy_min = Duration::from_nanos(period_ns / BUSY_PARTS);
    }

    /// Reads processes whose image is new, before they can be gone; those that a sample has made known are. One that has hardly
    /// run is rarely sampled before the next look.
    pub(crate) fn read_fresh(&mut self, now: Instant) {
        let busy_min = self.busy_min;
        // A process that is gone has no clock.
        let is_idle = |new: &New| process_cpu_time(new.exec.pid).is_some_and(|time| time < busy_min);
        while let Some(New { exec, was_known }) = self.fresh.take(now, is_idle) {
            let Exec { pid, start_ns, cgroup_id } = exec;
            let sampled = Sampled { pid, start_ns, cgroup_id, comm: "" };
            if self.by_pid.contains_key(&pid) {
                continue;
            }
            // Without a name there would be no label to stand in.
            if let Some(process) = self.read_living(sampled, now).filter(|it| !it.program.exe.is_empty()) {
                self.make_room();
                self.by_pid.insert(pid, process);
                if was_known {
                    // Not at the exec: its libraries were not mapped then, and its tables would be made twice.
                    self.request_tables_of(pid, now);
                }
            }
        }
    }

    /// Leaves those that are due to their first sample.
    pub(crate) fn skip_fresh(&mut self, now: Instant) {
        self.fresh.skip(now);
    }

    /// Whether this is the first sample of what a known process runs; asked once for each.
    pub(crate) fn is_first_sample(&mut self, pid: u32) -> bool {
        self.by_pid.get_mut(&pid).is_some_and(|process| !std::mem::replace(&mut process.is_sampled, true))
    }

    /// A sample of the process lacked tables: asks for them, unless that was done of late.
    pub(crate) fn lacks_tables(&mut self, pid: u32) {
        let Some(process) = self.by_pid.get_mut(&pid) else { return };
        if process.tables_requested.is_none_or(|last| last.elapsed() >= TABLES_INTERVAL) {
            self.request_tables_of(pid, Instant::now());
        }
    }

    fn request_tables_of(&mut self, pid: u32, now: Instant) {
        if let Some(process) = self.by_pid.get_mut(&pid) {
            process.tables_requested = Some(now);
        }
        self.request_tables(pid);
    }

    /// Asks for the unwind tables of a process as it is now.
    pub(crate) fn request_tables(&self, pid: u32) {
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
        let now = Instant::now();
        self.by_pid.retain(|_, process| now.saturating_duration_since(process.last_sampled) < IDLE_MAX);
        self.names.forget_idle();
    }

    /// Processes known now.
    pub(crate) fn len(&self) -> usize {
        self.by_pid.len()
    }

    /// What the table has met so far.
    pub(crate) fn counts(&self) -> ProcessCounts {
        let ImageCounts { unusable_files, ranges_cut } = self.images.counts();
        ProcessCounts {
            unusable_files,
            ranges_cut,
            read_late: self.fresh.skipped(),
            left_idle: self.fresh.left_idle(),
            ..self.counts
        }
    }

    /// What the names of cgroups have met so far.
    pub(crate) fn cgroups(&self) -> NameCounts {
        self.names.counts()
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
        let mut sampled: Vec<_> =
            self.by_pid.iter().map(|(&pid, process)| (process.last_sampled, pid)).collect();
        sampled.sort_unstable();
        sampled.truncate(self.processes_max.div_ceil(EVICTED_SHARE));
        for (_, pid) in &sampled {
            self.by_pid.remove(pid);
        }
        self.counts.evicted += sampled.len() as u64;
    }

    /// Reads a process, unless it is gone or another one by now.
    fn read(&mut self, sampled: Sampled<'_>, now: Instant) -> Process {
        // Most are gone for good: then this look is the only one.
        let is_there = self.images.stat(sampled.pid).is_some_and(|stat| is_sampled(stat, sampled));
        let process = if is_there { self.read_living(sampled, now) } else { None };
        process.unwrap_or_else(|| {
            self.counts.gone += 1;
            self.unread(sampled, now)
        })
    }

    /// The same, of one that was there a moment ago; `None` when it is gone.
    fn read_living(&mut self, sampled: Sampled<'_>, now: Instant) -> Option<Process> {
        let mappings_read_ns = clock::boot_ns();
        let mappings = self.images.mappings(sampled.pid);
        let Identity { program, owner, is_by_id } = self.identify(sampled)?;
        let series = self.series(&program, sampled.comm, owner);
        let exe = series.get("exe").unwrap_or_default();
        let generated = Arc::new(GeneratedCode::new(sampled.pid, sampled.start_ns, exe));
        Some(Process {
            series,
            program,
            mappings: mappings.into(),
            mappings_read_ns,
            generated,
            is_read: true,
            is_labeled_by_id: is_by_id,
            ..self.unread(sampled, now)
        })
    }

    /// Reads what a process runs and whose it is, and then whether it is still the one that was sampled.
    fn identify(&mut self, sampled: Sampled<'_>) -> Option<Identity> {
        let Sampled { pid, cgroup_id, .. } = sampled;
        let program = self.program(pid);
        let by_id = self.names.exact(cgroup_id);
        let is_by_id = by_id.is_some();
        let owner = by_id.unwrap_or_else(|| self.read_owner(pid));
        let stat = self.images.stat(pid).filter(|stat| is_sampled(*stat, sampled))?;
        if is_by_id {
            return Some(Identity { program, owner, is_by_id });
        }
        // To v1 hierarchies, a task that exits is in the root already. Source: kernel/cgroup/cgroup.c: proc_cgroup_show.
        let living = if stat.is_exiting() { self.images.living_thread(pid) } else { Some(pid) };
        let owner = match living {
            Some(thread) if thread == pid => owner,
            Some(thread) => self.read_owner(thread),
            None if program.exe.is_empty() => return None,
            None => {
                let owner = self.names.of_gone(cgroup_id).unwrap_or_default();
                return Some(Identity { program, owner, is_by_id });
            }
        };
        self.names.note(cgroup_id, &owner);
        Some(Identity { program, owner, is_by_id })
    }

    /// A process of which only the sample is known, and perhaps its cgroup.
    fn unread(&mut self, sampled: Sampled<'_>, now: Instant) -> Process {
        let Sampled { pid, start_ns, cgroup_id, comm } = sampled;
        let owner = self.names.of_gone(cgroup_id).unwrap_or_default();
        let program = Program::default();
        Process {
            start_ns,
            series: self.series(&program, comm, owner),
            program,
            mappings: Arc::default(),
            generated: Arc::new(GeneratedCode::new(pid, start_ns, comm)),
            is_read: false,
            is_labeled_by_id: false,
            cgroup_id,
            mappings_read: now,
            mappings_read_ns: 0,
            reread_interval: REREAD_INTERVAL_MIN,
            lacks_mappings: false,
            labels_read: now,
            tables_requested: None,
            is_sampled: false,
            last_sampled: now,
        }
    }

    /// A sample's cgroup is not the one that the labels are of.
    fn follow(&mut self, sampled: Sampled<'_>, now: Instant) {
        let owner = self.names.exact(sampled.cgroup_id);
        let Some(process) = self.by_pid.get_mut(&sampled.pid) else { return };
        match owner {
            Some(owner) => {
                let program = std::mem::take(&mut process.program);
                let series = self.series(&program, sampled.comm, owner);
                let Some(process) = self.by_pid.get_mut(&sampled.pid) else { return };
                (process.series, process.program, process.cgroup_id) = (series, program, sampled.cgroup_id);
            }
            None if now - process.labels_read >= MOVED_INTERVAL => self.read_labels_again(sampled, now),
            None => self.follow_into_cgroup(sampled),
        }
    }

    /// A runtime's process has come to a container's cgroup, or a manager's to a unit's, and becomes what runs there: until its
    /// labels are read again, or cannot be, the sample's cgroup is believed where it says whose it is.
    fn follow_into_cgroup(&mut self, sampled: Sampled<'_>) {
        let Some(process) = self.by_pid.get(&sampled.pid) else { return };
        if process.cgroup_id == sampled.cgroup_id {
            return;
        }
        let owner = self.names.exact(sampled.cgroup_id).or_else(|| self.names.of_gone(sampled.cgroup_id));
        let says_whose = |owner: &Arc<Owner>| owner.container_id.is_some() || owner.unit.is_some();
        let Some(owner) = owner.filter(says_whose) else { return };
        let series = self.series(&process.program, sampled.comm, owner);
        if let Some(process) = self.by_pid.get_mut(&sampled.pid) {
            process.series = series;
        }
    }

    fn read_labels_again(&mut self, sampled: Sampled<'_>, now: Instant) {
        let identity = self.identify(sampled);
        let labels = identity.map(|Identity { program, owner, is_by_id }| {
            (self.series(&program, sampled.comm, owner), program, is_by_id)
        });
        let Some(process) = self.by_pid.get_mut(&sampled.pid) else { return };
        (process.labels_read, process.cgroup_id) = (now, sampled.cgroup_id);
        // One that has exited meanwhile keeps what it had.
        if let Some((series, program, is_by_id)) = labels {
            (process.series, process.program, process.is_labeled_by_id) = (series, program, is_by_id);
        }
    }

    fn series(&self, program: &Program, comm: &str, owner: Arc<Owner>) -> SeriesLabels {
        let &Program { ref exe, is_kernel_thread } = program;
        self.labeler.series(&Subject { exe, is_kernel_thread, comm, owner })
    }

    fn program(&self, pid: u32) -> Program {
        let exe = self.images.exe(pid).unwrap_or_default().to_string_lossy().into_owned();
        let is_kernel_thread = exe.is_empty() && self.images.stat(pid).is_some_and(Stat::is_kernel_thread);
        Program { exe, is_kernel_thread }
    }

    /// Who a process belongs to, as all its hierarchies say.
    fn read_owner(&self, pid: u32) -> Arc<Owner> {
        let cgroup = fs::read(self.images.directory(pid).join("cgroup")).unwrap_or_default();
        Arc::new(owner(&String::from_utf8_lossy(&cgroup)))
    }
}

/// Whether what has the pid now is the process that was sampled.
fn is_sampled(stat: Stat, sampled: Sampled<'_>) -> bool {
    sampled.start_ns == 0 || stat.start_ticks == sampled.start_ns / NS_PER_TICK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executable::ExecutableCache;
    use crate::{memory, sys::heap};

    fn processes() -> Processes {
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(64)));
        Processes::new(images, Labeler::new("n", &[]), CgroupNames::new(None), None, 64)
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
        processes.exec(Exec { pid, start_ns: 0, cgroup_id: 1 }, Instant::now());
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
    fn a_process_takes_what_the_memory_plan_gives_it() {
        let mut processes = processes();
        let pid = std::process::id();
        processes.get(sampled(pid, 0, "x"));
        // The files stay open, and known.
        let before = heap::held_bytes();
        processes.forget_all();
        let held = usize::try_from(before - heap::held_bytes()).expect("it held something");
        assert!((200..memory::PROCESS_BYTES).contains(&held), "{held}");
    }

    #[test]
    fn a_process_that_is_gone_has_the_owner_that_others_in_its_cgroup_had() {
        let mut processes = processes();
        let owner = Owner { container_id: Some("web".into()), ..Owner::default() };
        processes.names.note(1, &Arc::new(owner));
        let process = processes.get(sampled(u32::MAX - 1, 5, "short"));
        assert_eq!(process.series.get("container"), Some("web"));
    }

    #[test]
    fn a_process_that_has_come_to_a_container_or_unit_is_labeled_by_it_before_it_is_read_again() {
        let mut processes = processes();
        let container = Owner { container_id: Some("web".into()), ..Owner::default() };
        let unit = Owner { unit: Some("web.service".into()), ..Owner::default() };
        let nobodys = Owner::default();
        for (id, owner) in [(2, container), (3, unit), (4, nobodys)] {
            processes.names.note(id, &Arc::new(owner));
        }
        let pid = std::process::id();
        let exe = processes.get(sampled(pid, 0, "runtime")).series.get("exe").map(str::to_owned);
        let mut moved = |cgroup_id| {
            let moved = Sampled { cgroup_id, ..sampled(pid, 0, "program") };
            let series = &processes.get_before_exec(moved).series;
            assert_eq!(series.get("exe"), exe.as_deref());
            ["container", "unit"].map(|label| series.get(label).map(str::to_owned))
        };
        assert_eq!(moved(2), [Some("web".to_owned()), None]);
        assert_eq!(moved(3), [None, Some("web.service".to_owned())]);
        assert_eq!(moved(4), [None, Some("web.service".to_owned())], "it says nothing");
    }

    #[test]
    fn a_new_image_is_read_before_its_first_sample() {
        let mut processes = processes();
        let (pid, now) = (std::process::id(), Instant::now());
        processes.exec(Exec { pid, start_ns: 0, cgroup_id: 1 }, now);
        let due = processes.next_fresh().expect("it is to be read");
        processes.read_fresh(now);
        assert!(processes.known(pid).is_none(), "not before it can have mapped its libraries");
        processes.read_fresh(due);
        let process = processes.known(pid).expect("it has been read");
        assert!(process.is_read && !process.mappings.is_empty());
        assert_eq!(processes.next_fresh(), None);
    }

    /// New memory without a file, as the kernel tells of it.
    fn memory(pid: u32, time_ns: u64) -> Mapped<'static> {
        let (start, end) = (0x10_0000, 0x11_0000);
        Mapped { pid, time_ns, start, end, offset: 0, device: (0, 0), inode: 0, path: b"" }
    }

    #[test]
    fn what_a_known_process_maps_is_added_and_what_is_known_or_older_is_no_news() {
        let mut processes = processes();
        let (pid, before_ns) = (std::process::id(), clock::boot_ns());
        assert!(
            !processes.is_news(&memory(pid, clock::boot_ns())),
            "all of it is read with its first sample"
        );
        processes.get(sampled(pid, 0, "x"));
        assert!(!processes.is_news(&memory(pid, before_ns)), "it was read later");
        let mapped = memory(pid, clock::boot_ns());
        assert!(processes.is_news(&mapped));
        processes.add_mapping(&mapped);
        let process = processes.known(pid).expect("it was sampled");
        assert!(matches!(
            process.mapping(Addr(0x10_8000)),
            Some(Mapping { backing: Backing::Anonymous, .. })
        ));
        let again = Mapped { start: 0x10_1000, end: 0x10_2000, ..mapped };
        assert!(!processes.is_news(&again), "a part of it became executable again");
        assert_eq!(processes.counts().mappings_added, 1);
    }

    #[test]
    fn a_process_whose_news_were_lost_is_read_again_with_a_sample_when_that_is_due() {
        let mut processes = processes();
        let pid = std::process::id();
        processes.get(sampled(pid, 0, "x"));
        processes.add_mapping(&memory(pid, clock::boot_ns()));
        processes.doubt_mappings();
        assert!(!processes.is_news(&memory(pid, clock::boot_ns())), "all of it will be read");
        assert!(processes.get(sampled(pid, 0, "x")).lacks_mappings, "it was read a moment ago");
        let process = processes.by_pid.get_mut(&pid).expect("it was sampled");
        process.mappings_read =
            Instant::now().checked_sub(REREAD_INTERVAL).expect("the machine runs for longer");
        let process = processes.get(sampled(pid, 0, "x"));
        assert!(!process.lacks_mappings && process.mapping(Addr(0x10_8000)).is_none(), "as /proc has it");
    }

    #[test]
    fn a_process_that_was_read_ahead_gets_its_tables_with_the_first_sample_that_lacks_them() {
        let (tables, requests) = crate::unwind::requests(Arc::default());
        let images = ImageReader::new("/proc".into(), Arc::new(ExecutableCache::new(64)));
        let mut processes =
            Processes::new(images, Labeler::new("n", &[]), CgroupNames::new(None), Some(tables), 64);
        let (pid, now) = (std::process::id(), Instant::now());
        processes.exec(Exec { pid, start_ns: 0, cgroup_id: 1 }, now);
        processes.read_fresh(processes.next_fresh().expect("it is to be read"));
        assert!(requests.try_recv().is_err(), "most programs end before they are sampled");
        processes.get(sampled(pid, 0, "x"));
        assert!(processes.is_first_sample(pid) && !processes.is_first_sample(pid));
        processes.lacks_tables(pid);
        assert!(requests.try_recv().is_ok());
        processes.lacks_tables(pid);
        assert!(requests.try_recv().is_err(), "it was asked for a moment ago");
    }

    #[test]
    fn room_is_made_by_forgetting_those_sampled_longest_ago() {
        let mut processes = processes();
        let first = u32::MAX - 1 - 64;
        for pid in first..u32::MAX {
            processes.get(sampled(pid, 5, "short"));
        }
        assert_eq!((processes.counts().evicted, processes.len()), (8, 64 + 1 - 8));
        assert!(processes.known(first).is_none() && processes.known(u32::MAX - 1).is_some());
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
}
