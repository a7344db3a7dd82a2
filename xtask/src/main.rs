//! The project's own tasks: `cargo xtask help`.

mod aarch64;
mod bench;
mod cargo_test;
mod command;
mod debian;
mod dist;
mod ebpf;
mod fuzz;
mod lint;
mod project;
mod sha256;
mod tally;
mod test;
mod testprogs;
mod tools;
mod ui;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, builder::PossibleValuesParser};

use self::tally::Tally;

/// Builds, checks and packs the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every test and check, privileged ones too; all that CI does.
    Test {
        /// Only these parts.
        #[arg(value_name = "PART", value_parser = PossibleValuesParser::new(test::names()))]
        parts: Vec<String>,
        /// Leave a part out, and count it as skipped.
        #[arg(long, value_name = "PART", value_parser = PossibleValuesParser::new(test::names()))]
        skip: Vec<String>,
    },
    /// Check format, lints, documentation and licences.
    Lint,
    /// Build the BPF objects in profiler-ebpf/prebuilt.
    BuildEbpf {
        /// Only prove that the committed objects are what their sources give.
        #[arg(long)]
        check: bool,
    },
    /// Build the test programs in target/testprogs.
    Testprogs,
    /// Measure what the agent costs, beside perf record, on a steady load.
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Run the root tests on other kernels: Debian's, under qemu without hardware support.
    Vm(vm::Options),
    /// Feed parsers with made-up bytes: libFuzzer and AddressSanitizer, by a nightly Rust.
    Fuzz(fuzz::Options),
    /// Pack a release: an archive and its checksum in target/dist.
    Dist,
}

fn main() -> Result<ExitCode> {
    if let Some(compiled) = ebpf::wrapper() {
        return compiled;
    }
    match Arguments::parse().task {
        Task::Test { parts, skip } => return Ok(exit_code(test::run(&parts, &skip))),
        Task::Lint => return Ok(exit_code(test::run(&["lint".to_owned()], &[]))),
        Task::BuildEbpf { check: true } => {
            let tally = ebpf::check()?;
            println!("{tally}");
            return Ok(exit_code(tally));
        }
        Task::BuildEbpf { check: false } => ebpf::build()?,
        Task::Testprogs => testprogs::build().map(drop)?,
        Task::Bench { bench } => bench::run(&bench)?,
        Task::Vm(options) => return Ok(exit_code(vm::run(&options)?)),
        Task::Fuzz(options) => return Ok(exit_code(fuzz::run(&options)?)),
        Task::Dist => dist::build()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn exit_code(tally: Tally) -> ExitCode {
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
