//! The durable store: memory for what is new, parts for what is older, and the way from one to the other.
//!
//! ```text
//! push ─▶ write-ahead log, synced ─▶ memory ─▶ acknowledged
//!                                      │ each minute, or when large
//!                                      ▼
//!                                    part ─▶ log segment deleted      closed hours: parts ─▶ one part
//! ```
//! A query sees memory and parts as they stood at one moment ([`Snapshot`]).

mod columns;
mod layout;
mod maintain;
mod open;
mod part;
mod prune;
mod read;
mod recent;
mod snapshot;
mod writer;

use std::{
    collections::HashSet,
    fs::File,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use self::{
    layout::{Hour, Layout, TABLES},
    open::{OpenError, create_data_dir, lock, open_parts},
    part::Part,
    recent::{BATCHES_MAX, RecentBatches, Seen},
};
pub(crate) use self::{
    read::{LabelNeed, Row, Scan},
    snapshot::Snapshot,
    writer::AppendError,
};
use crate::{
    metrics::{Gauges, Metrics},
    model::{BatchId, Profile},
    stack::StackCache,
    wal,
};

/// The sizes and times of a store.
#[derive(Debug, Clone)]
pub(crate) struct StoreOptions {
    pub(crate) data_dir: PathBuf,
    pub(crate) retention: Duration,
    /// Longest time a profile stays in memory only (and in the log).
    pub(crate) flush_interval: Duration,
    /// Memory at which a part is written early, in bytes.
    pub(crate) flush_bytes: usize,
    /// Memory at which pushes are deferred, in bytes: parts cannot be written fast enough, or at all.
    pub(crate) memory_bytes_max: usize,
    /// Bound on stacks and frames kept for queries, in bytes.
    pub(crate) stack_cache_bytes_max: usize,
}

/// Reads a record of the log back into what [`Store::append`] was given.
pub(crate) type Replay<'a> = dyn FnMut(&[u8], &StackCache) -> Result<(BatchId, Vec<Profile>), String> + 'a;

/// The store. Threads of its own write the log and the parts; [`Store::close`] ends them.
#[derive(Debug)]
pub(crate) struct Store {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
}

#[derive(Debug)]
struct Threads {
    commands: mpsc::SyncSender<writer::Command>,
    writer: JoinHandle<()>,
    wake: mpsc::SyncSender<maintain::Wake>,
    maintainer: JoinHandle<()>,
}

/// What the threads and the callers of a store share.
#[derive(Debug)]
struct Shared {
    layout: Layout,
    options: StoreOptions,
    state: RwLock<State>,
    recent: Mutex<RecentBatches>,
    stacks: StackCache,
    metrics: Arc<Metrics>,
    /// [`Store::close`] was called.
    closing: AtomicBool,
    /// Held open: the lock ends with the process.
    _lock: File,
}

#[derive(Debug, Default)]
struct State {
    /// Acknowledged, in the segment being written.
    active: Vec<Arc<Profile>>,
    /// Being written to parts, or to be tried again.
    frozen: Vec<Arc<Profile>>,
    memory_bytes: usize,
    parts: Vec<Arc<Part>>,
}

impl Shared {
    fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    // A panic while the state was locked leaves lists that are whole: each update is one assignment or push.
    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn recent(&self) -> MutexGuard<'_, RecentBatches> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Opens the store in `options.data_dir`, which is created if absent and made readable by its owner
    /// only: removes what unfinished writes left, reads the list of parts, replays the log.
    pub(crate) fn open(
        options: StoreOptions,
        metrics: Arc<Metrics>,
        replay: &mut Replay<'_>,
    ) -> Result<Self, OpenError> {
        let layout = Layout::new(&options.data_dir);
        create_data_dir(&layout)?;
        let lock = lock(&layout.lock())?;
        for table in TABLES {
            part::create_directories(layout.data_dir(), &layout.table(table))?;
        }
        part::create_directories(layout.data_dir(), &layout.wal())?;
        let stacks = StackCache::new(options.stack_cache_bytes_max);
        let parts = open_parts(&layout, &metrics)?;
        let state = State { parts, ..State::default() };
        let shared = Shared {
            layout,
            options,
            state: RwLock::new(state),
            recent: Mutex::default(),
            stacks,
            metrics,
            closing: AtomicBool::new(false),
            _lock: lock,
        };
        let segments = shared.replay(replay)?;
        Ok(Self::start(shared, segments))
    }

    fn start(shared: Shared, old_segments: Vec<u64>) -> Self {
        let shared = Arc::new(shared);
        let newest = old_segments.last().copied().unwrap_or(0);
        // A part may remember a segment that is gone; sequences never repeat.
        let in_parts = shared.state().parts.iter().map(|part| part.wal_sequence).max().unwrap_or(0);
        let log = writer::Log::new(shared.layout.wal(), newest.max(in_parts) + 1);
        let (wake, woken) = mpsc::sync_channel(1);
        let (commands, writer) = writer::spawn(Arc::clone(&shared), log, wake.clone());
        let maintainer = maintain::spawn(Arc::clone(&shared), commands.clone(), woken, old_segments);
        let threads = Threads { commands, writer, wake, maintainer };
        Self { shared, threads: Mutex::new(Some(threads)) }
    }

    /// The cache that profiles to be appended share their stacks in.
    pub(crate) fn stacks(&self) -> &StackCache {
        &self.shared.stacks
    }

    /// Stores a batch: `record` is what a restart replays, `profiles` what queries see. Waits until it is durable;
    /// blocks, so never call it from async code.
    pub(crate) fn append(
        &self,
        id: BatchId,
        record: Vec<u8>,
        profiles: Vec<Profile>,
    ) -> Result<Appended, AppendError> {
        if self.shared.state().memory_bytes > self.shared.options.memory_bytes_max {
            return Err(AppendError::MemoryFull);
        }
        match self.shared.recent().begin(id) {
            Seen::Stored => return Ok(Appended::Duplicate),
            Seen::Underway => return Err(AppendError::Underway),
            Seen::New => {}
        }
        let result = self.send(record, profiles);
        match &result {
            Ok(()) => self.shared.recent().finish(id),
            Err(_) => self.shared.recent().abandon(&id),
        }
        result.map(|()| Appended::Stored)
    }

    fn send(&self, record: Vec<u8>, profiles: Vec<Profile>) -> Result<(), AppendError> {
        let commands = match &*self.threads() {
            Some(threads) => threads.commands.clone(),
            None => return Err(AppendError::Closed),
        };
        let (done, outcome) = mpsc::sync_channel(1);
        let profiles = profiles.into_iter().map(Arc::new).collect();
        let append = writer::Append { record, profiles, done };
        commands.send(writer::Command::Append(append)).map_err(|_| AppendError::Closed)?;
        outcome.recv().map_err(|_| AppendError::Closed)?
    }

    /// Whether a batch is stored already; cheaper than decoding it first.
    pub(crate) fn has_batch(&self, id: BatchId) -> bool {
        self.shared.recent().has(&id)
    }

    /// Everything stored at this moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.shared.state();
        let memory = state.frozen.iter().chain(&state.active).cloned().collect();
        Snapshot { memory, parts: state.parts.clone(), shared: Arc::clone(&self.shared) }
    }

    pub(crate) fn gauges(&self) -> Gauges {
        let state = self.shared.state();
        Gauges {
            memory_bytes: state.memory_bytes,
            memory_profiles: state.active.len() + state.frozen.len(),
            parts: state.parts.len(),
            stack_cache_bytes: self.shared.stacks.bytes(),
        }
    }

    /// Writes what is in memory to parts and ends the threads. Later pushes are refused; queries go on.
    pub(crate) fn close(&self) {
        let Some(Threads { commands, writer, wake, maintainer }) = self.threads().take() else { return };
        self.shared.closing.store(true, Relaxed);
        // Fails only when the thread is gone, and then there is nothing to end.
        let _ = wake.send(maintain::Wake::Close);
        let _ = maintainer.join();
        drop(commands);
        let _ = writer.join();
    }

    fn threads(&self) -> MutexGuard<'_, Option<Threads>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

/// What came of storing a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appended {
    Stored,
    /// The batch was stored before.
    Duplicate,
}

impl Shared {
    /// Reads every segment of the log into memory, but for what parts hold already. Gives the segments' sequences.
    fn replay(&self, decode: &mut Replay<'_>) -> Result<Vec<u64>, OpenError> {
        let directory = self.layout.wal();
        let segments = wal::segments(&directory)?;
        let stored = self.remember_parts(segments.first().copied())?;
        for &sequence in &segments {
            let replayed = wal::replay(&directory, sequence, |record| match decode(&record, &self.stacks) {
                Ok((batch, profiles)) => self.restore(batch, profiles, &stored),
                Err(error) => {
                    self.metrics.wal_records_unreadable.add(1);
                    tracing::error!("write-ahead log, segment {sequence}: a record was skipped: {error}");
                }
            })?;
            self.metrics.wal_records_replayed.add(replayed.records);
            self.metrics.wal_bytes_torn.add(replayed.torn_bytes);
            if replayed.torn_bytes > 0 {
                tracing::warn!(
                    "write-ahead log, segment {sequence}: {} bytes at the end are no whole record",
                    replayed.torn_bytes
                );
            }
        }
        Ok(segments)
    }

    /// Remembers the newest batches of the parts; gives, by hour, those that the log may hold too.
    fn remember_parts(&self, first_segment: Option<u64>) -> Result<HashSet<(Hour, BatchId)>, OpenError> {
        let mut in_log = HashSet::new();
        let mut state = self.state_mut();
        state.parts.sort_by_key(|part| part.wal_sequence);
        let mut remembered: Vec<HashSet<BatchId>> = Vec::new();
        for part in state.parts.iter().rev() {
            let may_be_in_log = first_segment.is_some_and(|first| part.wal_sequence >= first);
            let enough = remembered.iter().map(HashSet::len).sum::<usize>() >= BATCHES_MAX;
            if !may_be_in_log && enough {
                break;
            }
            let batches = part.batch_ids()?;
            if may_be_in_log {
                in_log.extend(batches.iter().map(|batch| (part.hour, *batch)));
            }
            remembered.push(batches);
        }
        let mut recent = self.recent();
        remembered.into_iter().rev().flatten().for_each(|batch| recent.finish(batch));
        Ok(in_log)
    }

    /// Takes a replayed batch into memory. A part of one hour may have been written when the crash came and the part
    /// of the next hour not, so the hours of a batch are looked at one by one.
    fn restore(&self, batch: BatchId, profiles: Vec<Profile>, stored: &HashSet<(Hour, BatchId)>) {
        let mut state = self.state_mut();
        // Twice in the log: the first write was durable, but its sync failed and the sender tried again.
        let again = state.frozen.iter().any(|profile| profile.head.batch == batch);
        for profile in profiles {
            if !again && !stored.contains(&(Hour::of(profile.head.start_us), batch)) {
                state.memory_bytes += profile.bytes;
                state.frozen.push(Arc::new(profile));
            }
        }
        self.recent().finish(batch);
    }
}

/// Now, in Unix microseconds.
fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
