//! `/healthz`, `/readyz` and `/metrics` of a running worker. The only file of this crate that knows
//! HTTP.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use litestripe_contract::settings::Address;
use litestripe_contract::systemd;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use warp::http::StatusCode;
use warp::reply::{Json, WithStatus};
use warp::{Filter, Reply};

use crate::metrics;
use crate::store::Store;

/// How long the database may take to answer a ping before the worker is not ready.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Most connections at a time: a probe and a scraper need one each. Further ones are not accepted.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection may last. It carries one request, so no client can hold one for longer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait if a connection cannot be accepted, as when the system has no sockets left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What readiness depends on. Filled in during the start.
#[derive(Default)]
pub(crate) struct Readiness {
    /// Set once the database has answered and its schema is current.
    pub(crate) store: OnceLock<Store>,
    pub(crate) consuming: AtomicBool,
    pub(crate) problems: Problems,
}

/// What keeps the worker from its work although everything it needs answers. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problems(Arc<Mutex<BTreeMap<&'static str, Problem>>>);

#[derive(Debug)]
struct Problem {
    reason: String,
    /// When it is forgotten unless it is reported again.
    ends: Option<Instant>,
}

impl Problems {
    /// Records that `part` of the worker does not do its work. The worker is not ready until
    /// [`Problems::clear`]. `reason` is shown to everybody who can reach `/readyz`: it holds no
    /// value that is stored and no secret.
    pub(crate) fn report(&self, part: &'static str, reason: String) {
        self.locked().insert(part, Problem { reason, ends: None });
    }

    /// Like [`Problems::report`], for a part that may not notice the end: the problem is forgotten
    /// unless it is reported again before `ends`.
    pub(crate) fn report_until(&self, part: &'static str, reason: String, ends: Instant) {
        let ends = Some(ends);
        self.locked().insert(part, Problem { reason, ends });
    }

    /// Records that `part` works again.
    pub(crate) fn clear(&self, part: &'static str) {
        self.locked().remove(part);
    }

    /// Returns each part with its reason, in the order of their names.
    pub(crate) fn list(&self, now: Instant) -> Vec<String> {
        let mut problems = self.locked();
        problems.retain(|_, problem| problem.ends.is_none_or(|ends| now < ends));
        problems
            .iter()
            .map(|(part, problem)| format!("{part}: {}", problem.reason))
            .collect()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<&'static str, Problem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: set LITESTRIPE_WORKER_LISTEN to a free address of this host")]
pub(crate) struct ListenError {
    address: Address,
    source: std::io::Error,
}

/// Binds the address early, so that a second worker on the same address fails at its start.
pub(crate) async fn listen(address: &Address) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address.as_str())
        .await
        .map_err(|source| ListenError {
            address: address.clone(),
            source,
        })
}

/// Serves until the process ends.
pub(crate) async fn serve(
    listener: TcpListener,
    nats: async_nats::Client,
    readiness: Arc<Readiness>,
) {
    let (problems, client) = (readiness.problems.clone(), nats.clone());
    let alive = warp::path!("healthz").map(|| answer(StatusCode::OK, "alive"));
    let ready = warp::path!("readyz").then(move || {
        let (nats, readiness) = (nats.clone(), Arc::clone(&readiness));
        async move {
            let waits_for = waits_for(&nats, &readiness).await;
            match why_not_ready(waits_for, &readiness.problems) {
                None => answer(StatusCode::OK, "ready"),
                Some(why) => answer(StatusCode::SERVICE_UNAVAILABLE, &why),
            }
        }
    });
    let metrics = warp::path!("metrics").map(move || {
        let is_connected = client.connection_state() == State::Connected;
        let text = metrics::render(is_connected, problems.list(Instant::now()).len());
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
    // hyper directly: warp's own server has no connection limit and no timeout, and adds HTTP/2.
    let service = TowerToHyperService::new(warp::service(warp::get().and(routes)));
    let mut http = http1::Builder::new();
    http.keep_alive(false);
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = Arc::clone(&connections)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let Ok((stream, _)) = listener.accept().await else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(async move {
            let _permit = permit;
            // Fails if the client disconnects or is too slow, which needs no action.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        });
    }
}

/// Tells systemd when the start is complete, and until then what the worker waits for. `Problems` do
/// not count: starting the worker anew would end none of them.
pub(crate) async fn tell_started(nats: async_nats::Client, readiness: Arc<Readiness>) {
    systemd::tell_ready(|| async {
        let what = waits_for(&nats, &readiness).await?;
        Some(format!("waiting for {what}"))
    })
    .await;
}

async fn waits_for(nats: &async_nats::Client, readiness: &Readiness) -> Option<&'static str> {
    if nats.connection_state() != State::Connected {
        return Some("NATS");
    }
    let Some(store) = readiness.store.get().cloned() else {
        return Some("the database");
    };
    if !matches!(timeout(PING_TIMEOUT, store.ping()).await, Ok(Ok(()))) {
        return Some("the database");
    }
    if readiness.consuming.load(Ordering::Relaxed) {
        None
    } else if metrics::DATABASE.is_awaited() {
        // It answers, and refuses what a start needs, such as a right.
        Some("the database")
    } else {
        Some("the streams")
    }
}

/// Returns all reasons, or `None` if there are none.
fn why_not_ready(waits_for: Option<&str>, problems: &Problems) -> Option<String> {
    let waits_for = waits_for.map(|what| format!("waiting for {what}"));
    let reasons: Vec<String> = waits_for
        .into_iter()
        .chain(problems.list(Instant::now()))
        .collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

fn answer(status: StatusCode, text: &str) -> WithStatus<Json> {
    warp::reply::with_status(
        warp::reply::json(&serde_json::json!({ "status": text })),
        status,
    )
}

#[cfg(test)]
mod tests;
