//! Stacks of programs without frame pointers are whole, from the leaf to the thread's first function.

mod support;

use std::{
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use support::{Agent, Merged, Program};

/// Where threads begin.
const ROOTS: [&str; 5] = ["_start", "clone3", "__clone3", "clone", "__clone"];

/// CPU time of each program before shares mean something, in nanoseconds: 500 samples.
const ENOUGH_NS: i64 = 5_000_000_000;

/// Length of the windows, as given to the agent.
const WINDOW: Duration = Duration::from_secs(2);

const PYTHON: &str = "
import json
def fib(n): return 1 if n < 2 else fib(n - 1) + fib(n - 2)
while True: sorted([json.dumps({'n': fib(10), 'i': i}) for i in range(20)], key=lambda text: fib(3) + len(text))
";

const NODE: &str = "
function fib(n) { return n < 2 ? 1 : fib(n - 1) + fib(n - 2) }
for (;;) [3, 1, 2].map(n => JSON.stringify({ n: fib(15 + n) })).sort((a, b) => fib(5) && a.length - b.length)
";

/// A program, and the least share of its time whose stacks must be whole.
struct Expect {
    program: Program,
    selector: String,
    name: &'static str,
    share: f64,
}

#[test]
#[ignore = "needs root and BPF"]
fn stacks_of_programs_without_frame_pointers_reach_the_root() {
    let compiled = ["deep_gcc", "deep_clang"].map(compiled);
    let interpreted = [("python3", "-c", PYTHON), ("node", "-e", NODE)].map(interpreted);
    let programs: Vec<_> = compiled.into_iter().chain(interpreted).flatten().collect();
    assert!(!programs.is_empty(), "no program is installed");

    let agent = Agent::start(&["-F", "99", "--window", &format!("{}s", WINDOW.as_secs())]);
    agent.wait_for("tables of the running programs", || {
        (agent.metric("profiler_agent_unwind_scanned")? == 1.0).then_some(())
    });
    // Windows that were open before the tables were there hold stacks without them.
    let from = SystemTime::now() + WINDOW;
    let dropped = agent.metric("profiler_agent_samples_dropped_total").expect("metrics");
    let merged: Vec<Merged> = programs
        .iter()
        .map(|expect| {
            agent.wait_for(&format!("enough samples of {}", expect.name), || {
                let merged = agent.merge_since(&expect.selector, from);
                (merged.total > ENOUGH_NS).then_some(merged)
            })
        })
        .collect();
    let dropped = agent.metric("profiler_agent_samples_dropped_total").expect("metrics") - dropped;
    assert_eq!(dropped, 0.0, "lost samples have no stacks");

    for (expect, merged) in programs.iter().zip(&merged) {
        let share = merged.share_from(&ROOTS);
        eprintln!("{} (pid {}): {:.2} % reach the root", expect.name, expect.program.pid(), share * 100.0);
        assert!(share >= expect.share, "{}: {share:.4} of {:?}", expect.name, merged.roots());
    }
    for (expect, merged) in programs.iter().zip(&merged).filter(|(expect, _)| expect.name.starts_with("deep"))
    {
        check_inner_frames(expect.name, merged);
    }
    agent.stop();
}

/// The frames between leaf and root are those of the source.
#[track_caller]
fn check_inner_frames(name: &str, merged: &Merged) {
    let sorting = ["sort", "realigned", "recurse", "recurse", "run"];
    let in_thread = [&sorting[..], &["worker"]].concat();
    let in_main = [&sorting[..], &["main"]].concat();
    for (function, callers) in
        [("compare", in_main), ("compare", in_thread), ("sort", vec!["on_alarm", "recurse", "run"])]
    {
        assert!(merged.has_stack(function, &callers), "{name}: no {function} under {callers:?}\n{merged:#?}");
    }
}

fn compiled(name: &'static str) -> Option<Expect> {
    let program = Program::start_if_built(name).or_else(|| skip(name))?;
    let selector = format!("{{exe=\"{name}\"}}");
    Some(Expect { program, selector, name, share: 0.995 })
}

/// An interpreter of the system's, by its exe label: `python3` may be a link to `python3.13`.
fn interpreted((name, flag, code): (&'static str, &str, &str)) -> Option<Expect> {
    let path = ["/usr/bin", "/usr/local/bin"].map(|directory| format!("{directory}/{name}"));
    let path = path.into_iter().find(|path| std::path::Path::new(path).exists()).or_else(|| skip(name))?;
    let probe = Command::new(&path).args(["--version"]).stdout(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        return skip(name);
    }
    let program = Program::system(&path, &[flag, code]);
    let file = std::fs::canonicalize(&path).expect("it has just been run");
    let exe = file.file_name().and_then(|name| name.to_str()).expect("a plain name");
    let selector = format!("{{exe=\"{exe}\",pid=\"{}\"}}", program.pid());
    Some(Expect { program, selector, name, share: 0.99 })
}

fn skip<T>(name: &str) -> Option<T> {
    eprintln!("SKIP {name}: not installed");
    None
}
