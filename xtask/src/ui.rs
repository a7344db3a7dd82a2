//! The UI's checks: types, unit tests, and that the committed `dist/` is what its sources give.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{
    command, project,
    tally::Tally,
    tools::{self, NODE, NPM},
};

pub(crate) fn check() -> Result<Tally> {
    install()?;
    let mut tally = unit_tests()?;
    // The build checks the types first.
    let built = project::target().join("ui-dist");
    let mut build = npm();
    build.args(["run", "build", "--", "--emptyOutDir", "--outDir"]).arg(&built);
    command::run(&mut build)?;
    tally += Tally::PASSED;
    tally += compare(&dir().join("dist"), &built)?;
    Ok(tally)
}

/// Installs what `package-lock.json` names, unless that has been done since it changed.
pub(crate) fn install() -> Result<()> {
    tools::need(&[NODE, NPM])?;
    let modified = |path: &str| fs::metadata(dir().join(path)).and_then(|metadata| metadata.modified()).ok();
    if modified("node_modules/.package-lock.json") < modified("package-lock.json") {
        command::run(npm().args(["ci", "--no-audit", "--no-fund"]))?;
    }
    Ok(())
}

fn dir() -> PathBuf {
    project::root().join("profiler-backend/ui")
}

fn npm() -> Command {
    let mut npm = Command::new("npm");
    npm.current_dir(dir());
    npm
}

fn unit_tests() -> Result<Tally> {
    let mut tally = Tally::default();
    let succeeded = command::run_reading(npm().arg("test"), |line| count(line, &mut tally))?;
    if !succeeded && tally.failed == 0 || tally == Tally::default() {
        println!("FAILED: `npm test` ended without a result");
        tally += Tally::FAILED;
    }
    Ok(tally)
}

/// Adds one of the closing lines of node's test runner, which end in `pass 12`, `fail 0` and `skipped 0`.
fn count(line: &str, tally: &mut Tally) {
    let mut words = line.trim_start_matches(['#', 'ℹ', ' ']).split(' ');
    let (Some(what), Some(Ok(number)), None) =
        (words.next(), words.next().map(str::parse::<u64>), words.next())
    else {
        return;
    };
    match what {
        "pass" => tally.passed += number,
        "fail" | "cancelled" => tally.failed += number,
        "skipped" | "todo" => tally.skipped += number,
        _ => {}
    }
}

/// Compares two folders, byte for byte.
fn compare(committed: &Path, built: &Path) -> Result<Tally> {
    let mut files = project::files_under(committed)?;
    files.extend(project::files_under(built)?);
    files.sort();
    files.dedup();
    let differing: Vec<&PathBuf> = files
        .iter()
        .filter(|file| {
            let (committed, built) = (fs::read(committed.join(file)), fs::read(built.join(file)));
            committed.is_err() || built.is_err() || committed.ok() != built.ok()
        })
        .collect();
    if differing.is_empty() && !files.is_empty() {
        println!("ok: the UI's dist/ is what its sources give, byte for byte");
        return Ok(Tally::PASSED);
    }
    differing.iter().for_each(|file| println!("  {} differs or is on one side only", file.display()));
    println!(
        "FAILED: the UI's dist/ is not what its sources give; `npm run build` in profiler-backend/ui makes it"
    );
    Ok(Tally::FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_nodes_test_runner_are_counted_in_both_of_its_formats() {
        let mut tally = Tally::default();
        for line in
            ["# tests 15", "# pass 12", "ℹ fail 2", "# skipped 1", "# todo 0", "# pass the salt", "ok 1 - a"]
        {
            count(line, &mut tally);
        }
        assert_eq!(tally, Tally { passed: 12, failed: 2, skipped: 1 });
    }
}
