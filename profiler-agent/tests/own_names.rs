//! Programs are named by what they are themselves: generated code by the runtime's own map, stripped Go programs by their
//! own table, a program that claims another's build id by its own content. Names outlive a restart of the agent.

mod support;

use std::{fs, path::Path, process::Command};

use support::{Agent, Program};

/// CPU time of a program that shares are taken of, in nanoseconds.
const ENOUGH_NS: i64 = 1_500_000_000;

const SCRIPT: &str = "
function jitHot(n) { let s = 0; for (let i = 0; i < n; i++) s = (s * 31 + i) % 1000003; return s }
function jitOuter(n) { return jitHot(n) + 1 }
require('fs').writeSync(1, 'ready\\n')
const end = Date.now() + 120000
while (Date.now() < end) jitOuter(1000000)
";

/// Waits for enough samples of an executable, and gives the share that has a function under a certain caller.
fn share(agent: &Agent, exe: &str, function: &str, caller: &str) -> f64 {
    let selector = format!("{{exe=\"{exe}\"}}");
    let from = agent.counted_from(&selector, function);
    let merged = agent.wait_for("enough samples", || {
        let merged = agent.merge_since(&selector, from);
        (merged.total > ENOUGH_NS).then_some(merged)
    });
    merged.share_below(function, caller)
}

/// Node in a pid namespace of its own, as pid 1, with its own `/tmp`: its map is `/tmp/perf-1.map` there and nowhere here.
fn node_in_namespaces(directory: &Path) -> Program {
    let script = directory.join("burn.js");
    fs::write(&script, SCRIPT).expect("write a script");
    let inside = "mount -t tmpfs none /tmp && cat > /tmp/burn.js && exec node --perf-basic-prof /tmp/burn.js";
    let unshare = "unshare --pid --fork --kill-child --mount --mount-proc";
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {unshare} sh -c '{inside}' < {}", script.display())]);
    // Node leaves logs where it is started.
    command.current_dir(directory);
    Program::start_command(&mut command)
}

#[test]
#[ignore = "needs root and BPF"]
fn generated_code_is_named_by_the_map_in_its_own_namespaces() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    let _node = node_in_namespaces(directory.path());
    let share = share(&agent, "node", "jitHot", "");
    // The rest is the start of node, and what the first samples met before the map was written.
    assert!(share > 0.7, "jitHot has {share:.2} of node's time:\n{:#?}", agent.merge("{exe=\"node\"}"));
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn generated_code_without_a_map_says_which_switch_would_name_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    let mut command = Command::new("node");
    command.args(["-e", SCRIPT]).current_dir(directory.path());
    let _node = Program::start_command(&mut command);
    let share = share(&agent, "node", "[jit: names with node --perf-basic-prof]", "");
    assert!(share > 0.7, "{share:.2} of node's time:\n{:#?}", agent.merge("{exe=\"node\"}"));
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn a_stripped_go_program_has_its_names_and_a_restart_has_those_of_c() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cache = directory.path().join("cache");
    let arguments = ["-F", "99", "--window", "2s", "--cache-dir", cache.to_str().expect("a plain path")];
    let _go = Program::start("goburn_stripped", &[]);
    let _burn = Program::start("burn", &[]);
    let metric = |agent: &Agent, name: &str| agent.metric(&format!("profiler_agent_name_store_{name}_total"));

    let agent = Agent::start(&arguments);
    let of_go = share(&agent, "goburn_stripped", "main.goHot", "main.goOuter");
    assert!(of_go > 0.85, "{of_go:.2}:\n{:#?}", agent.merge("{exe=\"goburn_stripped\"}"));
    let of_c = share(&agent, "burn", "hot_loop", "outer_work");
    assert!(of_c > 0.8, "{of_c:.2}:\n{:#?}", agent.merge("{exe=\"burn\"}"));
    assert_eq!(metric(&agent, "hits"), Some(0.0), "nothing was kept before");
    agent.stop();

    let agent = Agent::start(&arguments);
    let of_c = share(&agent, "burn", "hot_loop", "outer_work");
    assert!(of_c > 0.8, "{of_c:.2}:\n{:#?}", agent.merge("{exe=\"burn\"}"));
    assert!(metric(&agent, "hits") > Some(0.0));
    assert_eq!((metric(&agent, "files_discarded"), metric(&agent, "file_errors")), (Some(0.0), Some(0.0)));
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn a_program_that_claims_the_build_id_of_another_names_only_itself() {
    // The forger is there first; both have the same code at the same addresses, and the same build id.
    let _forger = Program::start("forger", &[]);
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    let of_forger = share(&agent, "forger", "poison_hot", "");
    let _victim = Program::start("victim", &[]);
    let of_victim = share(&agent, "victim", "honest_hot", "");
    assert!(of_forger > 0.9 && of_victim > 0.9, "{of_forger:.2}, {of_victim:.2}");
    let others = agent.merge("{exe!=\"forger\"}");
    assert!(!others.mentions("poison_hot"), "{others:#?}");
    agent.stop();
}
