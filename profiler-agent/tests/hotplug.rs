//! CPUs that go and come while the agent samples.

mod support;

use std::{fs, path::Path, time::SystemTime};

use support::{Agent, Program};

const NAME: &str = "what_runs_is_sampled_while_a_cpu_goes_and_comes";
const CPU: &str = "/sys/devices/system/cpu/cpu1/online";

/// Brings the CPU back whatever happens.
struct Offline;

impl Offline {
    fn now() -> std::io::Result<Self> {
        fs::write(CPU, "0").map(|()| Self)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        if let Err(error) = fs::write(CPU, "1") {
            eprintln!("CPU 1 stays offline: {error}");
        }
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn what_runs_is_sampled_while_a_cpu_goes_and_comes() {
    if !Path::new(CPU).exists() {
        return support::skip(NAME, "CPU 1 cannot be taken offline here");
    }
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    let cpus = agent.metric("profiler_agent_mapping_event_cpus").expect("metrics");
    let two_threads = Program::start("burn", &["-t", "2", "-c", "6"]);
    let selector = format!("{{exe=\"burn\",pid=\"{}\"}}", two_threads.pid());
    match Offline::now() {
        Err(error) => return support::skip(NAME, &format!("CPU 1 cannot be taken offline here: {error}")),
        Ok(offline) => {
            logged(&agent, "CPU went offline");
            mappings_told_on(&agent, cpus - 1.0);
            drop(offline);
        }
    }
    logged(&agent, "CPU came online and is sampled");
    mappings_told_on(&agent, cpus);
    let used: serde_json::Value = serde_json::from_str(&two_threads.output()).expect("JSON");
    let used_ns = used["cpu_ns"].as_f64().expect("a number");
    agent.wait_for_window_after(SystemTime::now());

    // On the CPU that came back, a second at most passes before it is sampled again.
    let sampled_ns = agent.merge(&selector).total as f64;
    let missing_s = (used_ns - sampled_ns) / 1e9;
    assert!((-0.3..1.5).contains(&missing_s), "sampled {sampled_ns} of {used_ns} ns");
    let account = agent.stop();
    assert!(account.contains("waiting 0 + dropped 0") && !account.contains("UNACCOUNTED"), "{account}");
}

fn logged(agent: &Agent, line: &str) {
    agent.wait_for(line, || agent.log().contains(line).then_some(()));
}

/// New mappings of so many CPUs are told.
fn mappings_told_on(agent: &Agent, cpus: f64) {
    let is_told = || (agent.metric("profiler_agent_mapping_event_cpus")? == cpus).then_some(());
    agent.wait_for(&format!("mappings of {cpus} CPUs are told"), is_told);
}
