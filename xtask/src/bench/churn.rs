//! `cargo xtask bench churn`: what the agent costs beside `perf record` while processes come and go. Both run at the same
//! time, so that each sees the same load, the other one included.

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    load::{Backend, Running},
    proc,
    profiler::Started,
};
use crate::project;

const PROCESSES: u32 = 1000;
const FORKS_PER_SECOND: u32 = 1000;
const EXECS_PER_SECOND: u32 = 50;
/// Until the profilers know the processes that were there before them.
const WARM_UP: Duration = Duration::from_secs(10);

/// What a profiler took in the measured interval.
#[derive(Clone, Copy)]
struct Use {
    cpu_s: f64,
    bpf_s: f64,
    rss_mib: f64,
}

/// Measures both for `measured` and prints a table.
pub(super) fn run(hz: u32, measured: Duration, backend: &Backend, work: &Path) -> Result<()> {
    let _crowd = program("crowd", &[PROCESSES, 1, 100])?;
    let seconds = u32::try_from((WARM_UP + measured).as_secs()).context("too long")? + 5;
    let _storm = program("fork_storm", &[FORKS_PER_SECOND, seconds])?;
    let (mut agent, mut perf) = (Started::agent(hz, backend, work)?, Started::perf(hz, work)?);
    exec_for(WARM_UP)?;
    let before = [reading(&mut agent)?, reading(&mut perf)?];
    let execs = exec_for(measured)?;
    let after = [reading(&mut agent)?, reading(&mut perf)?];
    let [agent_use, perf_use] = std::array::from_fn(|index| Use {
        cpu_s: after[index].cpu_s - before[index].cpu_s,
        bpf_s: after[index].bpf_s - before[index].bpf_s,
        rss_mib: after[index].rss_mib,
    });
    let measured_s = measured.as_secs_f64();
    println!(
        "{PROCESSES} processes, {FORKS_PER_SECOND} forks/s, {:.0} execs/s, {hz} Hz, {measured_s} s",
        f64::from(execs) / measured_s
    );
    println!("\n| | CPU s | % of one CPU | BPF s | resident MiB |\n| --- | ---: | ---: | ---: | ---: |");
    for (name, Use { cpu_s, bpf_s, rss_mib }) in [("agent", agent_use), ("perf record -a -g", perf_use)] {
        println!("| {name} | {cpu_s:.2} | {:.2} | {bpf_s:.2} | {rss_mib:.0} |", cpu_s * 100.0 / measured_s);
    }
    println!("\nagent / perf: {:.2} (CPU time of the processes)", agent_use.cpu_s / perf_use.cpu_s);
    Ok(())
}

fn reading(profiler: &mut Started) -> Result<Use> {
    let process = profiler.process();
    process.check()?;
    let pid = process.pid();
    let rss_mib = proc::memory(pid)?.rss_bytes as f64 / f64::from(1 << 20);
    Ok(Use { cpu_s: proc::cpu_s(pid)?, bpf_s: proc::bpf(pid)?.run_ns as f64 / 1e9, rss_mib })
}

/// Starts programs that live for some milliseconds at an even rate; gives how many.
fn exec_for(duration: Duration) -> Result<u32> {
    let (start, mut started) = (Instant::now(), 0);
    let mut running = Vec::new();
    while start.elapsed() < duration {
        running.push(program("short", &[5])?);
        started += 1;
        // Those that have ended are waited for when they are dropped.
        if running.len() > EXECS_PER_SECOND as usize {
            running.remove(0);
        }
        let due = start + Duration::from_secs(1) * started / EXECS_PER_SECOND;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(started)
}

fn program(name: &str, arguments: &[u32]) -> Result<Running> {
    let mut command = Command::new(project::target().join("testprogs").join(name));
    command.args(arguments.iter().map(u32::to_string));
    Running::start(command.stdin(Stdio::piped()).stdout(Stdio::null()))
}
