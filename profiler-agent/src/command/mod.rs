//! What the program does besides being the agent.

mod ask;
mod bundle;

use std::process::ExitCode;

use anyhow::Context as _;

use crate::{
    cli::{Command, DoctorFlags, StatusFlags},
    config::{Config, Sources},
    doctor::{self, Host},
    record,
};
use ask::Agent;

/// Does it, and says how the program ends.
pub(crate) fn run(command: Command, sources: &Sources, config: &Config) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    match command {
        Command::Record(arguments) => record::run(&arguments.adjust(config.clone())?, &arguments),
        Command::Doctor(flags) => run_doctor(&flags),
        Command::Status(flags) => runtime.block_on(show(config, "/status", flags)),
        Command::Targets(flags) => runtime.block_on(show(config, "/targets", flags)),
        Command::SupportBundle(flags) => {
            let missing = runtime.block_on(bundle::write(&flags.output, sources, config))?;
            println!("written to {}", flags.output.display());
            for part in missing {
                println!("left out: {part}");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints what the running agent answers.
async fn show(config: &Config, path: &str, StatusFlags { json }: StatusFlags) -> anyhow::Result<ExitCode> {
    let form = if json { "?format=json" } else { "" };
    let answer = Agent::new(config)?.get(&format!("{path}{form}")).await?;
    print!("{}", String::from_utf8_lossy(&answer));
    Ok(ExitCode::SUCCESS)
}

fn run_doctor(flags: &DoctorFlags) -> anyhow::Result<ExitCode> {
    let host = Host { proc: "/proc".as_ref(), sys: "/sys".as_ref() };
    if let Some(pid) = flags.pid {
        let report = doctor::process::examine(host.proc, pid)?;
        print_as(flags.json, &report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = doctor::examine(host);
    print_as(flags.json, &report)?;
    Ok(if report.can_profile() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_as(json: bool, report: &(impl serde::Serialize + std::fmt::Display)) -> anyhow::Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(report).context("write JSON")?),
        false => print!("{report}"),
    }
    Ok(())
}
