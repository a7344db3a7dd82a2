//! A backend from its options to its end.

use std::{
    error::Error,
    future::Future,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{net::TcpListener, sync::watch};

use crate::{
    http::{self, App, PushLimits},
    metrics::Metrics,
    receive,
    store::{Store, StoreOptions},
    time::parse_duration_ms,
};

/// Time open requests have to finish once the backend is asked to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What a backend is to do. [`Options::new`] gives the defaults; every field may be changed after.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address of the HTTP door; port 0 takes a free one. Default 127.0.0.1:7700.
    pub listen: SocketAddr,
    /// Directory of the store, made with mode 0700 when absent. One backend uses it at a time.
    pub data_dir: PathBuf,
    /// How long profiles are kept, in whole hours of the clock. Default 7 days.
    pub retention: Duration,
    /// Names by which clients call this backend, besides `localhost` and IP addresses. Requests for other names are
    /// refused, since a web page could make them up (DNS rebinding). Default none.
    pub allowed_hosts: Vec<String>,
    /// How long a profile stays in memory and in the log before it goes to a Parquet part. Default 1 minute.
    pub flush_interval: Duration,
    /// Largest body of a push, as sent, in bytes. Default 16 MiB.
    pub push_bytes_max: usize,
    /// Largest body of a push after inflating, in bytes, and again for all its profiles together. Default 64 MiB.
    pub push_inflated_bytes_max: usize,
    /// Memory of profiles not yet in a part at which pushes are answered 503, in bytes. Default 256 MiB.
    pub memory_bytes_max: usize,
}

impl Options {
    /// The defaults, for a store in `data_dir`.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7700)),
            data_dir: data_dir.into(),
            retention: 7 * DAY,
            allowed_hosts: Vec::new(),
            flush_interval: Duration::from_secs(60),
            push_bytes_max: 16 << 20,
            push_inflated_bytes_max: 64 << 20,
            memory_bytes_max: 256 << 20,
        }
    }

    fn store(&self) -> StoreOptions {
        StoreOptions {
            data_dir: self.data_dir.clone(),
            retention: self.retention,
            flush_interval: self.flush_interval,
            flush_bytes: self.memory_bytes_max / 4,
            memory_bytes_max: self.memory_bytes_max,
            stack_cache_bytes_max: 64 << 20,
        }
    }
}

/// Reads a retention such as `7d` or `36h`: units ms, s, m, h, d and w. `None` when it is none, or less than an hour.
pub fn parse_retention(text: &str) -> Option<Duration> {
    let retention = Duration::from_millis(parse_duration_ms(text)?.unsigned_abs());
    (retention >= Duration::from_secs(60 * 60)).then_some(retention)
}

/// Why a backend did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store in the data directory cannot be opened: in use, not readable, not writable.
    #[error("open the store in {data_dir}")]
    Open {
        /// [`Options::data_dir`].
        data_dir: PathBuf,
        /// What failed.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The address cannot be listened on.
    #[error("listen on {listen}")]
    Listen {
        /// [`Options::listen`].
        listen: SocketAddr,
        /// What failed.
        source: io::Error,
    },
    /// Connections can no longer be accepted.
    #[error("serve HTTP")]
    Serve(#[source] io::Error),
}

/// A backend whose store is open and whose port is bound: connections wait until [`Server::run`].
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    local_addr: SocketAddr,
}

impl Server {
    /// Opens the store, replays what a crash left in its log, and binds the port.
    ///
    /// # Errors
    /// When the data directory is in use or broken, or the address taken.
    pub async fn bind(options: Options) -> Result<Self, ServeError> {
        let app = {
            let options = options.clone();
            let opened = tokio::task::spawn_blocking(move || open(&options)).await;
            opened.expect("opening does not panic, and nothing cancels it")?
        };
        let listen_error = |source| ServeError::Listen { listen: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(listen_error)?;
        let local_addr = listener.local_addr().map_err(listen_error)?;
        Ok(Self { app: Arc::new(app), listener, local_addr })
    }

    /// The address that is listened on, with the port that was taken.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `shutdown` completes; then lets open requests finish for a few seconds and writes what is in
    /// memory to parts.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
        let Self { app, listener, .. } = self;
        let (ending, mut ended) = watch::channel(false);
        let signal = async move {
            shutdown.await;
            // Fails when the server ended by itself.
            let _ = ending.send(true);
        };
        let router = http::router(Arc::clone(&app));
        let serve = axum::serve(listener, router).with_graceful_shutdown(signal);
        let drained = async {
            // An error means that the server ended by itself, and the other branch says how.
            if ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(DRAIN_TIMEOUT).await;
        };
        let result = tokio::select! {
            result = serve.into_future() => result.map_err(ServeError::Serve),
            () = drained => Ok(()),
        };
        let closed = tokio::task::spawn_blocking(move || app.store.close()).await;
        closed.expect("closing does not panic, and nothing cancels it");
        result
    }
}

/// [`Server::bind`] and [`Server::run`] in one.
///
/// # Errors
/// As of both.
pub async fn serve(
    options: Options,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    Server::bind(options).await?.run(shutdown).await
}

fn open(options: &Options) -> Result<App, ServeError> {
    let metrics = Arc::new(Metrics::default());
    let inflated_bytes_max = options.push_inflated_bytes_max;
    let store = Store::open(options.store(), Arc::clone(&metrics), &mut |record, stacks| {
        let body = receive::Body::from_record(record, inflated_bytes_max);
        let request = body.and_then(|body| body.request());
        let decoded = request.and_then(|request| {
            let profiles = receive::profiles(&request, stacks, inflated_bytes_max)?;
            Ok((receive::batch_id(&request), profiles))
        });
        decoded.map_err(|error| error.to_string())
    });
    let store = store.map_err(|source| ServeError::Open {
        data_dir: options.data_dir.clone(),
        source: Box::new(source),
    })?;
    let limits = PushLimits { body_bytes_max: options.push_bytes_max, inflated_bytes_max };
    Ok(App::new(store, metrics, limits, options.retention, options.allowed_hosts.clone()))
}
