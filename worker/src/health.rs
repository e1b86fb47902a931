//! `/healthz`, `/readyz` and `/metrics` of a running worker. The only file of this crate that knows HTTP.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_nats::connection::State;
use tokio::net::TcpListener;
use warp::http::StatusCode;
use warp::reply::{Json, WithStatus};
use warp::{Filter, Reply};

use crate::store::{Store, detached};

/// How long the database may take to answer before the worker counts as not ready.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// What readiness depends on, filled in as it comes.
#[derive(Default)]
pub(crate) struct Readiness {
    /// The database, once it answered and its schema is current.
    pub(crate) store: OnceLock<Store>,
    pub(crate) consuming: AtomicBool,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: set LITESTRIPE_WORKER_LISTEN to a free address")]
pub(crate) struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Takes the address, so that a second worker on it fails at once.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ListenError { address, source })
}

/// Serves until the process ends.
pub(crate) async fn serve(
    listener: TcpListener,
    nats: async_nats::Client,
    readiness: Arc<Readiness>,
) {
    let alive = warp::path!("healthz").map(|| answer(StatusCode::OK, "alive"));
    let ready = warp::path!("readyz").then(move || {
        let (nats, readiness) = (nats.clone(), Arc::clone(&readiness));
        async move {
            match waits_for(&nats, &readiness).await {
                None => answer(StatusCode::OK, "ready"),
                Some(what) => answer(
                    StatusCode::SERVICE_UNAVAILABLE,
                    &format!("waiting for {what}"),
                ),
            }
        }
    });
    let metrics = warp::path!("metrics").map(|| {
        let text = crate::metrics::render();
        warp::reply::with_header(
            text,
            "content-type",
            "text/plain; version=0.0.4; charset=utf-8",
        )
        .into_response()
    });
    let routes = alive
        .or(ready)
        .unify()
        .map(Reply::into_response)
        .or(metrics)
        .unify();
    warp::serve(warp::get().and(routes))
        .incoming(listener)
        .run()
        .await;
}

async fn waits_for(nats: &async_nats::Client, readiness: &Readiness) -> Option<&'static str> {
    if nats.connection_state() != State::Connected {
        return Some("NATS");
    }
    let Some(store) = readiness.store.get().cloned() else {
        return Some("the database");
    };
    let ping = detached(async move { store.ping().await });
    if !matches!(tokio::time::timeout(PING_TIMEOUT, ping).await, Ok(Ok(()))) {
        return Some("the database");
    }
    (!readiness.consuming.load(Ordering::Relaxed)).then_some("the streams")
}

fn answer(status: StatusCode, text: &str) -> WithStatus<Json> {
    warp::reply::with_status(
        warp::reply::json(&serde_json::json!({ "status": text })),
        status,
    )
}
