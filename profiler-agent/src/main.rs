//! An eBPF continuous profiling agent with an embedded backend.

mod addr;
mod bpf;
mod config;
mod drain;
mod embedded;
mod executable;
mod export;
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

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};
use tracing::{error, info};

use crate::{
    config::{Config, ConfigError, Flags},
    embedded::Backend,
    export::Destination,
    pipeline::Pipeline,
    telemetry::Status,
};

/// A bad flag, variable or file: nothing was started.
const EXIT_USAGE: u8 = 2;

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
    profile(&config, &runtime)
}

fn profile(config: &Config, runtime: &Runtime) -> anyhow::Result<()> {
    let listener = runtime
        .block_on(http::bind(config.listen))
        .with_context(|| format!("listen on {} (another agent? choose with --listen)", config.listen))?;
    let backend = match config.uploads.is_empty() {
        true => Some(runtime.block_on(Backend::start(config))?),
        false => None,
    };
    let destinations = match &backend {
        Some(backend) => vec![Destination::local(backend.address())],
        None => config.uploads.clone(),
    };
    let pipeline = Pipeline::start(config, destinations, runtime.handle())?;
    runtime.spawn(http::serve(listener, pipeline.view().clone()));
    announce(config, &pipeline, backend.as_ref());

    let mut status = Status::new(pipeline.view().clone());
    runtime.block_on(wait_for_stop(&mut status))?;
    status.end_line();
    let balances = pipeline.stop(runtime.handle());
    if let Some(backend) = backend {
        runtime.block_on(backend.stop())?;
    }
    for balance in balances {
        if balance.unaccounted() == 0 {
            info!("{balance}");
        } else {
            error!("{balance}");
        }
    }
    Ok(())
}

/// What is sampled, at what rate, what is kept where, and where to look.
fn announce(config: &Config, pipeline: &Pipeline, backend: Option<&Backend>) {
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
    info!("own metrics: http://{}/metrics; Ctrl-C stops", config.listen);
}

/// Prints the status line until the agent is told to stop.
async fn wait_for_stop(status: &mut Status) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut tick = tokio::time::interval(status.interval());
    tick.tick().await;
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            _ = tick.tick() => status.print(),
        }
    }
}
