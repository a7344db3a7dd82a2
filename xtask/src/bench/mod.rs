//! `cargo xtask bench overhead`: what the agent costs, beside `perf record` and bpftrace on the same loads in the same
//! run, with an A/A control.
//!
//! The load keeps every CPU busy throughout. Cases take turns on it, and every second round takes them in reverse, so
//! that a drift of the machine falls on all alike. The agent uploads to a backend of its own process, which is not
//! counted: remote agents do the same.

mod case;
mod churn;
mod compile;
mod heap;
mod load;
mod memory_cgroup;
mod proc;
mod profiler;
mod report;
mod unwind;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;

use self::{
    case::{Case, LoadKind, Profiler},
    load::{Backend, Load},
    proc::BpfStats,
};
use crate::{
    command, project, testprogs,
    tools::{self, BPFTRACE, PERF},
};

/// Samples per second and CPU: the default, what people ask for, and enough to see the target slow down.
const FREQUENCIES_HZ: [u32; 3] = [19, 99, 997];
/// While executables come and go, with the last of which the machine would be busy with little else.
const CHURN_FREQUENCIES_HZ: [u32; 2] = [19, 99];

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// CPU time, memory and bytes of the agent, of perf record and of bpftrace at several rates.
    Overhead {
        /// Only this load.
        #[arg(long, value_enum)]
        load: Option<LoadKind>,
        /// Only this profiler, beside nobody.
        #[arg(long, value_enum)]
        profiler: Option<Profiler>,
        /// Only this rate, in samples per second and CPU.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
        frequency: Option<u32>,
        /// Measured seconds of each case.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// Seconds that a profiler runs before it is measured: its start is told apart.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
        warm_up: u64,
        /// How often each case is measured.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
        rounds: u32,
    },
    /// CPU time of the agent and of perf record at the same time, while processes come and go.
    Churn {
        /// Measured seconds.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// Samples per second and CPU.
        #[arg(long, default_value_t = 19, value_parser = clap::value_parser!(u32).range(1..=1000))]
        frequency: u32,
    },
    /// What profiling its heap costs a program, beside heaptrack and bpftrace.
    Heap {
        /// CPU seconds of the program in each case.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// How often each case is measured.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
        rounds: u32,
    },
    /// What stacks cost in the kernel by their depth, and what unwind tables cost.
    Unwind {
        /// Measured seconds of each depth.
        #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=600))]
        seconds: u64,
    },
}

/// How long things are measured.
struct Plan {
    warm_up: Duration,
    measured: Duration,
    rounds: u32,
}

pub(crate) fn run(bench: &Bench) -> Result<()> {
    if !command::is_root() {
        bail!("measuring needs root, as the agent and perf record -a do");
    }
    testprogs::build()?;
    build_programs()?;
    match *bench {
        Bench::Overhead { load, profiler, frequency, seconds, warm_up, rounds } => {
            tools::need(&[PERF])?;
            let (warm_up, measured) = (Duration::from_secs(warm_up), Duration::from_secs(seconds));
            let has_bpftrace =
                tools::need(&[BPFTRACE]).inspect_err(|error| eprintln!("SKIP bpftrace: {error:#}")).is_ok();
            let wanted = |case: &Case| {
                load.is_none_or(|load| load == case.load)
                    && (case.hz == 0
                        || frequency.is_none_or(|hz| hz == case.hz)
                            && profiler.is_none_or(|profiler| profiler == case.profiler))
                    && (has_bpftrace || case.profiler != Profiler::Bpftrace)
            };
            overhead(&Plan { warm_up, measured, rounds }, &cases().filter(wanted).collect::<Vec<_>>())
        }
        Bench::Churn { seconds, frequency } => {
            tools::need(&[PERF])?;
            churn(Duration::from_secs(seconds), frequency)
        }
        Bench::Heap { seconds, rounds } => {
            let folder = Folder::create()?;
            folder.write("heap.json", &heap::run(Duration::from_secs(seconds), rounds, &folder.work())?)
        }
        Bench::Unwind { seconds } => {
            let folder = Folder::create()?;
            folder.write("unwind.json", &unwind::run(seconds, &folder.work())?)
        }
    }
}

fn churn(measured: Duration, hz: u32) -> Result<()> {
    let folder = Folder::create()?;
    let _counting = BpfStats::enable()?;
    let backend = Backend::start(&folder.work())?;
    churn::run(hz, measured, &backend, &folder.work())
}

/// All of the workspace, as the tests do: fewer packages would be built with other features, and so would what they need.
fn build_programs() -> Result<()> {
    let mut cargo = command::cargo();
    cargo.args(["build", "--release", "--workspace", "--bins"]);
    command::run(&mut cargo)
}

fn overhead(plan: &Plan, cases: &[Case]) -> Result<()> {
    let machine = report::Machine::read()?;
    let folder = Folder::create()?;
    let _counting = BpfStats::enable()?;
    let backend = Backend::start(&folder.work())?;
    let _load = Load::start()?;
    let mut runs = Vec::new();
    for round in 0..plan.rounds {
        for case in in_order(cases, round) {
            eprintln!("round {} of {}: {case}", round + 1, plan.rounds);
            runs.push(case::measure(case, plan, &backend, &folder.work()).with_context(|| case.to_string())?);
            // Now, so that a case that fails does not take the others with it.
            folder.write("overhead.json", &report::json(&machine, &runs)?)?;
        }
    }
    print!("{}", report::markdown(&machine, plan, &runs));
    Ok(())
}

/// Under each load nobody first and last: the two should not differ.
fn cases() -> impl Iterator<Item = Case> {
    let steady = (LoadKind::Steady, FREQUENCIES_HZ.as_slice());
    let churn = (LoadKind::Churn, CHURN_FREQUENCIES_HZ.as_slice());
    [steady, churn].into_iter().flat_map(|(load, frequencies)| {
        let case = move |profiler, hz| Case { load, profiler, hz };
        let of_rate = move |&hz: &u32| {
            [Profiler::Agent, Profiler::Perf, Profiler::Bpftrace].map(|profiler| case(profiler, hz))
        };
        let others = frequencies.iter().flat_map(of_rate);
        [case(Profiler::Nobody, 0)].into_iter().chain(others).chain([case(Profiler::NobodyAgain, 0)])
    })
}

/// Every second round in reverse.
fn in_order(cases: &[Case], round: u32) -> Vec<Case> {
    let mut cases = cases.to_vec();
    if round % 2 == 1 {
        cases.reverse();
    }
    cases
}

/// `target/bench`: results stay; `work/` holds logs, recordings and the backend's store of the last run.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let folder = Self(project::target().join("bench"));
        let work = folder.work();
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        Ok(folder)
    }

    fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        eprintln!("raw numbers: {}", path.display());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_measured_once_a_round_and_the_order_turns() {
        let cases: Vec<Case> = cases().collect();
        assert_eq!(cases.len(), 2 * 2 + 3 * (FREQUENCIES_HZ.len() + CHURN_FREQUENCIES_HZ.len()));
        let mut different = cases.clone();
        different.sort();
        different.dedup();
        assert_eq!(different.len(), cases.len());
        let (first, mut second) = (in_order(&cases, 0), in_order(&cases, 1));
        assert_ne!(first, second);
        second.reverse();
        assert_eq!(first, second);
    }
}
