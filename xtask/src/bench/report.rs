//! The numbers as a table for people and as JSON.

use std::{fmt::Write as _, fs, process::Command};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    FREQUENCIES_HZ, Plan,
    case::{Case, Cost, Profiler, Run},
};
use crate::command;

/// What the numbers depend on.
#[derive(Serialize)]
pub(super) struct Machine {
    kernel: String,
    cpus: usize,
    perf: String,
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
    serde_json::to_string_pretty(&Report { format_version: 1, machine, runs }).context("write JSON")
}

/// A line of the table: its title, its value in a run's cost, and the digits shown.
struct Row {
    title: &'static str,
    value: fn(&Run, &Cost) -> Option<f64>,
    digits: usize,
}

const MIB: f64 = 1024.0 * 1024.0;

const ROWS: [Row; 12] = [
    row("CPU s per minute (user + system)", |run, cost| Some(cost.cpu_s * 60.0 / run.seconds), 2),
    row("BPF s per minute, in the targets' time", |run, cost| bpf(cost, cost.bpf_s * 60.0 / run.seconds), 3),
    row("BPF µs per sample, mean", |_, cost| Some(cost.bpf_ns_per_sample? / 1e3), 1),
    row("RSS, MiB", |_, cost| Some(cost.memory.rss_bytes as f64 / MIB), 1),
    row("RSS anonymous, MiB", |_, cost| Some(cost.memory.rss_anon_bytes as f64 / MIB), 1),
    row("RSS peak, MiB", |_, cost| Some(cost.memory.rss_peak_bytes as f64 / MIB), 1),
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
];

const fn row(title: &'static str, value: fn(&Run, &Cost) -> Option<f64>, digits: usize) -> Row {
    Row { title, value, digits }
}

/// What only a profiler with a BPF program has.
fn bpf(cost: &Cost, value: f64) -> Option<f64> {
    cost.bpf_ns_per_sample.map(|_| value)
}

/// Means over the rounds.
pub(super) fn markdown(machine: &Machine, plan: &Plan, runs: &[Run]) -> String {
    let Machine { kernel, cpus, perf, load_average } = machine;
    let mut text = format!(
        "Linux {kernel}, {cpus} CPUs, {perf}; load average before: {load_average}. {} x {} s a case after {} s of \
         warm-up; means. perf gives no names while it records; the agent does.\n\n|  |",
        plan.rounds,
        plan.measured.as_secs(),
        plan.warm_up.as_secs(),
    );
    for hz in FREQUENCIES_HZ {
        let _ = write!(text, " agent {hz} Hz | perf {hz} Hz | ratio |");
    }
    text += "\n| --- |";
    text += &" ---: |".repeat(3 * FREQUENCIES_HZ.len());
    for Row { title, value, digits } in &ROWS {
        let _ = write!(text, "\n| {title} |");
        let of = |profiler, hz| mean(runs, Case { profiler, hz }, |run| value(run, run.cost.as_ref()?));
        for hz in FREQUENCIES_HZ {
            text += &cells(of(Profiler::Agent, hz), of(Profiler::Perf, hz), *digits);
        }
    }
    text += "\n| samples lost |";
    for hz in FREQUENCIES_HZ {
        let case = Case { profiler: Profiler::Agent, hz };
        let lost = mean(runs, case, |run| run.cost.as_ref()?.samples_lost);
        text += &cells(lost, None, 0);
    }
    text + "\n\n" + &slowdown(runs)
}

fn cells(agent: Option<f64>, perf: Option<f64>, digits: usize) -> String {
    let ratio = agent.zip(perf).filter(|(_, perf)| *perf > 0.0).map(|(agent, perf)| agent / perf);
    format!(" {} | {} | {} |", number(agent, digits), number(perf, digits), number(ratio, 2))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// How much less a busy thread gets done in a second of its CPU time, beside each profiler and beside nobody again.
fn slowdown(runs: &[Run]) -> String {
    let mut text = "| target's slowdown | % |\n| --- | ---: |\n".to_owned();
    let nobody = Case { profiler: Profiler::Nobody, hz: 0 };
    let work = |case| mean(runs, case, |run| Some(run.target_rounds_per_cpu_s));
    let mut cases: Vec<Case> = runs.iter().map(|run| run.case).filter(|case| *case != nobody).collect();
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

    #[test]
    fn the_slowdown_is_what_is_missing_against_nobody() {
        let run = |profiler, hz, target_rounds_per_cpu_s| Run {
            case: Case { profiler, hz },
            seconds: 1.0,
            target_rounds_per_cpu_s,
            cost: None,
        };
        let runs = [
            run(Profiler::Nobody, 0, 90.0),
            run(Profiler::Nobody, 0, 110.0),
            run(Profiler::Perf, 19, 80.0),
            run(Profiler::NobodyAgain, 0, 100.0),
        ];
        let text = slowdown(&runs);
        assert!(text.ends_with("| nobody again (A/A) | 0.00 |\n| perf, 19 Hz | 25.00 |\n"), "{text}");
    }

    #[test]
    fn a_ratio_needs_both_sides() {
        assert_eq!(cells(Some(1.0), Some(4.0), 1), " 1.0 | 4.0 | 0.25 |");
        assert_eq!(cells(Some(1.0), None, 1), " 1.0 | - | - |");
        assert_eq!(cells(Some(1.0), Some(0.0), 1), " 1.0 | 0.0 | - |");
    }
}
