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
    compile::Compilers,
    load::{Backend, Target},
    proc::{self, Bpf, Memory},
    profiler::{Counters, SampleTimes, Started},
};

/// How often a starting profiler is looked at: no finer than the clock that its CPU time is counted in is of use.
const STARTUP_STEP: Duration = Duration::from_millis(20);

/// How often a profiler's memory is looked at.
const MEMORY_STEP: Duration = Duration::from_millis(500);

/// Who profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Profiler {
    /// No profiler.
    #[value(skip)]
    Nobody,
    /// The control: what differs from [`Self::Nobody`] is noise.
    #[value(skip)]
    NobodyAgain,
    Agent,
    Perf,
    Bpftrace,
}

/// What runs beside the profilers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LoadKind {
    /// Programs that stay the same.
    Steady,
    /// The same, and compilers that make and run ever new executables.
    Churn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Case {
    pub(super) load: LoadKind,
    pub(super) profiler: Profiler,
    /// Samples per second and CPU; 0 for nobody.
    pub(super) hz: u32,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = match self.load {
            LoadKind::Steady => "",
            LoadKind::Churn => "new executables: ",
        };
        f.write_str(load)?;
        match self.profiler {
            Profiler::Nobody => f.write_str("nobody (A)"),
            Profiler::NobodyAgain => f.write_str("nobody again (A/A)"),
            Profiler::Agent => write!(f, "agent, {} Hz", self.hz),
            Profiler::Perf => write!(f, "perf, {} Hz", self.hz),
            Profiler::Bpftrace => write!(f, "bpftrace, {} Hz", self.hz),
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
    /// Compiled and run in the interval, under [`LoadKind::Churn`].
    pub(super) executables: Option<u32>,
    pub(super) cost: Option<Cost>,
}

/// What a profiler took; all but the first three and the peak since its start are of the measured interval.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cost {
    pub(super) first_sample_s: f64,
    pub(super) first_sample_cpu_s: f64,
    pub(super) warm_up_cpu_s: f64,
    pub(super) cpu_s: f64,
    pub(super) bpf_s: f64,
    /// Mean over the runs of the sampling program; `None` without one.
    pub(super) bpf_ns_per_sample: Option<f64>,
    /// Of single runs, where the profiler times some of them.
    pub(super) bpf_sample_times: Option<SampleTimes>,
    /// Mean over the interval.
    #[serde(flatten)]
    pub(super) memory: Memory,
    /// The most that was seen at any look in the interval.
    pub(super) rss_bytes_max: u64,
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
        Profiler::Bpftrace => Some(Started::bpftrace(case.hz, work)?),
    };
    let compilers = match case.load {
        LoadKind::Steady => None,
        LoadKind::Churn => Some(Compilers::start(work)?),
    };
    let compilers = compilers.as_ref();
    match profiler {
        None => {
            let Interval { seconds, target_rounds_per_cpu_s, executables, memory: _ } =
                Interval::measure(plan.measured, compilers, None)?;
            Ok(Run { case, seconds, target_rounds_per_cpu_s, executables, cost: None })
        }
        Some(profiler) => measure_profiler(case, plan, profiler, started_s, compilers),
    }
}

fn measure_profiler(
    case: Case,
    plan: &Plan,
    mut profiler: Started,
    started_s: f64,
    compilers: Option<&Compilers>,
) -> Result<Run> {
    let startup = Startup::watch(&mut profiler, plan.warm_up)?;
    let before = Moment::read(&mut profiler)?;
    let pid = profiler.process().pid();
    let interval = Interval::measure(plan.measured, compilers, Some(pid))?;
    let after = Moment::read(&mut profiler)?;
    let Interval { seconds, target_rounds_per_cpu_s, executables, memory } = interval;

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
        bpf_sample_times: work.sample_times,
        memory: proc::mean(&memory).context("no look at the memory")?,
        rss_bytes_max: memory.iter().map(|memory| memory.rss_bytes).max().unwrap_or_default(),
        map_bytes: after.bpf.map_bytes,
        bytes_out: work.bytes_out,
        samples: work.samples,
        samples_lost: work.lost,
    };
    Ok(Run { case, seconds, target_rounds_per_cpu_s, executables, cost: Some(cost) })
}

/// A measured interval, in which the target runs.
struct Interval {
    seconds: f64,
    target_rounds_per_cpu_s: f64,
    executables: Option<u32>,
    /// Of a profiler, by and by.
    memory: Vec<Memory>,
}

impl Interval {
    fn measure(duration: Duration, compilers: Option<&Compilers>, pid: Option<u32>) -> Result<Self> {
        let (start, made_before) = (Instant::now(), compilers.map(Compilers::made));
        let (target, mut memory) = (Target::start(), Vec::new());
        while let Some(left) = duration.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
            thread::sleep(left.min(MEMORY_STEP));
            memory.extend(pid.map(proc::memory).transpose()?);
        }
        let target_rounds_per_cpu_s = target.finish()?;
        let seconds = start.elapsed().as_secs_f64();
        let executables = match compilers {
            None => None,
            Some(compilers) => {
                compilers.check()?;
                Some(compilers.made() - made_before.unwrap_or_default())
            }
        };
        Ok(Self { seconds, target_rounds_per_cpu_s, executables, memory })
    }
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
            counters: profiler.wait_for_counters(),
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
