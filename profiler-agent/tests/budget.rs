//! The CPU budget holds under a load that would exceed it ten times, and no CPU time is lost or invented while the
//! frequency changes.

mod support;

use std::time::{Duration, Instant, SystemTime};

use support::{Agent, Program};

const FREQUENCY: &str = "1000";
const WINDOW: &str = "2s";
/// The budget is kept within this factor.
const FACTOR: f64 = 1.5;
/// Difference accepted between what was sampled and what the kernel accounted.
const TOLERANCE: f64 = 0.03;
/// A frequency that is too high is halved after 30 s: one that is kept longer has settled.
const SETTLED: Duration = Duration::from_secs(33);

/// CPU time of profiling and the frequency, of one moment.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    cpu_s: f64,
    hz: f64,
}

fn read(agent: &Agent) -> Option<Reading> {
    let metric = |name: &str| agent.metric(&format!("profiler_agent_{name}"));
    let cpu_s =
        metric("cpu_seconds_total")? + metric("bpf_seconds_total")? - metric("backend_cpu_seconds_total")?;
    Some(Reading { at: Instant::now(), cpu_s, hz: metric("frequency_hz")? })
}

fn read_after(agent: &Agent, first: Reading, time: Duration) -> Reading {
    agent.wait_for("a later reading", || read(agent).filter(|now| now.at - first.at >= time))
}

/// Share of all CPUs that profiling took between two readings.
fn used(from: Reading, to: Reading) -> f64 {
    let cpus = std::thread::available_parallelism().expect("CPUs").get() as f64;
    (to.cpu_s - from.cpu_s) / (to.at - from.at).as_secs_f64() / cpus
}

/// What profiling takes of the CPUs without a budget, once it has met what runs.
fn used_without_a_budget() -> f64 {
    let agent = Agent::start(&["-F", FREQUENCY, "--cpu-budget", "off", "--window", WINDOW]);
    let first = agent.wait_for("a reading", || read(&agent));
    let warm = read_after(&agent, first, Duration::from_secs(4));
    let later = read_after(&agent, warm, Duration::from_secs(6));
    assert_eq!(agent.metric("profiler_agent_frequency_changes_total"), Some(0.0));
    agent.stop();
    used(warm, later)
}

#[test]
#[ignore = "needs root and BPF"]
fn a_load_of_ten_times_the_budget_settles_within_it_and_totals_stay_true() {
    let _deep = Program::start("deep_gcc", &[]);
    let _also_deep = Program::start("deep_clang", &[]);
    let at_first = used_without_a_budget();
    let budget = at_first / 10.0;
    let share = format!("{:.4}%", budget * 100.0);
    let agent = Agent::start(&["-F", FREQUENCY, "--cpu-budget", &share, "--window", WINDOW]);
    let burner = Program::start("burn", &[]);
    let selector = format!("{{exe=\"burn\",pid=\"{}\"}}", burner.pid());

    let first = agent.wait_for("a reading", || read(&agent));
    let next = |hz: f64| agent.wait_for("a lower frequency", || read(&agent).filter(|now| now.hz < hz));
    let mut since = next(next(first.hz).hz);
    // Each term has a patience of its own: beside a load that has its price at every frequency there are ten of them.
    let settled = loop {
        let now = agent.wait_for("a frequency that is kept or left", || {
            read(&agent).filter(|now| now.hz != since.hz || now.at - since.at >= SETTLED)
        });
        if now.hz == since.hz {
            break now;
        }
        since = now;
    };
    let kept = used(since, settled);
    let report = format!(
        "at {FREQUENCY} Hz {at_first:.5}, budget {budget:.5}, at {} Hz {kept:.5}\n{}",
        settled.hz,
        agent.log()
    );
    let (_, status) = agent.get(agent.agent, "/status").expect("an answer");
    let says_so = String::from_utf8_lossy(&status).contains("which the lowest frequency exceeds");
    assert!(kept <= FACTOR * budget || (settled.hz == 1.0 && says_so), "{report}");
    let changes = agent.metric("profiler_agent_frequency_changes_total").expect("a count");
    assert_eq!(agent.log().matches("above the CPU budget").count() as f64, changes, "{report}");

    let used: serde_json::Value = serde_json::from_str(&burner.finish()).expect("what it consumed, as JSON");
    let ended = SystemTime::now();
    let used_ns = used["cpu_ns"].as_f64().expect("a number");
    agent.wait_for_window_after(ended);
    let ratio = agent.merge(&selector).total as f64 / used_ns;
    println!("sampled {ratio:.4} of {used_ns} ns\n{report}");
    assert!((ratio - 1.0).abs() <= TOLERANCE, "sampled {ratio:.4} of {used_ns} ns");
    let log = agent.stop();
    assert!(log.contains("waiting 0 + dropped 0"), "{log}");
}
