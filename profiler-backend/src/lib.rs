//! A durable store for profiles with a query API and a flame graph UI, in one process and on one machine.
//!
//! Takes pushes of pprof profiles with their labels (`POST /api/v1/push`, see [`profiler_pprof::push`]). Gives them
//! back over HTTP, selected by labels and time: as a flame graph (`/api/v1/merge`), as totals over time
//! (`/api/v1/series`), as pprof for `go tool pprof`, and as a page for people. A push that was acknowledged survives
//! the death of the process.
//!
//! It is not a cluster: what outgrows one machine belongs in a backend made for that. It does not symbolize: a frame
//! without a name stays `binary+0xADDR`.
//!
//! ```no_run
//! # async fn example() -> Result<(), profiler_backend::ServeError> {
//! let options = profiler_backend::Options::new("/var/lib/profiler");
//! let server = profiler_backend::Server::bind(options).await?;
//! println!("http://{}/", server.local_addr());
//! server.run(std::future::pending()).await
//! # }
//! ```

mod flamegraph;
mod http;
mod metrics;
mod model;
mod private;
mod query;
mod receive;
mod selector;
mod server;
mod stack;
mod store;
mod time;
mod token;
mod ui;
mod wal;

pub use http::is_allowed_host;
pub use server::{Options, ServeError, Server, parse_retention, serve};
pub use token::{Token, TokenError};

/// An error with all its sources on one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
