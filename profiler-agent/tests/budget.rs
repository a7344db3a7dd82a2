//! The CPU budget holds under a load that would exceed it many times, and no CPU time is lost or invented while the
//! frequency changes.

mod support;

use std::time::{Duration, Instant, SystemTime};

use support::{Agent, Program};

/// What the load takes at [`FREQUENCY`] is more than ten times as much.
const BUDGET: &str = "0.25%";
const BUDGET_RATIO: f64 = 0.0025;
const FREQUENCY: &str = "1000";
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

/// Share of all CPUs that profiling took between two readings.
fn used(from: Reading, to: Reading) -> f64 {
    let cpus = std::thread::available_parallelism().expect("CPUs").get() as f64;
    (to.cpu_s - from.cpu_s) / (to.at - from.at).as_secs_f64() / cpus
}

#[test]
#[ignore = "needs root and BPF"]
fn a_load_of_ten_times_the_budget_settles_below_it_and_totals_stay_true() {
    let agent = Agent::start(&["-F", FREQUENCY, "--cpu-budget", BUDGET, "--window", "2s"]);
    let burner = Program::start("burn", &["-s", "170"]);
    let _deep = Program::start("deep_gcc", &[]);
    let selector = format!("{{exe=\"burn\",pid=\"{}\"}}", burner.pid());

    let first = agent.wait_for("a reading", || read(&agent));
    let loaded = agent.wait_for("some seconds at the first frequency", || {
        let now = read(&agent)?;
        (now.at - first.at >= Duration::from_secs(10)).then_some(now)
    });
    let at_first = used(first, loaded);
    assert!(at_first > 10.0 * BUDGET_RATIO, "the load is too small for this test: {at_first}");

    let mut since = agent.wait_for("a lower frequency", || read(&agent).filter(|now| now.hz < loaded.hz));
    let settled = agent.wait_for("a frequency that is kept", || {
        let now = read(&agent)?;
        if now.hz != since.hz {
            since = now;
        }
        (now.at - since.at >= SETTLED).then_some(now)
    });
    let kept = used(since, settled);
    assert!(settled.hz < loaded.hz / 8.0, "{settled:?} after {loaded:?}");
    assert!(
        kept <= FACTOR * BUDGET_RATIO || settled.hz == 1.0,
        "{kept} of a budget of {BUDGET_RATIO} at {} Hz; at first {at_first}\n{}",
        settled.hz,
        agent.log()
    );
    let changes = agent.metric("profiler_agent_frequency_changes_total").expect("a count");
    assert_eq!(agent.log().matches("above the CPU budget").count() as f64, changes, "{}", agent.log());

    let output = burner.output();
    let ended = SystemTime::now();
    let used: serde_json::Value = serde_json::from_str(&output).expect("what it consumed, as JSON");
    let used_ns = used["cpu_ns"].as_f64().expect("a number");
    agent.wait_for_window_after(ended);
    let ratio = agent.merge(&selector).total as f64 / used_ns;
    println!("{at_first:.4} at first, {kept:.4} at {} Hz; totals {ratio:.4}", settled.hz);
    assert!((ratio - 1.0).abs() <= TOLERANCE, "sampled {ratio:.4} of {used_ns} ns");
    let log = agent.stop();
    assert!(log.contains("waiting 0 + dropped 0"), "{log}");
}
