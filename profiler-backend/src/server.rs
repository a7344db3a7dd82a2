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
    http::{self, Access, App, PushLimits},
    metrics::Metrics,
    receive,
    store::{Store, StoreOptions},
    time::parse_duration_ms,
    token::Token,
};

/// Time open requests have to finish once the backend is asked to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to write what is in memory to parts after that. Together they are less than what an agent waits for its own.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(4);
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
    /// What requests must bring, but for `/healthz` and `/readyz`. Default none, which is for loopback addresses only.
    pub token: Option<Token>,
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
            token: None,
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
    /// Whoever reaches the address could read and write profiles. Nothing was opened.
    #[error(
        "listen: {listen} is not accepted without a token; accepted: a loopback address, or a token file"
    )]
    Unprotected {
        /// [`Options::listen`].
        listen: SocketAddr,
    },
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
    /// When the data directory is in use or broken, the address taken, or open to a network without a token.
    pub async fn bind(options: Options) -> Result<Self, ServeError> {
        if options.token.is_none() && !options.listen.ip().is_loopback() {
            return Err(ServeError::Unprotected { listen: options.listen });
        }
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
    /// memory to parts. A disk that is slow at it is not waited for: all that was acknowledged is in the log, which the
    /// next start reads.
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
        close(move || app.store.close(), CLOSE_TIMEOUT).await;
        result
    }
}

/// Runs `work`, on a thread of its own: those of the runtime may all be busy with queries. What takes longer than `timeout`
/// goes on by itself, and ends with the process.
async fn close(work: impl FnOnce() + Send + 'static, timeout: Duration) {
    let (done, is_done) = tokio::sync::oneshot::channel();
    let work = move || {
        work();
        // Nobody may wait for it any more.
        let _ = done.send(());
    };
    let thread = std::thread::Builder::new().name("store-close".to_owned()).spawn(work);
    thread.expect("a process that runs can start a thread");
    if tokio::time::timeout(timeout, is_done).await.is_err() {
        tracing::warn!(
            "what is in memory was not written to parts within {timeout:?}: the next start reads it from the log"
        );
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
    let access = Access { hosts: options.allowed_hosts.clone(), token: options.token.clone() };
    Ok(App::new(store, metrics, limits, options.retention, access))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_does_not_close_is_not_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let (told, is_told) = std::sync::mpsc::channel();
        let work = move || {
            // An error means that it was released.
            let _ = hangs.recv();
            told.send(()).expect("the test waits for it");
        };
        runtime.block_on(close(work, Duration::from_millis(10)));
        assert!(is_told.try_recv().is_err(), "it hangs still");
        drop(release);
        is_told.recv().expect("it ends by itself");
        runtime.block_on(close(|| {}, Duration::from_secs(60)));
    }
}
