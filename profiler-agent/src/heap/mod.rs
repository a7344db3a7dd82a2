//! Heap profiles of chosen processes: finds their allocators, probes them, and lets go when they end.
//!
//! ```text
//! exec, fork, /proc ─▶ rules ─▶ link map ─▶ allocators' files ─▶ attach points ─▶ probes ◀─ budget    (thread `heap`, `profiler`)
//! ring buffer ─▶ sampled allocations ─▶ windows of `allocs`, snapshots of `heap`                       (worker, `live`)
//! ```

mod budget;
mod calibrate;
mod find;
mod link_map;
mod live;
mod member;
mod notes;
mod probes;
mod profiler;
mod rules;
mod seccomp;
mod states;
mod windows;

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use aya::maps::MapError;
pub(crate) use budget::Budget;
pub(crate) use calibrate::Options;
use link_map::Objects;
pub(crate) use live::{Live, LiveCounts, Sample};
pub(crate) use notes::Notes;
pub(crate) use profiler::Profiler;
use profiler_common::heap::{Hits, POINTS_MAX, TARGETS_MAX};
use profiler_heap::ScanError;
pub(crate) use rules::{DEFAULT_RATE, Rule, Rules, parse, parse_rate};
pub(crate) use states::{HeapState, HeapStates};
pub(crate) use windows::HeapWindows;

use crate::label::Labeler;

/// Execs and forks waiting to be looked at. More make the whole of `/proc` be looked at.
const EVENTS_MAX: usize = 1024;

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

impl HeapError {
    fn full() -> Self {
        Self::Full { max: TARGETS_MAX, points: POINTS_MAX }
    }
}

/// What a hit costs on this host, in nanoseconds of the probed process's time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Costs {
    /// The entry of a function, at an instruction that the kernel executes itself.
    pub(crate) entry_ns: f64,
    /// Its return.
    pub(crate) return_ns: f64,
    /// An entry at an instruction that must be single-stepped, where no probe goes.
    pub(crate) stepped_ns: f64,
}

impl Costs {
    /// What so many hits took.
    fn of(self, hits: Hits) -> budget::Spent {
        let Hits { allocs, frees, returns, sample_ns } = hits;
        let entries = |count: u64| count as f64 * self.entry_ns / 1e9;
        let more = (returns as f64 * self.return_ns + sample_ns as f64) / 1e9;
        budget::Spent { allocs: entries(allocs) + more, frees: entries(frees) }
    }
}

/// What the thread does, for metrics.
#[derive(Debug, Default)]
pub(crate) struct HeapGauges {
    /// Processes profiled now.
    pub(crate) targets: AtomicU64,
    /// Of these: above their budget, sampled in windows.
    pub(crate) limited: AtomicU64,
    /// Of these: what is in use is not followed.
    pub(crate) without_in_use: AtomicU64,
    /// Of these: under a seccomp filter.
    pub(crate) entry_only: AtomicU64,
    /// Processes that are meant but could not be profiled.
    pub(crate) refused: AtomicU64,
    /// Probes hit.
    pub(crate) hits: AtomicU64,
    /// What they took of the processes' CPU time, in nanoseconds.
    pub(crate) probe_ns: AtomicU64,
    /// Windows in which processes above their budget were sampled.
    pub(crate) windows: AtomicU64,
    /// What became of each process that is meant.
    pub(crate) states: HeapStates,
    /// Looks at all processes.
    pub(crate) scans: AtomicU64,
    /// Processes attached to so far.
    pub(crate) attached: AtomicU64,
    /// Times that a process went above its budget.
    pub(crate) above_budget: AtomicU64,
    /// The kernel turned out not to do it.
    pub(crate) has_failed: AtomicBool,
    costs: Mutex<Costs>,
}

impl HeapGauges {
    /// What a hit costs; zeros before that is known.
    pub(crate) fn costs(&self) -> Costs {
        // A value is written as a whole.
        *self.costs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_costs(&self, costs: Costs) {
        // As above.
        *self.costs.lock().unwrap_or_else(PoisonError::into_inner) = costs;
    }
}

/// Whether the dynamic linker of a process has loaded its objects, where it has one.
pub(crate) fn has_loaded(pid: u32) -> bool {
    let objects = link_map::objects(format!("/proc/{pid}").as_ref());
    matches!(objects, Some(Objects::Static | Objects::Dynamic(_)))
}

/// What the thread is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The process has had a new image since a boot time.
    Exec { pid: u32, time_ns: u64 },
    /// A process has been made by another.
    Fork { parent: u32, child: u32 },
    /// Whom to probe, and for how much, from now on.
    Rules(Rules),
    /// How processes are labelled from now on.
    Labels(Labeler),
    /// Probe whom the rules mean.
    Resume,
    /// Take all probes out.
    Pause,
    /// Take all probes out and end.
    Stop,
}

/// Tells the thread of processes, and what to do.
#[derive(Clone, Debug)]
pub(crate) struct Orders(SyncSender<Told>);

impl Orders {
    /// A process has had a new image since a boot time. One that there is no room for is found by the next look at all
    /// processes.
    pub(crate) fn exec(&self, pid: u32, time_ns: u64) {
        let _ = self.0.try_send(Told::Exec { pid, time_ns });
    }

    /// A process has been made; as for [`Self::exec`].
    pub(crate) fn fork(&self, parent: u32, child: u32) {
        let _ = self.0.try_send(Told::Fork { parent, child });
    }

    /// Others are meant from now on.
    pub(crate) fn set_rules(&self, rules: Rules) {
        self.order(Told::Rules(rules));
    }

    /// Processes have other labels from now on.
    pub(crate) fn set_labels(&self, labeler: Labeler) {
        self.order(Told::Labels(labeler));
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
    let (sender, receiver) = sync_channel(EVENTS_MAX);
    (Orders(sender), receiver)
}
