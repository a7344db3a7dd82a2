//! Deep stacks are whole up to 1,024 frames; what is cut is marked at the root end and counted.

mod support;

use std::time::{Duration, SystemTime};

use support::{Agent, Merged, Program};

const WINDOW: Duration = Duration::from_secs(2);

/// CPU time that is enough to look at, in nanoseconds: 100 samples.
const ENOUGH_NS: i64 = 1_000_000_000;

const CUT: &str = "profiler_agent_stacks_total{end=\"depth_limit\"}";

/// The profile of `recurse DEPTH` while it runs.
fn profile(agent: &Agent, program: &Program, from: SystemTime) -> Merged {
    let selector = format!("{{exe=\"recurse\",pid=\"{}\"}}", program.pid());
    agent.wait_for(&format!("enough samples of {selector}"), || {
        let merged = agent.merge_since(&selector, from);
        (merged.total > ENOUGH_NS).then_some(merged)
    })
}

fn count(stack: &[&str], function: &str) -> usize {
    stack.iter().filter(|name| **name == function).count()
}

#[test]
#[ignore = "needs root and BPF"]
fn a_stack_of_900_calls_is_whole_and_one_of_5000_is_cut_marked_and_counted() {
    let (whole, cut) = (Program::start("recurse", &["900"]), Program::start("recurse", &["5000"]));
    let agent = Agent::start(&["-F", "99", "--cpu-budget", "off", "--window", "2s"]);
    agent.wait_for_tables();
    agent.wait_for_names();
    let from = SystemTime::now() + WINDOW;
    let counted = agent.metric(CUT).expect("metrics");

    let merged = profile(&agent, &whole, from);
    let stack = merged.hottest_stack();
    assert_eq!((count(&stack, "descend"), count(&stack, "main")), (900, 1), "{stack:?}");
    assert!(!merged.mentions("[truncated"), "{:?}", merged.roots());

    let merged = profile(&agent, &cut, from);
    let stack = merged.hottest_stack();
    assert_eq!((count(&stack, "descend"), count(&stack, "main")), (1023, 0), "{stack:?}");
    assert!(merged.share_from(&["[truncated: too deep]"]) > 0.99, "{:?}", merged.roots());
    assert!(agent.metric(CUT).expect("metrics") > counted, "what is cut is counted");
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn the_depth_of_stacks_can_be_chosen() {
    let program = Program::start("recurse", &["900"]);
    let agent = Agent::start(&["-F", "99", "--stack-depth", "200", "--cpu-budget", "off", "--window", "2s"]);
    agent.wait_for_tables();
    agent.wait_for_names();
    let merged = profile(&agent, &program, SystemTime::now() + WINDOW);
    let stack = merged.hottest_stack();
    assert_eq!((count(&stack, "descend"), count(&stack, "main")), (199, 0), "{stack:?}");
    assert!(merged.share_from(&["[truncated: too deep]"]) > 0.99, "{:?}", merged.roots());
    agent.stop();
}
