//! One case: start a profiler, let it settle, measure it, stop it.

use std::{
    fmt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    Plan,
    load::{Backend, Target},
    proc::{self, Bpf, Memory},
    profiler::{Counters, Started},
};

/// How often a starting profiler is looked at: no finer than the clock that its CPU time is counted in is of use.
const STARTUP_STEP: Duration = Duration::from_millis(20);

/// Who profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Profiler {
    Nobody,
    /// The control: what differs from [`Self::Nobody`] is noise.
    NobodyAgain,
    Agent,
    Perf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Case {
    pub(super) profiler: Profiler,
    /// Samples per second and CPU; 0 for nobody.
    pub(super) hz: u32,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.profiler {
            Profiler::Nobody => f.write_str("nobody (A)"),
            Profiler::NobodyAgain => f.write_str("nobody again (A/A)"),
            Profiler::Agent => write!(f, "agent, {} Hz", self.hz),
            Profiler::Perf => write!(f, "perf, {} Hz", self.hz),
        }
    }
}

/// One measurement of one case.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Run {
    #[serde(flatten)]
    pub(super) case: Case,
    pub(super) seconds: f64,
    pub(super) target_rounds_per_cpu_s: f64,
    pub(super) cost: Option<Cost>,
}

/// What a profiler took; all but the first three and the peak are of the measured interval.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cost {
    pub(super) first_sample_s: f64,
    pub(super) first_sample_cpu_s: f64,
    pub(super) warm_up_cpu_s: f64,
    pub(super) cpu_s: f64,
    pub(super) bpf_s: f64,
    /// Mean over the runs of the sampling program; `None` without one.
    pub(super) bpf_ns_per_sample: Option<f64>,
    #[serde(flatten)]
    pub(super) memory: Memory,
    pub(super) map_bytes: u64,
    pub(super) bytes_out: f64,
    pub(super) samples: f64,
    pub(super) samples_lost: Option<f64>,
}

pub(super) fn measure(case: Case, plan: &Plan, backend: &Backend, work: &Path) -> Result<Run> {
    let started_s = proc::uptime_s()?;
    let profiler = match case.profiler {
        Profiler::Nobody | Profiler::NobodyAgain => None,
        Profiler::Agent => Some(Started::agent(case.hz, backend, work)?),
        Profiler::Perf => Some(Started::perf(case.hz, work)?),
    };
    match profiler {
        None => {
            let (seconds, target_rounds_per_cpu_s) = run_target(plan.measured)?;
            Ok(Run { case, seconds, target_rounds_per_cpu_s, cost: None })
        }
        Some(profiler) => measure_profiler(case, plan, profiler, started_s),
    }
}

fn measure_profiler(case: Case, plan: &Plan, mut profiler: Started, started_s: f64) -> Result<Run> {
    let startup = Startup::watch(&mut profiler, plan.warm_up)?;
    let before = Moment::read(&mut profiler)?;
    let (seconds, target_rounds_per_cpu_s) = run_target(plan.measured)?;
    let after = Moment::read(&mut profiler)?;
    let memory = proc::memory(profiler.process().pid())?;

    let work = profiler.finish(before.counters.zip(after.counters), before.at_s, after.at_s)?;
    let first_s = work.first_sample_s.or(startup.first_sample_s).context("no sample while warming up")?;
    let sample_runs = after.bpf.sample_runs - before.bpf.sample_runs;
    let sample_ns = after.bpf.sample_ns - before.bpf.sample_ns;
    let cost = Cost {
        first_sample_s: (first_s - started_s).max(0.0),
        first_sample_cpu_s: startup.cpu_s_at(first_s),
        warm_up_cpu_s: before.cpu_s,
        cpu_s: after.cpu_s - before.cpu_s,
        bpf_s: (after.bpf.run_ns - before.bpf.run_ns) as f64 / 1e9,
        bpf_ns_per_sample: (sample_runs > 0).then(|| sample_ns as f64 / sample_runs as f64),
        memory,
        map_bytes: after.bpf.map_bytes,
        bytes_out: work.bytes_out,
        samples: work.samples,
        samples_lost: work.lost,
    };
    Ok(Run { case, seconds, target_rounds_per_cpu_s, cost: Some(cost) })
}

/// Seconds that passed, and the target's rounds per CPU second.
fn run_target(duration: Duration) -> Result<(f64, f64)> {
    let start = Instant::now();
    let target = Target::start();
    thread::sleep(duration);
    let rounds_per_cpu_s = target.finish()?;
    Ok((start.elapsed().as_secs_f64(), rounds_per_cpu_s))
}

/// A profiler's use of CPU and kernel at a moment.
struct Moment {
    /// Seconds since boot.
    at_s: f64,
    cpu_s: f64,
    bpf: Bpf,
    counters: Option<Counters>,
}

impl Moment {
    fn read(profiler: &mut Started) -> Result<Self> {
        let process = profiler.process();
        process.check()?;
        let pid = process.pid();
        Ok(Self {
            at_s: proc::uptime_s()?,
            cpu_s: proc::cpu_s(pid)?,
            bpf: proc::bpf(pid)?,
            counters: profiler.counters(),
        })
    }
}

/// A profiler's first seconds.
struct Startup {
    /// Seconds since boot and CPU seconds until then, in order.
    cpu: Vec<(f64, f64)>,
    /// Seconds since boot, when the profiler says so itself.
    first_sample_s: Option<f64>,
}

impl Startup {
    /// Returns when `warm_up` is over.
    fn watch(profiler: &mut Started, warm_up: Duration) -> Result<Self> {
        let end = Instant::now() + warm_up;
        let mut startup = Self { cpu: Vec::new(), first_sample_s: None };
        while Instant::now() < end {
            let process = profiler.process();
            process.check()?;
            let now_s = proc::uptime_s()?;
            startup.cpu.push((now_s, proc::cpu_s(process.pid())?));
            // Asked only until it has one, for each answer costs the profiler.
            if startup.first_sample_s.is_none() && profiler.counters().is_some_and(|now| now.has_samples()) {
                startup.first_sample_s = Some(now_s);
            }
            thread::sleep(STARTUP_STEP);
        }
        Ok(startup)
    }

    /// CPU seconds at the first look at or after `moment_s`; 0 when there was none.
    fn cpu_s_at(&self, moment_s: f64) -> f64 {
        self.cpu.iter().find(|(at_s, _)| *at_s >= moment_s).map_or(0.0, |(_, cpu_s)| *cpu_s)
    }
}
