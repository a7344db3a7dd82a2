//! CPU time is measured rightly: totals, duration and utilisation.

mod support;

use std::time::SystemTime;

use support::{Agent, Program, run};

/// Short, so that the last one is stored soon.
const WINDOW: &str = "2s";
const WINDOW_NS: f64 = 2e9;

/// Difference accepted between what was sampled and what the kernel accounted.
const TOLERANCE: f64 = 0.03;

#[test]
#[ignore = "needs root and BPF"]
fn a_program_that_burns_one_core_for_20_s_has_20_s_of_cpu_time() {
    let agent = Agent::start(&["-F", "99", "--window", WINDOW]);
    let program = Program::start("burn", &["-c", "20"]);
    let selector = format!("{{exe=\"burn\",pid=\"{}\"}}", program.pid());
    let output = program.output();
    let ended = SystemTime::now();
    let used: serde_json::Value = serde_json::from_str(&output).expect("what it consumed, as JSON");
    let used_ns = used["cpu_ns"].as_f64().expect("a number");
    let wall_ns = used["wall_ns"].as_f64().expect("a number");

    agent.wait_for_window_after(ended);
    let sampled_ns = agent.merge(&selector).total as f64;
    let ratio = sampled_ns / used_ns;
    assert!((ratio - 1.0).abs() <= TOLERANCE, "sampled {sampled_ns} ns, used {used_ns} ns: {ratio:.4}");

    let path = agent.merge_to_file(&selector, "burn.pb.gz");
    let top = run("go", &["tool", "pprof", "-top", path.to_str().expect("a plain path")]);
    let (duration_s, total_s, utilization) = header(&top);
    assert!((total_s * 1e9 / sampled_ns - 1.0).abs() < 0.01, "total of {sampled_ns} ns:\n{top}");
    // It runs all the time, so that no window of its time is missing; the first and the last may hold no more than a
    // moment of it.
    let longest_ns = wall_ns + 2.0 * WINDOW_NS;
    let duration_ns = duration_s * 1e9;
    assert!((wall_ns - 1e8..=longest_ns + 1e8).contains(&duration_ns), "it ran for {wall_ns} ns:\n{top}");
    let least = used_ns / longest_ns * (1.0 - TOLERANCE);
    let most = used_ns / wall_ns * (1.0 + TOLERANCE);
    assert!((least..=most).contains(&(utilization / 100.0)), "it used {used_ns} of {wall_ns} ns:\n{top}");

    let log = agent.stop();
    let account = log.lines().find(|line| line.contains("taken ")).expect("an account at the end");
    assert!(account.contains("waiting 0 + dropped 0") && !account.contains("UNACCOUNTED"), "{account}");
}

/// `Duration: 25.01s, Total samples = 20.02s (80.05%)`
fn header(top: &str) -> (f64, f64, f64) {
    let line = top.lines().find(|line| line.starts_with("Duration: ")).expect("a line with the duration");
    let mut numbers = line.split([' ', ',', '(', ')']).filter_map(seconds_or_percent);
    let mut next = || numbers.next().unwrap_or_else(|| panic!("three numbers in {line:?}"));
    (next(), next(), next())
}

/// pprof writes times in the unit that suits the smallest of them: `25.01s`, `19848.48ms`, `1.5mins`.
fn seconds_or_percent(word: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 4] = [("mins", 60.0), ("ms", 1e-3), ("s", 1.0), ("%", 1.0)];
    UNITS.iter().find_map(|(unit, seconds)| Some(word.strip_suffix(unit)?.parse::<f64>().ok()? * seconds))
}
