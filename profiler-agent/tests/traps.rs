//! What a process puts where the agent looks for the names of its generated code: a map of its own is read, a pipe and a link
//! that leads out of its root are not, and hold up nothing.

mod support;

use std::{fs, path::Path, process::Command};

use support::{Agent, Program};

const SCRIPT: &str = "function hot(n) { let s = 0; for (let i = 0; i < n; i++) s = (s * 31 + i) | 0; return s; } \
                      console.log('ready'); for (;;) hot(1e6);";
const UNNAMED: &str = "[jit: names with node --perf-basic-prof]";
/// A map whose one function is everywhere.
const MAP: &str = "1000 7fffffff0000 ";

/// Node as the first process of its pid namespace, so that `/tmp/perf-1.map` is its map, with a `/tmp` of its own in which
/// `command` was run; and its pid outside.
fn node(command: &str) -> (Program, u32) {
    let script = format!("mount -t tmpfs tmpfs /tmp && {command} && exec node -e \"$0\"");
    let arguments = ["--pid", "--fork", "--kill-child", "--mount", "sh", "-c", &script, SCRIPT];
    let program = Program::start_command(Command::new("unshare").args(arguments));
    let outside = program.pid();
    let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).expect("children");
    let pid = children.trim().parse().expect("one child");
    (program, pid)
}

#[track_caller]
fn check(agent: &Agent, pid: u32, function: &str) {
    let selector = format!("{{pid=\"{pid}\"}}");
    let merged = agent.wait_for(&format!("{function} in {selector}"), || {
        let merged = agent.merge(&selector);
        (merged.total > 1_000_000_000 && merged.mentions(function)).then_some(merged)
    });
    let others: Vec<_> =
        ["inside_name", "outside_name", UNNAMED].into_iter().filter(|name| merged.mentions(name)).collect();
    // Before the map was read, code has no name.
    let expect = if function == "inside_name" { others.contains(&function) } else { others == [function] };
    assert!(expect, "{selector}: {others:?}, not {function}\n{merged:#?}");
}

#[test]
#[ignore = "needs root and BPF"]
fn a_pipe_and_a_link_out_of_the_root_are_no_perf_maps() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let outside = directory.path().join("outside.map");
    fs::write(&outside, format!("{MAP}outside_name\n")).expect("write a map");
    assert!(
        outside.starts_with("/tmp") || !Path::new("/tmp").exists(),
        "hidden by the /tmp of the processes"
    );
    let own = node(&format!("echo '{MAP}inside_name' >/tmp/perf-1.map"));
    let pipe = node("mkfifo /tmp/perf-1.map");
    let link = node(&format!("ln -s '{}' /tmp/perf-1.map", outside.display()));
    let up = node(&format!("ln -s '../../../..{}' /tmp/perf-1.map", outside.display()));
    let agent = Agent::start(&["-F", "199", "--window", "2s"]);
    check(&agent, own.1, "inside_name");
    for (_, pid) in [&pipe, &link, &up] {
        check(&agent, *pid, UNNAMED);
    }
    let account = agent.stop();
    assert!(!account.contains("UNACCOUNTED"), "{account}");
}
