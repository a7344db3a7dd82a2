//! `cargo xtask fuzz`: parsers of other people's bytes, fed by libFuzzer under AddressSanitizer.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::{command, ebpf, project, tally::Tally};

const MANIFEST: &str = "fuzz/Cargo.toml";
/// Sanitizers need the target to be named: build scripts and procedural macros are built without them then.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What libFuzzer counts coverage by. Source: llvm.org, SanitizerCoverage; 4 is edges of functions that call others.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Zsanitizer=address \
     -Cdebug-assertions -Coverflow-checks";

#[derive(Args)]
pub(crate) struct Options {
    /// Only these files of fuzz/fuzz_targets.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each runs. What it finds new is kept in target/fuzz/corpus.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs the targets one after the other; what makes one fail is kept in `target/fuzz`, and said.
pub(crate) fn run(options: &Options) -> Result<Tally> {
    let Options { targets: chosen, seconds } = options;
    let targets = targets()?;
    for name in chosen {
        ensure!(targets.contains(name), "{name:?} is no fuzz target; there are {}", targets.join(", "));
    }
    let build = project::target().join("fuzz");
    let mut cargo = ebpf::nightly_cargo()?;
    cargo.current_dir(project::root()).env("RUSTFLAGS", RUSTFLAGS);
    cargo.args(["build", "--release", "--locked", "--manifest-path", MANIFEST, "--target", TARGET]);
    command::run(cargo.arg("--target-dir").arg(&build))?;
    let mut tally = Tally::default();
    for name in targets.iter().filter(|name| chosen.is_empty() || chosen.contains(name)) {
        println!("\n== fuzz {name}");
        tally += match run_one(name, *seconds, &build) {
            Ok(()) => Tally::PASSED,
            Err(error) => {
                println!("FAILED: {error:#}");
                Tally::FAILED
            }
        };
    }
    Ok(tally)
}

fn run_one(name: &str, seconds: u32, build: &Path) -> Result<()> {
    let corpus = build.join("corpus").join(name);
    fs::create_dir_all(&corpus).with_context(|| format!("make {}", corpus.display()))?;
    let mut fuzzer = Command::new(build.join(TARGET).join("release").join(name));
    fuzzer.current_dir(build).arg(format!("-max_total_time={seconds}")).arg("-print_final_stats=1");
    command::run(fuzzer.arg(&corpus))
}

/// That the targets compile, by the compiler that all else is built with.
pub(crate) fn check() -> Result<()> {
    let mut cargo = command::cargo();
    cargo.args(["clippy", "--release", "--locked", "--manifest-path", MANIFEST, "--target-dir"]);
    command::run(cargo.arg(project::target()).args(["--", "-Dwarnings"]))
}

/// Names of all targets, sorted.
fn targets() -> Result<Vec<String>> {
    let files = project::files_under(&project::root().join("fuzz/fuzz_targets"))?;
    let name = |file: &PathBuf| Some(file.file_stem()?.to_str()?.to_owned());
    Ok(files.iter().filter_map(name).collect())
}
