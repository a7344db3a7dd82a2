//! `profiler-agent record`: one profile of some processes, or of all, in one file.

mod capture;
mod command;
mod heap;
mod output;
mod progress;
mod summary;
mod target;

use std::{
    ffi::OsString,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use profiler_pprof::proto::Profile;
use tokio::runtime::Runtime;

pub(crate) use self::command::{EXIT_NOT_RUN, NotRun};
use self::{
    capture::{Capture, Measured},
    command::{Running, Waiting},
    output::Output,
    progress::Progress,
    target::Target,
};
use crate::{
    Signals,
    config::{self, Config, ConfigError},
    heap as heaps, prepare,
};

/// Samples per second and CPU of a recording, unless asked for otherwise: more than the agent's own, since it ends.
const DEFAULT_FREQUENCY: &str = "99";
/// Length of a recording without a command.
const DEFAULT_DURATION: &str = "10s";
const DURATION_MIN: Duration = Duration::from_millis(100);
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);
/// How often the progress line moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Record CPU time of some processes, or of all, or the heap of some, into one file.
///
/// Without a target, CPU time of every process is recorded. A command is recorded with all that it starts, until it ends; its
/// exit status is the recording's.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  profiler-agent record -p 1234                         profile.pb.gz, for `go tool pprof`
  profiler-agent record -d 30s -o all.svg               every process, as a flame graph for a browser
  profiler-agent record --container 3f1c -o -           pprof to standard output
  profiler-agent record -F 997 -o make.folded -- make   a command and all that it starts
  profiler-agent record --heap -p 1234 -d 1m            what it allocates in a minute, and holds of that at its end
  profiler-agent record --heap --rate 64KiB -- ./app    from its first allocation to its last")]
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

    /// Record the heap instead of CPU time: allocations made meanwhile, and those of them that are in use at the end, in the
    /// form of Go's heap profiles. Of a command that ends, what it held then. x86-64, Linux 5.15
    #[arg(long, conflicts_with = "frequency")]
    heap: bool,

    /// Mean bytes between two sampled allocations, as 64KiB; 1 takes every allocation [default: 512KiB]
    #[arg(long, value_name = "BYTES", requires = "heap")]
    rate: Option<String>,

    /// What that may take of the time of each process, as a share of one CPU, or off; above it, allocations are sampled in
    /// windows at random times and scaled [default: the agent's --heap-budget, 1%]
    #[arg(long, value_name = "SHARE", requires = "heap")]
    heap_budget: Option<String>,

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
    /// For a frequency or a budget that is not accepted.
    pub(crate) fn adjust(&self, mut config: Config) -> Result<Config, ConfigError> {
        let frequency = self.frequency.clone().unwrap_or_else(|| DEFAULT_FREQUENCY.to_owned());
        config.frequency_hz = config::parse_frequency(Some(frequency))?;
        config.uploads.clear();
        // It ends by itself, and was asked for at this rate.
        config.cpu_budget = None;
        if let Some(budget) = &self.heap_budget {
            config.heap.budget = config::parse_heap_budget(Some(budget.clone()))?;
        }
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

    fn measured(&self) -> Result<Measured, ConfigError> {
        if !self.heap {
            return Ok(Measured::Cpu);
        }
        let has_target = !self.pid.is_empty() || self.container.is_some() || self.cgroup.is_some();
        if !has_target && self.command.is_empty() {
            let accepted = "accepted with -p, --container, --cgroup or a command: each call of an allocator costs its program";
            return Err(ConfigError::new("heap", "every process", accepted.to_owned()));
        }
        let Some(text) = &self.rate else { return Ok(Measured::Heap { rate: heaps::DEFAULT_RATE }) };
        let refused = || ConfigError::new("rate", text, "accepted: 1 to 4095MiB, as 64KiB".to_owned());
        let rate = heaps::parse_rate(text).filter(|&rate| rate > 0).ok_or_else(refused)?;
        Ok(Measured::Heap { rate })
    }
}

/// Records, writes and sums up. Gives the command's exit status.
///
/// # Errors
/// For arguments that are not accepted, targets that are not there or never ran, and all that fails underway.
pub(crate) fn run(config: &Config, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let output = Output::parse(&arguments.output)?;
    let (duration, measured) = (arguments.duration()?, arguments.measured()?);
    prepare(config, "warn")?;
    let target = Target::resolve(arguments)?;
    let file = output.open()?;
    let command = Waiting::spawn(&arguments.command)?;
    let target = command.as_ref().map_or(target, |command| Target::Command(command.pid()));
    let runtime = Runtime::new().context("start the async runtime")?;
    let mut capture = Capture::begin(config, &target, measured, runtime.handle())?;
    let running = match command {
        Some(command) => Some(command.run(|pid| capture.follow(pid), measured != Measured::Cpu)?),
        None => {
            capture.wait_for_heaps(&target)?;
            None
        }
    };
    let Observed { elapsed, running } = observe(&runtime, &mut capture, duration, running)?;
    let profile = capture.finish(elapsed, runtime.handle());
    // Behind the capture: what it held when it ended is asked for while its parent has not waited for it.
    let end = End { elapsed, command: running.map(Running::finish).transpose()? };
    runtime.shutdown_background();
    let Some(profile) = profile? else {
        if end.command_failed() {
            return Ok(end.exit_code());
        }
        bail!("no samples: {target} {} in {:.1?}; nothing was written", measured.lack(), end.elapsed);
    };
    finish(&profile, &output, file)?;
    Ok(end.exit_code())
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

/// A recording that is over.
struct Observed {
    elapsed: Duration,
    /// The command, which may run on or have ended.
    running: Option<Running>,
}

/// Waits for the duration, the command or Ctrl-C, whichever is first.
fn observe(
    runtime: &Runtime,
    capture: &mut Capture,
    duration: Option<Duration>,
    running: Option<Running>,
) -> anyhow::Result<Observed> {
    let started = Instant::now();
    let mut progress = Progress::new(duration);
    runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        loop {
            tokio::select! {
                () = signals.end() => break,
                _ = ticks.tick() => {}
            }
            progress.show(started.elapsed(), capture.samples());
            if let Some(part) = capture.look() {
                bail!("stage {part} died");
            }
            let over = duration.is_some_and(|duration| started.elapsed() >= duration);
            let ended = running.as_ref().map(Running::has_ended).transpose()?.unwrap_or(false);
            if over || ended {
                break;
            }
        }
        Ok(())
    })?;
    progress.clear();
    Ok(Observed { elapsed: started.elapsed(), running })
}
