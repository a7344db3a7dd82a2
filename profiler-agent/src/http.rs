//! The agent's own HTTP: metrics, health, readiness and the account of samples.

use std::net::SocketAddr;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;

use crate::{pipeline::View, telemetry};

/// Opens the listener: a taken port is an error at the start, not later.
pub(crate) async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(listen).await
}

/// Serves until the program ends.
pub(crate) async fn serve(listener: TcpListener, view: View) -> std::io::Result<()> {
    let router = Router::new()
        .route("/", get(index))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "sampling\n" }))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(view);
    axum::serve(listener, router).await
}

async fn index() -> &'static str {
    "profiler-agent\n\n/status   taken = delivered + waiting + dropped\n/metrics  Prometheus\n/healthz  alive\n/readyz   sampling\n"
}

async fn metrics(State(view): State<View>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::metrics(&view))
}

async fn status(State(view): State<View>) -> impl IntoResponse {
    let lines: String = view.balances().iter().map(|balance| format!("{balance}\n")).collect();
    (StatusCode::OK, lines)
}
