//! What is known of sampled allocations in use: the kernel side knows which they are, this knows their stacks.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use profiler_common::heap::{LIVE_MAX, LiveKey};

use super::Notes;
use crate::{
    bpf::LiveMap,
    label::SeriesLabels,
    normalize::Location,
    sys::clock::{self, WallClock},
    window::{Closed, Counts, Measure, OBJECT, Room, SampleLabels, Window},
};

/// Samples remembered. Those that were freed are found out when this is reached or a window closes; no more than
/// `LIVE_MAX` are in use. About 150 bytes each, stacks apart.
const SAMPLES_MAX: usize = 2 * LIVE_MAX as usize;
/// Frames of all different stacks, 40 bytes each.
const FRAMES_MAX: usize = 1 << 20;

/// One sampled allocation.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// When it was made: tells it from an earlier one at the same address.
    pub(crate) time_ns: u64,
    /// What identifies the profiles of its process.
    pub(crate) series: SeriesLabels,
    /// Labels inside a profile.
    pub(crate) labels: SampleLabels,
    /// What it stands for.
    pub(crate) counts: Counts,
}

/// Counted for metrics.
#[derive(Debug, Default)]
pub(crate) struct LiveCounts {
    /// Sampled allocations in the last snapshot.
    pub(crate) samples: AtomicU64,
    /// Samples that are missing from snapshots because there was no room for them or their stack.
    pub(crate) dropped: AtomicU64,
    /// Allocations that all samples stand for that were missing from snapshots, whyever there was no room.
    pub(crate) missing_objects: AtomicU64,
    /// Their bytes.
    pub(crate) missing_bytes: AtomicU64,
    /// Snapshots that could not be read from the kernel.
    pub(crate) failed: AtomicU64,
}

/// What there was no room for, of one process since it is profiled.
#[derive(Clone, Debug)]
struct Missing {
    pid: u32,
    series: SeriesLabels,
    counts: Counts,
}

/// Sampled allocations, by address.
pub(crate) struct Live {
    map: LiveMap,
    samples: HashMap<LiveKey, (Sample, Arc<[Location]>)>,
    stacks: HashSet<Arc<[Location]>>,
    frames: usize,
    /// By number of the process.
    missing: HashMap<u32, Missing>,
    notes: Notes,
    counts: Arc<LiveCounts>,
}

impl Live {
    /// Nothing yet. `notes` says whose allocations are wanted.
    pub(crate) fn new(map: LiveMap, notes: Notes, counts: Arc<LiveCounts>) -> Self {
        let (samples, stacks, missing) = Default::default();
        Self { map, samples, stacks, frames: 0, missing, notes, counts }
    }

    /// Remembers a sample.
    pub(crate) fn insert(&mut self, key: LiveKey, sample: Sample, stack: &[Location]) {
        if self.samples.len() >= SAMPLES_MAX || self.frames >= FRAMES_MAX {
            self.forget_freed();
        }
        let stack = (self.samples.len() < SAMPLES_MAX).then(|| self.intern(stack)).flatten();
        match stack {
            Some(stack) => {
                self.samples.insert(key, (sample, stack));
            }
            None => {
                self.counts.dropped.fetch_add(1, Relaxed);
                self.lose(key.target, sample);
            }
        }
    }

    /// A sample that there was no room for.
    pub(crate) fn lose(&mut self, target: u32, sample: Sample) {
        let Sample { time_ns: _, series, labels, counts } = sample;
        let Counts { samples: _, value, objects } = counts;
        self.counts.missing_objects.fetch_add(objects.saturating_add(OBJECT / 2) / OBJECT, Relaxed);
        self.counts.missing_bytes.fetch_add(value, Relaxed);
        let none = || Missing { pid: labels.pid, series, counts: Counts::default() };
        let missing = &mut self.missing.entry(target).or_insert_with(none).counts;
        missing.value = missing.value.saturating_add(value);
        missing.objects = missing.objects.saturating_add(objects);
    }

    /// Processes have other labels from now on: what one of them holds is told under those. `series` gives those of a process.
    pub(crate) fn relabel(&mut self, series: impl Fn(u32) -> SeriesLabels) {
        let mut by_pid = HashMap::new();
        let mut of = |pid: u32| by_pid.entry(pid).or_insert_with(|| series(pid)).clone();
        self.samples.values_mut().for_each(|(sample, _)| sample.series = of(sample.labels.pid));
        self.missing.values_mut().for_each(|missing| missing.series = of(missing.pid));
    }

    fn intern(&mut self, stack: &[Location]) -> Option<Arc<[Location]>> {
        if let Some(known) = self.stacks.get(stack) {
            return Some(Arc::clone(known));
        }
        if self.frames + stack.len() > FRAMES_MAX {
            return None;
        }
        let stack: Arc<[Location]> = stack.into();
        self.frames += stack.len();
        self.stacks.insert(Arc::clone(&stack));
        Some(stack)
    }

    /// What is in use at a boot time up to which all samples are there, of processes that are profiled; `None` where that is
    /// nothing, or the kernel does not say. What was freed since is not in it.
    pub(crate) fn snapshot(&mut self, at_ns: u64, room: &Room) -> Option<Closed> {
        let rate = self.notes.rate();
        if !self.forget_freed() {
            return None;
        }
        self.counts.samples.store(self.samples.len() as u64, Relaxed);
        let mut window = Window::snapshot(at_ns, room);
        for (sample, stack) in self.samples.values() {
            let Sample { time_ns: _, series, labels, counts } = sample.clone();
            // The window of the allocations has asked for their symbols.
            if window.add_counts(series, labels, stack.to_vec(), counts, |_| {}).is_err() {
                self.counts.dropped.fetch_add(1, Relaxed);
            }
        }
        if self.samples.is_empty() {
            return None;
        }
        let mut closed = window.close_snapshot(WallClock::now(), Measure::InUse { rate });
        let lacks = self.missing.values().map(|missing| (missing.series.clone(), missing.comment()));
        for (series, text) in lacks.chain(self.notes.of_snapshot()) {
            closed.comment(&series, text);
        }
        Some(closed)
    }

    /// Keeps what the kernel side says is in use, and what is too new for it to be asked. Gives whether it said.
    fn forget_freed(&mut self) -> bool {
        let asked_ns = clock::boot_ns();
        let in_use = match self.in_use() {
            Ok(in_use) => in_use,
            Err(error) => {
                self.counts.failed.fetch_add(1, Relaxed);
                tracing::debug!(%error, "read the allocations in use");
                return false;
            }
        };
        self.samples.retain(|key, (sample, _)| {
            sample.time_ns >= asked_ns || in_use.get(key).is_some_and(|&time_ns| time_ns == sample.time_ns)
        });
        let frames = &mut self.frames;
        self.stacks.retain(|stack| {
            let is_used = Arc::strong_count(stack) > 1;
            if !is_used {
                *frames -= stack.len();
            }
            is_used
        });
        true
    }

    /// The times of the samples in use. Those of processes that are gone are deleted.
    fn in_use(&mut self) -> io::Result<HashMap<LiveKey, u64>> {
        let targets = self.notes.followed();
        self.missing.retain(|target, _| targets.contains(target));
        let (mut in_use, mut gone) = (HashMap::new(), Vec::new());
        self.map.each(|key, time_ns| {
            if targets.contains(&key.target) {
                in_use.insert(key, time_ns);
            } else {
                gone.push(key);
            }
        })?;
        gone.into_iter().for_each(|key| self.map.remove(key));
        Ok(in_use)
    }
}

impl Missing {
    fn comment(&self) -> String {
        let Self { pid, series: _, counts } = self;
        let objects = counts.objects.saturating_add(OBJECT / 2) / OBJECT;
        format!(
            "pid {pid}: {objects} objects of {} bytes, freed since or not, are missing: there was no room to follow their samples",
            counts.value
        )
    }
}
