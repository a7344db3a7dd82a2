//! An eBPF continuous profiling agent with an embedded backend.

mod addr;
mod bpf;
mod config;
mod drain;
mod embedded;
mod executable;
mod export;
mod heap;
mod http;
mod label;
mod ledger;
mod normalize;
mod pipeline;
mod privileges;
mod process;
mod symbolize;
mod sys;
mod telemetry;
mod unwind;
mod window;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::Parser as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use tracing::{error, info};

use crate::{
    config::{Config, ConfigError, Flags},
    embedded::Backend,
    export::Destination,
    http::Front,
    ledger::Balance,
    pipeline::{Pipeline, Stopped},
    telemetry::Status,
};

/// A bad flag, variable or file: nothing was started.
const EXIT_USAGE: u8 = 2;
/// Ended by Ctrl-C, as shells count it: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;
/// How often the agent looks whether all of its parts live, and which CPUs are online.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("profiler-agent: {error:#}");
            if error.is::<ConfigError>() { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn run() -> anyhow::Result<()> {
    let config = config::load(Flags::parse())?;
    privileges::acquire()?;
    telemetry::start_logging(&config.log, config.log_format)?;
    // ring is the only provider compiled in; an error means that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Kernels before 5.11 need it; later ones count maps against the memory cgroup.
    let _ = sys::limits::lift_locked_memory();
    let runtime = Runtime::new().context("start the async runtime")?;
    let result = profile(&config, &runtime);
    // A read of a file system that hangs must not keep the agent: what had to be joined has been.
    runtime.shutdown_background();
    result
}

fn profile(config: &Config, runtime: &Runtime) -> anyhow::Result<()> {
    let listener = runtime
        .block_on(http::bind(config.listen))
        .with_context(|| format!("listen on {} (another agent? choose with --listen)", config.listen))?;
    let listen = listener.local_addr().context("read own address")?;
    let front = Front::default();
    let server = runtime.spawn(http::serve(listener, front.clone(), config.node.clone()));
    let backend = match config.uploads.is_empty() {
        true => Some(runtime.block_on(Backend::start(config))?),
        false => None,
    };
    let destinations = match &backend {
        Some(backend) => vec![Destination::local(backend.address())],
        None => config.uploads.clone(),
    };
    let mut pipeline = Pipeline::start(config, destinations, runtime.handle())?;
    front.begin(pipeline.view().clone());
    let signals = runtime.block_on(async { Signals::listen() })?;
    announce(config, listen, &pipeline, backend.as_ref());

    let mut status = Status::new(pipeline.view().clone());
    let check = || {
        pipeline.follow_cpus();
        let own_http = server.is_finished().then_some("the agent's own HTTP");
        let embedded = backend.as_ref().is_some_and(Backend::is_dead).then_some("the embedded backend");
        let stage = pipeline.dead_stage().map(|stage| format!("stage {stage}"));
        stage.or_else(|| own_http.or(embedded).map(str::to_owned))
    };
    let (end, interrupt) =
        runtime.block_on(wait_for_end(signals, status.interval(), || status.print(), check));
    status.end_line();
    // The last one who knows the symbolizer would wait for its threads, which may read from a file system that hangs.
    // They end with the process.
    std::mem::forget(status);
    front.end(end.to_string());
    info!("{end}: flushing the open window; Ctrl-C once more exits at once");
    runtime.spawn(exit_when_interrupted_again(interrupt));
    let Stopped { balances, failure } = pipeline.stop(runtime.handle());
    // Told first: whatever fails from here on changes nothing in it.
    tell(&balances);
    if let Some(backend) = backend {
        runtime.block_on(backend.stop())?;
    }
    match (end, failure) {
        (_, Some(failure)) => Err(failure.into()),
        (End::Died(part), None) => bail!("{part} died"),
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

/// What is sampled, at what rate, what is kept where, and where to look.
fn announce(config: &Config, listen: SocketAddr, pipeline: &Pipeline, backend: Option<&Backend>) {
    let Config { frequency_hz, window, data_dir, .. } = config;
    info!(
        "sampling on-CPU stacks of every process on {} CPUs at {frequency_hz} Hz, windows of {window:?}",
        pipeline.cpus()
    );
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
    info!("own metrics: http://{listen}/metrics; Ctrl-C stops");
}

/// Why the agent ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// By a signal.
    Asked,
    /// A part of it has ended by itself: which.
    Died(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Asked => f.write_str("stopping"),
            Self::Died(part) => write!(f, "stopping: {part} died"),
        }
    }
}

/// The signals that ask the agent to end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Within a runtime. From then on, they no longer kill the agent.
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }
}

/// Prints the status line until the agent is told to stop, or until `check` names a part of it that died. Gives back
/// the signal of Ctrl-C, for the next one.
async fn wait_for_end(
    signals: Signals,
    interval: Duration,
    mut print: impl FnMut(),
    mut check: impl FnMut() -> Option<String>,
) -> (End, Signal) {
    let Signals { mut interrupt, mut terminate } = signals;
    let mut checks = tokio::time::interval(CHECK_INTERVAL);
    let mut prints = tokio::time::interval(interval);
    prints.tick().await;
    loop {
        tokio::select! {
            _ = interrupt.recv() => return (End::Asked, interrupt),
            _ = terminate.recv() => return (End::Asked, interrupt),
            _ = prints.tick() => print(),
            _ = checks.tick() => {
                if let Some(part) = check() {
                    return (End::Died(part), interrupt);
                }
            }
        }
    }
}

/// For somebody who does not want to wait for the flush.
async fn exit_when_interrupted_again(mut interrupt: Signal) {
    if interrupt.recv().await.is_some() {
        eprintln!("profiler-agent: interrupted again: exiting at once, without flush and account");
        std::process::exit(EXIT_INTERRUPTED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_dies_ends_the_agent_by_its_name() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (end, _) = runtime.block_on(async {
            let signals = Signals::listen().expect("signals");
            let mut checks = [None, Some("stage window".to_owned())].into_iter();
            wait_for_end(signals, Duration::from_secs(60), || {}, || checks.next().flatten()).await
        });
        assert_eq!(end, End::Died("stage window".to_owned()));
        assert_eq!(end.to_string(), "stopping: stage window died");
    }
}
