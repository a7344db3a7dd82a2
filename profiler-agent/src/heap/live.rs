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

use super::Targets;
use crate::{
    bpf::LiveMap,
    label::SeriesLabels,
    normalize::Location,
    sys::clock::{self, WallClock},
    window::{Closed, Counts, Measure, Room, SampleLabels, Window},
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
    /// Snapshots that could not be read from the kernel.
    pub(crate) failed: AtomicU64,
}

/// Sampled allocations, by address.
pub(crate) struct Live {
    map: LiveMap,
    samples: HashMap<LiveKey, (Sample, Arc<[Location]>)>,
    stacks: HashSet<Arc<[Location]>>,
    frames: usize,
    targets: Targets,
    counts: Arc<LiveCounts>,
}

impl Live {
    /// Nothing yet. `targets` says whose allocations are wanted.
    pub(crate) fn new(map: LiveMap, targets: Targets, counts: Arc<LiveCounts>) -> Self {
        Self { map, samples: HashMap::new(), stacks: HashSet::new(), frames: 0, targets, counts }
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
            }
        }
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

    /// What is in use now, of processes that are profiled; `None` where that is nothing, or the kernel does not say.
    pub(crate) fn snapshot(&mut self, rate: u32, room: &Room) -> Option<Closed> {
        if !self.forget_freed() {
            return None;
        }
        self.counts.samples.store(self.samples.len() as u64, Relaxed);
        let mut window = Window::snapshot(clock::boot_ns(), room);
        for (sample, stack) in self.samples.values() {
            let Sample { time_ns: _, series, labels, counts } = sample.clone();
            // The window of the allocations has asked for their symbols.
            if window.add_counts(series, labels, stack.to_vec(), counts, |_| {}).is_err() {
                self.counts.dropped.fetch_add(1, Relaxed);
            }
        }
        (!self.samples.is_empty()).then(|| window.close_snapshot(WallClock::now(), Measure::InUse { rate }))
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
        let targets = self.targets.ids();
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
