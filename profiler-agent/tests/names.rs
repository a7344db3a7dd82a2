//! Each program's hottest function and its caller are found by name, under its own labels and no other's.

mod support;

use std::{
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use support::{Agent, Merged, Program, run};

/// A function, who calls it, and the share of its program's time it must have.
struct Expect<'a> {
    exe: &'a str,
    function: &'a str,
    caller: &'a str,
    share: RangeInclusive<f64>,
    /// No other program has a function of this name.
    is_unique: bool,
}

const EXPECT: [Expect<'_>; 4] = [
    // 90 % by its source; 300 samples tell it to 2 %.
    Expect { exe: "burn", function: "hot_loop", caller: "outer_work", share: 0.8..=0.97, is_unique: true },
    Expect {
        exe: "rust_burn",
        function: "rust_hot",
        caller: "rust_outer",
        share: 0.85..=1.0,
        is_unique: true,
    },
    Expect {
        exe: "goburn",
        function: "main.goHot",
        caller: "main.goOuter",
        share: 0.85..=1.0,
        is_unique: true,
    },
    // What the kernel does for /dev/zero is its own affair, but the read of it takes most of the time, and the writes and
    // the way into the kernel take some.
    Expect { exe: "dd", function: "vfs_read", caller: "ksys_read", share: 0.3..=0.99, is_unique: false },
];

/// Length of the windows, as given to the agent.
const WINDOW: Duration = Duration::from_secs(2);

/// Different stacks a program's profile needs before shares mean something, in nanoseconds of CPU time.
const ENOUGH_NS: i64 = 3_000_000_000;

#[test]
#[ignore = "needs root and BPF"]
fn hottest_functions_and_their_callers_are_found_under_their_own_labels() {
    let _programs = [
        Program::start("burn", &[]),
        Program::start("rust_burn", &[]),
        Program::start("goburn", &[]),
        Program::system("dd", &["if=/dev/zero", "of=/dev/null", "bs=64k"]),
    ];
    // Names wait where they cost more than their share of the budget.
    let window = format!("{}s", WINDOW.as_secs());
    let agent = Agent::start(&["-F", "99", "--cpu-budget", "off", "--window", &window]);
    // The first windows need not wait for the names of large files.
    for expect in &EXPECT {
        agent.wait_for(&format!("the first names of {}", expect.exe), || {
            agent.merge(&selector(expect)).mentions(expect.function).then_some(())
        });
    }
    let from = SystemTime::now() + WINDOW;
    for expect in &EXPECT {
        let merged = agent.wait_for("enough samples of each program", || {
            let merged = agent.merge_since(&selector(expect), from);
            (merged.total > ENOUGH_NS).then_some(merged)
        });
        check(expect, &merged);
    }
    for expect in &EXPECT {
        read_with_pprof(&agent, expect, from);
    }
    for &Expect { exe, function, .. } in EXPECT.iter().filter(|expect| expect.is_unique) {
        let others = agent.merge(&format!("{{exe!=\"{exe}\"}}"));
        assert!(others.total > ENOUGH_NS, "the others have samples too: {others:#?}");
        assert!(!others.mentions(function), "{function} of {exe} is under another's labels:\n{others:#?}");
    }
    agent.stop();
}

fn selector(expect: &Expect<'_>) -> String {
    format!("{{exe=\"{}\"}}", expect.exe)
}

#[track_caller]
fn check(expect: &Expect<'_>, merged: &Merged) {
    let &Expect { exe, function, caller, ref share, is_unique: _ } = expect;
    let found = merged.share_below(function, caller);
    assert!(
        share.contains(&found),
        "{exe}: {function} under {caller} has {found:.2} of the time, not {share:?}:\n{merged:#?}"
    );
    if exe != "dd" {
        let stack = merged.hottest_stack();
        let is_expected = |pair: &[&str]| pair[0].contains(function) && pair[1].contains(caller);
        assert!(stack.windows(2).any(is_expected), "{exe}: the hottest stack is {stack:?}");
    }
    for other in EXPECT.iter().filter(|other| other.function != function) {
        assert!(!merged.mentions(other.function), "{exe} has no {}:\n{merged:#?}", other.function);
    }
}

/// The real tool reads what the backend gives: the function leads its report, and nothing is wrong with the file.
fn read_with_pprof(agent: &Agent, expect: &Expect<'_>, from: SystemTime) {
    let &Expect { exe, function, ref share, .. } = expect;
    let path = agent.merge_to_file_since(&selector(expect), &format!("{exe}.pb.gz"), from);
    let path = path.to_str().expect("a plain path");
    let top = run("go", &["tool", "pprof", "-top", "-cum", path]);
    let line = top.lines().find(|line| line.contains(function));
    let line = line.unwrap_or_else(|| panic!("{function} is not in the report:\n{top}"));
    let cumulative =
        line.split_ascii_whitespace().nth(4).and_then(|column| column.strip_suffix('%')?.parse().ok());
    let cumulative: f64 = cumulative.unwrap_or_else(|| panic!("no share in {line:?}"));
    assert!(share.contains(&(cumulative / 100.0)), "{line:?}, not {share:?}");
    assert!(top.contains("Type: cpu"), "{top}");
    assert!(top.contains("Duration: "), "{top}");

    let raw = run("go", &["tool", "pprof", "-raw", path]);
    assert!(raw.contains("PeriodType: cpu nanoseconds"), "{raw}");
    assert!(raw.contains(&format!("exe:[{exe}]")), "{exe} is a label of its samples:\n{raw}");
    let addresses: Vec<u64> = raw.lines().filter_map(location_address).collect();
    assert!(!addresses.is_empty(), "{raw}");
    // Where kernel and processes lie stays on the node: every address is one in a file or a module.
    assert!(addresses.iter().all(|&address| address < 1 << 40), "{raw}");
}

/// `     1: 0x4a3f10 M=1 main.goHot /main.go:12:0 s=10`
fn location_address(line: &str) -> Option<u64> {
    let mut words = line.split_ascii_whitespace();
    words.next()?.strip_suffix(':')?.parse::<u64>().ok()?;
    u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()
}
