//! One capture: the stages of the agent with a collector in the place of uploads, for some processes and one kind of
//! measurement.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use profiler_common::{heap::HeapCounter, limits};
use profiler_pprof::proto::Profile;
use tokio::runtime;
use tracing::warn;

use super::{heap, target::Target};
use crate::{
    config::Config,
    export::Collector,
    heap::{Rule, Rules},
    ledger::ProfileType,
    pipeline::{HeapView, Pipeline, Sink, Stopped, View},
    tell,
};

/// How long a capture waits for unwind tables before it begins; it goes on without.
const TABLES_DEADLINE: Duration = Duration::from_secs(5);
/// How long it waits for the first heap: a dynamic linker has as long to finish.
const HEAPS_DEADLINE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// What is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measured {
    /// CPU time.
    Cpu,
    /// Allocations, sampled once in so many bytes, and those in use at the end.
    Heap { rate: u32 },
}

impl Measured {
    /// What it means that there is no sample.
    pub(crate) fn lack(self) -> &'static str {
        match self {
            Self::Cpu => "used no CPU time",
            Self::Heap { .. } => "allocated nothing that was sampled",
        }
    }

    fn profile_type(self) -> ProfileType {
        match self {
            Self::Cpu => ProfileType::Cpu,
            Self::Heap { .. } => ProfileType::Allocs,
        }
    }

    fn config(self, config: &Config, target: &Target) -> Config {
        let config = Config { targets: target.to_targets(), ..config.clone() };
        match self {
            Self::Cpu => config,
            Self::Heap { rate } => {
                let heap = Rules { list: rules(target, rate), budget: config.heap.budget };
                Config { heap, profiles: Vec::new(), ..config }
            }
        }
    }
}

/// The rules that mean a target's processes, and those that they start.
fn rules(target: &Target, rate: u32) -> Vec<Rule> {
    let rule = |name: &str, value: String| Rule { name: name.to_owned(), value, rate, budget: None };
    match target {
        Target::Everything => Vec::new(),
        Target::Processes(pids) => pids.iter().map(|pid| rule("family", pid.to_string())).collect(),
        Target::Command(pid) => vec![rule("family", pid.to_string())],
        Target::Cgroup(path) => vec![rule("cgroup", path.clone())],
    }
}

/// A capture that is under way.
#[must_use]
pub(crate) struct Capture {
    pipeline: Pipeline,
    collector: Arc<Collector>,
    measured: Measured,
    /// Processes that were attached to or could not be, once all that ran were looked at.
    decided: u64,
}

impl Capture {
    /// Attaches to the kernel. Of heaps, those of processes that run are attached to soon after
    /// ([`Self::wait_for_heaps`]).
    ///
    /// # Errors
    /// When something cannot be attached.
    pub(crate) fn begin(
        config: &Config,
        target: &Target,
        measured: Measured,
        runtime: &runtime::Handle,
    ) -> anyhow::Result<Self> {
        let config = measured.config(config, target);
        let collector = Arc::<Collector>::default();
        let pipeline = Pipeline::start(&config, vec![Sink::Collect(Arc::clone(&collector))], runtime)?;
        let mut capture = Self { pipeline, collector, measured, decided: 0 };
        if measured != Measured::Cpu && capture.heaps().is_none() {
            bail!("this machine cannot profile heaps");
        }
        // The first stacks are worth as much as the last ones: what runs now gets its unwind tables first, within reason.
        match target {
            Target::Processes(pids) => {
                pids.iter().for_each(|&pid| capture.pipeline.make_tables(pid, TABLES_DEADLINE));
            }
            Target::Everything | Target::Command(_) | Target::Cgroup(_) => {
                wait(TABLES_DEADLINE, || capture.pipeline.has_scanned());
            }
        }
        capture.pipeline.resume()?;
        if let Some(heaps) = capture.heaps() {
            wait(HEAPS_DEADLINE, || {
                heaps.gauges.scans.load(Relaxed) > 0 || heaps.gauges.has_failed.load(Relaxed)
            });
            if heaps.gauges.has_failed.load(Relaxed) {
                bail!("this machine cannot profile heaps");
            }
            capture.decided = decided(heaps);
        }
        Ok(capture)
    }

    /// Waits until a heap of a target that runs is profiled. Nothing for other captures.
    ///
    /// # Errors
    /// When there is none. Why a process is left out has been logged.
    pub(crate) fn wait_for_heaps(&self, target: &Target) -> anyhow::Result<()> {
        let Some(heaps) = self.heaps() else { return Ok(()) };
        wait(HEAPS_DEADLINE, || decided(heaps) > 0);
        if heaps.gauges.targets.load(Relaxed) == 0 {
            bail!("{target}: no heap that can be profiled");
        }
        Ok(())
    }

    /// A process of the target, stopped before its first own instruction, is about to run: waits until its heap is profiled,
    /// or cannot be, and until its stacks can be unwound.
    pub(crate) fn follow(&self, pid: u32) {
        let Some(heaps) = self.heaps() else { return };
        // Before its exec it was attached to as well, as what it was then.
        if !wait(HEAPS_DEADLINE, || decided(heaps) > self.decided) {
            warn!(pid, "its heap is profiled late: its first allocations are missing");
        }
        self.pipeline.make_tables(pid, TABLES_DEADLINE);
    }

    /// Samples taken so far.
    pub(crate) fn samples(&self) -> u64 {
        self.pipeline.view().snapshot().of(self.measured.profile_type()).taken
    }

    /// As [`Pipeline::forward_messages`] and [`Pipeline::dead_stage`].
    pub(crate) fn look(&mut self) -> Option<&str> {
        self.pipeline.forward_messages();
        self.pipeline.dead_stage()
    }

    /// Detaches, and gives the profile of so long a time; `None` where nothing was sampled.
    ///
    /// # Errors
    /// When a stage failed.
    pub(crate) fn finish(
        self,
        elapsed: Duration,
        runtime: &runtime::Handle,
    ) -> anyhow::Result<Option<Profile>> {
        let Self { pipeline, collector, measured, decided: _ } = self;
        let ends = SystemTime::now();
        let view = pipeline.view().clone();
        let Stopped { balances, failure } = pipeline.stop(runtime);
        if balances.iter().any(|balance| balance.delivered != balance.taken) {
            tell(&balances);
        }
        if let Some(failure) = failure {
            return Err(failure.into());
        }
        tell_of_missing(&view);
        let profile = match measured {
            Measured::Cpu => collector.take("cpu"),
            Measured::Heap { .. } => collector.take("allocs").and_then(|allocs| {
                let in_use = collector.take_snapshot_since("heap", ends)?;
                heap::profile(allocs, in_use)
            }),
        };
        let profile = profile.context("sum up the recording")?;
        let profile = profile.filter(|profile| !profile.sample.is_empty());
        let duration_nanos = i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX);
        Ok(profile.map(|profile| Profile { duration_nanos, ..profile }))
    }

    fn heaps(&self) -> Option<&HeapView> {
        self.pipeline.view().heap.get()
    }
}

/// Processes that were attached to so far, or could not be.
fn decided(heaps: &HeapView) -> u64 {
    heaps.gauges.attached.load(Relaxed) + heaps.gauges.refused.load(Relaxed)
}

/// What the recording lacks of its target.
fn tell_of_missing(view: &View) {
    let not_followed = view.families_not_followed();
    if not_followed > 0 {
        eprintln!(
            "missing: {not_followed} child processes, for more than {} ran at a time",
            limits::FAMILY_MAX
        );
    }
    view.heap.get().into_iter().for_each(warn_of_missing);
}

/// What is in use is known only as far as it was remembered, and everything only as far as the budget goes.
fn warn_of_missing(heaps: &HeapView) {
    let missing = heaps.live.dropped.load(Relaxed) + heaps.count(HeapCounter::LiveFull);
    if missing > 0 {
        warn!(
            samples = missing,
            "too many allocations: samples are missing from what is in use; use a larger --rate"
        );
    }
    if heaps.live.failed.load(Relaxed) > 0 {
        warn!("what is in use could not be read from the kernel");
    }
    let processes = heaps.gauges.above_budget.load(Relaxed);
    if processes > 0 {
        warn!(
            processes,
            "above the heap budget, allocations were sampled in windows and scaled; --heap-budget off takes all"
        );
    }
    let processes = heaps.gauges.without_in_use.load(Relaxed);
    if processes > 0 {
        warn!(processes, "what is in use is not known of some; comments of the profile say why");
    }
}

/// Whether it came true within the deadline.
fn wait(deadline: Duration, is_true: impl Fn() -> bool) -> bool {
    let end = Instant::now() + deadline;
    while !is_true() {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}
