//! Unwind tables for the kernel side: made from the executables of processes, kept in its maps, named by its process
//! entries. All on a thread of its own; until a process has its tables, its stacks are walked by frame pointers.
//!
//! ```text
//! worker: new process, exec, unknown address ─▶ requests (bounded) ─▶ unwind thread
//!                                                                      /proc/<pid>/maps
//!                                                                      ELF files ─▶ rules, leaves, directories
//!                                                                      a free chunk ─▶ the process's entry
//! ```
//! A request may be lost: the worker asks again for as long as samples come without tables. A child has its parent's
//! tables from its first instruction: the kernel side copies the entry, and the fork's record makes it known here.

mod chunk;
mod ids;
mod lives;
mod make;
mod sharing;
mod tables;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    time::{Duration, Instant},
};

use aya::maps::MapError;
use profiler_common::unwind::mappings::{CHUNK_RECORDS, NS_PER_TICK, ProcessEntry};
use profiler_unwind::{Architecture, Source};
use tracing::{debug, warn};

use self::{
    chunk::{CodeRange, MappedTable, Part, Record},
    make::MakeError,
    sharing::{ChunkRef, Chunks, GivenUp},
    tables::{Owner, PlaceError, Tables, Write},
};
pub(crate) use self::{
    lives::{Life, Lives},
    make::Reason,
};
use crate::{
    addr::FileOffset,
    background::Payer,
    bpf::UnwindMaps,
    executable::Executable,
    memory::UnwindSizes,
    process::{Backing, ImageReader, Mapping},
    sys::memory,
    vdso,
};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Architecture = Architecture::X86_64;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Architecture = Architecture::Aarch64;

/// Requests between worker and unwind thread, of which those with forks and ends take a kilobyte each. A machine that starts
/// more processes at a time asks again.
const REQUESTS_MAX: usize = 1024;
/// Forks and ends in one request, 16 bytes each.
const LIVES_MAX: usize = 64;
/// Processes that wait to be looked at.
const WAITING_MAX: usize = 4096;
/// New mappings of one process that wait: with more of them all of its mappings are read.
const NEW_MAPPINGS_MAX: usize = 32;
/// Time between two looks for processes that have exited.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two attempts to find room for what had none: the largest tables take 0.15 s to make.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Making tables of so many rows leaves megabytes of free memory behind.
const MANY_ROWS: u64 = 50_000;
/// Executables remembered to have no table. Emptied when full; they are then tried once more.
const REFUSED_MAX: usize = 8192;

/// What happened to tables.
#[derive(Debug, Default)]
pub(crate) struct UnwindCounts {
    /// Tables in the kernel now.
    pub(crate) tables: AtomicU64,
    /// Pages of rows they take.
    pub(crate) leaves: AtomicU64,
    /// Processes with tables now.
    pub(crate) processes: AtomicU64,
    /// The processes that ran when the agent started have their tables.
    pub(crate) has_scanned: AtomicBool,
    /// Requests there was no room for.
    pub(crate) requests_dropped: AtomicU64,
    errors: [AtomicU64; Reason::ALL.len()],
}

impl UnwindCounts {
    /// Tables, or processes, that had to do without.
    pub(crate) fn errors(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.errors.iter().map(|count| count.load(Relaxed)))
    }

    fn count_error(&self, reason: Reason) {
        let known = Reason::ALL.iter().zip(&self.errors).find(|(known, _)| **known == reason);
        known.expect("ALL holds every reason").1.fetch_add(1, Relaxed);
    }
}

/// Where the worker asks for tables. The unwind thread ends when all of these are gone.
#[derive(Clone, Debug)]
pub(crate) struct TableRequests {
    requests: SyncSender<Request>,
    counts: Arc<UnwindCounts>,
}

/// What the worker has learned of a process.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// It may have other mappings than before.
    Read(u32),
    /// The same, and to be told when its tables are made or cannot be had.
    ReadFor(u32, SyncSender<()>),
    /// It has one more mapping.
    Mapped(u32, Mapping),
    /// Processes were forked, or have ended.
    Lives(Box<[Life]>),
}

impl TableRequests {
    /// Asks for the tables of a process as it is now. Never waits.
    pub(crate) fn request(&self, pid: u32) {
        self.send(Request::Read(pid));
    }

    /// The same, and waits until they are made or cannot be had, or the deadline has passed.
    pub(crate) fn request_and_wait(&self, pid: u32, deadline: Duration) {
        let (sender, done) = sync_channel(1);
        self.send(Request::ReadFor(pid, sender));
        // It is no error to go on without.
        let _ = done.recv_timeout(deadline);
    }

    /// Tells of a new mapping. Where that is lost, the first sample whose stack ends there asks for all of them.
    pub(crate) fn mapped(&self, pid: u32, mapping: Mapping) {
        self.send(Request::Mapped(pid, mapping));
    }

    /// Tells of forks and ends. Where that of a fork is lost, the child's first sample without tables asks for them; where
    /// that of an end is, the next look for processes that are gone finds it.
    pub(crate) fn tell(&self, lives: &mut Lives) {
        lives.take(LIVES_MAX).for_each(|lives| self.send(Request::Lives(lives)));
    }

    fn send(&self, request: Request) {
        if self.requests.try_send(request).is_err() {
            self.counts.requests_dropped.fetch_add(1, Relaxed);
        }
    }
}

/// The channel that requests go through.
pub(crate) fn requests(counts: Arc<UnwindCounts>) -> (TableRequests, Receiver<Request>) {
    let (requests, received) = sync_channel(REQUESTS_MAX);
    (TableRequests { requests, counts }, received)
}

/// Makes tables and gives them to the kernel side. The only writer of its maps.
pub(crate) struct Unwinder {
    maps: UnwindMaps,
    images: ImageReader,
    counts: Arc<UnwindCounts>,
    tables: Tables,
    chunks: Chunks,
    processes: HashMap<u32, Published>,
    /// Executables that have no table, and will not have one on another try.
    refused: HashSet<Owner>,
    /// Executables there was no room for, and when.
    crowded_out: HashMap<Owner, Instant>,
    /// Processes that lack a table for want of room.
    incomplete: HashSet<u32>,
    /// Processes to look at that were asked for: samples of theirs go without tables.
    waiting: VecDeque<u32>,
    /// Processes to look at when no other waits: those that ran at the start, and those that lacked room.
    unasked: VecDeque<u32>,
    /// What those have mapped that need not be read for it: all else of theirs is known.
    new_mappings: HashMap<u32, Vec<Mapping>>,
    /// Who is to be told when one was looked at.
    told: Vec<(u32, SyncSender<()>)>,
    /// Rows of the tables that were made since free memory was given back.
    made_rows: u64,
    payer: Payer,
}

/// A process that has an entry.
struct Published {
    start_ticks: u64,
    chunk: ChunkRef,
}

impl Published {
    fn entry(&self) -> ProcessEntry {
        let &Self { start_ticks, chunk: ChunkRef { chunk, generation } } = self;
        ProcessEntry { start_ticks, chunk, generation }
    }
}

/// A process as it is to be published. Its tables are held.
struct Image {
    start_ticks: u64,
    records: Vec<Record>,
    owners: HashSet<Owner>,
}

impl Unwinder {
    /// No tables yet, in maps of these sizes.
    pub(crate) fn new(
        maps: UnwindMaps,
        sizes: UnwindSizes,
        images: ImageReader,
        counts: Arc<UnwindCounts>,
        payer: Payer,
    ) -> Self {
        Self {
            maps,
            images,
            counts,
            tables: Tables::new(ARCHITECTURE, sizes.leaves, sizes.directories),
            chunks: Chunks::new(sizes.processes),
            processes: HashMap::new(),
            refused: HashSet::new(),
            crowded_out: HashMap::new(),
            incomplete: HashSet::new(),
            waiting: VecDeque::new(),
            unasked: VecDeque::new(),
            new_mappings: HashMap::new(),
            told: Vec::new(),
            made_rows: 0,
            payer,
        }
    }

    /// Looks at every process there is, at those asked for first, until nobody can ask any more.
    ///
    /// Tables of programs that are never sampled would else take the room of those that are.
    pub(crate) fn run(mut self, requests: &Receiver<Request>) {
        self.unasked = self.images.pids().into();
        let (mut swept, mut retried) = (Instant::now(), Instant::now());
        self.payer.begin();
        let mut wait = None;
        while self.receive(requests, wait).is_some() {
            self.payer.pay();
            wait = if self.is_idle() { None } else { self.payer.wait(Instant::now()) };
            if wait.is_none()
                && let Some(pid) = self.waiting.pop_front().or_else(|| self.unasked.pop_front())
            {
                match self.new_mappings.remove(&pid) {
                    Some(mappings) => self.extend(pid, &mappings),
                    None => self.update(pid),
                }
                self.told.extract_if(.., |(asked, _)| *asked == pid).for_each(|(_, asker)| {
                    // One that waits no more need not know.
                    let _ = asker.try_send(());
                });
            }
            if self.is_idle() {
                self.counts.has_scanned.store(true, Relaxed);
                self.release_memory();
            }
            if swept.elapsed() >= SWEEP_INTERVAL {
                self.sweep();
                swept = Instant::now();
            }
            self.crowded_out.retain(|_, since| since.elapsed() < RETRY_INTERVAL);
            if retried.elapsed() >= RETRY_INTERVAL {
                self.unasked.extend(self.incomplete.drain());
                retried = Instant::now();
            }
            self.update_counts();
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.unasked.is_empty()
    }

    /// Takes what has been asked for; waits only while there is nothing to do, or no CPU time to do it. `None` at the end.
    fn receive(&mut self, requests: &Receiver<Request>, wait: Option<Duration>) -> Option<()> {
        if let Some(wait) = if self.is_idle() { Some(SWEEP_INTERVAL) } else { wait } {
            match requests.recv_timeout(wait) {
                Ok(request) => self.take(request),
                Err(RecvTimeoutError::Timeout) => return Some(()),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        for _ in 0..REQUESTS_MAX {
            match requests.try_recv() {
                Ok(request) => self.take(request),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return None,
            }
        }
        Some(())
    }

    /// Forks and ends are a look-up each and done at once, in their order; readings wait for their turn.
    fn take(&mut self, request: Request) {
        match request {
            Request::Read(pid) => {
                // All of them are read: the new ones are among them.
                self.new_mappings.remove(&pid);
                self.enqueue(pid);
            }
            Request::Mapped(pid, mapping) => self.take_mapping(pid, mapping),
            // Somebody waits: ahead of those nobody waits for.
            Request::ReadFor(pid, sender) => {
                self.new_mappings.remove(&pid);
                self.waiting.push_front(pid);
                self.told.push((pid, sender));
            }
            Request::Lives(lives) => lives.into_iter().for_each(|life| match life {
                Life::Forked { pid, start_ns: _ } => self.adopt(pid),
                Life::Exited { pid, start_ns } => self.bury(pid, start_ns),
            }),
        }
    }

    /// Remembers a new mapping until its process's turn, unless all of them are to be read then.
    fn take_mapping(&mut self, pid: u32, mapping: Mapping) {
        match self.new_mappings.get_mut(&pid) {
            Some(mappings) if mappings.len() < NEW_MAPPINGS_MAX => mappings.push(mapping),
            Some(_) => {
                self.new_mappings.remove(&pid);
            }
            None if self.waiting.contains(&pid) || self.unasked.contains(&pid) => {}
            None => {
                if self.enqueue(pid) {
                    self.new_mappings.insert(pid, vec![mapping]);
                }
            }
        }
    }

    /// The process is looked at when its turn comes; `false` where too many wait.
    fn enqueue(&mut self, pid: u32) -> bool {
        if self.waiting.contains(&pid) {
            return true;
        }
        if self.waiting.len() >= WAITING_MAX {
            self.counts.requests_dropped.fetch_add(1, Relaxed);
            return false;
        }
        self.unasked.retain(|&other| other != pid);
        self.waiting.push_back(pid);
        true
    }

    /// The child is one more user of the chunk that the kernel side gave it.
    fn adopt(&mut self, pid: u32) {
        let now = Instant::now();
        let entry = match self.maps.entry(pid) {
            Ok(Some(entry)) => entry,
            // It has ended, or has a new image by now.
            Ok(None) => return,
            Err(error) => return self.counts.count_error(map_failed(&error)),
        };
        let ProcessEntry { start_ticks, chunk, generation } = entry;
        let published = Published { start_ticks, chunk: ChunkRef { chunk, generation } };
        let is_known = self.processes.get(&pid).is_some_and(|known| known.entry() == entry);
        if !is_known && self.chunks.join(published.chunk) {
            let before = self.processes.insert(pid, published);
            self.give_up(before, now);
        }
    }

    /// Forgets a process that has ended. The kernel side has done so, unless its entry was written while it ended.
    fn bury(&mut self, pid: u32, start_ns: u64) {
        let is_it = |start_ticks: u64| start_ns == 0 || start_ticks == start_ns / NS_PER_TICK;
        if self.processes.get(&pid).is_some_and(|known| is_it(known.start_ticks)) {
            let before = self.processes.remove(&pid);
            self.give_up(before, Instant::now());
        }
        if let Ok(Some(entry)) = self.maps.entry(pid)
            && is_it(entry.start_ticks)
        {
            self.forget(pid);
        }
    }

    /// Files were read: their rows are in the kernel now.
    fn release_memory(&mut self) {
        if self.made_rows >= MANY_ROWS {
            self.made_rows = 0;
            memory::release_free();
        }
    }

    fn update(&mut self, pid: u32) {
        let now = Instant::now();
        self.incomplete.remove(&pid);
        let Some(image) = self.read(pid, now) else {
            self.withdraw(pid, now);
            return;
        };
        let is_known = |known: &Published| {
            known.start_ticks == image.start_ticks
                && self.chunks.records(known.chunk) == Some(image.records.as_slice())
        };
        if self.processes.get(&pid).is_some_and(is_known) {
            self.release(image.owners, now);
            self.renew(pid);
        } else if let Err(reason) = self.publish(pid, image, now) {
            self.counts.count_error(reason);
            self.withdraw(pid, now);
        }
    }

    /// Adds mappings to those of a process that has its tables; another one is read.
    fn extend(&mut self, pid: u32, mappings: &[Mapping]) {
        let now = Instant::now();
        // After an exec its entry is gone, or another: what is known is of the image before.
        let entry = self.maps.entry(pid).ok().flatten();
        let known = self.processes.get(&pid).filter(|known| Some(known.entry()) == entry).and_then(|known| {
            let (records, owners) = self.chunks.content(known.chunk)?;
            Some((known.start_ticks, records.to_vec(), owners.clone()))
        });
        let Some((start_ticks, mut records, mut owners)) = known else {
            return self.update(pid);
        };
        owners.iter().for_each(|&owner| self.tables.hold(owner));
        let before = records.clone();
        for mapping in mappings {
            let range = self.code_range(pid, mapping, &mut owners, now);
            records = chunk::with(&records, &range);
        }
        if records.len() > CHUNK_RECORDS || records == before {
            self.release(owners, now);
            if records != before {
                self.counts.count_error(Reason::TooManyMappings);
                self.withdraw(pid, now);
            }
            return;
        }
        if let Err(reason) = self.publish(pid, Image { start_ticks, records, owners }, now) {
            self.counts.count_error(reason);
            self.withdraw(pid, now);
        }
    }

    /// The process as it is now, and tables for all of it that can be had; `None` for a process without code of its own.
    fn read(&mut self, pid: u32, now: Instant) -> Option<Image> {
        let start_ticks = self.images.start_ticks(pid)?;
        let mappings = self.images.mappings(pid);
        if mappings.is_empty() {
            return None;
        }
        let mut owners = HashSet::new();
        let ranges: Vec<_> =
            mappings.iter().map(|mapping| self.code_range(pid, mapping, &mut owners, now)).collect();
        let records = chunk::records(&ranges);
        if records.is_none() {
            self.counts.count_error(Reason::TooManyMappings);
        }
        // Another process may have taken the pid meanwhile.
        let is_same = self.images.start_ticks(pid) == Some(start_ticks);
        match records.filter(|_| is_same) {
            Some(records) => Some(Image { start_ticks, records, owners }),
            None => {
                self.release(owners, now);
                None
            }
        }
    }

    fn code_range(
        &mut self,
        pid: u32,
        mapping: &Mapping,
        owners: &mut HashSet<Owner>,
        now: Instant,
    ) -> CodeRange {
        let range = mapping.range();
        let (owner, bias, executable) = match &mapping.backing {
            Backing::Unnamed(name) if &**name == vdso::NAME => (Some(Owner::Vdso), range.start.0, None),
            Backing::Anonymous | Backing::Unnamed(_) => (None, 0, None),
            Backing::Executable(executable) => match bias(mapping, executable) {
                Some(bias) => {
                    let executable = self.images.settled(executable);
                    (Some(Owner::Executable(executable.id())), bias, Some(executable))
                }
                None => (None, 0, None),
            },
        };
        let parts = owner.and_then(|owner| {
            let parts = self.parts(pid, owner, executable.as_deref(), now)?;
            // Held from now on, lest the next table of this very process takes its place.
            if owners.insert(owner) {
                self.tables.hold(owner);
            }
            Some(parts)
        });
        let table = parts.map(|parts| MappedTable { bias, parts });
        CodeRange { addresses: range.start.0..range.end.0, table }
    }

    /// Where a table lies, made now unless it is there; `None` where it cannot be had.
    fn parts(
        &mut self,
        pid: u32,
        owner: Owner,
        executable: Option<&Executable>,
        now: Instant,
    ) -> Option<Arc<[Part]>> {
        if let Some(parts) = self.tables.parts(owner, now) {
            return Some(parts);
        }
        if self.refused.contains(&owner) {
            return None;
        }
        if self.crowded_out.contains_key(&owner) {
            self.incomplete.insert(pid);
            return None;
        }
        match self.make(owner, executable, now) {
            Ok(parts) => Some(parts),
            Err(reason) => {
                self.counts.count_error(reason);
                if reason == Reason::NoRoom {
                    self.crowded_out.insert(owner, now);
                    self.incomplete.insert(pid);
                } else {
                    self.refuse(owner);
                }
                None
            }
        }
    }

    fn make(
        &mut self,
        owner: Owner,
        executable: Option<&Executable>,
        now: Instant,
    ) -> Result<Arc<[Part]>, Reason> {
        let table = executable.map_or_else(make::of_vdso, make::of_executable).map_err(|error| {
            log_refusal(executable, &error);
            error.reason()
        })?;
        self.made_rows += table.counts().rows;
        let maps = &mut self.maps;
        let placed = self.tables.place(owner, &table, now, |write| match write {
            Write::Rule(id, rule) => maps.set_rule(id, rule),
            Write::Leaf(id, leaf) => maps.set_leaf(id, leaf),
            Write::Directory(id, directory) => maps.set_directory(id, directory),
        });
        placed.map_err(|error| match error {
            PlaceError::NoRoom => Reason::NoRoom,
            PlaceError::TooLarge => Reason::TooLarge,
            PlaceError::Write(error) => map_failed(&error),
        })
    }

    fn refuse(&mut self, owner: Owner) {
        if self.refused.len() >= REFUSED_MAX {
            self.refused.clear();
        }
        self.refused.insert(owner);
    }

    /// Writes the image to a free chunk and makes that the process's, then gives up what it had.
    fn publish(&mut self, pid: u32, image: Image, now: Instant) -> Result<(), Reason> {
        let Image { start_ticks, records, owners } = image;
        let value = chunk::chunk(&records);
        let chunk = match self.chunks.take(records, owners, now) {
            Ok(chunk) => chunk,
            Err(owners) => {
                self.release(owners, now);
                return Err(Reason::TooManyProcesses);
            }
        };
        let published = Published { start_ticks, chunk };
        let written = self.maps.set_chunk(chunk.chunk, &value);
        if let Err(error) = written.and_then(|()| self.maps.publish(pid, published.entry())) {
            self.give_up(Some(published), now);
            return Err(map_failed(&error));
        }
        let before = self.processes.insert(pid, published);
        self.give_up(before, now);
        Ok(())
    }

    /// Writes the entry again: the kernel side deletes it at exec, also when the new image is as the old one.
    fn renew(&mut self, pid: u32) {
        let Some(entry) = self.processes.get(&pid).map(Published::entry) else { return };
        if let Err(error) = self.maps.publish(pid, entry) {
            self.counts.count_error(map_failed(&error));
        }
    }

    /// The process goes back to frame pointers.
    fn withdraw(&mut self, pid: u32, now: Instant) {
        let Some(before) = self.processes.remove(&pid) else { return };
        self.forget(pid);
        self.give_up(Some(before), now);
    }

    fn forget(&mut self, pid: u32) {
        if let Err(error) = self.maps.forget(pid) {
            self.counts.count_error(map_failed(&error));
        }
    }

    /// The process uses its chunk no more. The last one ends all entries that name it, also those not known here.
    fn give_up(&mut self, before: Option<Published>, now: Instant) {
        let Some(Published { chunk, .. }) = before else { return };
        let Some(GivenUp { now: of, owners }) = self.chunks.leave(chunk, now) else { return };
        if let Err(error) = self.maps.set_generation(of.chunk, of.generation) {
            self.counts.count_error(map_failed(&error));
        }
        self.release(owners, now);
    }

    fn release(&mut self, owners: HashSet<Owner>, now: Instant) {
        owners.into_iter().for_each(|owner| self.tables.release(owner, now));
    }

    /// Forgets processes that are gone and whose end was not told.
    fn sweep(&mut self) {
        let now = Instant::now();
        let known: HashSet<u32> = self.processes.keys().copied().chain(self.maps.known()).collect();
        for pid in known.into_iter().filter(|&pid| !self.images.directory(pid).exists()).collect::<Vec<_>>() {
            self.withdraw(pid, now);
            self.forget(pid);
        }
    }

    fn update_counts(&self) {
        self.counts.tables.store(self.tables.len() as u64, Relaxed);
        self.counts.leaves.store(self.tables.leaves_used() as u64, Relaxed);
        self.counts.processes.store(self.processes.len() as u64, Relaxed);
    }
}

/// What is added to an ELF address of a mapping's file to get that of the process.
fn bias(mapping: &Mapping, executable: &Executable) -> Option<u64> {
    let FileOffset(offset) = mapping.offset();
    let first = executable.elf_addr(FileOffset(offset))?;
    Some(mapping.range().start.0.wrapping_sub(first.0))
}

/// What the unwind table of a file is made from, and its rows; else why there is none.
pub(crate) fn source_of(executable: &Executable) -> Result<(&'static str, u64), String> {
    let table =
        make::of_executable(executable).map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
    let source = match table.source() {
        Source::EhFrame => ".eh_frame",
        Source::EhFrameHdr => ".eh_frame by its header: sections are stripped",
        Source::DebugFrame => ".debug_frame",
        Source::Go => "frame pointers of Go",
    };
    Ok((source, table.counts().rows))
}

fn log_refusal(executable: Option<&Executable>, error: &MakeError) {
    let name = executable.map_or(vdso::NAME.into(), Executable::name);
    debug!(error = error as &dyn std::error::Error, %name, "no unwind table; frame pointers stay");
}

fn map_failed(error: &MapError) -> Reason {
    warn!(error = error as &dyn std::error::Error, "unwind tables cannot be written");
    Reason::Map
}
