//! The agent's own HTTP: metrics, health, readiness and the account of samples.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    Router,
    extract::{Request, State},
    http::{
        HeaderName, StatusCode,
        header::{CONTENT_TYPE, HOST},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;

use crate::{
    ledger::{Balance, Snapshot},
    pipeline::View,
    telemetry,
};

/// What the agent's HTTP knows of the agent.
#[derive(Clone, Default)]
pub(crate) struct Front {
    state: Arc<FrontState>,
}

#[derive(Default)]
struct FrontState {
    view: OnceLock<View>,
    end: OnceLock<String>,
}

impl Front {
    /// Sampling has begun.
    pub(crate) fn begin(&self, view: View) {
        // An agent begins once.
        let _ = self.state.view.set(view);
    }

    /// The agent no longer samples, and why. The first reason stays.
    pub(crate) fn end(&self, why: String) {
        let _ = self.state.end.set(why);
    }

    fn readiness(&self) -> (StatusCode, String) {
        match (self.state.end.get(), self.state.view.get()) {
            (Some(why), _) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            (None, None) => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
            (None, Some(_)) => (StatusCode::OK, "sampling\n".to_owned()),
        }
    }

    /// What `at` makes of the agent and its account.
    async fn look<T: IntoResponse>(&self, at: impl FnOnce(&View, &Snapshot) -> T) -> Response {
        match self.state.view.get() {
            Some(view) => at(view, &view.exact_snapshot().await).into_response(),
            None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
        }
    }
}

/// Opens the listener: a taken port is an error at the start, not later.
pub(crate) async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(listen).await
}

/// Serves until the program ends. `node` is a name that requests may call this agent by, besides addresses and
/// `localhost`.
pub(crate) async fn serve(listener: TcpListener, front: Front, node: String) -> std::io::Result<()> {
    let names: Arc<[String]> = [node].into();
    let router = Router::new()
        .route("/", get(index))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|State(front): State<Front>| async move { front.readiness() }))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .layer(middleware::from_fn_with_state(names, guard))
        .with_state(front);
    axum::serve(listener, router).await
}

/// Refuses requests for a host that is not this one, by the backend's rule: a web page could make up the name and read
/// what the agent says (DNS rebinding).
async fn guard(State(names): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if profiler_backend::is_allowed_host(host, &names) {
        return next.run(request).await;
    }
    let why = format!("host {host:?} is not served here: call it by address or by the node's name\n");
    (StatusCode::FORBIDDEN, why).into_response()
}

async fn index() -> &'static str {
    "profiler-agent\n\n/status   taken = delivered + waiting + dropped\n/metrics  Prometheus\n/healthz  alive\n/readyz   sampling\n"
}

async fn metrics(State(front): State<Front>) -> Response {
    const TEXT: [(HeaderName, &str); 1] = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    front.look(|view, snapshot| (TEXT, telemetry::metrics(view, snapshot))).await
}

async fn status(State(front): State<Front>) -> Response {
    let line = |balance: &Balance| format!("{balance}\n");
    front.look(|_, snapshot| snapshot.balances().iter().map(line).collect::<String>()).await
}

#[cfg(test)]
mod tests {
    use reqwest::Client;
    use tokio::runtime;

    use super::*;

    /// Asks a served `front` for a path, calling it by `host` or else by its address.
    fn ask(front: &Front, path: &str, host: Option<&str>) -> (u16, String) {
        // An error means that another test has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("a free port");
            let address = listener.local_addr().expect("a bound socket has an address");
            tokio::spawn(serve(listener, front.clone(), "node-1".to_owned()));
            let client = Client::builder().no_proxy().build().expect("a client");
            let mut request = client.get(format!("http://{address}{path}"));
            if let Some(host) = host {
                request = request.header(HOST, host);
            }
            let response = request.send().await.expect("an answer");
            (response.status().as_u16(), response.text().await.expect("text"))
        })
    }

    #[test]
    fn the_agent_is_not_ready_before_it_samples_nor_after_a_stage_died() {
        let front = Front::default();
        assert_eq!(ask(&front, "/readyz", None), (503, "starting\n".to_owned()));
        assert_eq!(ask(&front, "/metrics", None).0, 503);
        assert_eq!(ask(&front, "/healthz", None).0, 200);
        front.end("stage window died".to_owned());
        assert_eq!(ask(&front, "/readyz", None), (503, "stage window died\n".to_owned()));
    }

    #[test]
    fn names_that_a_web_page_could_make_up_are_refused() {
        let front = Front::default();
        for path in ["/", "/healthz", "/status", "/metrics", "/nowhere"] {
            assert_eq!(ask(&front, path, Some("evil.example")).0, 403, "{path}");
        }
        for host in ["localhost:7701", "node-1:7701", "10.0.0.7"] {
            assert_eq!(ask(&front, "/healthz", Some(host)).0, 200, "{host}");
        }
    }
}
