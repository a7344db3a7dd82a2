//! `cargo xtask bench churn`: what the agent costs beside `perf record` while processes come and go. Both run at the same
//! time, so that each sees the same load, the other one included. The agent's memory is limited by a cgroup, its account is
//! to be exact, and its labels right: otherwise the measurement fails.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    load::{self, Backend, Running},
    memory_cgroup::MemoryCgroup,
    proc,
    profiler::{self, Started},
};
use crate::{command, project};

const PROCESSES: u32 = 1000;
const FORKS_PER_SECOND: u32 = 1000;
const EXECS_PER_SECOND: u32 = 50;
/// Limit of the agent's memory cgroup: 90 % of it are its `--memory-limit`.
const MEMORY_BYTES: u64 = 128 << 20;
/// Until the profilers know the processes that were there before them.
const WARM_UP: Duration = Duration::from_secs(10);
/// Share of the load's CPU time that must be under the executable it was spent in.
const LABELED_MIN: f64 = 0.95;

/// What a profiler took in the measured interval.
#[derive(Clone, Copy)]
struct Use {
    cpu_s: f64,
    bpf_s: f64,
    rss_mib: f64,
}

/// Measures both for `measured` and prints a table.
pub(super) fn run(hz: u32, measured: Duration, backend: &Backend, work: &Path) -> Result<()> {
    let without = MappingCost::measure()?;
    let memory = MemoryCgroup::create(MEMORY_BYTES)?;
    let mut agent = start_agent(hz, backend, work, &memory)?;
    wait_for_samples(&mut agent)?;
    let with = MappingCost::measure()?;
    let _crowd = program("crowd", &[PROCESSES, 1, 100])?;
    let seconds = u32::try_from((WARM_UP + measured).as_secs()).context("too long")? + 5;
    let _storm = program("fork_storm", &[FORKS_PER_SECOND, seconds])?;
    let mut perf = Started::perf(hz, work)?;
    exec_for(WARM_UP)?;
    let before = [reading(&mut agent)?, reading(&mut perf)?];
    let execs = exec_for(measured)?;
    let after = [reading(&mut agent)?, reading(&mut perf)?];
    let [agent_use, perf_use] = std::array::from_fn(|index| Use {
        cpu_s: after[index].cpu_s - before[index].cpu_s,
        bpf_s: after[index].bpf_s - before[index].bpf_s,
        rss_mib: after[index].rss_mib,
    });
    print_costs(agent_use, perf_use, measured, &format!("{execs} execs, {hz} Hz"));
    println!("agent and its programs / perf: {:.2}", (agent_use.cpu_s + agent_use.bpf_s) / perf_use.cpu_s);
    println!("an executable mapping and its end: {without} without the agent, {with} with it");
    stop(perf)?;
    let metrics = stop(agent)?;
    judge(&memory, backend, &fs::read_to_string(work.join(AGENT_LOG)).context("read the agent's log")?)?;
    println!("{metrics}");
    Ok(())
}

fn print_costs(agent: Use, perf: Use, measured: Duration, load: &str) {
    let measured_s = measured.as_secs_f64();
    println!("{PROCESSES} processes, {FORKS_PER_SECOND} forks/s, {load}, {measured_s} s");
    println!("\n| | CPU s | % of one CPU | BPF s | resident MiB |\n| --- | ---: | ---: | ---: | ---: |");
    for (name, Use { cpu_s, bpf_s, rss_mib }) in [("agent", agent), ("perf record -a -g", perf)] {
        println!("| {name} | {cpu_s:.2} | {:.2} | {bpf_s:.2} | {rss_mib:.0} |", cpu_s * 100.0 / measured_s);
    }
    println!("\nagent / perf: {:.2} (CPU time of the processes)", agent.cpu_s / perf.cpu_s);
}

const AGENT_LOG: &str = "agent-churn.log";

/// The agent by a shell that goes into the cgroup before it becomes the agent.
fn start_agent(hz: u32, backend: &Backend, work: &Path, memory: &MemoryCgroup) -> Result<Started> {
    let address = load::free_address()?;
    let agent = load::own_program("profiler-agent");
    let mut shell = Command::new("sh");
    shell.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(memory.procs()).arg(agent.get_program());
    for (variable, _) in agent.get_envs().filter(|(_, value)| value.is_none()) {
        shell.env_remove(variable);
    }
    shell.args(["--frequency", &hz.to_string(), "--listen", &address.to_string()]);
    shell.args(["--upload", &format!("http://{}", backend.address)]);
    shell.stdin(Stdio::null()).stdout(Stdio::null());
    let process = Running::start(shell.stderr(load::log(work, AGENT_LOG)?))?;
    Ok(Started::Agent { process, address })
}

fn wait_for_samples(agent: &mut Started) -> Result<()> {
    let end = Instant::now() + load::PATIENCE;
    while !agent.counters().is_some_and(|counters| counters.has_samples()) {
        agent.process().check().context("the agent")?;
        ensure!(Instant::now() < end, "the agent takes no samples");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Ends a profiler. Gives what the agent says of processes and mappings.
fn stop(profiler: Started) -> Result<String> {
    match profiler {
        Started::Agent { process, address } => {
            let metrics = profiler::get(address, "/metrics")?;
            process.interrupt().context("stop the agent")?;
            let is_of_processes = |line: &&str| {
                ["first_stacks", "mapping", "exec_events", "fork_exit", "processes"]
                    .iter()
                    .any(|name| line.starts_with(&format!("profiler_agent_{name}")))
            };
            Ok(metrics.lines().filter(is_of_processes).collect::<Vec<_>>().join("\n"))
        }
        Started::Perf { process, .. } | Started::Bpftrace { process, .. } => {
            process.interrupt().context("stop the other profiler")?;
            Ok(String::new())
        }
    }
}

/// Whether the agent kept to its memory, to its account, and to the right labels.
fn judge(memory: &MemoryCgroup, backend: &Backend, log: &str) -> Result<()> {
    let (peak, killed) = (memory.peak_bytes()? >> 20, memory.killed()?);
    println!("memory cgroup: peak {peak} MiB of {}, {killed} kills", MEMORY_BYTES >> 20);
    let account =
        log.lines().rev().find(|line| line.contains(": taken ")).context("no account in the log")?;
    println!("{}", account.trim());
    let total = |query: &str| -> Result<f64> {
        let escaped = query.replace('{', "%7B").replace('}', "%7D").replace('"', "%22").replace('=', "%3D");
        let path = format!("/api/v1/merge?type=cpu&format=json&max_nodes=10&from=now-1h&query={escaped}");
        let merged: serde_json::Value = serde_json::from_str(&profiler::get(backend.address, &path)?)?;
        merged["total"].as_f64().context("an answer without a total")
    };
    let (mut right, mut all) = (0.0, 0.0);
    for name in ["crowd", "fork_storm", "short"] {
        all += total(&format!("{{comm=\"{name}\"}}"))?;
        right += total(&format!("{{comm=\"{name}\",exe=\"{name}\"}}"))?;
    }
    println!("labeled rightly: {:.1} % of {:.1} s", right * 100.0 / all, all / 1e9);
    ensure!(killed == 0, "the agent was killed for lack of memory");
    ensure!(!account.contains("UNACCOUNTED"), "the account is not exact");
    ensure!(right / all >= LABELED_MIN, "less than {LABELED_MIN} of the CPU time is labeled rightly");
    Ok(())
}

/// Nanoseconds of mapping a page of a file and unmapping it, as data and as code.
struct MappingCost {
    data_ns: f64,
    code_ns: f64,
}

impl MappingCost {
    fn measure() -> Result<Self> {
        let text = command::output(&mut Command::new(project::target().join("testprogs/map_code")))?;
        let costs: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default())
            .context("parse what map_code says")?;
        let [Some(data_ns), Some(code_ns)] = ["data_ns", "code_ns"].map(|name| costs[name].as_f64()) else {
            bail!("map_code says {text}");
        };
        Ok(Self { data_ns, code_ns })
    }
}

impl std::fmt::Display for MappingCost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { data_ns, code_ns } = self;
        write!(f, "{code_ns:.0} ns ({data_ns:.0} as data)")
    }
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
