//! The numbers as a table for people and as JSON.

use std::{fmt::Write as _, fs, process::Command};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    Plan,
    case::{Case, Cost, LoadKind, Profiler, Run},
};
use crate::command;

/// What the numbers depend on.
#[derive(Serialize)]
pub(super) struct Machine {
    kernel: String,
    cpus: usize,
    perf: String,
    /// `None` where there is none.
    bpftrace: Option<String>,
    /// Other work on the machine, before the load started: 1, 5 and 15 minutes.
    load_average: String,
}

impl Machine {
    pub(super) fn read() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let load = read("/proc/loadavg")?;
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus: std::thread::available_parallelism().context("count the CPUs")?.get(),
            perf: command::output(Command::new("perf").arg("--version"))?.trim().to_owned(),
            bpftrace: command::probe(Command::new("bpftrace").arg("--version"))
                .map(|text| text.trim().to_owned()),
            load_average: load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        })
    }
}

pub(super) fn json(machine: &Machine, runs: &[Run]) -> Result<String> {
    #[derive(Serialize)]
    struct Report<'a> {
        format_version: u32,
        machine: &'a Machine,
        runs: &'a [Run],
    }
    serde_json::to_string_pretty(&Report { format_version: 2, machine, runs }).context("write JSON")
}

/// A line of the table: its title, its value in a run's cost, and the digits shown.
struct Row {
    title: &'static str,
    value: fn(&Run, &Cost) -> Option<f64>,
    digits: usize,
}

const MIB: f64 = 1024.0 * 1024.0;

const ROWS: [Row; 17] = [
    row("CPU s per minute (user + system)", |run, cost| Some(cost.cpu_s * 60.0 / run.seconds), 2),
    row("BPF s per minute, in the targets' time", |run, cost| bpf(cost, cost.bpf_s * 60.0 / run.seconds), 3),
    row("both", |run, cost| Some((cost.cpu_s + cost.bpf_s) * 60.0 / run.seconds), 2),
    row("BPF µs per sample, mean", |_, cost| Some(cost.bpf_ns_per_sample? / 1e3), 1),
    row("BPF µs per sample, p50", |_, cost| Some(cost.bpf_sample_times?.p50_ns / 1e3), 1),
    row("BPF µs per sample, p99", |_, cost| Some(cost.bpf_sample_times?.p99_ns / 1e3), 1),
    row("RSS, MiB, mean", |_, cost| Some(cost.memory.rss_bytes as f64 / MIB), 1),
    row("RSS anonymous, MiB, mean", |_, cost| Some(cost.memory.rss_anon_bytes as f64 / MIB), 1),
    row("RSS, MiB, most in the interval", |_, cost| Some(cost.rss_bytes_max as f64 / MIB), 1),
    row("RSS, MiB, peak since the start", |_, cost| Some(cost.memory.rss_peak_bytes as f64 / MIB), 1),
    row("BPF maps, MiB", |_, cost| bpf(cost, cost.map_bytes as f64 / MIB), 1),
    row(
        "KiB per minute, uploaded or written",
        |run, cost| Some(cost.bytes_out / 1024.0 * 60.0 / run.seconds),
        0,
    ),
    row("s to the first sample", |_, cost| Some(cost.first_sample_s), 2),
    row("CPU s to the first sample", |_, cost| Some(cost.first_sample_cpu_s), 2),
    row("CPU s of the warm-up", |_, cost| Some(cost.warm_up_cpu_s), 2),
    row("samples per second", |run, cost| Some(cost.samples / run.seconds), 1),
    row("samples lost", |_, cost| cost.samples_lost, 0),
];

const fn row(title: &'static str, value: fn(&Run, &Cost) -> Option<f64>, digits: usize) -> Row {
    Row { title, value, digits }
}

/// What only a profiler with a BPF program has.
fn bpf(cost: &Cost, value: f64) -> Option<f64> {
    cost.bpf_ns_per_sample.map(|_| value)
}

/// A table for each load and frequency: means over the rounds, and what the agent takes for 1 that each other does.
pub(super) fn markdown(machine: &Machine, plan: &Plan, runs: &[Run]) -> String {
    let Machine { kernel, cpus, perf, bpftrace, load_average } = machine;
    let bpftrace = bpftrace.as_deref().unwrap_or("no bpftrace");
    let mut text = format!(
        "Linux {kernel}, {cpus} CPUs, {perf}, {bpftrace}; load average before: {load_average}. {} x {} s a case after \
         {} s of warm-up; means. perf gives no names while it records; the agent does, by its own table, with lines and \
         inlined calls where there is DWARF; bpftrace by symbols, of processes that still run.\n",
        plan.rounds,
        plan.measured.as_secs(),
        plan.warm_up.as_secs(),
    );
    let mut kinds: Vec<_> = runs.iter().map(|run| (run.case.load, run.case.hz)).collect();
    kinds.sort();
    kinds.dedup();
    for &(load, hz) in kinds.iter().filter(|(_, hz)| *hz > 0) {
        text += &table(load, hz, runs);
    }
    kinds.dedup_by_key(|(load, _)| *load);
    for (load, _) in kinds {
        text += &slowdown(load, runs);
    }
    text
}

fn table(load: LoadKind, hz: u32, runs: &[Run]) -> String {
    let (title, executables) = match load {
        LoadKind::Steady => ("steady load", None),
        LoadKind::Churn => ("new executables", executables_per_minute(hz, runs)),
    };
    let mut text = format!("\n{title}, {hz} Hz");
    if let Some(executables) = executables {
        let _ = write!(text, ", {executables:.0} executables compiled and run a minute");
    }
    text += "\n\n| | agent | perf | agent / perf | bpftrace | agent / bpftrace |\n| --- | ---: | ---: | ---: | ---: | ---: |";
    for Row { title, value, digits } in &ROWS {
        let of = |profiler| mean(runs, Case { load, profiler, hz }, |run| value(run, run.cost.as_ref()?));
        let [agent, perf, bpftrace] = [Profiler::Agent, Profiler::Perf, Profiler::Bpftrace].map(of);
        let _ = write!(text, "\n| {title} | {} |", number(agent, *digits));
        for other in [perf, bpftrace] {
            text += &cells(agent, other, *digits);
        }
    }
    text + "\n"
}

fn executables_per_minute(hz: u32, runs: &[Run]) -> Option<f64> {
    let per_minute = |run: &Run| Some(f64::from(run.executables?) * 60.0 / run.seconds);
    let all: Vec<f64> = runs.iter().filter(|run| run.case.hz == hz).filter_map(per_minute).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

/// Another profiler's value, and the ratio.
fn cells(agent: Option<f64>, other: Option<f64>, digits: usize) -> String {
    let ratio = agent.zip(other).filter(|(_, other)| *other > 0.0).map(|(agent, other)| agent / other);
    format!(" {} | {} |", number(other, digits), number(ratio, 2))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// How much less a busy thread gets done in a second of its CPU time, beside each profiler and beside nobody again.
fn slowdown(load: LoadKind, runs: &[Run]) -> String {
    let title = match load {
        LoadKind::Steady => "steady load",
        LoadKind::Churn => "new executables",
    };
    let mut text = format!("\n| target's slowdown, {title} | % |\n| --- | ---: |\n");
    let nobody = Case { load, profiler: Profiler::Nobody, hz: 0 };
    let work = |case| mean(runs, case, |run| Some(run.target_rounds_per_cpu_s));
    let of_load = runs.iter().map(|run| run.case).filter(|case| case.load == load);
    let mut cases: Vec<Case> = of_load.filter(|case| *case != nobody).collect();
    cases.sort_by_key(|case| (case.hz, case.profiler));
    cases.dedup();
    for case in cases {
        let percent = work(nobody).zip(work(case)).map(|(alone, beside)| (alone / beside - 1.0) * 100.0);
        let _ = writeln!(text, "| {case} | {} |", number(percent, 2));
    }
    text
}

fn mean(runs: &[Run], case: Case, value: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = runs.iter().filter(|run| run.case == case).filter_map(value).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(load: LoadKind, profiler: Profiler, hz: u32, target_rounds_per_cpu_s: f64) -> Run {
        let case = Case { load, profiler, hz };
        Run { case, seconds: 30.0, target_rounds_per_cpu_s, executables: Some(20), cost: None }
    }

    #[test]
    fn the_slowdown_is_what_is_missing_against_nobody_on_the_same_load() {
        let steady = LoadKind::Steady;
        let runs = [
            run(steady, Profiler::Nobody, 0, 90.0),
            run(steady, Profiler::Nobody, 0, 110.0),
            run(LoadKind::Churn, Profiler::Nobody, 0, 1.0),
            run(steady, Profiler::Perf, 19, 80.0),
            run(steady, Profiler::NobodyAgain, 0, 100.0),
        ];
        let text = slowdown(steady, &runs);
        assert!(text.ends_with("| nobody again (A/A) | 0.00 |\n| perf, 19 Hz | 25.00 |\n"), "{text}");
    }

    #[test]
    fn a_table_says_how_many_executables_were_made() {
        let text = table(LoadKind::Churn, 19, &[run(LoadKind::Churn, Profiler::Perf, 19, 1.0)]);
        assert!(
            text.starts_with("\nnew executables, 19 Hz, 40 executables compiled and run a minute\n"),
            "{text}"
        );
    }

    #[test]
    fn a_ratio_needs_both_sides() {
        assert_eq!(cells(Some(1.0), Some(4.0), 1), " 4.0 | 0.25 |");
        assert_eq!(cells(Some(1.0), None, 1), " - | - |");
        assert_eq!(cells(Some(1.0), Some(0.0), 1), " 0.0 | - |");
    }
}
