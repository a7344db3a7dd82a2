//! Many processes, most of them short-lived, and little memory: nothing is lost without being counted, and what is kept
//! is under the right names.

#[path = "support/cgroups.rs"]
mod cgroups;
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime},
};

use cgroups::Cgroups;
use support::{Agent, Program, testprogs};

/// The whole of the agent and its backend, the memory of BPF maps and the page cache of what it reads and writes.
const MEMORY_MAX: u64 = 128 << 20;
/// Share of the CPU time that must be under the right executable.
const RIGHT: f64 = 0.95;
/// A minute by `PROFILER_TEST_LONG=1 cargo xtask test root`.
fn seconds() -> u32 {
    if std::env::var_os("PROFILER_TEST_LONG").is_some() { 60 } else { 15 }
}

/// Children, threads or programs that are started a second: a tenth where everything takes longer.
fn a_second(number: u32) -> u32 {
    if support::is_emulated() { number / 10 } else { number }
}

/// Milliseconds between a crowd member's moments of work, which are ten times as long where everything takes longer: the
/// crowd would leave nothing of the CPU.
fn pause_ms(pause: u32) -> String {
    (if support::is_emulated() { pause * 20 } else { pause }).to_string()
}

#[test]
#[ignore = "needs root and BPF"]
fn a_thousand_processes_and_forks_a_second_are_accounted_for_and_labeled() {
    let memory = MemoryCgroup::new("churn");
    let agent = Agent::start_after(&memory.moves(), &["-F", "99", "--window", "2s"]);
    let crowd = Program::start("crowd", &["1000", "1", &pause_ms(100)]);
    let before = agent_cpu_s(&agent);
    let storm = Program::start("fork_storm", &[&a_second(1000).to_string(), &seconds().to_string()]);
    let execs = exec_for(seconds(), a_second(50));
    let forked = storm.output();
    let cpu_s = agent_cpu_s(&agent) - before;
    drop(crowd);
    agent.wait_for_window_after(SystemTime::now());

    let of = |selector: &str| agent.merge(selector).total as f64;
    let (mut right, mut all) = (0.0, 0.0);
    for name in ["crowd", "fork_storm", "short"] {
        let (of_name, of_both) =
            (of(&format!("{{comm=\"{name}\"}}")), of(&format!("{{comm=\"{name}\",exe=\"{name}\"}}")));
        println!("{name}: {:.3} s, {:.1} % under its name", of_name / 1e9, of_both * 100.0 / of_name);
        (right, all) = (right + of_both, all + of_name);
    }
    println!("{execs} execs, forks {}, agent {cpu_s:.2} CPU s in {} s; {memory}", forked.trim(), seconds());
    println!("{}", interesting(&agent));
    assert!(all > 0.0 && right / all >= RIGHT, "{right} of {all} ns are under the right executable");
    end(agent, &memory);
}

#[test]
#[ignore = "needs root and BPF"]
fn a_storm_of_threads_is_one_process() {
    let memory = MemoryCgroup::new("threads");
    let agent = Agent::start_after(&memory.moves(), &["-F", "99", "--window", "2s"]);
    if support::is_emulated() {
        // Names come later than the storm ends.
        let _early = Program::start("fork_storm", &["100", "600", "threads"]);
        agent.counted_from("{exe=\"fork_storm\"}", "child_work");
    }
    let known = agent.metric("profiler_agent_unwind_processes").expect("metrics");
    let (number, seconds) = (a_second(2000).to_string(), (seconds() / 3).to_string());
    let storm = Program::start("fork_storm", &[&number, &seconds, "threads"]);
    let selector = format!("{{pid=\"{}\"}}", storm.pid());
    let started = storm.output();
    let at_most = agent.metric("profiler_agent_unwind_processes").expect("metrics");
    agent.wait_for_window_after(SystemTime::now());
    let of_both = agent.merge(&format!("{}exe=\"fork_storm\"}}", selector.replace('}', ",")));
    let share = of_both.total as f64 / agent.merge(&selector).total as f64;
    println!("{}: {:.1} % under its name; {memory}", started.trim(), share * 100.0);
    assert!(share >= RIGHT, "{share} of its time is under its name");
    assert!(of_both.mentions("child_work"), "{of_both:#?}");
    assert!(at_most < known + 500.0, "threads are no processes: {known}, then {at_most}");
    end(agent, &memory);
}

#[test]
#[ignore = "needs root and BPF"]
fn twenty_thousand_threads_in_two_thousand_cgroups_fit_into_the_memory_there_is() {
    let memory = MemoryCgroup::new("crowd");
    let agent = Agent::start_after(&memory.moves(), &["-F", "99", "--window", "2s"]);
    let cgroups = Cgroups::new();
    let directory = cgroups.directory("crowd.slice");
    let before = agent_cpu_s(&agent);
    let directory = directory.to_str().expect("a plain path");
    let crowd = Program::start("crowd", &["2000", "10", &pause_ms(1000), directory]);
    let end_of_phase = Instant::now() + Duration::from_secs(seconds().into());
    agent.wait_for("the crowd has been sampled for long enough", || {
        (Instant::now() > end_of_phase).then_some(())
    });
    let cpu_s = agent_cpu_s(&agent) - before;
    drop(crowd);
    agent.wait_for_window_after(SystemTime::now());
    let of_name = agent.merge("{comm=\"crowd\"}").total as f64;
    let of_both = agent.merge("{comm=\"crowd\",exe=\"crowd\"}").total as f64;
    println!(
        "crowd: {:.3} s, {:.1} % under its name; agent {cpu_s:.2} CPU s; {memory}",
        of_name / 1e9,
        of_both * 100.0 / of_name
    );
    println!("{}", interesting(&agent));
    assert!(
        of_name > 0.0 && of_both / of_name >= RIGHT,
        "{of_both} of {of_name} ns are under the right executable"
    );
    end(agent, &memory);
}

/// Nothing was killed for lack of memory, and the account is exact.
#[track_caller]
fn end(agent: Agent, memory: &MemoryCgroup) {
    let log = agent.stop();
    let account = log.lines().find(|line| line.contains("taken ")).expect("an account at the end");
    println!("{account}; {memory}");
    assert_eq!(memory.killed(), 0, "{memory}\n{log}");
    assert!(!account.contains("UNACCOUNTED"), "{account}");
}

/// Starts programs that are soon gone, so many a second; gives how many.
fn exec_for(seconds: u32, per_second: u32) -> u32 {
    let start = Instant::now();
    let short = testprogs().join("short");
    let failed = AtomicBool::new(false);
    let mut started = 0;
    thread::scope(|scope| {
        while started < per_second * seconds && !failed.load(Relaxed) {
            let due = start + Duration::from_secs(1) * started / per_second;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let mut command = Command::new(&short);
            command.arg("5").stdin(Stdio::null()).stdout(Stdio::null());
            let failed = &failed;
            scope.spawn(move || {
                if !command.status().is_ok_and(|status| status.success()) {
                    failed.store(true, Relaxed);
                }
            });
            started += 1;
        }
    });
    assert!(!failed.load(Relaxed), "{} runs", short.display());
    started
}

fn agent_cpu_s(agent: &Agent) -> f64 {
    agent.metric("profiler_agent_cpu_seconds_total").expect("metrics")
}

/// What the process table and the names met.
fn interesting(agent: &Agent) -> String {
    let (_, metrics) = agent.get(agent.agent, "/metrics").expect("metrics");
    let metrics = String::from_utf8_lossy(&metrics).into_owned();
    let names = ["processes", "cgroups", "samples", "exec", "resident", "mappings", "unusable"];
    let is_interesting = |line: &&str| {
        names.iter().any(|name| line.starts_with(&format!("profiler_agent_{name}"))) && !line.ends_with(" 0")
    };
    metrics.lines().filter(is_interesting).collect::<Vec<_>>().join("\n")
}

/// A cgroup whose memory is limited, of v1 or v2.
struct MemoryCgroup {
    directory: PathBuf,
    is_v2: bool,
}

impl MemoryCgroup {
    fn new(name: &str) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let is_v2 = !v1.exists();
        let root = if is_v2 { Path::new("/sys/fs/cgroup") } else { v1 };
        let directory = root.join(format!("profiler-test-{name}-{}", std::process::id()));
        if is_v2 {
            fs::write(root.join("cgroup.subtree_control"), "+memory").expect("memory can be limited");
        }
        fs::create_dir(&directory).expect("a cgroup can be created");
        let limit = directory.join(if is_v2 { "memory.max" } else { "memory.limit_in_bytes" });
        fs::write(limit, MEMORY_MAX.to_string()).expect("its memory can be limited");
        Self { directory, is_v2 }
    }

    /// Shell commands that move the shell there.
    fn moves(&self) -> String {
        format!("echo $$ >'{}/cgroup.procs' &&", self.directory.display())
    }

    /// Processes killed for lack of memory.
    fn killed(&self) -> u64 {
        let events = self.read(if self.is_v2 { "memory.events" } else { "memory.oom_control" });
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        killed.unwrap_or_else(|| panic!("no count of kills in {events:?}"))
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.directory.join(file)).unwrap_or_default().trim().to_owned()
    }
}

impl std::fmt::Display for MemoryCgroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (now, peak) = match self.is_v2 {
            true => ("memory.current", "memory.peak"),
            false => ("memory.usage_in_bytes", "memory.max_usage_in_bytes"),
        };
        let mib = |file| self.read(file).parse::<u64>().map_or(0, |bytes| bytes >> 20);
        let stat = self.read("memory.stat");
        let rss =
            stat.lines().find_map(|line| line.strip_prefix("rss ").or_else(|| line.strip_prefix("anon ")));
        let rss = rss.and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0) >> 20;
        write!(
            f,
            "memory {} MiB, anonymous {rss} MiB, peak {} MiB of {}",
            mib(now),
            mib(peak),
            MEMORY_MAX >> 20
        )
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}
