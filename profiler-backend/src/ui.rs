//! The web UI, embedded in the binary.

use std::sync::Arc;

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use crate::{http::App, model::ContentHash};

/// Everything the page uses comes from here; nothing may frame it or be submitted from it.
const CONTENT_SECURITY_POLICY: &str = "default-src 'self'; script-src 'self'; style-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'";

struct File {
    path: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
}

const FILES: [File; 4] = [
    File {
        path: "/",
        content_type: "text/html; charset=utf-8",
        bytes: include_bytes!("../ui/dist/index.html"),
    },
    File {
        path: "/app.js",
        content_type: "text/javascript; charset=utf-8",
        bytes: include_bytes!("../ui/dist/app.js"),
    },
    File {
        path: "/app.css",
        content_type: "text/css; charset=utf-8",
        bytes: include_bytes!("../ui/dist/app.css"),
    },
    File { path: "/icon.svg", content_type: "image/svg+xml", bytes: include_bytes!("../ui/dist/icon.svg") },
];

pub(crate) fn routes() -> Router<Arc<App>> {
    FILES.iter().fold(Router::new(), |router, file| {
        let etag = etag(file.bytes);
        router.route(file.path, get(async move |headers: HeaderMap| answer(file, &etag, &headers)))
    })
}

fn etag(bytes: &[u8]) -> String {
    let mut hash = ContentHash::default();
    bytes.chunks(8).for_each(|chunk| {
        let mut word = [0; 8];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        hash.number(u64::from_le_bytes(word));
    });
    format!("\"{:?}\"", hash.number(bytes.len() as u64).finish())
}

/// The file, or that the browser's copy is still right: names stay the same from version to version.
fn answer(file: &File, etag: &str, headers: &HeaderMap) -> Response {
    let common = [
        (header::ETAG, etag),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    if known.is_some_and(|known| known.split(',').any(|known| known.trim() == etag)) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    (common, [(header::CONTENT_TYPE, file.content_type)], file.bytes).into_response()
}
