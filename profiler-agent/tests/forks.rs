//! A process that is forked is known from its first instruction, and forgotten when it ends.

mod support;

use std::{
    process::Command,
    time::{Duration, SystemTime},
};

use support::{Agent, Program, testprogs};

/// Where threads begin.
const ROOTS: [&str; 2] = ["_start", "__libc_start_call_main"];

#[test]
#[ignore = "needs root and BPF"]
fn children_that_live_for_a_millisecond_have_whole_named_stacks() {
    let agent = Agent::start(&["-F", "199", "--cpu-budget", "off", "--window", "2s"]);
    agent.wait_for_tables();
    if support::is_emulated() {
        // Files are read once for their names, which takes longer than a storm there.
        let first = start_storm("600");
        agent.wait_for_names();
        drop(first);
    }
    let before = agent.metric("profiler_agent_unwind_processes").expect("metrics");
    let storm = start_storm("14");
    // The storm itself gets its tables at its first sample; its children have them from their first on.
    let from = SystemTime::now() + Duration::from_secs(6);
    let output: serde_json::Value = serde_json::from_str(&storm.output()).expect("JSON");
    let ended = SystemTime::now();
    agent.wait_for_window_after(ended);

    let merged = agent.merge_since("{exe=\"fork_storm_unframed\"}", from);
    let children = merged.share_below("child_work", "main");
    // The end of a child, when its memory is gone, has kernel frames alone.
    let cut: f64 = merged
        .roots()
        .iter()
        .filter(|(name, _)| name.starts_with("[truncated"))
        .map(|(_, ns)| *ns as f64)
        .sum();
    let whole_ns = merged.share_from(&ROOTS) * merged.total as f64;
    let whole = whole_ns / (whole_ns + cut);
    eprintln!("{output}: {:.1} % in children, {:.1} % reach the root", children * 100.0, whole * 100.0);
    assert!(merged.total > 300_000_000, "{} ns", merged.total);
    assert!(children > 0.25, "children are not named: {merged:#?}");
    assert!(whole > 0.95, "{whole:.4} {:?}\n{merged:#?}", merged.roots());

    agent.wait_for("the children are forgotten", || {
        let now = agent.metric("profiler_agent_unwind_processes")?;
        (now < before + 50.0).then_some(())
    });
    let lost = agent.metric("profiler_agent_fork_exit_events_lost_total").expect("metrics");
    assert_eq!(lost, 0.0);
    agent.stop();
}

fn start_storm(seconds: &str) -> Program {
    let forks_per_second = if support::is_emulated() { "50" } else { "300" };
    let mut storm = Command::new(testprogs().join("fork_storm_unframed"));
    // Lazy binding, which each child does anew, has no whole stack: `_dl_runtime_resolve_xsavec` keeps its CFA in rbx,
    // which is known in the innermost frame only.
    Program::start_command(storm.args([forks_per_second, seconds]).env("LD_BIND_NOW", "1"))
}
