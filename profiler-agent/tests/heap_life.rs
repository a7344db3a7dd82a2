//! Heap profiles keep to their budget, and follow what happens to programs and to the configuration.

mod support;

use std::{
    fs,
    time::{Duration, SystemTime},
};

use support::{Agent, HEAP_KINDS, Program, code_of, testprogs};

/// Bytes of a block of the program's pace.
const PACED_BYTES: f64 = 1000.0;
/// Bytes of its other blocks.
const BLOCK_BYTES: f64 = 4096.0;

/// Waits until so many processes have a heap that is profiled.
fn wait_for_targets(agent: &Agent, targets: f64) {
    agent.wait_for(&format!("{targets} heaps are profiled"), || {
        (agent.metric("profiler_agent_heap_targets")? == targets).then_some(())
    });
}

/// Waits until a process is among them.
fn wait_for_profile(agent: &Agent, pid: u32) {
    let line = format!("profiling the heap pid={pid} ");
    agent.wait_for(&line, || agent.log().contains(&line).then_some(()));
}

/// Where everything takes longer, the names of a file come later than what a test has it allocate.
fn wait_for_names(agent: &Agent) {
    if support::is_emulated() {
        agent.wait_for_names();
    }
}

/// Blocks a millisecond of a program that allocates all the time: a fifth where each probe takes longer.
fn pace() -> &'static str {
    if support::is_emulated() { "1" } else { "5" }
}

fn ask(program: &mut Program, line: &str) -> f64 {
    program.ask(line).trim().parse().expect("a number")
}

/// Comments of the merged profile of a type since a moment.
fn comments(agent: &Agent, selector: &str, kind: &str, since: SystemTime) -> Vec<String> {
    let ms = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_millis();
    let (from, to) = (ms(since).to_string(), ms(since + Duration::from_secs(3600)).to_string());
    let what = [("query", selector), ("type", kind), ("format", "pprof"), ("from", &from), ("to", &to)];
    let body = agent.query("/api/v1/merge", &what);
    let profile = profiler_pprof::decode(&body, &profiler_pprof::DecodeLimits::default()).expect("a profile");
    let text = |&index: &i64| profile.string_table[usize::try_from(index).expect("an index")].clone();
    profile.comment.iter().map(text).collect()
}

#[track_caller]
fn check_comment(comments: &[String], part: &str) {
    assert!(comments.iter().any(|comment| comment.contains(part)), "{part:?} in {comments:#?}");
}

fn selector(program: &Program) -> String {
    format!("{{exe=\"heap_life\",pid=\"{}\"}}", program.pid())
}

/// The program's probes cost several times the budget. They are in for a window of a second each few seconds, and what they
/// find is scaled.
#[test]
#[ignore = "needs root and BPF"]
fn a_program_above_its_budget_is_sampled_in_windows_within_it() {
    const BUDGET: f64 = 0.01;
    const WINDOWS: f64 = 6.0;
    /// What the pace of a busy machine differs by, from one window to the mean of all.
    const UNEVEN: f64 = 0.10;
    if !support::has_heap_profiles("a_program_above_its_budget_is_sampled_in_windows_within_it") {
        return;
    }
    // Where each probe takes longer, fewer blocks, whose probes are above the budget all the same, and more of them sampled.
    let (pace, rate) = if support::is_emulated() { ("1", 2048.0) } else { ("50", 65_536.0) };
    let mut program = Program::start("heap_life", &[pace]);
    let rule = format!("pid={}@{rate}", program.pid());
    let before = SystemTime::now();
    let agent = Agent::start(&["--window", "2s", "--heap", &rule, "--heap-budget", "1%"]);
    wait_for_targets(&agent, 1.0);
    let (attached, first) = (SystemTime::now(), ask(&mut program, "total"));
    let blocks_per_second = pace.parse::<f64>().expect("a number") * 1000.0;
    let metric = |name: &str| agent.metric(&format!("profiler_agent_heap_{name}")).unwrap_or(0.0);
    agent.wait_for("windows", || (metric("windows_total") >= WINDOWS).then_some(()));
    let opened = ask(&mut program, "total");
    assert_eq!((metric("targets_limited"), metric("targets_without_in_use")), (1.0, 1.0));
    // The last window is over a second after it was opened, and the next one begins a second later at the earliest.
    std::thread::sleep(Duration::from_millis(1000));
    let truth = ask(&mut program, "stop") - first;
    let elapsed = attached.elapsed().expect("time passes").as_secs_f64();
    agent.wait_for_window_after(SystemTime::now());

    // Ten seconds' worth is saved up at the start. A window, and the time until the first one, are on credit: 100,000 hits
    // a second take a tenth of a second each or two. Probed all the time, they would take that ten times over.
    let spent = metric("probe_seconds_total");
    let accepted = BUDGET * (elapsed + 10.0) + 0.25;
    eprintln!("probes took {spent:.3} s in {elapsed:.1} s, {accepted:.3} s accepted");
    assert!(spent <= accepted, "{spent} s in {elapsed} s");

    let merged = agent.merge_type(&selector(&program), ("allocs", "alloc_space"), before);
    // Where everything takes longer, the first windows come before names do.
    let found = if support::is_emulated() { merged.total } else { merged.total_of("place_paced") };
    let samples = WINDOWS * blocks_per_second * (1.0 - (-PACED_BYTES / rate).exp());
    let (found, truth) = (found as f64, truth * PACED_BYTES);
    let accepted = 4.0 / samples.sqrt() + UNEVEN;
    eprintln!(
        "{found:.0} of {truth:.0} bytes, {accepted:.3} accepted; {:.0} more while the last window was open",
        truth - (opened - first) * PACED_BYTES
    );
    assert!((found / truth - 1.0).abs() <= accepted, "{found} of {truth} bytes, {accepted} accepted");

    let said = comments(&agent, &selector(&program), "allocs", before);
    check_comment(
        &said,
        "above its heap budget of 1%, sampled for 0.00 s of 2.00 s: that it shows nothing does not mean",
    );
    check_comment(&said, "what it shows stands for the gap before as well");
    check_comment(&said, "what is in use is not known: probing its frees alone takes more than half");
    agent.stop();
}

/// An agent with a file that a test changes.
struct Configured {
    agent: Agent,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Configured {
    fn start(text: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("agent.toml");
        fs::write(&path, text).expect("write the file");
        let agent = Agent::start(&["--window", "2s", "--config", path.to_str().expect("text")]);
        Self { agent, path, _directory: directory }
    }

    /// Has the agent read another configuration.
    fn change(&self, text: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, text).expect("write the file");
        fs::rename(&new, &self.path).expect("rename");
        // SAFETY: a signal to a child that has not been waited for: the pid is still its.
        let status = unsafe { libc::kill(self.agent.pid().cast_signed(), libc::SIGHUP) };
        assert_eq!(status, 0, "the agent runs");
    }
}

fn rule(program: &Program, rate: &str, budget: &str) -> String {
    format!("[[heap]]\nmatch = \"pid={}\"\nrate = \"{rate}\"\nbudget = \"{budget}\"\n", program.pid())
}

#[test]
#[ignore = "needs root and BPF"]
fn rules_change_while_the_agent_runs_and_what_is_in_use_stays() {
    if !support::has_heap_profiles("rules_change_while_the_agent_runs_and_what_is_in_use_stays") {
        return;
    }
    let mut program = Program::start("heap_life", &["0"]);
    let configured = Configured::start("");
    let agent = &configured.agent;
    assert_eq!(agent.metric("profiler_agent_heap_targets"), Some(0.0));
    configured.change(&rule(&program, "1", "off"));
    wait_for_targets(agent, 1.0);
    let in_use = |program: &Program| {
        wait_for_names(agent);
        let since = SystemTime::now();
        agent.wait_for_window_after(since);
        agent.merge_type(&selector(program), ("heap", "inuse_objects"), since).total_of("place_held") as f64
    };
    // Everything is sampled: 100 blocks are 100.
    ask(&mut program, "hold 100");
    assert_eq!(in_use(&program), 100.0);
    configured.change(&rule(&program, "4KiB", "off"));
    agent.wait_for("the new rate", || agent.log().contains("at another rate").then_some(()));
    // Of these, each is a sample with probability 1 - 1/e, and stands for its like.
    const MORE: f64 = 4000.0;
    ask(&mut program, "hold 4000");
    let found = in_use(&program);
    let samples = MORE * (1.0 - (-BLOCK_BYTES / 4096.0f64).exp());
    let accepted = MORE * 4.0 / samples.sqrt();
    assert!((found - 100.0 - MORE).abs() <= accepted, "{found} of {}, {accepted} accepted", MORE + 100.0);
    configured.change(&rule(&program, "4KiB", "2%"));
    agent.wait_for("the new budget", || agent.log().contains("with another budget").then_some(()));
    configured.change(&rule(&program, "0", "2%"));
    wait_for_targets(agent, 0.0);
    configured.change("");
    configured.change(&format!("heap_budget = \"off\"\n[[heap]]\nmatch = \"pid={}\"\n", program.pid()));
    wait_for_targets(agent, 1.0);
    configured.agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn children_are_profiled_from_their_fork_on() {
    const CHILDREN: usize = 5;
    if !support::has_heap_profiles("children_are_profiled_from_their_fork_on") {
        return;
    }
    let mut program = Program::start("heap_life", &["0"]);
    let before = SystemTime::now();
    let agent = Agent::start(&["--window", "2s", "--heap", "exe=heap_life@4KiB@off"]);
    wait_for_profile(&agent, program.pid());
    // Forks are told once the process has its unwind tables, which it gets with the scan at the start. A child may also be met
    // in the first look at all processes.
    agent.wait_for_tables();
    agent.wait_for("forks are told", || {
        let pid = ask(&mut program, "child 100");
        agent.log().contains(&format!("profiling the heap pid={pid} ")).then_some(())
    });
    wait_for_names(&agent);
    // Each lives for a second: a look at all processes now and then finds one in ten.
    let blocks = if support::is_emulated() { 1000 } else { 10_000 };
    let children: Vec<f64> = (0..CHILDREN).map(|_| ask(&mut program, &format!("child {blocks}"))).collect();
    agent.wait_for_window_after(SystemTime::now());
    for pid in children {
        let selector = format!("{{exe=\"heap_life\",pid=\"{pid}\"}}");
        let merged = agent.merge_type(&selector, ("allocs", "alloc_space"), before);
        assert!(merged.total_of("place_child") > 0, "pid {pid}\n{}", agent.log());
    }
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn an_allocator_that_is_loaded_later_is_profiled_too() {
    if !support::has_heap_profiles("an_allocator_that_is_loaded_later_is_profiled_too") {
        return;
    }
    let mut program = Program::start("heap_life", &["1"]);
    let before = SystemTime::now();
    let rule = format!("pid={}@4KiB@off", program.pid());
    let agent = Agent::start(&["--window", "2s", "--heap", &rule]);
    wait_for_targets(&agent, 1.0);
    let plugin = testprogs().join("libheap_plugin.so");
    assert_eq!(ask(&mut program, &format!("load {}", plugin.display())), 0.0, "it is loaded");
    agent.wait_for("its allocations are seen", || {
        let merged = agent.merge_type(&selector(&program), ("allocs", "alloc_space"), before);
        (merged.total_of("place_plugin") > 0 && merged.total_of("place_paced") > 0).then_some(())
    });
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn what_there_is_no_room_for_is_counted_and_the_profile_says_so() {
    if !support::has_heap_profiles("what_there_is_no_room_for_is_counted_and_the_profile_says_so") {
        return;
    }
    let mut program = Program::start("heap_life", &["0"]);
    let before = SystemTime::now();
    let rule = format!("pid={}@1@off", program.pid());
    let agent = Agent::start(&["--window", "2s", "--heap", &rule, "--test-heap-live-max", "100"]);
    wait_for_targets(&agent, 1.0);
    ask(&mut program, "hold 250");
    wait_for_names(&agent);
    let held = SystemTime::now();
    agent.wait_for_window_after(held);
    let metric = |name: &str| agent.metric(&format!("profiler_agent_heap_{name}")).expect("it answers");
    let missing = metric("missing_objects_total");
    assert!(missing >= 150.0, "{missing}");
    assert_eq!(metric("live_full_total"), missing, "everything is sampled");
    let found = agent.merge_type(&selector(&program), ("heap", "inuse_objects"), held);
    assert!((1..=100).contains(&found.total_of("place_held")), "{found:?}");
    let said = comments(&agent, &selector(&program), "heap", before);
    let bytes = metric("missing_bytes_total");
    check_comment(&said, &format!("{missing} objects of {bytes} bytes, freed since or not, are missing"));
    agent.stop();
}

/// An agent that takes longer to let go of them than it has says so, and does not end in order.
#[test]
#[ignore = "needs root and BPF"]
fn many_programs_are_let_go_of_when_the_agent_is_switched_off_or_ends() {
    if !support::has_heap_profiles("many_programs_are_let_go_of_when_the_agent_is_switched_off_or_ends") {
        return;
    }
    let count = if support::is_emulated() { 32 } else { 256 };
    let programs: Vec<Program> = (0..count).map(|_| Program::start("heap_truth", &[])).collect();
    // All have the same code, but at other addresses, of which it has none in it.
    let untouched = code_of(programs[0].pid());
    let is_untouched = || programs.iter().all(|program| code_of(program.pid()) == untouched);
    assert!(is_untouched(), "before");
    let rules = "[[heap]]\nmatch = \"exe=heap_truth\"\nbudget = \"off\"\n";
    let configured = Configured::start(rules);
    wait_for_targets(&configured.agent, f64::from(count));
    configured.change(&format!("enabled = false\n{rules}"));
    wait_for_targets(&configured.agent, 0.0);
    assert!(is_untouched(), "switched off");
    configured.change(rules);
    wait_for_targets(&configured.agent, f64::from(count));
    let log = configured.agent.stop();
    assert!(is_untouched(), "after its end\n{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn other_labels_are_those_of_what_is_in_use_too_and_rules_may_mean_them() {
    if !support::has_heap_profiles("other_labels_are_those_of_what_is_in_use_too_and_rules_may_mean_them") {
        return;
    }
    let mut program = Program::start("heap_life", &[pace()]);
    let named = |team: &str| {
        let rules = rule(&program, "1", "off");
        format!("labels = {{ team = \"{team}\" }}\n{rules}[[heap]]\nmatch = \"team=blue\"\nrate = \"0\"\n")
    };
    let (red, green) = (named("red"), named("green"));
    // The first rule that means a process decides: `team=blue` comes first here.
    let blue = format!(
        "labels = {{ team = \"blue\" }}\n[[heap]]\nmatch = \"team=blue\"\nrate = \"0\"\n{}",
        rule(&program, "1", "off")
    );
    let green_first = blue.replacen("blue", "green", 1);
    let started = SystemTime::now();
    let configured = Configured::start(&red);
    let agent = &configured.agent;
    wait_for_targets(agent, 1.0);
    ask(&mut program, "hold 100");
    let found = |team: &str, kind: (&str, &str), since: SystemTime| {
        let selector = format!("{{team=\"{team}\",pid=\"{}\"}}", program.pid());
        agent.merge_type(&selector, kind, since)
    };
    let (held, paced) = (("heap", "inuse_objects"), ("allocs", "alloc_objects"));
    agent.wait_for("red", || (found("red", held, started).total_of("place_held") >= 100).then_some(()));
    configured.change(&green);
    agent.wait_for("green is told", || agent.log().contains("labels is changed").then_some(()));
    let changed = SystemTime::now();
    agent.wait_for("green", || (found("green", paced, changed).total_of("place_paced") > 0).then_some(()));
    let since = SystemTime::now();
    agent.wait_for_window_after(since);
    assert_eq!(found("green", held, since).total_of("place_held"), 100, "what is held has the new labels");
    assert_eq!(found("red", held, since).total, 0, "and not the old ones");
    // Nothing but a label makes the difference whether a rule means it.
    configured.change(&green_first);
    agent.wait_for("the order of rules", || agent.log().contains("heap is changed").then_some(()));
    assert_eq!(agent.metric("profiler_agent_heap_targets"), Some(1.0));
    configured.change(&blue);
    wait_for_targets(agent, 0.0);
    configured.agent.stop();
}

/// Whether the program runs, and allocates.
fn is_alive(program: &mut Program) -> bool {
    let before = ask(program, "total");
    (0..1000).any(|_| ask(program, "total") > before)
}

#[test]
#[ignore = "needs root and BPF"]
fn a_program_under_a_seccomp_filter_survives_and_its_allocations_are_seen() {
    if !support::has_heap_profiles("a_program_under_a_seccomp_filter_survives_and_its_allocations_are_seen") {
        return;
    }
    for (kind, _) in HEAP_KINDS {
        if !support::has_heap_kind("a program under a seccomp filter", kind) {
            continue;
        }
        let mut filtered = Program::start("heap_life", &[pace()]);
        assert_eq!(ask(&mut filtered, "filter"), 0.0, "it is filtered");
        let mut later = Program::start("heap_life", &[pace()]);
        let rules = [&filtered, &later].map(|program| format!("pid={}@64KiB@off", program.pid())).join(",");
        let flags = ["--window", "2s", "--heap", &rules, "--test-heap-kind", kind];
        let agent = Agent::start(&[&flags[..], &["--test-heap-seccomp-kills"]].concat());
        wait_for_targets(&agent, 2.0);
        let entry_only =
            |count: f64| (agent.metric("profiler_agent_heap_targets_entry_only")? == count).then_some(());
        agent.wait_for("one is under a filter", || entry_only(1.0));
        // It holds something while all of it is known.
        ask(&mut later, "hold 1000");
        wait_for_names(&agent);
        assert_eq!(ask(&mut later, "filter"), 0.0, "it is filtered");
        agent.wait_for("both are under a filter", || entry_only(2.0));
        // What comes now is in windows that have not begun yet.
        let since = SystemTime::now();
        agent.wait_for_window_after(since);
        ask(&mut later, "hold 1000");
        agent.wait_for_window_after(SystemTime::now());
        for program in [&mut filtered, &mut later] {
            assert!(is_alive(program), "{kind}");
            let merged = agent.merge_type(&selector(program), ("allocs", "alloc_space"), since);
            assert!(merged.total_of("place_paced") > 0, "{kind}: {}", agent.log());
            let said = comments(&agent, &selector(program), "allocs", since);
            check_comment(&said, "it is under a seccomp filter");
        }
        let samples = 1000.0 * (1.0 - (-BLOCK_BYTES / 65_536.0f64).exp());
        let merged = agent.merge_type(&selector(&later), ("allocs", "alloc_objects"), since);
        let found = merged.total_of("place_held") as f64;
        assert!((found / 1000.0 - 1.0).abs() <= 4.0 / samples.sqrt(), "{kind}: {found} of 1000");
        assert!(agent.log().contains("the process is under a seccomp filter"), "{}", agent.log());
        agent.stop();
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn a_filter_that_lets_probed_returns_pass_is_no_reason_to_do_without() {
    if !support::has_heap_profiles("a_filter_that_lets_probed_returns_pass_is_no_reason_to_do_without") {
        return;
    }
    let mut program = Program::start("heap_life", &[pace()]);
    assert_eq!(ask(&mut program, "filter"), 0.0, "it is filtered");
    let rule = format!("pid={}@1@off", program.pid());
    let agent = Agent::start(&["--window", "2s", "--heap", &rule]);
    wait_for_targets(&agent, 1.0);
    let ready = agent.log();
    let ready = ready.lines().find(|line| line.contains("heap profiling is ready")).expect("a line");
    if ready.contains("survives_seccomp=false") {
        support::skip("seccomp with returns", "this kernel's filters kill for them, as it has found out");
        agent.stop();
        return;
    }
    ask(&mut program, "hold 100");
    wait_for_names(&agent);
    let held = SystemTime::now();
    agent.wait_for_window_after(held);
    let merged = agent.merge_type(&selector(&program), ("heap", "inuse_objects"), held);
    assert_eq!(merged.total_of("place_held"), 100);
    assert!(is_alive(&mut program));
    agent.stop();
}

/// 100 times with `PROFILER_TEST_LONG`.
#[test]
#[ignore = "needs root and BPF"]
fn probes_that_go_in_and_out_under_load_leave_the_code_as_it_was() {
    if !support::has_heap_profiles("probes_that_go_in_and_out_under_load_leave_the_code_as_it_was") {
        return;
    }
    let cycles = if std::env::var_os("PROFILER_TEST_LONG").is_some() { 100 } else { 10 };
    let mut program = Program::start("heap_life", &[pace()]);
    let untouched = code_of(program.pid());
    let configured = Configured::start("");
    let with_rule = rule(&program, "64KiB", "off");
    for cycle in 0..cycles {
        configured.change(&with_rule);
        wait_for_targets(&configured.agent, 1.0);
        assert!(code_of(program.pid()) != untouched, "cycle {cycle}: there are breakpoints");
        configured.change("");
        wait_for_targets(&configured.agent, 0.0);
        assert!(code_of(program.pid()) == untouched, "cycle {cycle}: breakpoints stay");
    }
    assert!(is_alive(&mut program));
    configured.agent.stop();
}
