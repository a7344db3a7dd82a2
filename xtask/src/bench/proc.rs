//! What `/proc` says about a process, its BPF programs and maps.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::command;

const STATS_SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// include/uapi/linux/bpf.h: BPF_PROG_TYPE_PERF_EVENT.
const PROGRAM_TYPE_PERF_EVENT: u64 = 7;

/// Memory of a process. Source: proc_pid_status(5).
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Memory {
    pub(super) rss_bytes: u64,
    pub(super) rss_anon_bytes: u64,
    /// Since the process started.
    pub(super) rss_peak_bytes: u64,
}

/// BPF programs and maps that a process has descriptors of, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bpf {
    /// Time in all programs.
    pub(super) run_ns: u64,
    /// Time in, and runs of, programs on perf events: one run a sample.
    pub(super) sample_ns: u64,
    pub(super) sample_runs: u64,
    pub(super) map_bytes: u64,
}

/// Has the kernel count what BPF programs take, until it is dropped. The counting itself is two clock reads a run.
pub(super) struct BpfStats {
    before: String,
}

impl BpfStats {
    pub(super) fn enable() -> Result<Self> {
        let before = fs::read_to_string(STATS_SWITCH).with_context(|| format!("read {STATS_SWITCH}"))?;
        let before = before.trim().to_owned();
        fs::write(STATS_SWITCH, "1").with_context(|| format!("write {STATS_SWITCH}"))?;
        eprintln!("kernel.bpf_stats_enabled: {before} -> 1 for this run");
        Ok(Self { before })
    }
}

impl Drop for BpfStats {
    fn drop(&mut self) {
        match fs::write(STATS_SWITCH, &self.before) {
            Ok(()) => eprintln!("kernel.bpf_stats_enabled: back to {}", self.before),
            Err(error) => eprintln!("kernel.bpf_stats_enabled could not be set back: {error}"),
        }
    }
}

/// Seconds since boot, suspend included, in steps of 10 ms. Source: proc_uptime(5).
pub(super) fn uptime_s() -> Result<f64> {
    let text = fs::read_to_string("/proc/uptime").context("read /proc/uptime")?;
    text.split(' ').next().and_then(|word| word.parse().ok()).context("/proc/uptime holds no number")
}

/// Nanoseconds that the calling thread was on a CPU. Source: Documentation/scheduler/sched-stats.rst.
pub(super) fn thread_cpu_ns() -> Result<u64> {
    let path = "/proc/thread-self/schedstat";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.split(' ').next().and_then(|word| word.parse().ok()).with_context(|| format!("parse {path}"))
}

/// CPU seconds of a process and of its children that it has waited for, user and system, in steps of a clock tick.
pub(super) fn cpu_s(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(cpu_ticks(&text).with_context(|| format!("parse {path}"))? as f64 / ticks_per_s())
}

/// utime + stime + cutime + cstime. Source: proc_pid_stat(5), fields 14 to 17; field 2 may hold spaces, and ends in the
/// last parenthesis.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, from_third) = stat.rsplit_once(") ")?;
    let fields = from_third.split(' ').skip(11).take(4).map(|field| field.parse::<u64>().ok());
    fields.collect::<Option<Vec<_>>>().filter(|fields| fields.len() == 4).map(|fields| fields.iter().sum())
}

fn ticks_per_s() -> f64 {
    static TICKS: OnceLock<f64> = OnceLock::new();
    // 100 on every architecture that the agent runs on, whatever the kernel's own tick is.
    *TICKS.get_or_init(|| {
        command::probe(Command::new("getconf").arg("CLK_TCK"))
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(100.0)
    })
}

pub(super) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let bytes = |name: &str| {
        let kib = field(&text, name).with_context(|| format!("{path} has no {name}"))?;
        anyhow::Ok(kib * 1024)
    };
    Ok(Memory {
        rss_bytes: bytes("VmRSS")?,
        rss_anon_bytes: bytes("RssAnon")?,
        rss_peak_bytes: bytes("VmHWM")?,
    })
}

/// Mean of several readings, and the latest peak.
pub(super) fn mean(readings: &[Memory]) -> Option<Memory> {
    let mean = |bytes: fn(&Memory) -> u64| {
        let sum: u64 = readings.iter().map(bytes).sum();
        sum.checked_div(readings.len() as u64)
    };
    Some(Memory {
        rss_bytes: mean(|memory| memory.rss_bytes)?,
        rss_anon_bytes: mean(|memory| memory.rss_anon_bytes)?,
        rss_peak_bytes: readings.last()?.rss_peak_bytes,
    })
}

pub(super) fn bpf(pid: u32) -> Result<Bpf> {
    let folder = format!("/proc/{pid}/fdinfo");
    let entries = fs::read_dir(&folder).with_context(|| format!("list {folder}"))?;
    // A descriptor may be closed between the listing and the reading.
    let descriptors = entries.flatten().filter_map(|entry| read(&entry.path())).collect::<Vec<_>>();
    Ok(sum_bpf(&descriptors))
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The counters of a process's sampling program, for looking at often.
pub(super) struct SampleRuns(PathBuf);

/// Runs of a program, and the time in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Runs {
    pub(super) runs: u64,
    pub(super) ns: u64,
}

impl SampleRuns {
    pub(super) fn of(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/fdinfo");
        let entries = fs::read_dir(&folder).with_context(|| format!("list {folder}"))?;
        let is_sampler = |path: &PathBuf| read(path).is_some_and(|text| sample_runs(&text).is_some());
        let found = entries.flatten().map(|entry| entry.path()).find(is_sampler);
        found.map(Self).context("no program on perf events")
    }

    pub(super) fn read(&self) -> Result<Runs> {
        let path = self.0.display();
        let text = fs::read_to_string(&self.0).with_context(|| format!("read {path}"))?;
        sample_runs(&text).with_context(|| format!("{path} is no program"))
    }
}

fn sample_runs(text: &str) -> Option<Runs> {
    if field(text, "prog_type") != Some(PROGRAM_TYPE_PERF_EVENT) {
        return None;
    }
    Some(Runs { runs: field(text, "run_cnt")?, ns: field(text, "run_time_ns")? })
}

/// Adds up the fdinfo of descriptors; several may be of one program or map.
fn sum_bpf(descriptors: &[String]) -> Bpf {
    let by_id = |name: &'static str| -> BTreeMap<u64, &String> {
        descriptors.iter().filter_map(|text| Some((field(text, name)?, text))).collect()
    };
    let mut sum = Bpf::default();
    for text in by_id("prog_id").values() {
        let run_ns = field(text, "run_time_ns").unwrap_or_default();
        sum.run_ns += run_ns;
        if field(text, "prog_type") == Some(PROGRAM_TYPE_PERF_EVENT) {
            sum.sample_ns += run_ns;
            sum.sample_runs += field(text, "run_cnt").unwrap_or_default();
        }
    }
    sum.map_bytes = by_id("map_id").values().filter_map(|text| field(text, "memlock")).sum();
    sum
}

/// The first number behind `name:` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_name_with_spaces_and_parentheses() {
        let stat = "7 (a) b) (c)) S 1 7 7 0 -1 4194304 100 0 0 0 50 7 3 1 20 0 1 0 100";
        assert_eq!(cpu_ticks(stat), Some(61));
        assert_eq!(cpu_ticks("7 (a) S 1 7"), None);
    }

    #[test]
    fn a_program_or_map_with_several_descriptors_counts_once() {
        let sampler = "prog_type:\t7\nmemlock:\t8192\nprog_id:\t3\nrun_time_ns:\t900\nrun_cnt:\t2\n";
        let exec = "prog_type:\t17\nmemlock:\t4096\nprog_id:\t4\nrun_time_ns:\t50\nrun_cnt:\t1\n";
        let map = "map_type:\t27\nmemlock:\t1000\nmap_id:\t9\n";
        // A link names the program too, but has no times.
        let descriptors = [sampler, exec, map, map, "pos:\t0\n", sampler].map(str::to_owned);
        assert_eq!(sample_runs(sampler), Some(Runs { runs: 2, ns: 900 }));
        assert_eq!(sample_runs(exec), None);
        let expected = Bpf { run_ns: 950, sample_ns: 900, sample_runs: 2, map_bytes: 1000 };
        assert_eq!(sum_bpf(&descriptors), expected);
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = std::process::id();
        assert!(cpu_s(pid).expect("own stat") >= 0.0);
        assert!(memory(pid).expect("own status").rss_bytes > 0);
        assert_eq!(bpf(pid).expect("own descriptors"), Bpf::default());
    }
}
