//! Heap profiles of chosen processes: finds their allocators, probes them, and lets go when they end.
//!
//! ```text
//! exec, /proc ─▶ rules ─▶ link map ─▶ allocator's file ─▶ attach points ─▶ probes      (thread `heap`, this module)
//! ring buffer ─▶ sampled allocations ─▶ windows of `allocs`, snapshots of `heap`        (worker, `live`)
//! ```

mod link_map;
mod live;
mod member;
mod rules;
mod windows;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use aya::maps::MapError;
pub(crate) use live::{Live, LiveCounts, Sample};
use profiler_common::heap::{POINTS_MAX, Point, TARGETS_MAX, Target};
use profiler_heap::{Allocator, Function, ScanError};
pub(crate) use rules::{DEFAULT_RATE, Rule, parse, parse_rate};
use tracing::{info, warn};
pub(crate) use windows::HeapWindows;

use self::link_map::Objects;
use crate::{
    addr::FileOffset,
    bpf::HeapProgram,
    executable::{Executable, ExecutableId},
    process::{Backing, ImageReader, Mapping, Processes},
    sys::{bpf::Probe, file_map::FileMap},
};

/// Execs waiting to be looked at. More make the whole of `/proc` be looked at.
const EXECS_MAX: usize = 1024;
/// Time between two looks at the processes that are profiled.
const TICK: Duration = Duration::from_secs(1);
/// Time between two looks at all processes: for those that were not seen to exec, such as forked ones.
const SCAN_INTERVAL: Duration = Duration::from_secs(10);
/// A dynamic linker that has not finished is asked again after this long, so many times.
const LINKER_DELAY: Duration = Duration::from_millis(100);
const LINKER_TRIES: u32 = 50;
/// Bytes of a file whose symbols are read.
const FILE_BYTES_MAX: u64 = 4 << 30;
/// Files whose attach points are remembered.
const FILES_MAX: usize = 1024;

/// Whose allocations are wanted: shared by the thread that attaches and the one that takes snapshots.
#[derive(Clone, Debug, Default)]
pub(crate) struct Targets(Arc<Mutex<HashSet<u32>>>);

impl Targets {
    /// Their numbers ([`Target::id`]).
    fn ids(&self) -> HashSet<u32> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        // Every change is complete before anything that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a process that is meant is not profiled.
#[derive(Debug, thiserror::Error)]
enum HeapError {
    #[error("its dynamic linker does not finish")]
    NotReady,
    #[error("read the objects it has loaded")]
    Objects,
    #[error("none of its files defines malloc")]
    NoAllocator,
    #[error("{file}")]
    Scan {
        file: String,
        #[source]
        source: ScanError,
    },
    #[error("{max} processes are profiled, or {points} functions probed")]
    Full { max: u32, points: u32 },
    #[error("write the maps of the programs")]
    Map(#[from] MapError),
    #[error("attach to {file}")]
    Attach {
        file: String,
        #[source]
        source: io::Error,
    },
}

/// What the thread does, for metrics.
#[derive(Debug, Default)]
pub(crate) struct HeapGauges {
    /// Processes profiled now.
    pub(crate) targets: AtomicU64,
    /// Processes that are meant but could not be profiled.
    pub(crate) refused: AtomicU64,
    /// Probes hit.
    pub(crate) hits: AtomicU64,
    /// Looks at all processes.
    pub(crate) scans: AtomicU64,
    /// Processes attached to so far.
    pub(crate) attached: AtomicU64,
}

/// What the thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The process has a new image.
    Exec(u32),
    /// Probe whom the rules mean.
    Resume,
    /// Take all probes out.
    Pause,
    /// Take all probes out and end.
    Stop,
}

/// Tells the thread of execs, and what to do.
#[derive(Clone, Debug)]
pub(crate) struct Orders(SyncSender<Told>);

impl Orders {
    /// A process has a new image. One that there is no room for is found by the next look at all processes.
    pub(crate) fn exec(&self, pid: u32) {
        let _ = self.0.try_send(Told::Exec(pid));
    }

    /// Probes are wanted from now on.
    pub(crate) fn resume(&self) {
        self.order(Told::Resume);
    }

    /// No more probes are wanted for now.
    pub(crate) fn pause(&self) {
        self.order(Told::Pause);
    }

    /// No more probes are wanted.
    pub(crate) fn stop(&self) {
        self.order(Told::Stop);
    }

    fn order(&self, order: Told) {
        // A thread that has ended has no probes.
        let _ = self.0.send(order);
    }
}

/// A channel for orders.
pub(crate) fn orders() -> (Orders, Receiver<Told>) {
    let (sender, receiver) = sync_channel(EXECS_MAX);
    (Orders(sender), receiver)
}

/// A process that is profiled.
struct Attached {
    start_ticks: u64,
    id: u32,
    slot: u32,
    points: Vec<u32>,
    /// Closing it takes the breakpoints out.
    _link: OwnedFd,
}

/// A process that is to be looked at.
struct Due {
    pid: u32,
    at: Instant,
    tries: u32,
}

/// Attaches and detaches. Owned by its thread.
pub(crate) struct Profiler {
    program: HeapProgram,
    rules: Vec<Rule>,
    /// For labels and mappings; its table stays empty.
    processes: Processes,
    images: ImageReader,
    attached: HashMap<u32, Attached>,
    /// Start of each process that was looked at.
    seen: HashMap<u32, u64>,
    due: VecDeque<Due>,
    files: HashMap<ExecutableId, Arc<Result<Allocator, ScanError>>>,
    free_slots: Vec<u32>,
    free_points: Vec<u32>,
    next_id: u32,
    is_paused: bool,
    targets: Targets,
    gauges: Arc<HeapGauges>,
}

impl Profiler {
    /// Profiles nobody yet.
    pub(crate) fn new(
        program: HeapProgram,
        rules: Vec<Rule>,
        processes: Processes,
        images: ImageReader,
        targets: Targets,
        gauges: Arc<HeapGauges>,
    ) -> Self {
        Self {
            program,
            rules,
            processes,
            images,
            attached: HashMap::new(),
            seen: HashMap::new(),
            due: VecDeque::new(),
            files: HashMap::new(),
            free_slots: (0..TARGETS_MAX).rev().collect(),
            free_points: (0..POINTS_MAX).rev().collect(),
            next_id: 1,
            is_paused: true,
            targets,
            gauges,
        }
    }

    /// Follows processes until it is told to stop. All probes are gone when it returns.
    pub(crate) fn run(mut self, told: &Receiver<Told>) {
        let (mut ticked, mut scanned) = (Instant::now(), Instant::now());
        loop {
            match told.recv_timeout(self.wait(ticked)) {
                Ok(Told::Exec(pid)) => self.exec(pid),
                Ok(Told::Resume) => {
                    self.is_paused = false;
                    self.scan();
                }
                Ok(Told::Pause) => self.pause(),
                Err(RecvTimeoutError::Timeout) => {}
                // The last snapshot is of those that still are.
                Ok(Told::Stop) | Err(RecvTimeoutError::Disconnected) => return self.look_after_attached(),
            }
            if self.is_paused {
                continue;
            }
            self.look_at_due();
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.look_after_attached();
            }
            if scanned.elapsed() >= SCAN_INTERVAL {
                scanned = Instant::now();
                self.scan();
            }
        }
    }

    fn wait(&self, ticked: Instant) -> Duration {
        let due = self.due.front().map(|due| due.at.saturating_duration_since(Instant::now()));
        TICK.saturating_sub(ticked.elapsed()).min(due.unwrap_or(TICK))
    }

    /// Takes all probes out, and begins anew when it is resumed.
    fn pause(&mut self) {
        self.is_paused = true;
        let attached: Vec<u32> = self.attached.keys().copied().collect();
        attached.into_iter().for_each(|pid| self.detach(pid));
        self.seen.clear();
        self.due.clear();
    }

    /// What was known of the process is void.
    fn exec(&mut self, pid: u32) {
        self.detach(pid);
        self.seen.remove(&pid);
        self.due.push_back(Due { pid, at: Instant::now(), tries: 0 });
    }

    /// Looks at every process that has come since.
    fn scan(&mut self) {
        let pids: HashSet<u32> = self.images.pids().into_iter().collect();
        self.seen.retain(|pid, _| pids.contains(pid));
        for pid in pids {
            let start = self.images.start_ticks(pid);
            if start.is_some() && self.seen.get(&pid).copied() != start {
                self.look_at(Due { pid, at: Instant::now(), tries: 0 });
            }
        }
        self.gauges.scans.fetch_add(1, Relaxed);
    }

    fn look_at_due(&mut self) {
        let now = Instant::now();
        for _ in 0..self.due.len() {
            let Some(due) = self.due.pop_front() else { return };
            if due.at <= now {
                self.look_at(due);
            } else {
                self.due.push_back(due);
            }
        }
    }

    /// Profiles the process if a rule says so.
    fn look_at(&mut self, due: Due) {
        let Due { pid, at: _, tries } = due;
        let Some(start_ticks) = self.images.start_ticks(pid) else { return };
        self.seen.insert(pid, start_ticks);
        if self.attached.contains_key(&pid) || pid == std::process::id() {
            return;
        }
        let labels = self.processes.series_of(pid);
        let Some(rate) = rules::rate_of(&self.rules, pid, &labels) else { return };
        match self.attach(pid, start_ticks, rate) {
            Ok(()) => {}
            Err(HeapError::NotReady) if tries < LINKER_TRIES => {
                self.due.push_back(Due { pid, at: Instant::now() + LINKER_DELAY, tries: tries + 1 });
            }
            Err(error) => {
                self.gauges.refused.fetch_add(1, Relaxed);
                warn!(pid, error = %format!("{:#}", anyhow::Error::from(error)), "heap is not profiled");
            }
        }
    }

    fn attach(&mut self, pid: u32, start_ticks: u64, rate: u32) -> Result<(), HeapError> {
        let found = self.find_allocator(pid)?;
        let functions = found.functions();
        let enough = !self.free_slots.is_empty() && self.free_points.len() >= functions.len();
        let slot = self.free_slots.pop().filter(|_| enough);
        let slot = slot.ok_or(HeapError::Full { max: TARGETS_MAX, points: POINTS_MAX })?;
        let points = self.free_points.split_off(self.free_points.len() - functions.len());
        let id = self.next_id;
        self.next_id += 1;
        match self.probe(pid, &found, Target { id, rate }, slot, &points) {
            Ok(link) => {
                let functions = points.len();
                self.targets.lock().insert(id);
                self.attached.insert(pid, Attached { start_ticks, id, slot, points, _link: link });
                self.gauges.targets.store(self.attached.len() as u64, Relaxed);
                self.gauges.attached.fetch_add(1, Relaxed);
                let file = found.executable.name().into_owned();
                info!(pid, rate, functions, file, "profiling the heap");
                self.processes.request_tables(pid);
                Ok(())
            }
            Err(error) => {
                self.free_slots.push(slot);
                self.free_points.extend(points);
                Err(error)
            }
        }
    }

    /// Writes what the program finds at each probe, then puts the probes in.
    fn probe(
        &mut self,
        pid: u32,
        found: &Found,
        target: Target,
        slot: u32,
        points: &[u32],
    ) -> Result<OwnedFd, HeapError> {
        self.program.set_target(slot, target)?;
        let mut probes = Vec::new();
        for (&cookie, (function, address)) in points.iter().zip(found.functions()) {
            let &Function { name: _, call, offset, arguments, flags } = function;
            let point = Point { address, target: slot, call: call as u8, flags, arguments };
            self.program.set_point(cookie, point)?;
            probes.push(Probe { offset, cookie: cookie.into() });
        }
        let executable = &found.executable;
        // Names the open file, whatever has become of its path.
        let file = PathBuf::from(format!("/proc/self/fd/{}", executable.file().as_raw_fd()));
        let attached = self.program.attach(&file, pid, &probes);
        attached.map_err(|source| HeapError::Attach { file: executable.to_string(), source })
    }

    /// The first object in the order of symbol look-up that defines `malloc`.
    fn find_allocator(&mut self, pid: u32) -> Result<Found, HeapError> {
        let objects = link_map::objects(&self.images.directory(pid)).ok_or(HeapError::Objects)?;
        let mappings = self.images.mappings(pid);
        let candidates: Vec<Arc<Executable>> = match objects {
            Objects::NotReady => return Err(HeapError::NotReady),
            Objects::Static => executables(&mappings).take(1).map(|(executable, _)| executable).collect(),
            Objects::Dynamic(loads) => {
                let at = |load| executables(&mappings).find(|(_, found)| *found == load);
                loads.into_iter().filter_map(at).map(|(executable, _)| executable).collect()
            }
        };
        for executable in candidates {
            let scan = self.scan_file(&executable);
            match &*scan {
                Ok(_) => return Ok(Found { executable, scan, mappings }),
                Err(ScanError::NoMalloc | ScanError::Format) => {}
                Err(source) => {
                    return Err(HeapError::Scan { file: executable.to_string(), source: *source });
                }
            }
        }
        Err(HeapError::NoAllocator)
    }

    fn scan_file(&mut self, executable: &Executable) -> Arc<Result<Allocator, ScanError>> {
        if let Some(known) = self.files.get(&executable.id()) {
            return Arc::clone(known);
        }
        let scan = Arc::new(scan(executable).unwrap_or(Err(ScanError::Format)));
        if self.files.len() >= FILES_MAX {
            self.files.clear();
        }
        self.files.insert(executable.id(), Arc::clone(&scan));
        scan
    }

    /// Lets go of processes that have ended.
    fn look_after_attached(&mut self) {
        let gone: Vec<u32> = self
            .attached
            .iter()
            .filter(|(pid, attached)| self.images.start_ticks(**pid) != Some(attached.start_ticks))
            .map(|(&pid, _)| pid)
            .collect();
        gone.into_iter().for_each(|pid| self.detach(pid));
        let hits = (0..TARGETS_MAX).filter_map(|slot| self.program.hits(slot).ok()).sum();
        self.gauges.hits.store(hits, Relaxed);
    }

    fn detach(&mut self, pid: u32) {
        let Some(Attached { start_ticks: _, id, slot, points, _link }) = self.attached.remove(&pid) else {
            return;
        };
        drop(_link);
        self.targets.lock().remove(&id);
        self.free_slots.push(slot);
        self.free_points.extend(points);
        self.gauges.targets.store(self.attached.len() as u64, Relaxed);
        info!(pid, "the heap is no longer profiled");
    }
}

/// Whether the dynamic linker of a process has loaded its objects, where it has one.
pub(crate) fn has_loaded(pid: u32) -> bool {
    let objects = link_map::objects(format!("/proc/{pid}").as_ref());
    matches!(objects, Some(Objects::Static | Objects::Dynamic(_)))
}

/// A process's allocator.
struct Found {
    executable: Arc<Executable>,
    scan: Arc<Result<Allocator, ScanError>>,
    mappings: Vec<Mapping>,
}

impl Found {
    /// Its functions, each with the address of its probe in the process.
    fn functions(&self) -> Vec<(&Function, u64)> {
        let points = self.scan.as_ref().as_ref().map_or(&[][..], |allocator| &allocator.points);
        points.iter().filter_map(|function| Some((function, self.address(function.offset)?))).collect()
    }

    fn address(&self, offset: u64) -> Option<u64> {
        self.mappings.iter().find_map(|mapping| {
            let Backing::Executable(executable) = &mapping.backing else { return None };
            let range = mapping.range();
            let into = offset.checked_sub(mapping.offset().0)?;
            let address = range.start.0.checked_add(into)?;
            (executable.id() == self.executable.id() && address < range.end.0).then_some(address)
        })
    }
}

/// Each executable that is mapped, with how far from where its file says.
fn executables(mappings: &[Mapping]) -> impl Iterator<Item = (Arc<Executable>, u64)> {
    mappings.iter().filter_map(|mapping| {
        let Backing::Executable(executable) = &mapping.backing else { return None };
        let FileOffset(offset) = mapping.offset();
        let stated = executable.elf_addr(FileOffset(offset))?;
        Some((Arc::clone(executable), mapping.range().start.0.wrapping_sub(stated.0)))
    })
}

fn scan(executable: &Executable) -> Option<Result<Allocator, ScanError>> {
    let file = executable.file();
    let bytes = file.metadata().ok()?.len();
    let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes > 0 && bytes as u64 <= FILE_BYTES_MAX)?;
    let map = FileMap::new(file, bytes).ok()?;
    map.read(profiler_heap::scan).ok()
}
