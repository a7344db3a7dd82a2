//! One destination: sends its queue by HTTP, tries again what may go through later, drops what never will.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use reqwest::{
    Client, StatusCode, Url,
    header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::{info, warn};

use super::queue::{Batch, Next, Outcome, Queue};

/// One request, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Wait after a first failure; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Bytes of an error answer that are shown.
const ANSWER_CHARS_MAX: usize = 300;

/// Where profiles go: `[KIND+]URL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    /// Base address of the backend.
    url: Url,
}

impl Destination {
    /// The backend at an address of this machine.
    pub(crate) fn local(address: std::net::SocketAddr) -> Self {
        let url = Url::parse(&format!("http://{address}/")).expect("a socket address makes a URL");
        Self { url }
    }

    /// What metrics and messages call it: never with a password.
    pub(crate) fn name(&self) -> String {
        let mut url = self.url.clone();
        // Both fail only for URLs that cannot have credentials.
        let _ = url.set_password(None);
        let _ = url.set_username("");
        url.to_string()
    }

    fn push_url(&self) -> Url {
        let mut url = self.url.clone();
        let path = format!("{}/api/v1/push", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url
    }
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let accepted = "accepted: [profiler+]http://HOST[:PORT][/PATH] or https://…";
        let url = match text.split_once('+') {
            Some(("profiler", url)) => url,
            Some((kind, url)) if url.contains("://") => {
                return Err(format!("backend kind {kind:?} is not known; {accepted}"));
            }
            _ => text,
        };
        let url = Url::parse(url).map_err(|error| format!("{error}; {accepted}"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(format!("not an http or https address; {accepted}"));
        }
        Ok(Self { url })
    }
}

/// What the sender of one destination shares with metrics.
#[derive(Debug, Default)]
pub(crate) struct UploadCounts {
    /// Requests that were tried again.
    pub(crate) retries: AtomicU64,
    /// Bytes of bodies that were acknowledged.
    pub(crate) bytes: AtomicU64,
}

/// How one try ended.
enum Answer {
    Accepted,
    /// Never to be sent again, and why.
    Refused(String),
    /// To be sent again, after the time the server asked for.
    Later(String, Option<Duration>),
}

/// Sends the queue of one destination until it is closed and empty, or until the deadline that `stop` announces.
pub(crate) async fn run(
    client: Client,
    destination: Destination,
    queue: Arc<Queue>,
    counts: Arc<UploadCounts>,
    stop: watch::Receiver<Option<Instant>>,
) {
    let mut sender = Sender {
        client,
        url: destination.push_url(),
        name: destination.name(),
        counts,
        stop,
        failing: false,
    };
    while let Next::Send(batch) = queue.next().await {
        let outcome = sender.deliver(&batch).await;
        queue.finish(outcome);
    }
}

struct Sender {
    client: Client,
    url: Url,
    name: String,
    counts: Arc<UploadCounts>,
    stop: watch::Receiver<Option<Instant>>,
    failing: bool,
}

impl Sender {
    async fn deliver(&mut self, batch: &Batch) -> Outcome {
        let mut backoff = BACKOFF_MIN;
        loop {
            let Some(answer) = self.before_deadline(self.try_once(batch)).await else {
                return Outcome::Shutdown;
            };
            match answer {
                Answer::Accepted => {
                    self.recovered();
                    self.counts.bytes.fetch_add(batch.body.len() as u64, Relaxed);
                    return Outcome::Delivered;
                }
                Answer::Refused(why) => {
                    warn!(destination = self.name, events = batch.events, %why, "batch refused and dropped");
                    return Outcome::Refused;
                }
                Answer::Later(why, asked) => {
                    self.failed(&why);
                    self.counts.retries.fetch_add(1, Relaxed);
                    let wait = asked.unwrap_or(backoff).min(BACKOFF_MAX);
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                    if !self.wait(wait).await {
                        return Outcome::Shutdown;
                    }
                }
            }
        }
    }

    async fn try_once(&self, batch: &Batch) -> Answer {
        let request = self
            .client
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(CONTENT_ENCODING, "zstd")
            .timeout(REQUEST_TIMEOUT)
            .body(batch.body.clone());
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Answer::Later(causes(&error), None),
        };
        let status = response.status();
        if status.is_success() {
            return Answer::Accepted;
        }
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let text = response.text().await.unwrap_or_default();
        let text: String = text.trim().chars().take(ANSWER_CHARS_MAX).collect();
        let why = format!("{status}: {text}");
        if may_go_through_later(status) {
            Answer::Later(why, asked.map(Duration::from_secs))
        } else {
            Answer::Refused(why)
        }
    }

    /// The result, unless the agent stops first.
    async fn before_deadline<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut stop = self.stop.clone();
        let deadline = async {
            // An error means the agent is gone without a word: then there is no time left either.
            let Ok(at) = stop.wait_for(Option::is_some).await.map(|at| *at) else { return };
            sleep_until(at.unwrap_or_else(Instant::now)).await;
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = deadline => None,
        }
    }

    /// Waits, at most until the deadline. `false` when there is no time for another try. A stop cuts the wait short,
    /// so that the last windows get their try at once.
    async fn wait(&mut self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let already_stopping = self.stop.borrow().is_some();
        if !already_stopping {
            let stopping = self.stop.wait_for(Option::is_some);
            let _ = timeout_at(until, stopping).await;
            return true;
        }
        let Some(deadline) = *self.stop.borrow() else { return true };
        sleep_until(until.min(deadline)).await;
        until < deadline
    }

    fn failed(&mut self, why: &str) {
        if !self.failing {
            self.failing = true;
            warn!(destination = self.name, why, "upload failed; windows wait in memory and are tried again");
        }
    }

    fn recovered(&mut self) {
        if self.failing {
            self.failing = false;
            info!(destination = self.name, "uploads go through again");
        }
    }
}

fn may_go_through_later(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
}

/// The error and its causes on one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Result<&str, &str>) {
        match (text.parse::<Destination>(), expect) {
            (Ok(destination), Ok(url)) => assert_eq!(destination.push_url().as_str(), url),
            (Err(error), Err(part)) => assert!(error.contains(part) && error.contains("accepted"), "{error}"),
            (found, expect) => panic!("{text}: {found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn destinations_are_urls_with_a_kind() {
        check("http://h:7700", Ok("http://h:7700/api/v1/push"));
        check("profiler+https://h/base/", Ok("https://h/base/api/v1/push"));
        check("kafka+http://h", Err("kafka"));
        check("ftp://h", Err("not an http"));
        check("nonsense", Err("relative URL"));
    }

    #[test]
    fn a_password_is_never_shown() {
        let destination: Destination = "http://user:secret@h/".parse().expect("a URL");
        assert_eq!(destination.name(), "http://h/");
    }
}
