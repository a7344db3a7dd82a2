//! cargo test, counted.
//!
//! The tests marked `#[ignore]` are in three groups by the crate they are in, so that none belongs to no group: those of
//! profiler-pprof need Go, those of the agent need root and BPF, all others need programs to look at.
//!
//! A group is chosen by its test programs and not by `--package`: cargo builds dependencies with the features that the chosen
//! packages ask for, so that choosing others would build half of them again.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    aarch64, command, project,
    tally::Tally,
    testprogs,
    tools::{
        self, CHROMIUM, CLANG, CONTAINERD, GO, JEMALLOC, LIBPYTHON, MIMALLOC, MUSL, NODE, PERF, TCMALLOC,
    },
    ui,
};

/// Needs a library of the other architecture.
const AARCH64_TEST: &str = "the_step_agrees_with_gimli_on_every_row_of_an_aarch64_library";

const PPROF: &str = "profiler-pprof";
const AGENT: &str = "profiler-agent";

/// All tests that need nothing but a compiler.
pub(crate) fn unit() -> Result<Tally> {
    test(&mut command::cargo(), &[], &[])
}

/// Profiles are read by `go tool pprof`.
pub(crate) fn golden() -> Result<Tally> {
    tools::need(&[GO])?;
    test(&mut command::cargo(), &programs(|package| package == PPROF)?, &["--ignored"])
}

/// Tests against what is installed on the machine.
pub(crate) fn host() -> Result<Tally> {
    tools::need(&[CLANG, MUSL, GO, NODE, LIBPYTHON])?;
    let mut others = programs(|package| ![PPROF, AGENT].contains(&package))?;
    others.push("--lib".to_owned());
    let mut cargo = command::cargo();
    let mut options = vec!["--ignored"];
    let mut tally = Tally::default();
    match aarch64::libc() {
        Ok(library) => drop(cargo.env("PROFILER_TEST_AARCH64_LIBRARY", library)),
        Err(error) => {
            println!("skipped: {AARCH64_TEST}: {error:#}");
            options.extend(["--skip", AARCH64_TEST]);
            tally += Tally::SKIPPED;
        }
    }
    tally += test(&mut cargo, &others, &options)?;
    Ok(tally)
}

/// The agent in the kernel, on its own machine: one test at a time, for they sample each other.
pub(crate) fn root() -> Result<Tally> {
    tools::need(&[GO, NODE, CHROMIUM, CONTAINERD, CLANG, MUSL, PERF])?;
    tools::want(&[JEMALLOC, TCMALLOC, MIMALLOC]);
    testprogs::build()?;
    ui::install()?;
    let mut cargo = command::cargo();
    run_tests_as_root(&mut cargo)?;
    let mut programs = programs(|package| package == AGENT)?;
    programs.extend(["--bin".to_owned(), AGENT.to_owned()]);
    test(&mut cargo, &programs, &["--ignored", "--test-threads=1"])
}

/// Has cargo start the test programs, and nothing else, through sudo where we are not root.
fn run_tests_as_root(cargo: &mut Command) -> Result<()> {
    if command::is_root() {
        return Ok(());
    }
    let mut sudo = Command::new("sudo");
    if !command::is_installed("sudo") || command::run(sudo.args(["--validate"])).is_err() {
        bail!("these tests need root: run as root, or allow sudo");
    }
    let version = command::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let variable = format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_"));
    cargo.env(variable, "sudo --preserve-env --non-interactive");
    Ok(())
}

/// `--test NAME` for each test program below the `tests/` of the packages that are wanted.
fn programs(is_wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut programs = Vec::new();
    for package in folder(project::root())? {
        let tests = project::root().join(&package).join("tests");
        if !is_wanted(&package) || !tests.is_dir() {
            continue;
        }
        for entry in folder(&tests)? {
            let program = match entry.strip_suffix(".rs") {
                Some(name) => name,
                None if tests.join(&entry).join("main.rs").exists() => &entry,
                None => continue,
            };
            programs.extend(["--test".to_owned(), program.to_owned()]);
        }
    }
    Ok(programs)
}

/// The names in a folder, sorted.
fn folder(path: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(path).with_context(|| format!("list {}", path.display()))?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// Runs `cargo test` on the `targets` of the workspace, or all of them, with `options` for the test programs.
fn test(cargo: &mut Command, targets: &[String], options: &[&str]) -> Result<Tally> {
    cargo.args(["test", "--release", "--locked", "--no-fail-fast", "--workspace"]);
    cargo.args(targets).arg("--").args(options);
    let (mut tally, mut whole_skipped) = (Tally::default(), 0);
    let mut started = String::new();
    let succeeded = command::run_reading(cargo, |line| {
        let (test, said) = parse_test(line).unwrap_or(("", line));
        if !test.is_empty() {
            test.clone_into(&mut started);
        }
        if let Some(result) = parse_result(line) {
            tally += result;
        } else if is_skip(line) {
            tally += Tally::SKIPPED;
        }
        if let Some(skipped) = parse_skip(said) {
            tally.skipped += 1;
            whole_skipped += u64::from(skipped == started);
        }
    })?;
    // A test that says of itself that it is skipped has passed, to the harness.
    tally.passed = tally.passed.saturating_sub(whole_skipped);
    if tally == Tally::default() {
        println!("FAILED: no test was run");
        tally += Tally::FAILED;
    } else if !succeeded && tally.failed == 0 {
        println!("FAILED: a test program was not built, or ended before its result");
        tally += Tally::FAILED;
    }
    Ok(tally)
}

/// `test name ... ` begins when one test runs at a time; what the test says itself may stand behind.
fn parse_test(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ... ")
}

/// `SKIP name: reason`: a test, or a part of one, that could not run here.
fn parse_skip(said: &str) -> Option<&str> {
    said.strip_prefix("SKIP ")?.split(':').next()
}

/// What a test program's closing line says. Its ignored tests are another group's.
pub(crate) fn parse_result(line: &str) -> Option<Tally> {
    let counts = line.strip_prefix("test result: ")?;
    let count = |what: &str| {
        let before = counts.split(what).next()?;
        before.split(' ').next_back()?.parse().ok()
    };
    Some(Tally { passed: count(" passed;")?, failed: count(" failed;")?, skipped: 0 })
}

/// Whether a test says that it leaves something out: `SKIP java: not installed`. It may stand behind the test's name,
/// which has no line break yet.
fn is_skip(line: &str) -> bool {
    line.starts_with("SKIP ") || (line.starts_with("test ") && line.contains(" ... SKIP "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_test_leaves_out_is_counted() {
        assert!(is_skip("SKIP java: not installed"));
        assert!(is_skip("test stacks ... SKIP java: not installed"));
        assert!(!is_skip("test SKIP ... ok"));
    }

    #[test]
    fn closing_line_of_a_test_program_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 5 filtered out; finished in 0.1s";
        assert_eq!(parse_result(line), Some(Tally { passed: 12, failed: 3, skipped: 0 }));
    }

    #[test]
    fn what_a_test_skips_is_read_behind_its_name_and_on_lines_of_its_own() {
        let line = "test cpus_go ... SKIP cpus_go: there is one CPU";
        assert_eq!(parse_test(line), Some(("cpus_go", "SKIP cpus_go: there is one CPU")));
        assert_eq!(parse_skip("SKIP cpus_go: there is one CPU"), Some("cpus_go"));
        assert_eq!(parse_skip("ok"), None);
    }

    #[test]
    fn test_programs_are_found_as_cargo_finds_them() {
        let found = programs(|package| [PPROF, "profiler-backend"].contains(&package)).expect("a checkout");
        assert_eq!(found, ["--test", "backend", "--test", "golden", "--test", "properties"]);
    }

    #[test]
    fn other_lines_are_not_counted() {
        assert_eq!(parse_result("test tests::result ... ok"), None);
        assert_eq!(parse_result("running 3 tests"), None);
    }
}
