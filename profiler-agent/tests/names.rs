//! Each program's hottest function and its caller are found by name, under its own labels and no other's.

mod support;

use support::{Agent, Merged, Program, run};

/// A function, who calls it, and the least share of its program's time it must have.
struct Expect<'a> {
    exe: &'a str,
    function: &'a str,
    caller: &'a str,
    share: f64,
}

const EXPECT: [Expect<'_>; 4] = [
    Expect { exe: "burn", function: "hot_loop", caller: "outer_work", share: 0.75 },
    Expect { exe: "rust_burn", function: "hot_loop", caller: "outer_work", share: 0.75 },
    Expect { exe: "goburn", function: "main.goHot", caller: "main.goOuter", share: 0.75 },
    // What the kernel does for /dev/zero is its own affair, but the read of it takes most of the time.
    Expect { exe: "dd", function: "vfs_read", caller: "ksys_read", share: 0.3 },
];

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
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    for expect in &EXPECT {
        let merged = agent.wait_for("enough samples of each program", || {
            let merged = agent.merge(&selector(expect));
            (merged.total > ENOUGH_NS).then_some(merged)
        });
        check(expect, &merged);
    }
    for expect in &EXPECT {
        read_with_pprof(&agent, expect);
    }
    agent.stop();
}

fn selector(expect: &Expect<'_>) -> String {
    format!("{{exe=\"{}\"}}", expect.exe)
}

#[track_caller]
fn check(expect: &Expect<'_>, merged: &Merged) {
    let &Expect { exe, function, caller, share } = expect;
    let found = merged.share_below(function, caller);
    assert!(
        found >= share,
        "{exe}: {function} under {caller} has {found:.2} of the time, not {share}:\n{merged:#?}"
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
fn read_with_pprof(agent: &Agent, expect: &Expect<'_>) {
    let &Expect { exe, function, share, .. } = expect;
    let path = agent.merge_to_file(&selector(expect), &format!("{exe}.pb.gz"));
    let path = path.to_str().expect("a plain path");
    let top = run("go", &["tool", "pprof", "-top", "-cum", path]);
    let line = top.lines().find(|line| line.contains(function));
    let line = line.unwrap_or_else(|| panic!("{function} is not in the report:\n{top}"));
    let cumulative =
        line.split_ascii_whitespace().nth(4).and_then(|column| column.strip_suffix('%')?.parse().ok());
    let cumulative: f64 = cumulative.unwrap_or_else(|| panic!("no share in {line:?}"));
    assert!(cumulative >= share * 100.0, "{line:?}, not {share}");
    assert!(top.contains("Type: cpu"), "{top}");
    assert!(top.contains("Duration: "), "{top}");

    let raw = run("go", &["tool", "pprof", "-raw", path]);
    assert!(raw.contains("PeriodType: cpu nanoseconds"), "{raw}");
    assert!(raw.contains(&format!("exe:[{exe}]")), "{exe} is a label of its samples:\n{raw}");
}
