//! `profiler-agent record`: one profile of some processes, or of all, in one file.

mod command;
mod output;
mod progress;
mod summary;
mod target;

use std::{
    ffi::OsString,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use profiler_common::limits;
use profiler_pprof::proto::Profile;
use tokio::runtime::Runtime;

pub(crate) use self::command::{EXIT_NOT_RUN, NotRun};
use self::{command::Waiting, output::Output, progress::Progress, target::Target};
use crate::{
    Signals,
    config::{self, Config, ConfigError},
    export::Collector,
    ledger::ProfileType,
    pipeline::{Pipeline, Sink, Stopped},
    prepare, tell,
};

/// Samples per second and CPU of a recording, unless asked for otherwise: more than the agent's own, since it ends.
const DEFAULT_FREQUENCY: &str = "99";
/// Length of a recording without a command.
const DEFAULT_DURATION: &str = "10s";
const DURATION_MIN: Duration = Duration::from_millis(100);
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long a recording waits for unwind tables before it begins; it goes on without.
const TABLES_DEADLINE: Duration = Duration::from_secs(5);
const TABLES_POLL: Duration = Duration::from_millis(10);
/// How often the progress line moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Record CPU time of some processes, or of all, into one file.
///
/// Without a target, every process is recorded. A command is recorded with all that it starts, until it ends; its exit
/// status is the recording's.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  profiler-agent record -p 1234                         profile.pb.gz, for `go tool pprof`
  profiler-agent record -d 30s -o all.svg               every process, as a flame graph for a browser
  profiler-agent record --container 3f1c -o -           pprof to standard output
  profiler-agent record -F 997 -o make.folded -- make   a command and all that it starts")]
pub(crate) struct Arguments {
    /// Record this process; may be given more than once
    #[arg(short, long, value_name = "PID", value_delimiter = ',', conflicts_with_all = ["container", "cgroup", "command"])]
    pid: Vec<u32>,

    /// Record a container, by the beginning of its id, or its name where it has one instead
    #[arg(long, value_name = "ID", conflicts_with_all = ["cgroup", "command"])]
    container: Option<String>,

    /// Record a cgroup and all below it, by its path in the cgroup file system
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    cgroup: Option<String>,

    /// How long to record, 100ms to 24h [default: 10s; with a command, until it ends]
    #[arg(short, long, value_name = "DURATION")]
    duration: Option<String>,

    /// Samples per second and CPU, 1 to 1000 [default: 99]
    #[arg(short = 'F', long, value_name = "HZ")]
    frequency: Option<String>,

    /// Where to write: a name that ends in .pb.gz (pprof), .svg (flame graph) or .folded (one stack a line), or - for
    /// pprof on standard output
    #[arg(short, long, value_name = "FILE", default_value = "profile.pb.gz")]
    output: OsString,

    /// The command to run and record, with its arguments, behind `--`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Arguments {
    /// The agent's configuration with what a recording changes in it.
    ///
    /// # Errors
    /// For a frequency that is not accepted.
    pub(crate) fn adjust(&self, mut config: Config) -> Result<Config, ConfigError> {
        let frequency = self.frequency.clone().unwrap_or_else(|| DEFAULT_FREQUENCY.to_owned());
        config.frequency_hz = config::parse_frequency(Some(frequency))?;
        config.uploads.clear();
        // It ends by itself, and was asked for at this rate.
        config.cpu_budget = None;
        Ok(config)
    }

    /// `None`: until the command ends.
    fn duration(&self) -> Result<Option<Duration>, ConfigError> {
        let text = match (&self.duration, self.command.is_empty()) {
            (None, false) => return Ok(None),
            (None, true) => DEFAULT_DURATION,
            (Some(text), _) => text,
        };
        let duration = config::parse_duration(text).filter(|d| (DURATION_MIN..=DURATION_MAX).contains(d));
        let refused =
            || ConfigError::new("duration", text, "accepted: 100ms to 24h, as 10s, 500ms or 2m".to_owned());
        Ok(Some(duration.ok_or_else(refused)?))
    }
}

/// Records, writes and sums up. Gives the command's exit status.
///
/// # Errors
/// For arguments that are not accepted, targets that are not there or never ran, and all that fails underway.
pub(crate) fn run(config: &Config, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let output = Output::parse(&arguments.output)?;
    let duration = arguments.duration()?;
    prepare(config, "warn")?;
    let target = Target::resolve(arguments)?;
    let file = output.open()?;
    let command = Waiting::spawn(&arguments.command)?;
    let target = command.as_ref().map_or(target, |command| Target::Processes(vec![command.pid()]));
    let config = Config { targets: target.to_targets(), ..config.clone() };
    let runtime = Runtime::new().context("start the async runtime")?;
    let collector = Arc::<Collector>::default();
    let mut pipeline =
        Pipeline::start(&config, vec![Sink::Collect(Arc::clone(&collector))], runtime.handle())?;
    wait_for_tables(&pipeline);
    pipeline.resume()?;
    let end = observe(&runtime, &mut pipeline, duration, command)?;
    let view = pipeline.view().clone();
    let Stopped { balances, failure } = pipeline.stop(runtime.handle());
    runtime.shutdown_background();
    if balances.iter().any(|balance| balance.delivered != balance.taken) {
        tell(&balances);
    }
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    let not_followed = view.families_not_followed();
    if not_followed > 0 {
        eprintln!(
            "missing: {not_followed} child processes, for more than {} ran at a time",
            limits::FAMILY_MAX
        );
    }
    let profile = collector.take("cpu").context("sum up the recording")?;
    let Some(profile) = profile.filter(|profile| !profile.sample.is_empty()) else {
        if end.command_failed() {
            return Ok(end.exit_code());
        }
        bail!("no samples: {target} used no CPU time in {:.1?}; nothing was written", end.elapsed);
    };
    finish(&profile, &output, file)?;
    Ok(end.exit_code())
}

/// The first stacks are worth as much as the last ones: what runs now gets its unwind tables first, within reason.
fn wait_for_tables(pipeline: &Pipeline) {
    let deadline = Instant::now() + TABLES_DEADLINE;
    while !pipeline.has_scanned() && Instant::now() < deadline {
        thread::sleep(TABLES_POLL);
    }
}

fn finish(profile: &Profile, output: &Output, file: output::File) -> anyhow::Result<()> {
    file.write(profile).with_context(|| format!("write {output}"))?;
    eprint!("{}", summary::Summary::new(profile));
    eprintln!("{}", output.next_step());
    Ok(())
}

/// How a recording ended.
struct End {
    elapsed: Duration,
    command: Option<std::process::ExitStatus>,
}

impl End {
    fn command_failed(&self) -> bool {
        self.command.is_some_and(|status| !status.success())
    }

    /// The command's own; as shells give it for a signal.
    fn exit_code(&self) -> ExitCode {
        self.command.map_or(ExitCode::SUCCESS, command::exit_code)
    }
}

/// Waits for the duration, the command or Ctrl-C, whichever is first.
fn observe(
    runtime: &Runtime,
    pipeline: &mut Pipeline,
    duration: Option<Duration>,
    command: Option<Waiting>,
) -> anyhow::Result<End> {
    let started = Instant::now();
    let mut running = command.map(Waiting::run).transpose()?;
    let view = pipeline.view().clone();
    let mut progress = Progress::new(duration);
    runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        loop {
            tokio::select! {
                () = signals.end() => break,
                _ = ticks.tick() => {}
            }
            progress.show(started.elapsed(), view.snapshot().of(ProfileType::Cpu).taken);
            if let Some(part) = pipeline.dead_stage() {
                bail!("stage {part} died");
            }
            let over = duration.is_some_and(|duration| started.elapsed() >= duration);
            let ended = running.as_mut().map(command::Running::has_ended).transpose()?.unwrap_or(false);
            if over || ended {
                break;
            }
        }
        Ok(())
    })?;
    progress.clear();
    let elapsed = started.elapsed();
    Ok(End { elapsed, command: running.map(command::Running::finish).transpose()? })
}
