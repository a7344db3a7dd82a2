//! Stacks of programs without frame pointers are whole, from the leaf to the thread's first function: measured beside
//! perf, on the same processes at the same time.

#[path = "support/perf.rs"]
mod perf;
#[path = "support/stacks.rs"]
mod stacks;
mod support;

use std::{
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use perf::{CallGraph, Recording};
use stacks::Stacks;
use support::{Agent, Program, say, skip, testprogs};

/// With it, a run takes minutes and has enough of perf's stacks to compare them call by call.
const LONG: &str = "PROFILER_TEST_LONG";

/// With it, only programs whose names begin with one of these, separated by commas.
const ONLY: &str = "PROFILER_TEST_PROGRAMS";

/// With it, so many samples per second and CPU: an emulated processor has no time for more.
const HZ: &str = "PROFILER_TEST_HZ";

/// With it, programs are so much politer to the profilers: an emulated processor has little time to share.
const NICE: &str = "PROFILER_TEST_NICE";

/// Samples per second and CPU.
const AGENT_HZ: i64 = 997;

/// Samples of each program before shares mean something.
const ENOUGH: i64 = 400;

/// Stacks of each program, and calls in them, that perf has to have before they are compared with ours: with a few
/// hundred, what either has seen once by chance is more than may be missing.
const ENOUGH_OF_PERF: usize = 2000;

/// CPU time for so many, in nanoseconds, and for those that perf loses.
const ENOUGH_LONG_NS: i64 = ENOUGH_OF_PERF as i64 * 1_250_000_000 / LONG_PERF_HZ as i64;

/// Share of the calls in perf's stacks that have to be in ours.
const EDGES_SHARE: f64 = 0.97;

/// Bytes of stack that perf copies with each sample.
const STACK_BYTES: u32 = 16 << 10;

/// Samples per second of perf: it takes milliseconds to unwind one of its stacks.
const PERF_HZ: u32 = 49;
const LONG_PERF_HZ: u32 = 397;

/// Length of the windows, as given to the agent.
const WINDOW: Duration = Duration::from_secs(1);

/// Where the threads of programs with glibc begin.
const NATIVE: &[&str] = &["_start", "clone3", "__clone3", "clone", "__clone"];

/// What musl, which has no unwind information, calls `main` and the functions of threads from.
const MUSL: &[&str] = &["libc_start_main_stage2", "start"];

/// Threads of Go begin in the run-time system: goroutines, and what it runs on stacks of its own.
const GO: &[&str] =
    &["runtime.goexit", "runtime.goexit.abi0", "runtime.mstart", "runtime.mstart.abi0", "runtime.mcall"];

const PYTHON: &str = "
import json
def fib(n): return 1 if n < 2 else fib(n - 1) + fib(n - 2)
while True: sorted([json.dumps({'n': fib(10), 'i': i}) for i in range(20)], key=lambda text: fib(3) + len(text))
";

/// Half of its time in native code: perf's stacks end at the first frame of generated code.
const NODE: &str = "
const zlib = require('zlib'), crypto = require('crypto')
const text = Buffer.from('a line of text, of which there are some\\n'.repeat(400))
function fib(n) { return n < 2 ? 1 : fib(n - 1) + fib(n - 2) }
for (;;) {
    [3, 1, 2].map(n => JSON.stringify({ n: fib(15 + n) })).sort((a, b) => fib(5) && a.length - b.length)
    zlib.inflateSync(zlib.deflateSync(text))
    crypto.createHash('sha256').update(text).digest()
}
";

/// A kind of program, and what is expected of its stacks.
struct Kind {
    name: &'static str,
    /// Arguments of an interpreter; `None` for a program of ours.
    arguments: Option<&'static [&'static str]>,
    roots: &'static [&'static str],
    /// The least share of its time whose stacks must be whole. `None` where no unwind information exists for most of
    /// it: measured, and not judged.
    share: Option<f64>,
    /// Whether perf unwinds it well enough to compare calls.
    compares_calls: bool,
}

const COMPILED: Kind =
    Kind { name: "", arguments: None, roots: NATIVE, share: Some(0.995), compares_calls: true };

const KINDS: [Kind; 15] = [
    Kind { name: "deep_gcc", ..COMPILED },
    Kind { name: "deep_clang", ..COMPILED },
    // perf gets no call out of programs linked statically at a fixed address, be it C or Go.
    Kind { name: "deep_static", compares_calls: false, ..COMPILED },
    Kind { name: "deep_static_pie", ..COMPILED },
    Kind { name: "deep_musl", roots: MUSL, compares_calls: false, ..COMPILED },
    // Debian's musl has no unwind information, so that nothing leads out of its qsort.
    Kind { name: "deep_musl_qsort", roots: MUSL, share: None, compares_calls: false, ..COMPILED },
    Kind { name: "throw_gcc", ..COMPILED },
    Kind { name: "throw_clang", ..COMPILED },
    Kind { name: "rust_deep", ..COMPILED },
    Kind { name: "goburn", roots: GO, compares_calls: false, ..COMPILED },
    Kind { name: "goburn_stripped", roots: GO, compares_calls: false, ..COMPILED },
    Kind { name: "cgoburn", roots: GO, ..COMPILED },
    Kind { name: "python3", arguments: Some(&["-c", PYTHON]), share: Some(0.99), ..COMPILED },
    Kind { name: "node", arguments: Some(&["-e", NODE]), share: Some(0.99), ..COMPILED },
    Kind {
        name: "java",
        arguments: Some(&["-XX:+PreserveFramePointer", "-cp", "CLASSES", "Burn"]),
        share: Some(0.99),
        compares_calls: false,
        ..COMPILED
    },
];

/// C2 uses the frame pointer's register for whatever it likes, and says nowhere how large its frames are.
const JAVA_DEFAULT: Kind = Kind {
    name: "java",
    arguments: Some(&["-cp", "CLASSES", "Burn"]),
    share: None,
    compares_calls: false,
    ..COMPILED
};

/// One that runs.
struct Subject {
    kind: &'static Kind,
    program: Program,
}

#[test]
#[ignore = "needs root and BPF"]
fn stacks_of_programs_without_frame_pointers_reach_the_root() {
    let kinds = KINDS.iter().chain([&JAVA_DEFAULT]);
    let only = std::env::var(ONLY).unwrap_or_default();
    let is_chosen = |kind: &&Kind| only.split(',').any(|name| kind.name.starts_with(name));
    let subjects: Vec<Subject> = kinds.filter(is_chosen).filter_map(start).collect();
    assert!(!subjects.is_empty(), "no program is installed");
    let pids: Vec<u32> = subjects.iter().map(|subject| subject.program.pid()).collect();
    let is_long = std::env::var_os(LONG).is_some();

    let hz = std::env::var(HZ).map_or(AGENT_HZ, |hz| hz.parse().expect("a frequency"));
    let agent = start_agent(hz, &pids);
    agent.wait_for_tables();
    let data = |name: &str| agent.data_dir.path().join(name);
    let perf_hz = if is_long { LONG_PERF_HZ } else { PERF_HZ };
    let by_frames = Recording::start(&pids, CallGraph::FramePointers, PERF_HZ, &data("fp.data"));
    let by_dwarf = Recording::start(&pids, CallGraph::Dwarf(STACK_BYTES), perf_hz, &data("dwarf.data"));
    if by_frames.is_none() {
        skip("comparison with perf", "perf is not installed");
    }
    agent.wait_for_names();
    // Windows that were open before the tables were there hold stacks without them.
    let from = SystemTime::now() + WINDOW;
    let dropped = || agent.metric("profiler_agent_samples_dropped_total").expect("metrics");
    let dropped_before = dropped();
    let enough = if is_long { ENOUGH_LONG_NS } else { ENOUGH * 1_000_000_000 / hz };
    for subject in &subjects {
        agent.wait_for(&format!("enough samples of {}", subject.kind.name), || {
            (agent.merge_since(&selector(subject), from).total > enough).then_some(())
        });
    }
    say(&format!("samples after {:?}", from.elapsed()));
    let lost = (dropped() - dropped_before) as i64 * 1_000_000_000 / hz;
    let finish = |recording: Option<Recording>| recording.map(Recording::finish).unwrap_or_default();
    let (by_frames, by_dwarf) = std::thread::scope(|scope| {
        let by_frames = scope.spawn(|| finish(by_frames));
        let by_dwarf = finish(by_dwarf);
        (by_frames.join().expect("perf's recording is read"), by_dwarf)
    });

    say(&format!("perf read after {:?}", from.elapsed()));
    say("| program | samples | to the root | perf -g | perf dwarf | perf's calls found | where others end |");
    say("| --- | --- | --- | --- | --- | --- | --- |");
    let mut failures = Vec::new();
    for subject in &subjects {
        let kind = subject.kind;
        let ours = Stacks::of(&agent.pprof_since(&selector(subject), from));
        let pid = subject.program.pid();
        let of_perf = |stacks: &perf::Stacks| stacks.get(&pid).cloned().unwrap_or_default();
        let (framed, dwarf) = (of_perf(&by_frames), of_perf(&by_dwarf));
        let share = ours.share_from(kind.roots, lost);
        let edges = ours.edges_found(&dwarf);
        say(&format!(
            "| {} | {} | {:.2} % | {} | {} | {} of {} | {} |",
            title(kind),
            ours.total * hz / 1_000_000_000,
            share * 100.0,
            percent(share_of_perf(&framed, kind.roots)),
            percent(share_of_perf(&dwarf, kind.roots)),
            percent(edges.share()),
            edges.total,
            ours.other_roots(kind.roots)
        ));
        if kind.share.is_some_and(|least| share < least) {
            failures.push(format!("{}: {share:.4} to the root", title(kind)));
        }
        if is_long {
            say(&format!("    {} of perf's stacks; calls not seen: {}", dwarf.len(), edges.worst()));
        }
        let are_found = edges.share().is_some_and(|share| share >= EDGES_SHARE);
        let is_enough = dwarf.len() >= ENOUGH_OF_PERF && edges.total >= ENOUGH_OF_PERF as u64;
        if is_long && kind.compares_calls && !(is_enough && are_found) {
            let share = edges.share();
            let stacks = dwarf.len();
            failures.push(format!("{}: {share:?} of {} calls in {stacks} stacks", title(kind), edges.total));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    for subject in subjects.iter().filter(|subject| subject.kind.name.starts_with("deep")) {
        check_inner_frames(subject, &agent, from);
    }
    agent.stop();
}

/// It samples these processes only: the load of others would be its own.
fn start_agent(hz: i64, pids: &[u32]) -> Agent {
    let (hz, window) = (hz.to_string(), format!("{}s", WINDOW.as_secs()));
    let options = ["-F", &hz, "--cpu-budget", "off", "--window", &window];
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let pids = pids.iter().flat_map(|pid| ["--pid", pid.as_str()]);
    Agent::start(&options.into_iter().chain(pids).collect::<Vec<_>>())
}

fn title(kind: &Kind) -> String {
    let option = kind.arguments.and_then(|arguments| arguments.iter().find(|text| text.starts_with("-XX")));
    option.map_or_else(|| kind.name.to_owned(), |option| format!("{} {option}", kind.name))
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// Share of perf's stacks whose outermost frame is a known one; `None` where there are no stacks.
fn share_of_perf(stacks: &[Vec<perf::Frame>], roots: &[&str]) -> Option<f64> {
    let is_root = |frame: &perf::Frame| frame.symbol.as_deref().is_some_and(|symbol| roots.contains(&symbol));
    let whole = stacks.iter().filter(|stack| stack.last().is_some_and(is_root)).count();
    (!stacks.is_empty()).then(|| whole as f64 / stacks.len() as f64)
}

fn selector(subject: &Subject) -> String {
    format!("{{pid=\"{}\"}}", subject.program.pid())
}

/// The frames between leaf and root are those of the source.
#[track_caller]
fn check_inner_frames(subject: &Subject, agent: &Agent, from: SystemTime) {
    let name = subject.kind.name;
    let merged = agent.merge_since(&selector(subject), from);
    let sorting = ["sort", "realigned", "recurse", "recurse", "run"];
    let in_thread = [&sorting[..], &["worker"]].concat();
    let in_main = [&sorting[..], &["main"]].concat();
    let expected =
        [("compare", in_main), ("compare", in_thread), ("sort", vec!["on_alarm", "recurse", "run"])];
    for (function, callers) in expected.iter().filter(|_| subject.kind.share.is_some()) {
        assert!(merged.has_stack(function, callers), "{name}: no {function} under {callers:?}\n{merged:#?}");
    }
}

/// A program that gives way to the profilers: there are many of them, and all are busy.
fn polite(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", &std::env::var(NICE).unwrap_or_else(|_| "3".to_owned())]).arg(program);
    nice
}

fn start(kind: &'static Kind) -> Option<Subject> {
    let program = match kind.arguments {
        None if testprogs().join(kind.name).exists() => {
            Program::start_command(&mut polite(testprogs().join(kind.name)))
        }
        None => {
            skip(kind.name, "not built");
            return None;
        }
        Some(arguments) => interpreter(kind.name, arguments)?,
    };
    Some(Subject { kind, program })
}

/// An interpreter of the system's: one in a home directory may be a wrapper.
fn interpreter(name: &str, arguments: &[&str]) -> Option<Program> {
    let paths = ["/usr/bin", "/usr/local/bin"].map(|directory| format!("{directory}/{name}"));
    let runs = |path: &&String| {
        let version =
            Command::new(path).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    let Some(path) = paths.iter().find(runs) else {
        skip(name, "not installed");
        return None;
    };
    let classes = testprogs();
    let classes = classes.to_str().expect("a plain path");
    let arguments: Vec<&str> =
        arguments.iter().map(|&argument| if argument == "CLASSES" { classes } else { argument }).collect();
    Some(Program::system_command(polite(path).args(arguments)))
}
