//! The agent's own HTTP: metrics, health, readiness, the account of samples, and what a support bundle holds.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use axum::{
    Router,
    extract::{Query, Request, State},
    http::{
        StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, HOST, WWW_AUTHENTICATE},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use profiler_backend::Token;
use serde::Deserialize;
use tokio::net::TcpListener;

use crate::{
    bpf,
    census::{Asked, Census},
    config::Config,
    logs::Logs,
    pipeline::View,
    status::{Identity, Phase, Report},
    sys::{bpf_objects, cgroup::WholeV2},
    targets::Targets,
    telemetry,
};

/// What the agent's HTTP knows of the agent.
#[derive(Clone)]
pub(crate) struct Front {
    state: Arc<FrontState>,
}

struct FrontState {
    identity: Identity,
    logs: Option<Logs>,
    view: OnceLock<View>,
    backend: OnceLock<SocketAddr>,
    phase: Mutex<Phase>,
    /// One look at all processes at a time.
    census: tokio::sync::Mutex<()>,
    config: Mutex<Running>,
}

/// What runs: the configuration as `--print-config` shows it, and of it what is told elsewhere.
#[derive(Clone, Default)]
struct Running {
    shown: String,
    profiles: Vec<String>,
    targets: Option<Targets>,
}

impl Front {
    /// An agent that starts.
    pub(crate) fn new(identity: Identity, logs: Option<Logs>) -> Self {
        let (view, backend, config, census) = Default::default();
        let phase = Mutex::new(Phase::Starting);
        Self { state: Arc::new(FrontState { identity, logs, view, backend, phase, census, config }) }
    }

    /// The stages run, and there is or is not a backend in this process.
    pub(crate) fn begin(&self, view: View, backend: Option<SocketAddr>) {
        // An agent begins once.
        let _ = self.state.view.set(view);
        if let Some(backend) = backend {
            let _ = self.state.backend.set(backend);
        }
    }

    /// What the agent does now. It does nothing any more after an end, the first of which stays.
    pub(crate) fn set_phase(&self, phase: Phase) {
        let mut now = self.state.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*now, Phase::Ended(_)) {
            *now = phase;
        }
    }

    /// The configuration as it is now; `shown` is without secrets.
    pub(crate) fn set_config(&self, shown: String, config: &Config) {
        let (profiles, targets) = (config.profiles.clone(), Some(config.targets.clone()));
        let running = Running { shown, profiles, targets };
        *self.state.config.lock().unwrap_or_else(PoisonError::into_inner) = running;
    }

    fn running(&self) -> Running {
        self.state.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads `/proc`, which takes about a second for 10,000 processes. `None` before there is anything to tell.
    fn census(&self) -> Option<Census> {
        let view = self.state.view.get()?;
        let Running { shown: _, profiles, targets } = self.running();
        let hierarchy = WholeV2::find("/proc".as_ref());
        Some(Census::take(Asked {
            proc: "/proc".as_ref(),
            hierarchy: hierarchy.as_ref().map(WholeV2::path),
            phase: self.phase(),
            targets: &targets?,
            profiles: &profiles,
            frequency_hz: view.shared.sampling.hz(),
            includes_below: bpf::finds_cgroups_below(),
            heap: view.heap.get().map(|heap| heap.gauges.states.all()).unwrap_or_default(),
        }))
    }

    fn phase(&self) -> Phase {
        self.state.phase.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn readiness(&self) -> (StatusCode, String) {
        let phase = self.phase();
        let code = if phase.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, format!("{phase}\n"))
    }

    async fn report(&self) -> Report {
        let FrontState { identity, view, backend, .. } = &*self.state;
        let view = match view.get() {
            Some(view) => Some((view, view.exact_snapshot().await)),
            None => None,
        };
        let view = view.as_ref().map(|(view, snapshot)| (*view, snapshot));
        Report::new(identity, self.phase(), self.running().profiles, backend.get().copied(), view)
    }
}

/// Opens the listener: a taken port is an error at the start, not later.
pub(crate) async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(listen).await
}

/// Who may ask.
#[derive(Clone)]
struct Gate {
    /// A name that requests may call this agent by, besides addresses and `localhost`.
    names: Arc<[String]>,
    token: Option<Token>,
}

impl Gate {
    fn new(config: &Config) -> Self {
        Self { names: [config.node.clone()].into(), token: config.token.clone() }
    }

    fn is_allowed_host(&self, request: &Request) -> bool {
        profiler_backend::is_allowed_host(host(request), &self.names)
    }

    fn has_token(&self, request: &Request) -> bool {
        let Some(token) = &self.token else { return true };
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        header.is_some_and(|value| token.is_in(value))
    }
}

fn host(request: &Request) -> &str {
    request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default()
}

/// Serves everything until the program ends.
pub(crate) async fn serve(listener: TcpListener, front: Front, config: &Config) -> std::io::Result<()> {
    let gate = Gate::new(config);
    let router = public()
        .route("/", get(index))
        .route("/status", get(status))
        .route("/targets", get(targets))
        .route("/binaries", get(binaries))
        .route("/config", get(config_text))
        .route("/logs", get(logs))
        .route("/bpf", get(async || bpf_objects::listing()))
        .layer(middleware::from_fn_with_state(gate, guard))
        .with_state(front);
    axum::serve(listener, router).await
}

/// Serves metrics and health only, until the program ends. On an address of the network, names are not checked: who may
/// ask by any name may ask by address as well.
pub(crate) async fn serve_metrics(
    listener: TcpListener,
    front: Front,
    config: &Config,
) -> std::io::Result<()> {
    let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    let gate = Gate { token: None, ..Gate::new(config) };
    let router =
        if is_loopback { public().layer(middleware::from_fn_with_state(gate, guard)) } else { public() };
    axum::serve(listener, router.with_state(front)).await
}

fn public() -> Router<Front> {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async |State(front): State<Front>| front.readiness()))
        .route("/metrics", get(metrics))
}

/// Refuses requests for a host that is not this one, by the backend's rule: a web page could make up the name and read
/// what the agent says (DNS rebinding). Where there is a token, refuses those without, but for health.
async fn guard(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    if !gate.is_allowed_host(&request) {
        let host = host(&request);
        let why = format!("host {host:?} is not served here: call it by address or by the node's name\n");
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let is_health = matches!(request.uri().path(), "/healthz" | "/readyz");
    if !is_health && !gate.has_token(&request) {
        let challenge = [(WWW_AUTHENTICATE, "Bearer")];
        return (StatusCode::UNAUTHORIZED, challenge, "bring the bearer token of --token-file\n")
            .into_response();
    }
    next.run(request).await
}

async fn index() -> &'static str {
    "profiler-agent\n\n/status   taken = delivered + waiting + dropped; ?format=json\n/metrics  Prometheus\n\
     /targets  who is sampled, by which target, how often; ?format=json\n\
     /healthz  alive\n/readyz   sampling, or paused\n/config   without secrets\n/logs     the latest lines\n\
     /binaries which binaries cut stacks short, why, and what would help\n\
     /bpf      programs and maps\n"
}

async fn metrics(State(front): State<Front>) -> Response {
    match front.state.view.get() {
        Some(view) => {
            let text = telemetry::metrics(view, &view.exact_snapshot().await);
            ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", front.phase())).into_response(),
    }
}

#[derive(Deserialize)]
struct Form {
    format: Option<String>,
}

impl Form {
    /// As JSON where it is asked for, else for people.
    fn answer(&self, report: &(impl serde::Serialize + std::fmt::Display)) -> Response {
        match self.format.as_deref() {
            Some("json") => {
                let json = serde_json::to_string(report).expect("a report has text keys only");
                ([(CONTENT_TYPE, "application/json")], json).into_response()
            }
            _ => report.to_string().into_response(),
        }
    }
}

async fn status(State(front): State<Front>, Query(form): Query<Form>) -> Response {
    form.answer(&front.report().await)
}

async fn targets(State(front): State<Front>, Query(form): Query<Form>) -> Response {
    let _turn = front.state.census.lock().await;
    let asked = front.clone();
    match tokio::task::spawn_blocking(move || asked.census()).await {
        Ok(Some(census)) => form.answer(&census),
        _ => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", front.phase())).into_response(),
    }
}

async fn binaries(State(front): State<Front>) -> Response {
    match front.state.view.get() {
        Some(view) => {
            let reports = view.shared.binaries.reports();
            let json = serde_json::to_string(&reports).expect("reports have text keys only");
            ([(CONTENT_TYPE, "application/json")], json).into_response()
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", front.phase())).into_response(),
    }
}

async fn config_text(State(front): State<Front>) -> String {
    front.running().shown
}

async fn logs(State(front): State<Front>) -> String {
    front.state.logs.as_ref().map(Logs::recent).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use reqwest::Client;
    use tokio::runtime;

    use super::*;
    use crate::config::tests::sources;

    fn front() -> Front {
        Front::new(Identity::default(), None)
    }

    /// Who asks, and what.
    #[derive(Clone, Copy, Default)]
    struct Asked<'a> {
        path: &'a str,
        /// What the agent is called; its address otherwise.
        host: Option<&'a str>,
        token: Option<&'a str>,
    }

    /// Asks an agent with these flags, whose second listener it is when `is_second`.
    fn ask_with(front: &Front, flags: &[&str], is_second: bool, asked: Asked<'_>) -> (u16, String) {
        // An error means that another test has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = sources(&[&["--node", "node-1"], flags].concat()).load().expect("valid");
        let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("a free port");
            let address = listener.local_addr().expect("a bound socket has an address");
            let front = front.clone();
            tokio::spawn(async move {
                match is_second {
                    true => serve_metrics(listener, front, &config).await,
                    false => serve(listener, front, &config).await,
                }
            });
            let client = Client::builder().no_proxy().build().expect("a client");
            let mut request = client.get(format!("http://{address}{}", asked.path));
            if let Some(host) = asked.host {
                request = request.header(HOST, host);
            }
            if let Some(token) = asked.token {
                request = request.bearer_auth(token);
            }
            let response = request.send().await.expect("an answer");
            (response.status().as_u16(), response.text().await.expect("text"))
        })
    }

    fn ask(front: &Front, path: &str, host: Option<&str>) -> (u16, String) {
        ask_with(front, &[], false, Asked { path, host, token: None })
    }

    #[test]
    fn the_agent_is_ready_while_it_samples_or_is_paused() {
        let front = front();
        assert_eq!(ask(&front, "/readyz", None), (503, "starting\n".to_owned()));
        assert_eq!(ask(&front, "/metrics", None).0, 503);
        assert_eq!(ask(&front, "/healthz", None).0, 200);
        front.set_phase(Phase::Waiting("another agent (pid 7)".to_owned()));
        assert_eq!(ask(&front, "/readyz", None), (503, "waiting: another agent (pid 7)\n".to_owned()));
        front.set_phase(Phase::Sampling);
        assert_eq!(ask(&front, "/readyz", None), (200, "sampling\n".to_owned()));
        front.set_phase(Phase::Paused("enabled = false".to_owned()));
        assert_eq!(ask(&front, "/readyz", None), (200, "paused: enabled = false\n".to_owned()));
        front.set_phase(Phase::Ended("stage window died".to_owned()));
        front.set_phase(Phase::Sampling);
        assert_eq!(ask(&front, "/readyz", None), (503, "ended: stage window died\n".to_owned()));
    }

    #[test]
    fn names_that_a_web_page_could_make_up_are_refused() {
        let front = front();
        for path in [
            "/",
            "/healthz",
            "/status",
            "/metrics",
            "/targets",
            "/config",
            "/binaries",
            "/logs",
            "/bpf",
            "/nowhere",
        ] {
            assert_eq!(ask(&front, path, Some("evil.example")).0, 403, "{path}");
        }
        for host in ["localhost:7701", "node-1:7701", "10.0.0.7"] {
            assert_eq!(ask(&front, "/healthz", Some(host)).0, 200, "{host}");
        }
    }

    #[test]
    fn the_second_listener_serves_metrics_and_health_and_nothing_else() {
        let front = front();
        let get = |path| ask_with(&front, &[], true, Asked { path, ..Asked::default() }).0;
        assert_eq!((get("/healthz"), get("/readyz"), get("/metrics")), (200, 503, 503));
        for path in ["/", "/status", "/targets", "/config", "/binaries", "/logs", "/bpf"] {
            assert_eq!(get(path), 404, "{path}");
        }
    }

    #[test]
    fn where_there_is_a_token_only_health_is_told_without() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("token");
        fs::write(&file, "0123456789abcdef\n").expect("write the token");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set the mode");
        let flags = ["--token-file", file.to_str().expect("a plain path")];
        let front = front();
        let ask = |path, token| ask_with(&front, &flags, false, Asked { path, host: None, token }).0;
        for path in ["/", "/status", "/metrics", "/targets", "/config", "/binaries", "/logs", "/bpf"] {
            assert_eq!(ask(path, None), 401, "{path}");
            assert_eq!(ask(path, Some("0123456789abcdeF")), 401, "{path}");
        }
        assert_eq!((ask("/status", Some("0123456789abcdef")), ask("/healthz", None)), (200, 200));
        let second = ask_with(&front, &flags, true, Asked { path: "/healthz", ..Asked::default() });
        assert_eq!(second.0, 200);
    }
}
