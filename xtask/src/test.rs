//! `cargo xtask test`: every check there is, in the order in which a failure is cheapest to learn of.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{aarch64, cargo_test, ebpf, lint, tally::Tally, testprogs, ui, vm};

/// One part of the whole test, which runs to its end whatever the others do.
struct Step {
    name: &'static str,
    title: &'static str,
    run: fn() -> Result<Tally>,
}

const STEPS: [Step; 13] = [
    Step { name: "fmt", title: "the sources are formatted", run: lint::format },
    Step { name: "clippy", title: "the sources have no warnings", run: lint::clippy },
    Step { name: "docs", title: "the documentation builds without warnings", run: lint::docs },
    Step { name: "aarch64", title: "the agent compiles for aarch64", run: aarch64::check },
    Step { name: "deny", title: "licences and origins of all crates are allowed", run: lint::deny },
    Step { name: "ebpf", title: "the BPF objects are what their sources give", run: ebpf::check },
    Step { name: "testprogs", title: "the test programs build", run: testprogs::build },
    Step { name: "unit", title: "tests that need nothing but a compiler", run: cargo_test::unit },
    Step { name: "golden", title: "profiles are read by go tool pprof", run: cargo_test::golden },
    Step { name: "host", title: "tests against the machine's own programs", run: cargo_test::host },
    Step { name: "ui", title: "the UI is tested and its dist/ is what its sources give", run: ui::check },
    Step { name: "root", title: "the agent in the kernel", run: cargo_test::root },
    Step { name: "vm", title: "the agent in the oldest kernel, under qemu", run: vm::oldest },
];

/// Steps that need no build of the tests.
pub(crate) const LINT: [&str; 4] = ["fmt", "clippy", "docs", "deny"];

/// All names that choose steps: each step's own, and `lint` for some of the first.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    STEPS.iter().map(|step| step.name).chain(["lint"])
}

/// Runs the steps that `chosen` names, or all, but for those that `skipped` names, which are counted as skipped.
pub(crate) fn run(chosen: &[String], skipped: &[String]) -> Tally {
    let mut rows = Vec::new();
    for step in STEPS.iter().filter(|step| chosen.is_empty() || names_step(chosen, step)) {
        println!("\n== {}: {}", step.name, step.title);
        let start = Instant::now();
        let tally = if names_step(skipped, step) {
            println!("skipped: {}: by --skip", step.name);
            Tally::SKIPPED
        } else {
            (step.run)().unwrap_or_else(|error| {
                println!("FAILED: {error:#}");
                Tally::FAILED
            })
        };
        println!("== {}: {tally} in {}", step.name, seconds(start.elapsed()));
        let _ = std::io::stdout().flush();
        rows.push((step.name, tally, start.elapsed()));
    }
    print_table(&rows);
    let mut total = Tally::default();
    rows.into_iter().for_each(|(_, tally, _)| total += tally);
    println!("\n{total}");
    total
}

fn names_step(names: &[String], step: &Step) -> bool {
    names.iter().any(|name| name == step.name || name == "lint" && LINT.contains(&step.name))
}

fn print_table(rows: &[(&str, Tally, Duration)]) {
    println!("\n{:<10} {:>7} {:>7} {:>7} {:>9}", "step", "passed", "failed", "skipped", "time");
    for (name, Tally { passed, failed, skipped }, time) in rows {
        println!("{name:<10} {passed:>7} {failed:>7} {skipped:>7} {:>9}", seconds(*time));
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
