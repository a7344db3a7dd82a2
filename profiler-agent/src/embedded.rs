//! The backend inside the agent. It is reached through its HTTP door only, as from any other machine.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::{sync::oneshot, task::JoinHandle};

use crate::config::Config;

/// A backend that runs in this process.
pub(crate) struct Backend {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Backend {
    /// Opens its store and its listener; serves from then on.
    pub(crate) async fn start(config: &Config) -> anyhow::Result<Self> {
        let mut options = profiler_backend::Options::new(&config.data_dir);
        options.listen = config.backend_listen;
        let server = profiler_backend::Server::bind(options)
            .await
            .context("start the embedded backend (choose with --backend-listen and --data-dir)")?;
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            // An error means that the agent is gone, which is a stop too.
            let shutdown = async { drop(stopped.await) };
            server.run(shutdown).await.context("run the embedded backend")
        });
        Ok(Self { address, stop, task })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets it finish what it has taken, and waits for it.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        // An error means that it has stopped already; its result says why.
        let _ = self.stop.send(());
        self.task.await.context("join the embedded backend")?
    }
}
