//! The backend inside the agent. It is reached through its HTTP door only, as from any other machine.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use tokio::{
    runtime::{self, Runtime},
    sync::oneshot,
    task::JoinHandle,
};

use crate::config::Config;

/// How long it has to write what is in its memory at the end. Nothing is lost without: what it has acknowledged is in
/// its log.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Name of the threads it runs on, which are its own: what it takes of the CPUs is told apart from what profiling does.
pub(crate) const THREAD_NAME: &str = "backend";
/// Its threads for what waits, and for what reads and writes files.
const WORKERS: usize = 2;
const BLOCKING_THREADS: usize = 8;

/// A backend that runs in this process.
pub(crate) struct Backend {
    runtime: Threads,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Backend {
    /// Opens its store and its listener; serves from then on.
    pub(crate) async fn start(config: &Config) -> anyhow::Result<Self> {
        let mut options = profiler_backend::Options::new(&config.data_dir);
        options.listen = config.backend_listen;
        options.token = config.backend_token.clone();
        options.allowed_hosts = vec![config.node.clone()];
        let runtime = Threads::start()?;
        let server = runtime
            .handle()
            .spawn(profiler_backend::Server::bind(options))
            .await
            .context("start the embedded backend")?
            .context("start the embedded backend (choose with --backend-listen and --data-dir)")?;
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = runtime.handle().spawn(async move {
            // An error means that the agent is gone, which is a stop too.
            let shutdown = async { drop(stopped.await) };
            server.run(shutdown).await.context("run the embedded backend")
        });
        Ok(Self { runtime, address, stop, task })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// It has ended by itself, which it does only by a panic or when its listener breaks.
    pub(crate) fn is_dead(&self) -> bool {
        self.task.is_finished()
    }

    /// Lets it finish what it has taken, and waits for it.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        // An error means that it has stopped already; its result says why.
        let Self { runtime: _threads, address: _, stop, task } = self;
        let _ = stop.send(());
        let ended = tokio::time::timeout(STOP_DEADLINE, task)
            .await
            .with_context(|| format!("stop the embedded backend within {STOP_DEADLINE:?}"))?;
        ended.context("join the embedded backend")?
    }
}

/// The backend's runtime. Dropping it waits for nobody: what had to end has been waited for.
struct Threads(Option<Runtime>);

impl Threads {
    fn start() -> anyhow::Result<Self> {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(THREAD_NAME)
            .enable_all()
            .build();
        Ok(Self(Some(runtime.context("start the embedded backend's runtime")?)))
    }

    fn handle(&self) -> &runtime::Handle {
        self.0.as_ref().expect("it is taken by drop alone").handle()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
