//! `profiler-agent record --heap`: what a program allocates and holds, from its first allocation, in one file that
//! `go tool pprof` reads as it reads Go's own heap profiles.

mod support;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use profiler_pprof::{DecodeLimits, decode, proto::Profile};
use support::{Program, run, testprogs};

/// Go's columns, in its order.
const COLUMNS: [&str; 4] = ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"];

/// Runs `profiler-agent record --heap` without a budget in a directory, with `input` for the command.
fn record(dir: &Path, arguments: &[&str], input: &str) -> Output {
    record_with(&["--heap-budget", "off"], dir, arguments, input)
}

fn record_with(flags: &[&str], dir: &Path, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_profiler-agent"));
    command.args(["record", "--heap"]).args(flags).args(arguments).current_dir(dir);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it is read");
    child.wait_with_output().expect("a child of this test")
}

#[track_caller]
fn succeed(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{message}");
    message
}

fn read(path: &Path) -> Profile {
    decode(&fs::read(path).expect("written"), &DecodeLimits::default()).expect("a profile")
}

/// Sums of the four columns over samples with a function on their stack.
fn below(profile: &Profile, function: &str) -> [i64; 4] {
    let mut sums = [0; 4];
    for sample in &profile.sample {
        let locations = sample.location_id.iter().filter_map(|&id| profile.location(id));
        let mut lines = locations.flat_map(|location| &location.line);
        let is_named = lines.any(|line| {
            let name = profile.function(line.function_id).and_then(|found| profile.string(found.name));
            name.is_some_and(|name| name == function)
        });
        if is_named {
            sums.iter_mut().zip(&sample.value).for_each(|(sum, value)| *sum += value);
        }
    }
    sums
}

/// Functions by value, largest first, as `go tool pprof -top` prints them.
fn top(arguments: &[&str]) -> Vec<String> {
    let text = run("go", &[&["tool", "pprof", "-top"], arguments].concat());
    let rows = text.lines().skip_while(|line| !line.contains("flat%")).skip(1);
    rows.map(|row| row.split_whitespace().skip(5).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
#[ignore = "needs root and BPF"]
fn a_command_is_recorded_from_its_first_allocation_to_what_it_holds_at_its_end() {
    if !support::has_heap_profiles(
        "a_command_is_recorded_from_its_first_allocation_to_what_it_holds_at_its_end",
    ) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = testprogs().join("heap_truth");
    let program = program.to_str().expect("text");
    // Each allocation is a sample: the profile is exact.
    let output = record(dir.path(), &["--rate", "1", "-o", "a.pb.gz", "--", program, "5"], "go\n");
    let message = succeed(&output);
    assert!(message.contains("MiB in use of"), "{message}");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let truth = printed.lines().find(|line| line.starts_with('{')).expect("JSON");
    let truth: BTreeMap<String, [i64; 4]> = serde_json::from_str(truth).expect("JSON");
    let profile = read(&dir.path().join("a.pb.gz"));
    let found: BTreeMap<String, [i64; 4]> =
        truth.keys().map(|place| (place.clone(), below(&profile, place))).collect();
    assert_eq!(found, truth);
    let [objects, ..] = below(&profile, "main");
    assert!(objects > 0, "what main itself needs, such as the buffer of its output:\n{profile}");

    let file = dir.path().join("a.pb.gz");
    let raw = run("go", &["tool", "pprof", "-raw", file.to_str().expect("text")]);
    let types = COLUMNS.map(|column| format!("{column}/")).map(|column| raw.find(&column).expect("a column"));
    assert!(types.is_sorted(), "{raw}");
    assert!(raw.contains("PeriodType: space bytes") && raw.contains("Period: 1\n"), "{raw}");
    assert!(raw.contains("inuse_space/bytes[dflt]"), "{raw}");
}

#[test]
#[ignore = "needs root and BPF"]
fn what_a_command_starts_is_recorded_too_and_the_commands_status_is_given() {
    if !support::has_heap_profiles("what_a_command_starts_is_recorded_too_and_the_commands_status_is_given") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = testprogs().join("heap_truth");
    let script = format!("(sleep 2; echo go) | {} 400 > truth; exit 7", program.display());
    let output = record(dir.path(), &["--rate", "64KiB", "-o", "a.folded", "--", "sh", "-c", &script], "");
    assert_eq!(output.status.code(), Some(7), "{}", String::from_utf8_lossy(&output.stderr));
    let folded = fs::read_to_string(dir.path().join("a.folded")).expect("written");
    // It has ended before the recording: nothing of it is in use, and what it allocated is shown.
    let of_place = |line: &&str| line.starts_with("heap_truth;") && line.contains("place_malloc_262144");
    let bytes: i64 = folded
        .lines()
        .filter(of_place)
        .map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<i64>().ok()).expect("a value"))
        .sum();
    // 800 blocks, each a sample with a probability of 98 %.
    let truth = 800.0 * 262_144.0;
    assert!((bytes as f64 / truth - 1.0).abs() < 4.0 * (0.02f64 / 800.0).sqrt() + 0.01, "{bytes} of {truth}");
}

/// Its parent is another by the time anybody looks.
#[test]
#[ignore = "needs root and BPF"]
fn what_was_started_by_a_process_that_ended_at_once_is_recorded_too() {
    if !support::has_heap_profiles("what_was_started_by_a_process_that_ended_at_once_is_recorded_too") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = testprogs().join("heap_truth");
    let script = format!(
        "( (sleep 2; echo go; sleep 1) | {} 400 > truth & ); until grep -q place_ truth; do sleep 0.1; done; sleep 1",
        program.display()
    );
    let output = record(dir.path(), &["--rate", "64KiB", "-o", "a.folded", "--", "sh", "-c", &script], "");
    let message = succeed(&output);
    let folded = fs::read_to_string(dir.path().join("a.folded")).expect("written");
    let found =
        folded.lines().any(|line| line.starts_with("heap_truth;") && line.contains("place_malloc_262144"));
    assert!(found, "{message}{folded}");
}

#[test]
#[ignore = "needs root and BPF"]
fn a_recording_keeps_to_the_budget_and_says_so() {
    if !support::has_heap_profiles("a_recording_keeps_to_the_budget_and_says_so") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = testprogs().join("heap_pairs");
    let program = program.to_str().expect("text");
    // Every pair is probed: 10 s of 1 % are used up in the first second, whatever a hit costs.
    let arguments = ["--rate", "64KiB", "-o", "a.pb.gz", "--", program, "4000", "100"];
    let output = record_with(&["--heap-budget", "1%"], dir.path(), &arguments, "go\n");
    let message = succeed(&output);
    assert!(message.contains("above the heap budget"), "{message}");
    let without = record(dir.path(), &arguments, "go\n");
    assert!(!succeed(&without).contains("above the heap budget"));
}

#[test]
#[ignore = "needs root and BPF"]
fn the_difference_of_two_recordings_puts_the_leak_first() {
    if !support::has_heap_profiles("the_difference_of_two_recordings_puts_the_leak_first") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = testprogs().join("leak");
    if !program.exists() {
        support::skip("leak", "g++ is not installed");
        return;
    }
    let leak = Program::start("leak", &[]);
    let pid = leak.pid().to_string();
    let recorded = |name: &str, duration: &str| -> PathBuf {
        let arguments = ["--rate", "32KiB", "-p", &pid, "-d", duration, "-o", name];
        succeed(&record(dir.path(), &arguments, ""));
        dir.path().join(name)
    };
    let (short, long) = (recorded("short.pb.gz", "2s"), recorded("long.pb.gz", "8s"));
    let (short, long) = (short.to_str().expect("text"), long.to_str().expect("text"));
    let rows = top(&["-sample_index=inuse_space", "-diff_base", short, long]);
    assert!(rows.first().is_some_and(|row| row.contains("leak_session")), "{rows:#?}");
    let most_allocated = top(&["-sample_index=alloc_space", long]);
    assert!(most_allocated.first().is_some_and(|row| !row.contains("leak_session")), "{most_allocated:#?}");
    let names = |name: &str| read(Path::new(long)).to_string().contains(name);
    assert!(names("handle_request") && names("remember_page"), "{}", read(Path::new(long)));
}

#[test]
#[ignore = "needs root and BPF"]
fn interpreters_and_virtual_machines_run_on_and_are_recorded() {
    if !support::has_heap_profiles("interpreters_and_virtual_machines_run_on_and_are_recorded") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let python = "x = [bytes(100 + i % 4000) for i in range(20000)]; print(sum(map(len, x)))";
    let node = "const x = []; for (let i = 0; i < 2000; i++) x.push(Buffer.allocUnsafeSlow(20000 + i)); \
                console.log(x.reduce((sum, one) => sum + one.length, 0))";
    let cases: [(&str, &[&str], &str); 3] = [
        ("/usr/bin/python3", &["-c", python], "41990000"),
        ("node", &["-e", node], "41999000"),
        ("java", &["-Xshare:auto", "-version"], ""),
    ];
    for (program, arguments, printed) in cases {
        let is_there =
            Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
        if !is_there {
            support::skip(program, "not installed");
            continue;
        }
        let recording = ["--rate", "16KiB", "-o", "a.pb.gz", "--", program];
        let output = record(dir.path(), &[&recording[..], arguments].concat(), "");
        let message = succeed(&output);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(printed), "{program}: {text}{message}");
        let profile = read(&dir.path().join("a.pb.gz"));
        let allocated: i64 = profile.sample.iter().map(|sample| sample.value[1]).sum();
        let named = below(&profile, "main").into_iter().max().unwrap_or(0);
        eprintln!("{program}: {allocated} bytes in {} stacks, {named} below main", profile.sample.len());
        assert!(allocated > 1 << 20, "{program}: {allocated}\n{message}");
    }
}

#[test]
fn a_heap_needs_a_target_and_a_rate_that_is_one() {
    let dir = tempfile::tempdir().expect("a directory");
    for (arguments, parts) in [
        (&[][..], &["heap", "-p", "command"][..]),
        (&["-p", "1", "--rate", "0"], &["rate", "64KiB"]),
        (&["-p", "1", "--rate", "1KB"], &["rate", "64KiB"]),
        (&["-p", "1", "-F", "99"], &["--heap", "--frequency"]),
        (&["-p", "1", "--heap-budget", "0%"], &["heap-budget", "off"]),
    ] {
        let output = record_with(&[], dir.path(), arguments, "");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}
