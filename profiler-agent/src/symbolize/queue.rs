//! What waits to be symbolized, what is known, and who waits for it. No lock is held while a file is read.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cache::LocationCache;
use super::generated::PerfMapCounts;
use super::{Counts, Location, LocationId, LocationKey, NewFrame, Reason};
use crate::executable::{Executable, ExecutableId};
use crate::process::GeneratedCode;

/// Locations that may wait at a time: what a busy machine of 64 cores finds new in its first second.
const WAITING_MAX: usize = 64 << 10;

/// Addresses of one file in a batch; between batches another file gets its turn.
const BATCH_MAX: usize = 256;

/// Between batches of one file, that many times as long as the last one took: its tables are read anew for each, which is
/// to take a few thousandths of a CPU at most. Not longer than so many times as others are gathered.
const REST_FACTOR: u32 = 500;
const REST_GATHERS_MAX: u32 = 10;

/// Files whose last batch is remembered for that, by lane.
const RESTING_MAX: usize = 256;

/// Symbols and DWARF above this many bytes go to the large lane. Reading 16 MiB takes about 30 ms.
const QUICK_BYTES_MAX: u64 = 16 << 20;

/// Who symbolizes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Quick,
    Large,
}

impl Lane {
    /// Each with the name of its thread.
    pub(super) const ALL: [(Self, &'static str); 2] =
        [(Self::Quick, "symbolize"), (Self::Large, "symbolize-large")];

    fn of(source: &Source) -> Self {
        match source {
            // Go's table is not loaded, but read where it is asked.
            Source::File(executable) | Source::Reload(executable) if super::go::has_table(executable) => {
                Self::Quick
            }
            Source::File(executable) | Source::Reload(executable) => {
                let symbols = executable.symbols();
                let bytes = symbols.symbol_bytes.saturating_add(symbols.debug_bytes);
                if bytes > QUICK_BYTES_MAX { Self::Large } else { Self::Quick }
            }
            Source::Generated { .. } | Source::Kernel => Self::Quick,
        }
    }
}

/// Where the addresses of a batch lie.
#[derive(Clone, Debug)]
pub(super) enum Source {
    File(Arc<Executable>),
    /// No address: a file that has better names now than when it was read.
    Reload(Arc<Executable>),
    Generated {
        code: Arc<GeneratedCode>,
        version: u32,
    },
    Kernel,
}

/// What tells sources apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum SourceId {
    File(ExecutableId),
    Reload(ExecutableId),
    Generated(u32),
    Kernel,
}

impl Source {
    pub(super) fn id(&self) -> SourceId {
        match self {
            Self::File(executable) => SourceId::File(executable.id()),
            Self::Reload(executable) => SourceId::Reload(executable.id()),
            Self::Generated { code: _, version } => SourceId::Generated(*version),
            Self::Kernel => SourceId::Kernel,
        }
    }
}

/// A batch: at most `BATCH_MAX` addresses, as their source counts them.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) source: Source,
    pub(super) addrs: Vec<u64>,
}

/// What a symbolizer thread does next.
#[derive(Debug)]
pub(super) enum Next {
    Work(Work),
    Idle,
    Closed,
}

/// What became of a location that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// It waits now; with the lane whose thread has to be told that it is the first of its file.
    New(Option<Lane>),
    /// It waited or was in work already, or there is nothing to symbolize.
    Before,
    Refused,
}

#[derive(Debug)]
pub(super) struct Queue {
    /// How long what nobody waits for is gathered.
    gather: Duration,
    state: Mutex<State>,
    /// One call of `resolve` at a time.
    resolving: Mutex<()>,
    /// Work came to a lane, or the queue was closed.
    quick_work: Condvar,
    large_work: Condvar,
    /// A batch is done.
    done: Condvar,
    /// The queue was closed.
    closing: Condvar,
}

#[derive(Debug)]
struct State {
    cache: LocationCache,
    quick: Waiting,
    large: Waiting,
    /// Waiting or in work, so that a location is symbolized once.
    asked: HashSet<LocationId>,
    /// What `resolve` waits for; `None` until it is there. Kept apart from the cache, which may drop it.
    awaited: HashMap<LocationId, Option<Location>>,
    counts: Counts,
    closed: bool,
}

/// The waiting addresses of one lane by source, sources in turn.
#[derive(Debug, Default)]
struct Waiting {
    turns: VecDeque<SourceId>,
    by_source: HashMap<SourceId, (Work, Due)>,
    /// Until when those that were read of late are left alone.
    resting: HashMap<SourceId, Instant>,
}

/// When a batch is to be taken, if nobody waits for it.
type Due = Instant;

impl Waiting {
    /// True when it is the first address of its source.
    fn push(&mut self, source: Source, addr: u64, gather: Duration) -> bool {
        let work = self.work(source, Instant::now() + gather);
        work.addrs.push(addr);
        work.addrs.len() == 1
    }

    /// What waits of a source; its turn comes also without an address.
    fn work(&mut self, source: Source, due: Due) -> &mut Work {
        let id = source.id();
        let (work, _) = self.by_source.entry(id).or_insert_with(|| {
            self.turns.push_back(id);
            let due = self.resting.get(&id).map_or(due, |&rested| due.max(rested));
            (Work { source, addrs: Vec::new() }, due)
        });
        work
    }

    /// The next that is due by then, or the next of all.
    fn take(&mut self, by: Option<Due>) -> Option<Work> {
        let is_due = |id| self.by_source.get(id).is_some_and(|&(_, due)| by.is_none_or(|by| due <= by));
        let at = self.turns.iter().position(is_due)?;
        let id = self.turns.remove(at)?;
        let (mut work, due) = self.by_source.remove(&id)?;
        if work.addrs.len() > BATCH_MAX {
            let addrs = work.addrs.split_off(BATCH_MAX);
            self.by_source.insert(id, (Work { source: work.source.clone(), addrs }, due));
            self.turns.push_back(id);
        }
        Some(work)
    }

    /// When the first of it is to be taken.
    fn due(&self) -> Option<Due> {
        self.by_source.values().map(|&(_, due)| due).min()
    }

    /// Leaves a source alone, after a batch of it that took so long.
    fn rest(&mut self, source: SourceId, took: Duration, gather: Duration) {
        let now = Instant::now();
        if self.resting.len() >= RESTING_MAX {
            self.resting.retain(|_, &mut rested| rested > now);
        }
        let rest = (took * REST_FACTOR).min(gather * REST_GATHERS_MAX);
        if rest > gather && self.resting.len() < RESTING_MAX {
            self.resting.insert(source, now + rest);
        }
    }
}

impl State {
    /// Whether somebody waits for an answer: all is due then.
    fn is_awaited(&self) -> bool {
        self.awaited.values().any(Option::is_none)
    }

    fn waiting(&mut self, lane: Lane) -> &mut Waiting {
        match lane {
            Lane::Quick => &mut self.quick,
            Lane::Large => &mut self.large,
        }
    }

    /// Puts a location in the queue unless it is there or there is no room.
    fn ask(&mut self, key: LocationKey, gather: Duration) -> Asked {
        let id = key.id();
        let (source, addr) = match key {
            LocationKey::Native { executable, addr } => (Source::File(executable), addr.0),
            LocationKey::Generated { code, version, addr } => (Source::Generated { code, version }, addr.0),
            LocationKey::Kernel(addr) => (Source::Kernel, addr.0),
        };
        if self.asked.contains(&id) {
            return Asked::Before;
        }
        if self.asked.len() >= WAITING_MAX {
            return Asked::Refused;
        }
        let lane = Lane::of(&source);
        self.asked.insert(id);
        let is_first = self.waiting(lane).push(source, addr, gather);
        Asked::New(is_first.then_some(lane))
    }

    fn unresolved(&mut self, reason: Reason) -> Location {
        let counted =
            Reason::ALL.iter().zip(&mut self.counts.unresolved).find(|(known, _)| **known == reason);
        let (_, count) = counted.expect("Reason::ALL has every reason");
        *count += 1;
        Location::Unresolved(reason)
    }

    /// The answer that is there at once; else the location is asked for and awaited.
    fn answer(&mut self, key: LocationKey, gather: Duration) -> Option<Location> {
        let id = key.id();
        if let Some(known) = self.cache.get(id) {
            self.counts.hits += 1;
            return Some(known);
        }
        self.counts.misses += 1;
        if self.ask(key, gather) == Asked::Refused {
            return Some(self.unresolved(Reason::QueueFull));
        }
        self.awaited.insert(id, None);
        None
    }

    fn store(&mut self, id: LocationId, found: Result<Vec<NewFrame>, Reason>) {
        self.counts.symbolized += 1;
        if let Err(reason) = found {
            self.unresolved(reason);
        }
        let location = match (id, found) {
            // The process may write the name in a moment.
            (LocationId::Generated(..), Err(reason)) => Location::Unresolved(reason),
            (id, found) => self.cache.insert(id, found),
        };
        self.asked.remove(&id);
        if let Some(awaited) = self.awaited.get_mut(&id) {
            *awaited = Some(location);
        }
    }
}

impl Queue {
    pub(super) fn new(gather: Duration, cache_bytes_max: usize) -> Self {
        Self {
            gather,
            state: Mutex::new(State {
                cache: LocationCache::new(cache_bytes_max),
                quick: Waiting::default(),
                large: Waiting::default(),
                asked: HashSet::new(),
                awaited: HashMap::new(),
                counts: Counts::default(),
                closed: false,
            }),
            resolving: Mutex::new(()),
            quick_work: Condvar::new(),
            large_work: Condvar::new(),
            done: Condvar::new(),
            closing: Condvar::new(),
        }
    }

    pub(super) fn prefetch(&self, key: LocationKey) {
        let mut state = self.lock();
        if state.cache.contains(key.id()) {
            return;
        }
        match state.ask(key, self.gather) {
            Asked::New(Some(lane)) => self.work(lane).notify_one(),
            Asked::New(None) | Asked::Before => {}
            Asked::Refused => state.counts.prefetch_refused += 1,
        }
    }

    pub(super) fn resolve(
        &self,
        keys: impl IntoIterator<Item = LocationKey>,
        deadline: Instant,
    ) -> HashMap<LocationId, Location> {
        let _turn = self.resolving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let mut answers = HashMap::new();
        for key in keys {
            let id = key.id();
            if answers.contains_key(&id) || state.awaited.contains_key(&id) {
                continue;
            }
            if let Some(answer) = state.answer(key, self.gather) {
                answers.insert(id, answer);
            }
        }
        self.quick_work.notify_one();
        self.large_work.notify_one();
        let mut state = self.wait(state, deadline);
        for (id, answer) in std::mem::take(&mut state.awaited) {
            let answer = answer.unwrap_or_else(|| state.unresolved(Reason::Late));
            answers.insert(id, answer);
        }
        answers
    }

    /// Waits until everything awaited is there, the deadline has passed, or the queue is closed.
    fn wait<'s>(&'s self, mut state: MutexGuard<'s, State>, deadline: Instant) -> MutexGuard<'s, State> {
        while !state.closed && state.awaited.values().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// The next batch of a lane, waiting for one at most `idle`.
    pub(super) fn take(&self, lane: Lane, idle: Duration) -> Next {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Next::Closed;
            }
            let (now, is_awaited) = (Instant::now(), state.is_awaited());
            let waiting = state.waiting(lane);
            if let Some(work) = waiting.take((!is_awaited).then_some(now)) {
                return Next::Work(work);
            }
            let rest = waiting.due().map(|due| due.saturating_duration_since(now));
            let (wait, has_work) = (rest.unwrap_or(idle).min(idle), rest.is_some());
            let waited;
            (state, waited) =
                self.work(lane).wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() && !has_work {
                return Next::Idle;
            }
        }
    }

    /// Waits so long, or until the queue is closed; true when it is.
    pub(super) fn rest(&self, wait: Duration) -> bool {
        let (state, _) = self
            .closing
            .wait_timeout_while(self.lock(), wait, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        state.closed
    }

    /// Takes the results of a batch, and how often a parser panicked over it.
    pub(super) fn finish(
        &self,
        found: impl Iterator<Item = (LocationId, Result<Vec<NewFrame>, Reason>)>,
        panics: u64,
    ) {
        let found: Vec<_> = found.collect();
        let mut state = self.lock();
        for (id, found) in found {
            state.store(id, found);
        }
        state.counts.parser_panics += panics;
        self.done.notify_all();
    }

    /// A batch of a lane's took so long.
    pub(super) fn took(&self, lane: Lane, source: SourceId, time: Duration) {
        self.lock().waiting(lane).rest(source, time, self.gather);
    }

    pub(super) fn count_perf_maps(&self, more: PerfMapCounts) {
        let PerfMapCounts { bytes, lines_left_out } = more;
        let mut state = self.lock();
        state.counts.perf_map_bytes += bytes;
        state.counts.perf_map_lines_left_out += lines_left_out;
    }

    /// Has the thread that symbolizes an executable forget what it knows of it: by its own hand, so that no batch in work
    /// brings back what was forgotten.
    pub(super) fn reload(&self, executable: Arc<Executable>) {
        let source = Source::Reload(executable);
        let lane = Lane::of(&source);
        self.lock().waiting(lane).work(source, Instant::now());
        self.work(lane).notify_one();
    }

    pub(super) fn forget_executable(&self, id: ExecutableId) {
        self.lock().cache.forget_executable(id);
    }

    pub(super) fn forget_kernel(&self) {
        self.lock().cache.forget_kernel();
    }

    pub(super) fn counts(&self) -> Counts {
        let state = self.lock();
        Counts {
            evictions: state.cache.evictions(),
            cache_bytes: state.cache.bytes() as u64,
            cached: state.cache.len() as u64,
            waiting: state.asked.len() as u64,
            ..state.counts
        }
    }

    /// Ends the threads; whoever waits gets what is there.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.quick_work.notify_all();
        self.large_work.notify_all();
        self.done.notify_all();
        self.closing.notify_all();
    }

    fn work(&self, lane: Lane) -> &Condvar {
        match lane {
            Lane::Quick => &self.quick_work,
            Lane::Large => &self.large_work,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change to the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr;

    fn kernel(addr: u64) -> LocationKey {
        LocationKey::Kernel(Addr(addr))
    }

    /// One that gathers nothing.
    fn queue(cache_bytes_max: usize) -> Queue {
        Queue::new(Duration::ZERO, cache_bytes_max)
    }

    fn named(name: &str) -> Result<Vec<NewFrame>, Reason> {
        Ok(vec![NewFrame { function: name.into(), ..NewFrame::default() }])
    }

    /// Symbolizes what waits in the quick lane, on this thread.
    fn work_once(queue: &Queue) -> Vec<u64> {
        let Next::Work(work) = queue.take(Lane::Quick, Duration::ZERO) else { return Vec::new() };
        let ids = work.addrs.iter().map(|&addr| (LocationId::Kernel(Addr(addr)), named("found")));
        queue.finish(ids, 0);
        work.addrs
    }

    #[test]
    fn a_location_is_symbolized_once_however_often_it_is_asked_for() {
        let queue = queue(1 << 20);
        for _ in 0..3 {
            queue.prefetch(kernel(1));
        }
        assert_eq!(work_once(&queue), [1]);
        queue.prefetch(kernel(1));
        assert!(work_once(&queue).is_empty());
        let answers = queue.resolve([kernel(1), kernel(1)], Instant::now());
        assert!(matches!(answers[&kernel(1).id()], Location::Resolved(_)));
        let counts = queue.counts();
        assert_eq!((counts.symbolized, counts.hits, counts.misses), (1, 1, 0));
    }

    #[test]
    fn what_is_late_is_said_to_be_and_is_there_for_the_next_window() {
        let queue = queue(1 << 20);
        let id = kernel(1).id();
        assert_eq!(queue.resolve([kernel(1)], Instant::now())[&id], Location::Unresolved(Reason::Late));
        assert_eq!(work_once(&queue), [1]);
        assert!(matches!(queue.resolve([kernel(1)], Instant::now())[&id], Location::Resolved(_)));
        let late =
            Reason::ALL.iter().position(|&reason| reason == Reason::Late).expect("ALL has every reason");
        assert_eq!(queue.counts().unresolved[late], 1);
    }

    #[test]
    fn answers_outlive_a_cache_too_small_for_them() {
        let queue = queue(1);
        let far = Instant::now() + Duration::from_secs(60);
        let answers = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.resolve((1..=200).map(kernel), far));
            while !waiting.is_finished() {
                work_once(&queue);
                std::thread::yield_now();
            }
            waiting.join().unwrap()
        });
        assert_eq!(answers.len(), 200);
        assert!(answers.values().all(|answer| matches!(answer, Location::Resolved(_))));
    }

    #[test]
    fn a_full_queue_refuses_and_counts() {
        let queue = queue(1 << 20);
        for addr in 0..WAITING_MAX as u64 + 5 {
            queue.prefetch(kernel(addr));
        }
        let new = kernel(u64::MAX);
        let answers = queue.resolve([new.clone()], Instant::now());
        assert_eq!(answers[&new.id()], Location::Unresolved(Reason::QueueFull));
        let counts = queue.counts();
        assert_eq!((counts.prefetch_refused, counts.waiting), (5, WAITING_MAX as u64));
        assert_eq!(work_once(&queue).len(), BATCH_MAX);
    }

    #[test]
    fn closing_frees_who_waits() {
        let queue = queue(1 << 20);
        let far = Instant::now() + Duration::from_secs(3600);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.resolve([kernel(1)], far));
            queue.close();
            let answers = waiting.join().unwrap();
            assert_eq!(answers[&kernel(1).id()], Location::Unresolved(Reason::Late));
        });
        assert!(matches!(queue.take(Lane::Large, Duration::ZERO), Next::Closed));
    }

    #[test]
    fn what_nobody_waits_for_is_gathered_and_goes_at_once_when_somebody_does() {
        let far = Duration::from_secs(3600);
        let queue = Queue::new(far, 1 << 20);
        queue.prefetch(kernel(1));
        queue.prefetch(kernel(2));
        assert!(queue.lock().quick.due().is_some_and(|due| due > Instant::now() + far / 2));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.resolve([kernel(3)], Instant::now() + far));
            let Next::Work(work) = queue.take(Lane::Quick, far) else { panic!("somebody waits") };
            assert_eq!(work.addrs, [1, 2, 3]);
            queue.finish(work.addrs.iter().map(|&addr| (LocationId::Kernel(Addr(addr)), named("found"))), 0);
            assert_eq!(waiting.join().unwrap().len(), 1);
        });
        assert_eq!(queue.lock().quick.due(), None);
    }

    #[test]
    fn a_file_that_took_long_is_left_alone_and_others_are_not() {
        let (gather, now) = (Duration::from_millis(1), Instant::now());
        let mut waiting = Waiting::default();
        let code = Arc::new(GeneratedCode::new(1, 0, "node"));
        let generated = |version| Source::Generated { code: Arc::clone(&code), version };
        waiting.rest(generated(1).id(), Duration::from_secs(1), gather);
        waiting.rest(generated(2).id(), Duration::from_nanos(1), gather);
        for version in [1, 2] {
            assert!(waiting.push(generated(version), 7, gather));
            assert!(!waiting.push(generated(version), 8, gather));
        }
        let soon = now + gather * REST_GATHERS_MAX / 2;
        assert!(waiting.take(Some(now)).is_none());
        let taken = waiting.take(Some(soon)).map(|work| work.source.id());
        assert_eq!(taken, Some(generated(2).id()));
        assert!(waiting.take(Some(soon)).is_none());
        assert!(waiting.due().is_some_and(|due| due > soon));
        assert!(waiting.take(None).is_some(), "somebody waits for it");
        assert!(waiting.due().is_none() && waiting.take(None).is_none());
    }
}
