//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::{
    config::{Flags, Sources},
    record,
};

/// Samples the stacks of every process on this machine and shows them as flame graphs.
///
/// Without --upload, profiles are kept and shown by the backend built into this program. Without a command, the agent runs
/// until it is stopped.
#[derive(Debug, Parser)]
#[command(
    name = "profiler-agent",
    version,
    max_term_width = 100,
    subcommand_help_heading = "Commands",
    args_override_self = true
)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of running the agent.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Record CPU time of some processes, or of all, into one file
    Record(record::Arguments),
    /// Say what works on this machine, what does not, and what to do about it
    Doctor(DoctorFlags),
    /// Show what the running agent does
    Status(StatusFlags),
    /// Show which processes the running agent samples: by which target, how often, for which profiles
    Targets(StatusFlags),
    /// Pack what somebody who helps needs to know into one file, without secrets
    SupportBundle(BundleFlags),
}

/// Flags of `doctor`. It ends with 1 when the agent cannot profile this machine.
#[derive(Args, Clone, Debug)]
pub(crate) struct DoctorFlags {
    /// Look at one process: where the unwind information and the names of each of its mappings come from
    #[arg(short, long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `status` and `targets`. They end with 1 when no agent answers.
#[derive(Args, Clone, Debug)]
pub(crate) struct StatusFlags {
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `support-bundle`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BundleFlags {
    /// The file to write
    #[arg(short, long, value_name = "FILE.tar.gz")]
    pub(crate) output: PathBuf,
}

/// Reads the command line. Ends the program for `--help` and `--version`, and, in one line, for what clap refuses.
pub(crate) fn parse() -> (Sources, Option<Command>) {
    let matches = Cli::command().try_get_matches().unwrap_or_else(|error| refuse(&error));
    let Cli { flags, command } = Cli::from_arg_matches(&matches).unwrap_or_else(|error| refuse(&error));
    (Sources::new(flags, &matches), command)
}

fn refuse(error: &clap::Error) -> ! {
    if !error.use_stderr() {
        error.exit();
    }
    eprintln!("profiler-agent: {}; see --help", one_line(&error.to_string()));
    std::process::exit(error.exit_code());
}

/// The first paragraph of what clap says; the others are usage and hints.
fn one_line(message: &str) -> String {
    let first = message.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.trim_start_matches("error: ").split_whitespace().collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// The help without what the environment of the test adds to it.
    fn help(command: &mut clap::Command) -> String {
        let hidden = command.clone().mut_args(|argument| argument.hide_env_values(true));
        hidden.term_width(100).render_long_help().to_string()
    }

    #[test]
    fn the_help_is_as_designed() {
        insta::assert_snapshot!("help", help(&mut Cli::command()));
        for name in ["record", "doctor", "status", "targets", "support-bundle"] {
            let mut root = Cli::command();
            let command = root.find_subcommand_mut(name).expect("a command");
            insta::assert_snapshot!(format!("help-{name}"), help(command));
        }
    }

    #[test]
    fn what_clap_refuses_takes_one_line() {
        for args in [&["--frequncy", "9"][..], &["bench"], &["doctor", "-p", "x"], &["support-bundle"]] {
            let error = Cli::try_parse_from([&["profiler-agent"], args].concat()).expect_err("refused");
            let line = one_line(&error.to_string());
            assert!(!line.contains('\n') && !line.is_empty(), "{line}");
        }
        let error = Cli::try_parse_from(["profiler-agent", "--frequncy", "9"]).expect_err("refused");
        assert_eq!(one_line(&error.to_string()), "unexpected argument '--frequncy' found");
    }
}
