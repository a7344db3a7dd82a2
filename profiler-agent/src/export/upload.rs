//! One destination: sends its queue by HTTP, tries again what may go through later, drops what never will.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use profiler_backend::Token;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER},
    redirect::Policy,
};
use serde::Deserialize;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::{info, warn};

use super::queue::{Batch, Next, Outcome, Queue};

/// A backend that does not answer a connection for so long is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// One request, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Wait after a first failure, and the least one that a server may ask for; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Server errors in a row after which the batch is what is wrong: it must not block those behind it.
const SERVER_ERRORS_MAX: u32 = 5;
/// Bytes of an answer that are read. What the contract answers is shorter.
const ANSWER_BYTES_MAX: usize = 4 << 10;
/// Characters of an error answer that are shown.
const ANSWER_CHARS_MAX: usize = 300;

/// Where profiles go: `[KIND+]URL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    /// Base address of the backend.
    url: Url,
    /// On this machine: never reached through a proxy.
    is_local: bool,
    /// What it wants to be brought.
    token: Option<Token>,
}

impl Destination {
    /// The backend at an address of this machine.
    pub(crate) fn local(address: SocketAddr, token: Option<Token>) -> Self {
        let url = Url::parse(&format!("http://{address}/")).expect("a socket address makes a URL");
        Self { url, is_local: true, token }
    }

    /// The same backend, which is brought a token.
    pub(crate) fn with_token(self, token: Option<Token>) -> Self {
        Self { token, ..self }
    }

    /// What it is brought.
    pub(crate) fn token(&self) -> Option<&Token> {
        self.token.as_ref()
    }

    /// Whether a token goes over a network as it is.
    pub(crate) fn tells_token_in_clear(&self) -> bool {
        self.token.is_some() && self.url.scheme() == "http" && !self.is_local
    }

    /// What metrics and messages call it: never with a password, nor with a query, which may hold a token.
    pub(crate) fn name(&self) -> String {
        let mut url = self.url.clone();
        // Both fail only for URLs that cannot have credentials.
        let _ = url.set_password(None);
        let _ = url.set_username("");
        url.set_query(None);
        url.set_fragment(None);
        url.to_string()
    }

    /// A client that may be used for this destination. It follows no redirect: where one leads, nobody has asked for
    /// profiles, and a login page answers 200. A proxy from the environment is used for other machines only.
    pub(crate) fn client(&self) -> reqwest::Result<Client> {
        let client = Client::builder().connect_timeout(CONNECT_TIMEOUT).redirect(Policy::none());
        if self.is_local { client.no_proxy() } else { client }.build()
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
        // A `+` behind the scheme belongs to the URL, maybe to a password in it.
        let scheme = text.split_once("://").map_or("", |(scheme, _)| scheme);
        let url = match scheme.split_once('+') {
            Some(("profiler", _)) => text.strip_prefix("profiler+").unwrap_or(text),
            Some((kind, _)) => return Err(format!("backend kind {kind:?} is not known; {accepted}")),
            None => text,
        };
        let url = Url::parse(url).map_err(|error| format!("{error}; {accepted}"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(format!("not an http or https address; {accepted}"));
        }
        let is_local = url.host_str().is_some_and(is_loopback);
        Ok(Self { url, is_local, token: None })
    }
}

/// `host` as a URL has it: an IPv6 address in brackets.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let is_name = matches!(host.trim_end_matches('.'), "localhost");
    is_name || address.parse().is_ok_and(|address: IpAddr| address.is_loopback())
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
    /// The server broke: over this batch, if it does so again and again.
    Broke(String),
}

/// The answer to a push. Source: crate profiler-backend, `POST /api/v1/push`.
#[derive(Deserialize)]
struct Stored {
    /// Profiles stored by this request; 0 when the batch was stored before.
    #[serde(rename = "stored")]
    _profiles: u64,
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
        token: destination.token,
        counts,
        stop,
        backoff_min: BACKOFF_MIN,
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
    token: Option<Token>,
    counts: Arc<UploadCounts>,
    stop: watch::Receiver<Option<Instant>>,
    /// [`BACKOFF_MIN`], but in tests.
    backoff_min: Duration,
    failing: bool,
}

impl Sender {
    async fn deliver(&mut self, batch: &Batch) -> Outcome {
        let mut backoff = self.backoff_min;
        let mut server_errors = 0;
        loop {
            let Some(answer) = self.before_deadline(self.try_once(batch)).await else {
                return Outcome::Shutdown;
            };
            server_errors = if matches!(answer, Answer::Broke(_)) { server_errors + 1 } else { 0 };
            let (why, asked) = match answer {
                Answer::Accepted => {
                    self.recovered();
                    self.counts.bytes.fetch_add(batch.body.len() as u64, Relaxed);
                    return Outcome::Delivered;
                }
                Answer::Refused(why) => {
                    self.refused(batch, &why);
                    return Outcome::Refused;
                }
                Answer::Broke(why) if server_errors >= SERVER_ERRORS_MAX => {
                    self.refused(batch, &format!("{why} ({server_errors} times in a row)"));
                    return Outcome::Refused;
                }
                Answer::Broke(why) => (why, None),
                Answer::Later(why, asked) => (why, asked),
            };
            self.failed(&why);
            self.counts.retries.fetch_add(1, Relaxed);
            let wait = asked.unwrap_or(backoff).clamp(self.backoff_min, BACKOFF_MAX);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            if !self.wait(wait).await {
                return Outcome::Shutdown;
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
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.text()),
            None => request,
        };
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Answer::Later(causes(&error.without_url()), None),
        };
        let status = response.status();
        let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        match body(response).await {
            Ok(body) => answer(status, asked.map(Duration::from_secs), &body),
            // Stored or not: a batch that is sent twice is stored once.
            Err(error) if status.is_success() => Answer::Later(causes(&error.without_url()), None),
            Err(_) => answer(status, asked.map(Duration::from_secs), &[]),
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

    fn refused(&self, batch: &Batch, why: &str) {
        warn!(destination = self.name, events = ?batch.events, why, "batch refused and dropped");
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

/// The beginning of an answer's body.
async fn body(mut response: Response) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while body.len() < ANSWER_BYTES_MAX
        && let Some(chunk) = response.chunk().await?
    {
        body.extend_from_slice(&chunk);
    }
    body.truncate(ANSWER_BYTES_MAX);
    Ok(body)
}

/// What an answer means. Only one that says what was stored is an acknowledgement: anything may answer 200.
fn answer(status: StatusCode, asked: Option<Duration>, body: &[u8]) -> Answer {
    if status.is_success() && serde_json::from_slice::<Stored>(body).is_ok() {
        return Answer::Accepted;
    }
    let text = String::from_utf8_lossy(body);
    let text: String = text.lines().next().unwrap_or_default().chars().take(ANSWER_CHARS_MAX).collect();
    let why = format!("{status}: {text}");
    match status {
        StatusCode::REQUEST_TIMEOUT
        | StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Answer::Later(why, asked),
        status if status.is_server_error() => Answer::Broke(why),
        status if status.is_success() => Answer::Refused(format!("{why} (not a backend's answer to a push)")),
        _ => Answer::Refused(why),
    }
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
    use crate::ledger::PerType;

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
    fn a_plus_in_a_password_is_no_kind() {
        check(
            "https://user:se+cret@h/?next=http://x",
            Ok("https://user:se+cret@h/api/v1/push?next=http://x"),
        );
    }

    #[test]
    fn neither_password_nor_token_is_ever_shown() {
        let destination: Destination = "http://user:secret@h/p?token=secret#secret".parse().expect("a URL");
        assert_eq!(destination.name(), "http://h/p");
    }

    #[test]
    fn destinations_on_this_machine_are_known_as_such() {
        let is_local = |url: &str| url.parse::<Destination>().expect("a URL").is_local;
        for url in
            ["http://127.0.0.1:1/", "http://127.8.0.1/", "http://[::1]:7700/", "http://LocalHost:7700/"]
        {
            assert!(is_local(url), "{url}");
        }
        for url in ["http://10.0.0.1/", "http://localhost.evil.example/", "http://127.0.0.1.example/"] {
            assert!(!is_local(url), "{url}");
        }
        let local = |token| Destination::local("10.0.0.1:7700".parse().expect("an address"), token);
        assert!(local(None).is_local);
    }

    /// What the uploads of one batch come to when the server gives these answers, the last one for ever; and how many
    /// requests it took.
    fn outcome(answers: &'static [&'static str]) -> (Outcome, usize) {
        // An error means that another test has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("a bound socket has an address");
            let requests = tokio::spawn(serve(listener, answers));
            let destination = Destination::local(address, None);
            let (_stop, stop) = watch::channel(None);
            let mut sender = Sender {
                client: destination.client().expect("a client"),
                url: destination.push_url(),
                name: destination.name(),
                token: None,
                counts: Arc::default(),
                stop,
                backoff_min: Duration::from_millis(1),
                failing: false,
            };
            let outcome =
                sender.deliver(&Batch { body: vec![0; 8].into(), events: PerType::from_fn(|_| 1) }).await;
            requests.abort();
            (outcome, sender.counts.retries.load(Relaxed) as usize + 1)
        })
    }

    /// Answers requests, one a connection.
    async fn serve(listener: tokio::net::TcpListener, answers: &[&str]) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let last = answers.last().expect("an answer");
        for answer in answers.iter().chain(std::iter::repeat(last)) {
            let (mut connection, _) = listener.accept().await.expect("a connection");
            let mut request = [0; 4096];
            // The request's end is not looked for: its body is 8 bytes.
            let _ = connection.read(&mut request).await.expect("a request");
            let (status, body) = answer.split_once('|').unwrap_or((answer, ""));
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            connection.write_all(answer.as_bytes()).await.expect("an answer");
        }
    }

    #[test]
    fn only_an_answer_that_says_what_was_stored_is_an_acknowledgement() {
        assert_eq!(outcome(&["200 OK|{\"stored\":2}"]), (Outcome::Delivered, 1));
        assert_eq!(outcome(&["200 OK|{\"stored\":0,\"duplicate\":true}"]), (Outcome::Delivered, 1));
        assert_eq!(outcome(&["200 OK|<html>Please log in</html>"]), (Outcome::Refused, 1));
        assert_eq!(outcome(&["204 No Content"]), (Outcome::Refused, 1));
    }

    #[test]
    fn a_redirect_is_a_refusal_and_is_not_followed() {
        const LOGIN: &str = "302 Found\r\nLocation: /login";
        assert_eq!(outcome(&[LOGIN, "200 OK|{\"stored\":1}"]), (Outcome::Refused, 1));
    }

    #[test]
    fn a_batch_that_always_breaks_the_server_is_dropped_after_some_tries() {
        assert_eq!(
            outcome(&["500 Internal Server Error|oops"]),
            (Outcome::Refused, SERVER_ERRORS_MAX as usize)
        );
    }

    #[test]
    fn a_server_that_is_away_is_tried_again() {
        const AWAY: &str = "503 Service Unavailable\r\nRetry-After: 0";
        assert_eq!(outcome(&[AWAY, AWAY, "200 OK|{\"stored\":1}"]), (Outcome::Delivered, 3));
    }
}
