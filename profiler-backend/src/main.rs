//! The backend as a program of its own.

use std::{
    fmt,
    io::IsTerminal,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use profiler_backend::{Options, ServeError, Server, Token, parse_retention};
use tokio::signal::unix::{SignalKind, signal};

/// A flag or variable was not accepted: nothing was started.
const EXIT_USAGE: u8 = 2;

/// Stores profiles and shows them: API and flame graphs on one port.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Address of API and UI. Elsewhere than on loopback it needs --token-file.
    #[arg(long, env = "PROFILER_BACKEND_LISTEN", default_value = "127.0.0.1:7700")]
    listen: SocketAddr,
    /// File with the token that requests must bring, but for /healthz and /readyz: `Authorization: Bearer TOKEN`, or
    /// as the password of any user. Not readable by others; read at the start.
    #[arg(long, env = "PROFILER_BACKEND_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Directory of the store.
    #[arg(long, env = "PROFILER_BACKEND_DATA_DIR", default_value = "/var/lib/profiler")]
    data_dir: PathBuf,
    /// How long profiles are kept: 36h, 7d, 4w; at least 1h.
    #[arg(long, env = "PROFILER_BACKEND_RETENTION", default_value = "7d", value_parser = retention)]
    retention: Duration,
    /// A name clients call this backend by, besides localhost and addresses; repeatable.
    #[arg(
        long = "allowed-host",
        env = "PROFILER_BACKEND_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    allowed_hosts: Vec<String>,
}

fn retention(text: &str) -> Result<Duration, String> {
    parse_retention(text).ok_or_else(|| "expected a duration of at least 1h, such as 36h or 7d".to_owned())
}

/// A value that is not accepted: one line that names it.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .with_env_var("PROFILER_LOG")
        .from_env_lossy();
    let color = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(color).init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let is_refused = matches!(error.downcast_ref(), Some(ServeError::Unprotected { .. }));
            if is_refused || error.is::<Refused>() {
                eprintln!("profiler-backend: {error:#}");
                return ExitCode::from(EXIT_USAGE);
            }
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn read_token(file: &Path) -> Result<Token, Refused> {
    Token::read(file).map_err(|error| {
        let (file, accepted) = (file.display(), Token::ACCEPTED);
        Refused(format!("token-file: \"{file}\" is not accepted; {error}; accepted: {accepted}"))
    })
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { listen, token_file, data_dir, retention, allowed_hosts } = arguments;
    let token = token_file.as_deref().map(read_token).transpose()?;
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
        let options = Options { listen, token, retention, allowed_hosts, ..Options::new(data_dir) };
        let server = Server::bind(options).await?;
        tracing::info!("listening on http://{}/", server.local_addr());
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        Ok(server.run(shutdown).await?)
    })
}
