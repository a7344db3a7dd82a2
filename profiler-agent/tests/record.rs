//! `profiler-agent record`: one target, one file, a summary, the command's status.

mod support;

use std::{fs, path::Path, process::Output};

use support::{Program, run, testprogs};

/// Runs `profiler-agent record` in a directory.
fn record(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_profiler-agent"));
    command.arg("record").args(arguments).current_dir(dir).output().expect("it starts")
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Values of the folded stacks by the process they are of.
fn processes(folded: &str) -> Vec<(&str, i64)> {
    let mut processes: Vec<(&str, i64)> = Vec::new();
    for line in folded.lines() {
        let (stack, value) = line.rsplit_once(' ').expect("a stack and a value");
        let process = stack.split(';').next().unwrap_or_default();
        let value: i64 = value.parse().expect("a number");
        match processes.iter_mut().find(|(known, _)| *known == process) {
            Some((_, sum)) => *sum += value,
            None => processes.push((process, value)),
        }
    }
    processes
}

#[test]
#[ignore = "needs root and BPF"]
fn a_process_is_recorded_and_no_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let (wanted, other) = (Program::start("burn", &[]), Program::start("rust_burn", &[]));
    let output = record(dir.path(), &["-p", &wanted.pid().to_string(), "-d", "3s", "-o", "a.folded"]);
    assert_eq!(output.status.code(), Some(0), "{}", message(&output));
    let folded = fs::read_to_string(dir.path().join("a.folded")).expect("written");
    let processes = processes(&folded);
    assert!(matches!(processes[..], [("burn", ns)] if ns > 50_000_000), "{processes:?}");
    let message = message(&output);
    for part in ["hot_loop", "own %", "next: ", "a.folded"] {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    drop(other);
}

#[test]
#[ignore = "needs root and BPF"]
fn a_command_is_recorded_with_what_it_starts_and_gives_its_status() {
    let dir = tempfile::tempdir().expect("a directory");
    let other = Program::start("rust_burn", &[]);
    let burn = testprogs().join("burn");
    let script = format!("sleep 3 | {} > /dev/null; exit 7", burn.display());
    let output = record(dir.path(), &["-o", "a.pb.gz", "--", "sh", "-c", &script]);
    assert_eq!(output.status.code(), Some(7), "{}", message(&output));
    let file = dir.path().join("a.pb.gz");
    let raw = run("go", &["tool", "pprof", "-top", file.to_str().expect("text")]);
    assert!(raw.contains("hot_loop"), "{raw}");
    assert!(!raw.contains("rust_hot"), "{raw}");
    drop(other);
}

#[test]
#[ignore = "needs root and BPF"]
fn a_recording_ends_by_itself_as_svg_and_on_standard_output() {
    let dir = tempfile::tempdir().expect("a directory");
    let burn = Program::start("burn", &[]);
    let pid = burn.pid().to_string();
    let svg = record(dir.path(), &["-p", &pid, "-d", "1s", "-o", "a.svg"]);
    assert_eq!(svg.status.code(), Some(0), "{}", message(&svg));
    let text = fs::read_to_string(dir.path().join("a.svg")).expect("written");
    assert!(text.contains("<svg") && text.contains("hot_loop"), "{text}");
    let piped = record(dir.path(), &["-p", &pid, "-d", "1s", "-o", "-"]);
    assert_eq!(piped.status.code(), Some(0), "{}", message(&piped));
    assert_eq!(piped.stdout.get(..2), Some(&[0x1f, 0x8b][..]), "gzip");
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing but a.svg");
}

#[test]
#[ignore = "needs root and BPF"]
fn a_target_that_never_ran_is_an_error_and_leaves_no_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let idle = Program::system("sleep", &["1000"]);
    let output = record(dir.path(), &["-p", &idle.pid().to_string(), "-d", "1s"]);
    assert_eq!(output.status.code(), Some(1), "{}", message(&output));
    assert!(message(&output).contains("no samples"), "{}", message(&output));
    let gone = record(dir.path(), &["-p", "4194303"]);
    assert_eq!(gone.status.code(), Some(1), "{}", message(&gone));
    assert!(message(&gone).contains("find process 4194303"), "{}", message(&gone));
    let none = record(dir.path(), &["--", "/no/such/program"]);
    assert_eq!(none.status.code(), Some(127), "{}", message(&none));
    assert!(message(&none).contains("run /no/such/program"), "{}", message(&none));
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0, "no file");
}

#[test]
fn bad_arguments_end_with_2_and_one_line() {
    let dir = tempfile::tempdir().expect("a directory");
    for (arguments, parts) in [
        (&["-d", "0s"][..], ["duration", "100ms to 24h"]),
        (&["-F", "0"], ["frequency", "1 to 1000"]),
        (&["-o", "a.pdf"], ["output", ".svg"]),
    ] {
        let output = record(dir.path(), arguments);
        let message = message(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}
