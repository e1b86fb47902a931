//! `/healthz`, `/readyz` and `/metrics` of a running worker. The only file of this crate that knows HTTP.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_nats::connection::State;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use warp::http::StatusCode;
use warp::reply::{Json, WithStatus};
use warp::{Filter, Reply};

use crate::store::{Store, detached};

/// How long the database may take to answer before the worker counts as not ready.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// What readiness depends on, filled in as it comes.
#[derive(Default)]
pub struct Readiness {
    /// The database, once it answered and its schema is current.
    pub store: OnceLock<Store>,
    /// Whether the consumer is open.
    pub consuming: AtomicBool,
}

/// What the worker is connected to.
#[derive(Clone)]
pub struct Dependencies {
    /// The broker.
    pub nats: async_nats::Client,
    /// How far the worker has come.
    pub readiness: Arc<Readiness>,
}

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: set LITESTRIPE_WORKER_LISTEN to a free address")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Takes the address, so that a second worker on it fails at once.
///
/// # Errors
/// When it is taken or not ours.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError { address, source })
}

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, dependencies: Dependencies, shutdown: CancellationToken) {
    let alive = warp::path!("healthz").map(|| answer(StatusCode::OK, "alive"));
    let ready = warp::path!("readyz").and_then(move || {
        let dependencies = dependencies.clone();
        async move { Ok::<_, Infallible>(readiness(&dependencies).await) }
    });
    let metrics = warp::path!("metrics").map(|| {
        let text = crate::metrics::render();
        warp::reply::with_header(text, "content-type", "text/plain; version=0.0.4; charset=utf-8").into_response()
    });
    let routes = warp::get()
        .and(alive.map(Reply::into_response).or(ready.map(Reply::into_response)).unify().or(metrics).unify());
    warp::serve(routes).incoming(listener).graceful(shutdown.cancelled_owned()).run().await;
}

async fn readiness(dependencies: &Dependencies) -> WithStatus<Json> {
    if dependencies.nats.connection_state() != State::Connected {
        return answer(StatusCode::SERVICE_UNAVAILABLE, "waiting for NATS");
    }
    let Some(store) = dependencies.readiness.store.get().cloned() else {
        return answer(StatusCode::SERVICE_UNAVAILABLE, "waiting for the database");
    };
    let ping = detached(async move { store.ping().await });
    if !matches!(tokio::time::timeout(PING_TIMEOUT, ping).await, Ok(Ok(()))) {
        return answer(StatusCode::SERVICE_UNAVAILABLE, "waiting for the database");
    }
    if !dependencies.readiness.consuming.load(Ordering::Relaxed) {
        return answer(StatusCode::SERVICE_UNAVAILABLE, "waiting for the streams");
    }
    answer(StatusCode::OK, "ready")
}

fn answer(status: StatusCode, text: &str) -> WithStatus<Json> {
    warp::reply::with_status(warp::reply::json(&serde_json::json!({ "status": text })), status)
}
