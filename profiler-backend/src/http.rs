//! The HTTP door: pushes, queries, the UI, health and metrics.

use std::{
    collections::HashMap,
    io::Write,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::{
    describe,
    metrics::Metrics,
    query::{self, MergeFormat, Params, QueryError},
    receive::{self, Compression, ReceiveError},
    store::{AppendError, Appended, Snapshot, Store},
    token::Token,
    ui,
};

/// Bodies held at once; more are deferred.
const PUSHES_MAX: usize = 32;
/// Bodies decoded at once: each may take the inflated bound several times over.
const PUSHES_DECODED_MAX: usize = 4;
/// Queries computed at once, and those that wait for their turn.
const QUERIES_MAX: usize = 4;
const QUERIES_WAITING_MAX: usize = 64;
/// Time a sender has for its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers below this are not worth compressing, in bytes.
const GZIP_BYTES_MIN: usize = 1024;
/// Windows that start further ahead than this come from a clock nobody should trust.
const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// Browsers ask for a password; any name goes with it. Source: RFC 9110 §11.6.1, RFC 7617.
const CHALLENGE: &str = "Basic realm=\"profiler\", charset=\"UTF-8\", Bearer realm=\"profiler\"";

/// Bounds of a push, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PushLimits {
    /// As sent.
    pub(crate) body_bytes_max: usize,
    /// After inflating, and again for all its profiles together.
    pub(crate) inflated_bytes_max: usize,
}

/// Who may ask.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    /// Names, besides `localhost` and addresses, by which this backend may be called.
    pub(crate) hosts: Vec<String>,
    /// What requests must bring, but for health.
    pub(crate) token: Option<Token>,
}

impl Access {
    fn has_token(&self, request: &Request) -> bool {
        let Some(token) = &self.token else { return true };
        let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        header.is_some_and(|value| token.is_in(value))
    }
}

/// What requests share.
pub(crate) struct App {
    pub(crate) store: Store,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limits: PushLimits,
    pub(crate) retention: Duration,
    pub(crate) access: Access,
    pushes: Arc<Semaphore>,
    pushes_decoded: Arc<Semaphore>,
    queries: Arc<Semaphore>,
    queries_waiting: Arc<Semaphore>,
}

impl App {
    pub(crate) fn new(
        store: Store,
        metrics: Arc<Metrics>,
        limits: PushLimits,
        retention: Duration,
        access: Access,
    ) -> Self {
        Self {
            store,
            metrics,
            limits,
            retention,
            access,
            pushes: Arc::new(Semaphore::new(PUSHES_MAX)),
            pushes_decoded: Arc::new(Semaphore::new(PUSHES_DECODED_MAX)),
            queries: Arc::new(Semaphore::new(QUERIES_MAX)),
            queries_waiting: Arc::new(Semaphore::new(QUERIES_MAX + QUERIES_WAITING_MAX)),
        }
    }
}

pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/api/v1/push", post(push))
        .route("/api/v1/types", get(types))
        .route("/api/v1/labels", get(labels))
        .route("/api/v1/labels/{name}/values", get(label_values))
        .route("/api/v1/series", get(series))
        .route("/api/v1/merge", get(merge))
        .route("/api/v1/binaries", get(binaries))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async || "ready\n"))
        .route("/metrics", get(metrics))
        .merge(ui::routes())
        .fallback(async |uri: Uri| not_found(&uri))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

/// Refuses requests for a host that is not this one and those without the token, and sets headers that every answer has.
///
/// A page elsewhere can point a name of its own at 127.0.0.1 and would then read profiles with the browser's blessing
/// (DNS rebinding). It cannot do so with an address, nor with `localhost`.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let is_health = matches!(request.uri().path(), "/healthz" | "/readyz");
    let mut response = if !is_allowed_host(host, &app.access.hosts) {
        app.metrics.hosts_refused.add(1);
        let message = format!("host {host:?} is not served here: call it by address or allow the name\n");
        (StatusCode::FORBIDDEN, message).into_response()
    } else if !is_health && !app.access.has_token(&request) {
        app.metrics.tokens_refused.add(1);
        let message = "bring the token of this backend: Authorization: Bearer TOKEN, or as a password\n";
        (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, CHALLENGE)], message).into_response()
    } else {
        next.run(request).await
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whether a server may answer a request whose `Host` header is `host`: an IP address, `localhost`, or a name in
/// `allowed`; a port is left out of account. Other names a web page could make up and point here (DNS rebinding).
pub fn is_allowed_host(host: &str, allowed: &[String]) -> bool {
    let name = match host.rsplit_once(':') {
        // In `[::1]` the last colon is part of the address.
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let name = name.strip_suffix('.').unwrap_or(name);
    address.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
}

fn not_found(uri: &Uri) -> Response {
    error(StatusCode::NOT_FOUND, &format!("no such path: {}", uri.path()))
}

/// An error of the query API.
fn error(status: StatusCode, message: &str) -> Response {
    (status, json_headers(), serde_json::json!({ "error": message }).to_string()).into_response()
}

fn json_headers() -> [(header::HeaderName, &'static str); 2] {
    // Answers change with each push.
    [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")]
}

fn retry_after(status: StatusCode, seconds: &'static str, message: String) -> Response {
    (status, [(header::RETRY_AFTER, seconds)], message + "\n").into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let text = app.metrics.render(&app.store.gauges());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

/// Why a push was not stored, as its sender is told.
enum PushRefusal {
    /// Never to be sent again.
    Invalid(StatusCode, String),
    /// To be tried again after some seconds.
    Deferred(&'static str, String),
}

impl From<ReceiveError> for PushRefusal {
    fn from(error: ReceiveError) -> Self {
        let status = match error {
            ReceiveError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::Invalid(status, error.to_string())
    }
}

impl From<AppendError> for PushRefusal {
    fn from(error: AppendError) -> Self {
        let seconds = match error {
            AppendError::Underway => "1",
            AppendError::MemoryFull | AppendError::Closed | AppendError::Log(_) => "10",
        };
        Self::Deferred(seconds, error.to_string())
    }
}

/// What was stored.
struct Stored {
    profiles: usize,
    outcome: Appended,
}

async fn push(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    match receive_push(&app, &headers, body).await {
        Ok(Stored { outcome: Appended::Duplicate, .. }) => {
            app.metrics.pushes_duplicate.add(1);
            (json_headers(), r#"{"stored":0,"duplicate":true}"#).into_response()
        }
        Ok(Stored { profiles, outcome: Appended::Stored }) => {
            app.metrics.pushes_stored.add(1);
            (json_headers(), format!(r#"{{"stored":{profiles}}}"#)).into_response()
        }
        Err(PushRefusal::Invalid(status, message)) => {
            app.metrics.pushes_invalid.add(1);
            // One line, whatever a name in the push holds.
            let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            (status, line + "\n").into_response()
        }
        Err(PushRefusal::Deferred(seconds, message)) => {
            app.metrics.pushes_deferred.add(1);
            retry_after(StatusCode::SERVICE_UNAVAILABLE, seconds, message)
        }
    }
}

async fn receive_push(app: &Arc<App>, headers: &HeaderMap, body: Body) -> Result<Stored, PushRefusal> {
    let compression = content(headers)?;
    let busy = |_| PushRefusal::Deferred("1", "too many pushes at once".to_owned());
    let held = Arc::clone(&app.pushes).try_acquire_owned().map_err(busy)?;
    let bytes = read_body(body, app.limits.body_bytes_max).await?;
    let decoding = Arc::clone(&app.pushes_decoded).acquire_owned().await;
    let app = Arc::clone(app);
    let stored = tokio::task::spawn_blocking(move || {
        // Moved here: a sender that hangs up does not stop this work, nor lift the bounds on it.
        let (_held, decoding) = (held, decoding);
        let decoded = decode_push(&app, &bytes, compression)?;
        drop(decoding);
        decoded.store(&app.store)
    });
    stored.await.unwrap_or_else(|_| Err(PushRefusal::Deferred("10", "storing failed inside".to_owned())))
}

fn content(headers: &HeaderMap) -> Result<Compression, PushRefusal> {
    let unsupported = |message: String| PushRefusal::Invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?")).unwrap_or("");
    let media_type = text(header::CONTENT_TYPE).split(';').next().unwrap_or("").trim();
    if !["application/x-protobuf", "application/protobuf"].contains(&media_type) {
        let message = format!("Content-Type is {media_type:?}, not application/x-protobuf");
        return Err(unsupported(message));
    }
    let encoding = text(header::CONTENT_ENCODING);
    Compression::from_header(encoding)
        .ok_or_else(|| unsupported(format!("Content-Encoding is {encoding:?}, not identity, gzip or zstd")))
}

async fn read_body(body: Body, bytes_max: usize) -> Result<axum::body::Bytes, PushRefusal> {
    let read = tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, bytes_max));
    let read = read.await.map_err(|_| {
        let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
        PushRefusal::Deferred("10", message)
    })?;
    read.map_err(|error| match std::error::Error::source(&error) {
        Some(source) if source.is::<http_body_util::LengthLimitError>() => {
            let message = format!("the body is larger than {bytes_max} bytes");
            PushRefusal::Invalid(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
        _ => PushRefusal::Invalid(StatusCode::BAD_REQUEST, format!("read the body: {}", describe(&error))),
    })
}

/// A push that is right.
enum Decoded {
    Duplicate,
    New { batch: crate::model::BatchId, record: Vec<u8>, profiles: Vec<crate::model::Profile> },
}

fn decode_push(app: &App, bytes: &[u8], compression: Compression) -> Result<Decoded, PushRefusal> {
    let inflated_bytes_max = app.limits.inflated_bytes_max;
    let body = receive::Body { bytes, compression, inflated_bytes_max };
    let request = body.request()?;
    let batch = receive::batch_id(&request);
    if app.store.has_batch(batch) {
        return Ok(Decoded::Duplicate);
    }
    for (index, series) in request.series.iter().enumerate() {
        check_window(series.start_unix_ns, app.retention).map_err(|problem| {
            PushRefusal::Invalid(StatusCode::BAD_REQUEST, format!("series {index}: {problem}"))
        })?;
    }
    let profiles = receive::profiles(&request, app.store.stacks(), inflated_bytes_max)?;
    Ok(Decoded::New { batch, record: body.to_record(), profiles })
}

/// Windows outside what is kept would be deleted at once, or stay for ever.
fn check_window(start_unix_ns: i64, retention: Duration) -> Result<(), String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = Duration::from_nanos(start_unix_ns.unsigned_abs());
    if start + retention < now {
        return Err(format!(
            "start_unix_ns {start_unix_ns} is older than the {} s kept",
            retention.as_secs()
        ));
    }
    if start > now + AHEAD_MAX {
        let ahead = AHEAD_MAX.as_secs();
        return Err(format!("start_unix_ns {start_unix_ns} is more than {ahead} s ahead: check the clocks"));
    }
    Ok(())
}

impl Decoded {
    fn store(self, store: &Store) -> Result<Stored, PushRefusal> {
        match self {
            Self::Duplicate => Ok(Stored { profiles: 0, outcome: Appended::Duplicate }),
            Self::New { batch, record, profiles } => {
                let count = profiles.len();
                let outcome = store.append(batch, record, profiles)?;
                Ok(Stored { profiles: count, outcome })
            }
        }
    }
}

async fn types(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    json_query(&app, &uri, &headers, query::profile_types).await
}

async fn labels(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    json_query(&app, &uri, &headers, query::label_names).await
}

async fn label_values(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    json_query(&app, &uri, &headers, move |snapshot, params| query::label_values(snapshot, params, &name))
        .await
}

async fn series(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    json_query(&app, &uri, &headers, query::series).await
}

async fn binaries(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    json_query(&app, &uri, &headers, query::binaries).await
}

async fn merge(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Response {
    let gzip = accepts_gzip(&headers);
    run_query(&app, &uri, move |snapshot, params| match params.format()? {
        MergeFormat::Json => Ok(json_answer(&query::merge(snapshot, params)?, gzip)),
        MergeFormat::Pprof => {
            let name = format!("attachment; filename=\"{}.pb.gz\"", file_name(params.profile_type()));
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
                (header::CONTENT_DISPOSITION, name),
                (header::CACHE_CONTROL, "no-store".to_owned()),
            ];
            Ok((headers, query::pprof(snapshot, params)?).into_response())
        }
    })
    .await
}

/// Keeps what every file system and header takes.
fn file_name(profile_type: &str) -> String {
    let kept = profile_type.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_');
    kept.take(64).collect()
}

async fn json_query<T: Serialize>(
    app: &Arc<App>,
    uri: &Uri,
    headers: &HeaderMap,
    compute: impl FnOnce(&Snapshot, &Params) -> Result<T, QueryError> + Send + 'static,
) -> Response {
    let gzip = accepts_gzip(headers);
    run_query(app, uri, move |snapshot, params| Ok(json_answer(&compute(snapshot, params)?, gzip))).await
}

/// Answers a query on a blocking thread, when its turn comes.
async fn run_query(
    app: &Arc<App>,
    uri: &Uri,
    compute: impl FnOnce(&Snapshot, &Params) -> Result<Response, QueryError> + Send + 'static,
) -> Response {
    let params = match Query::<HashMap<String, String>>::try_from_uri(uri) {
        Ok(Query(values)) => Params::new(values, now_ms()),
        Err(rejection) => {
            app.metrics.queries_refused.add(1);
            return error(StatusCode::BAD_REQUEST, &rejection.body_text());
        }
    };
    let Ok(_waiting) = Arc::clone(&app.queries_waiting).try_acquire_owned() else {
        app.metrics.queries_refused.add(1);
        return retry_after(StatusCode::TOO_MANY_REQUESTS, "1", "too many queries at once".to_owned());
    };
    let turn = Arc::clone(&app.queries).acquire_owned().await;
    let snapshot = app.store.snapshot();
    let computed = tokio::task::spawn_blocking(move || {
        // Moved here: a client that hangs up does not stop this work, nor lift the bound on it.
        let _turn = turn;
        compute(&snapshot, &params)
    });
    match computed.await {
        Ok(Ok(response)) => {
            app.metrics.queries.add(1);
            response
        }
        Ok(Err(refused)) => {
            app.metrics.queries_refused.add(1);
            error(StatusCode::BAD_REQUEST, &refused.to_string())
        }
        Err(_) => {
            app.metrics.queries_failed.add(1);
            error(StatusCode::INTERNAL_SERVER_ERROR, "the query panicked: the log tells where")
        }
    }
}

fn json_answer<T: Serialize>(value: &T, gzip: bool) -> Response {
    let json = serde_json::to_vec(value).expect("answers have string keys and no custom serializers");
    if !gzip || json.len() < GZIP_BYTES_MIN {
        return (json_headers(), json).into_response();
    }
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let compressed = encoder.write_all(&json).and_then(|()| encoder.finish());
    let compressed = compressed.expect("writing to a Vec cannot fail");
    let headers = [(header::CONTENT_ENCODING, "gzip"), (header::VARY, "Accept-Encoding")];
    (json_headers(), headers, compressed).into_response()
}

/// RFC 9110 §12.5.3, without weights other than `q=0`.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| {
        let mut parts = item.split(';').map(str::trim);
        let refused = |part: &str| matches!(part.strip_prefix("q="), Some("0" | "0.0" | "0.00" | "0.000"));
        parts.next().is_some_and(|coding| coding.eq_ignore_ascii_case("gzip")) && !parts.any(refused)
    })
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_host(host: &str, allowed: bool) {
        assert_eq!(is_allowed_host(host, &["profiles.example".to_owned()]), allowed, "for {host:?}");
    }

    #[test]
    fn only_addresses_localhost_and_configured_names_are_hosts() {
        for host in ["127.0.0.1:7700", "[::1]:7700", "[::1]", "localhost", "LocalHost:80", "10.0.0.7:7700"] {
            check_host(host, true);
        }
        check_host("profiles.example:7700", true);
        check_host("profiles.example.:7700", true);
        for host in
            ["", "evil.example", "evil.example:7700", "localhost.evil.example", "127.0.0.1.evil.example"]
        {
            check_host(host, false);
        }
    }

    #[test]
    fn gzip_is_used_only_where_it_is_accepted() {
        let accepts = |value: &'static str| {
            let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(value))]);
            accepts_gzip(&headers)
        };
        assert!(accepts("gzip"));
        assert!(accepts("deflate, GZIP;q=0.5, br"));
        assert!(!accepts("gzip;q=0"));
        assert!(!accepts("br"));
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
