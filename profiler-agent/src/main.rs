//! An eBPF continuous profiling agent with an embedded backend.

mod addr;
mod background;
mod binaries;
mod bpf;
mod budget;
mod census;
mod cli;
mod command;
mod config;
#[cfg(test)]
mod docs;
mod doctor;
mod drain;
mod embedded;
mod executable;
mod export;
mod faults;
mod heap;
mod http;
mod instance;
mod label;
mod languages;
mod ledger;
mod logs;
mod mapping_events;
mod memory;
mod normalize;
mod pipeline;
mod privileges;
mod process;
mod record;
mod reload;
mod status;
mod supervise;
mod symbolize;
mod sys;
mod targets;
mod telemetry;
mod unwind;
mod vdso;
mod window;

use std::{
    process::ExitCode,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use tracing::{error, info, warn};

use crate::{
    config::{Config, ConfigError},
    embedded::Backend,
    export::Destination,
    http::Front,
    ledger::Balance,
    logs::Logs,
    pipeline::{Pipeline, Sink, Stopped},
    reload::Reloader,
    status::{Identity, Phase},
    supervise::Supervisor,
    telemetry::Status,
};

#[global_allocator]
static ALLOCATOR: sys::heap::Counting = sys::heap::Counting;

/// A bad flag, variable or file: nothing was started.
const EXIT_USAGE: u8 = 2;
/// Ended by Ctrl-C, as shells count it: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;
/// How often the agent looks at the off switch and the configuration file, which must be the same twice in a row, at its own
/// parts and at the CPUs.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Threads that wait for sockets and timers; no file is read on them, and nothing is computed for long.
const ASYNC_THREADS: usize = 1;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("profiler-agent: {error:#}");
            if error.is::<ConfigError>() {
                ExitCode::from(EXIT_USAGE)
            } else if error.is::<record::NotRun>() {
                ExitCode::from(record::EXIT_NOT_RUN)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    sys::memory::bound_allocator();
    let (sources, command) = cli::parse();
    let config = sources.load()?;
    if sources.is_to_be_printed() {
        print!("{}", sources.show(&config)?);
        return Ok(ExitCode::SUCCESS);
    }
    // ring is the only provider compiled in; an error means that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if let Some(command) = command {
        return command::run(command, &sources, &config);
    }
    let logs = prepare(&config, &config.log)?;
    let runtime = start_runtime()?;
    let result = profile(Reloader::new(sources, config), logs, &runtime);
    // A read of a file system that hangs must not keep the agent: what had to be joined has been.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

fn start_runtime() -> anyhow::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(ASYNC_THREADS).enable_all().build().context("start the async runtime")
}

/// Gets the privileges, starts logging with a filter, and looks whether this kernel may be sampled.
fn prepare(config: &Config, log: &str) -> anyhow::Result<Logs> {
    let missing = privileges::acquire()?;
    let logs = Logs::start(log, config.log_format)?;
    privileges::tell(&missing);
    doctor::kernel::check("/proc".as_ref(), config.allow_kernel)?;
    // Kernels before 5.11 need it; later ones count maps against the memory cgroup.
    let _ = sys::limits::lift_locked_memory();
    Ok(logs)
}

fn identity(config: &Config) -> Identity {
    Identity {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        node: config.node.clone(),
        instance: config.instance.clone(),
    }
}

fn profile(reloader: Reloader, logs: Logs, runtime: &Runtime) -> anyhow::Result<()> {
    let config = reloader.running().clone();
    let front = Front::new(identity(&config), Some(logs.clone()));
    front.set_config(reloader.show(), &config);
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    let mut doors = supervise::Doors::new(&config, front.clone());
    let Some(_lock) = runtime.block_on(supervise::lock(&config, &mut doors, &front, &mut signals))? else {
        return Ok(());
    };
    runtime.block_on(doors.open())?;
    let backend = match config.uploads.is_empty() {
        true => Some(runtime.block_on(Backend::start(&config))?),
        false => None,
    };
    let destinations = match &backend {
        Some(backend) => vec![Destination::local(backend.address(), config.backend_token.clone())],
        None => config.uploads.clone(),
    };
    for destination in destinations.iter().filter(|destination| destination.tells_token_in_clear()) {
        warn!("the token for {} goes over the network in clear: use https", destination.name());
    }
    let sinks = destinations.into_iter().map(Sink::Upload).collect();
    let pipeline = Pipeline::start(&config, sinks, runtime.handle())?;
    front.begin(pipeline.view().clone(), backend.as_ref().map(Backend::address));
    let mut status = Status::new(pipeline.view().clone());
    let mut supervisor = Supervisor::new(pipeline, reloader, front.clone(), logs);
    supervisor.look_at_switch()?;
    announce(&config, supervisor.pipeline(), backend.as_ref());

    let interval = status.interval();
    let tick = |tick| match tick {
        Tick::Print => {
            status.print();
            None
        }
        Tick::Reload => {
            supervisor.reload();
            None
        }
        Tick::Check => {
            let embedded = backend.as_ref().is_some_and(Backend::is_dead);
            let others =
                [(doors.are_dead(), "the agent's own HTTP died"), (embedded, "the embedded backend died")];
            let other = others.into_iter().find(|(is_dead, _)| *is_dead);
            supervisor
                .look()
                .or_else(|| supervisor.check())
                .or_else(|| other.map(|(_, what)| what.to_owned()))
        }
    };
    let (teller, told) = channel();
    runtime.spawn(pass_on(signals, teller));
    let end = {
        let _context = runtime.enter();
        wait_for_end(&told, interval, tick)
    };
    status.end_line();
    // The last one who knows the symbolizer would wait for its threads, which may read from a file system that hangs.
    // They end with the process.
    std::mem::forget(status);
    front.set_phase(Phase::Ended(end.to_string()));
    info!("{end}: flushing the open window; Ctrl-C once more exits at once");
    // From now on, the next Ctrl-C finds nobody to be told.
    drop(told);
    let Stopped { balances, failure } = supervisor.stop(runtime.handle());
    // Told first: whatever fails from here on changes nothing in it.
    tell(&balances);
    if let Some(backend) = backend {
        runtime.block_on(backend.stop())?;
    }
    match (end, failure) {
        (_, Some(failure)) => Err(failure.into()),
        (End::Died(part), None) => bail!("{part}"),
        (End::Asked, None) => Ok(()),
    }
}

fn tell(balances: &[Balance]) {
    for balance in balances {
        if balance.unaccounted() == 0 {
            info!("{balance}");
        } else {
            error!("{balance}");
        }
    }
}

/// What is taken, at what rate, what is kept where, and where to look.
fn announce(config: &Config, pipeline: &Pipeline, backend: Option<&Backend>) {
    let Config { frequency_hz, window, data_dir, profiles, targets, .. } = config;
    let kinds = if profiles.is_empty() { "none".to_owned() } else { profiles.join(", ") };
    let whom = if targets.want_everything() { "every process" } else { "what the targets want" };
    info!("profiles of {whom}: {kinds}; {frequency_hz} Hz per CPU, windows of {window:?}");
    match config.cpu_budget {
        Some(budget) => {
            info!("sampling less often while that takes more than {budget} of the CPUs (--cpu-budget)")
        }
        None => info!("no CPU budget: sampling at this rate whatever it takes"),
    }
    match backend {
        Some(backend) => {
            info!("keeping profiles in {}", data_dir.display());
            info!("flame graphs: http://{}/", backend.address());
        }
        None => {
            for exporter in pipeline.view().shared.exporters.iter() {
                info!("sending profiles to {}", exporter.name);
            }
        }
    }
}

/// Why the agent ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// By a signal.
    Asked,
    /// It cannot go on, and why: a part of it has ended by itself, or the kernel does not let it attach again.
    Died(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Asked => f.write_str("stopping"),
            Self::Died(why) => write!(f, "stopping: {why}"),
        }
    }
}

/// The signals that the agent listens to.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    /// Within a runtime. From then on, they no longer kill the agent.
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            hang_up: signal(SignalKind::hangup()).context("listen for SIGHUP")?,
        })
    }

    /// Returns when the agent is asked to end.
    async fn end(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// What is due.
#[derive(Clone, Copy, Debug)]
enum Tick {
    /// The status line.
    Print,
    /// A look at the off switch, the configuration file and all parts of the agent.
    Check,
    /// The configuration, as SIGHUP asks.
    Reload,
}

/// What signals tell the agent.
#[derive(Debug)]
enum Told {
    /// To end.
    End,
    /// To read its configuration again.
    Reload,
}

/// Tells of signals. When nobody is there to be told, Ctrl-C is of somebody who does not want to wait for the flush.
async fn pass_on(mut signals: Signals, teller: Sender<Told>) {
    loop {
        let (told, is_interrupt) = tokio::select! {
            Some(()) = signals.interrupt.recv() => (Told::End, true),
            Some(()) = signals.terminate.recv() => (Told::End, false),
            Some(()) = signals.hang_up.recv() => (Told::Reload, false),
            else => return,
        };
        if teller.send(told).is_err() && is_interrupt {
            eprintln!("profiler-agent: interrupted again: exiting at once, without flush and account");
            std::process::exit(EXIT_INTERRUPTED);
        }
    }
}

/// Does what is due until the agent is told to stop, or until `tick` says why it cannot go on. On the calling thread, not in
/// the runtime, whose timers wake two threads.
fn wait_for_end(
    told: &Receiver<Told>,
    print_interval: Duration,
    mut tick: impl FnMut(Tick) -> Option<String>,
) -> End {
    let mut check_at = Instant::now();
    let mut print_at = check_at + print_interval;
    loop {
        let now = Instant::now();
        let due = match told.recv_timeout(check_at.min(print_at).saturating_duration_since(now)) {
            Ok(Told::End) | Err(RecvTimeoutError::Disconnected) => return End::Asked,
            Ok(Told::Reload) => Tick::Reload,
            Err(RecvTimeoutError::Timeout) if print_at <= check_at => {
                print_at = Instant::now() + print_interval;
                Tick::Print
            }
            Err(RecvTimeoutError::Timeout) => {
                check_at = Instant::now() + CHECK_INTERVAL;
                Tick::Check
            }
        };
        if let Some(why) = tick(due) {
            return End::Died(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_dies_ends_the_agent_by_its_name() {
        let mut checks = [None, Some("stage window died".to_owned())].into_iter();
        let tick = |tick| match tick {
            Tick::Check => checks.next().flatten(),
            _ => None,
        };
        let (_teller, told) = channel();
        let end = wait_for_end(&told, Duration::from_secs(60), tick);
        assert_eq!(end, End::Died("stage window died".to_owned()));
        assert_eq!(end.to_string(), "stopping: stage window died");
    }

    #[test]
    fn what_it_is_told_comes_before_what_is_due() {
        let (teller, told) = channel();
        let mut done = Vec::new();
        for told in [Told::Reload, Told::End] {
            teller.send(told).expect("a receiver");
        }
        let tick = |tick| {
            done.push(format!("{tick:?}"));
            None
        };
        assert_eq!(wait_for_end(&told, Duration::ZERO, tick), End::Asked);
        assert_eq!(done, ["Reload"]);
    }
}
