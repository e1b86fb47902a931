//! The HTTP surface: paths, methods, statuses, and the order of the checks on a delivery.
//!
//! The only file that knows HTTP requests and answers. May not know how a signature is made or how
//! an event is stored. Invariant: 200 is answered only for an event that is stored, or that is
//! never stored: one of a type that the settings leave out.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures_util::Stream;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::service::TowerToHyperService;
use litestripe_contract::event::EventType;
use litestripe_contract::header;
use serde::Serialize;
use serde_json::json;
use time::OffsetDateTime;
use tracing::{Instrument as _, Level, Span, debug, enabled, warn};
use warp::Filter;
use warp::http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue,
    RETRY_AFTER,
};
use warp::http::{Method, StatusCode};

use crate::body::{self, BodyError, Budget};
use crate::envelope::{Envelope, NotAnEvent};
use crate::metrics::{Metrics, Outcome, State};
use crate::publish::{Delivery, Publisher, StoreError, Stored};
use crate::secret::Secrets;
use crate::settings::{EventTypes, HookId, Settings};
use crate::signature::{self, SignatureError};
use crate::throttle::Throttle;
use crate::trace;

/// How long a body may take to arrive.
const BODY_WITHIN: Duration = Duration::from_secs(10);

/// `Retry-After` of a 503, in seconds. A restart or an election of the broker is over by then.
const RETRY_AFTER_S: u16 = 5;

const SUCCESS: &[u8] = br#"{"status":"success"}"#;

/// How often a refused signature is logged at most: anyone can send them.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);

/// How often a thin event that the settings leave out is logged at most.
const LEFT_OUT_INTERVAL: Duration = Duration::from_secs(60 * 60);

pub(crate) struct Ingress {
    settings: Settings,
    secrets: Secrets,
    bodies: Arc<Budget>,
    publisher: Arc<Publisher>,
    metrics: Arc<Metrics>,
    /// Limits the log lines about refused signatures.
    refused: Throttle,
    /// The types that the worker handles.
    handled: EventTypes,
    /// Limits the log lines about handled thin events that the settings leave out.
    left_out: Throttle,
}

impl Ingress {
    pub(crate) fn new(
        settings: Settings,
        secrets: Secrets,
        publisher: Arc<Publisher>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let bodies = Budget::new(body::BUDGET_BYTES);
        Self {
            settings,
            secrets,
            bodies,
            publisher,
            metrics,
            refused: Throttle::new(REFUSED_INTERVAL),
            handled: EventTypes::handled(),
            left_out: Throttle::new(LEFT_OUT_INTERVAL),
        }
    }

    /// Checks what a delivery is sent to, before its body is read.
    fn check_address(&self, method: &Method, uuid: &str) -> Result<(), Refusal> {
        if method != Method::POST {
            return Err(Refusal::Method);
        }
        if HookId::parse(uuid) != Some(self.settings.hook) {
            return Err(Refusal::UnknownHook);
        }
        Ok(())
    }

    /// Counts, logs and answers a delivery that began at `began`.
    fn answer(
        &self,
        delivered: Result<Outcome, Refusal>,
        began: Instant,
        span: &Span,
    ) -> warp::reply::Response {
        let (status, outcome) = match &delivered {
            Ok(outcome) => (StatusCode::OK, *outcome),
            Err(refusal) => refusal.verdict(),
        };
        self.metrics.record_delivery(outcome, began.elapsed());
        trace::record_answer(span, status, outcome.label());
        let Err(refusal) = delivered else {
            return answer(status, Bytes::from_static(SUCCESS));
        };
        let is_too_large = status == StatusCode::PAYLOAD_TOO_LARGE;
        if is_too_large && self.publisher.body_bytes_max() < self.settings.body_limit {
            self.publisher.request_max_payload_check();
        }
        refusal.log(&self.refused);
        refusal.answer()
    }

    /// Returns the outcome of an event that is not stored. Warns if the worker would handle it and
    /// only the settings leave it out: an operator who adds a destination of thin events, but keeps
    /// a list of types for snapshot events, would otherwise lose all thin events unnoticed.
    fn ignore(&self, envelope: &Envelope) -> Outcome {
        debug!(event_id = %envelope.id, "{} is of a type that is not stored", envelope.id);
        if !envelope.is_thin {
            return Outcome::Ignored;
        }
        if self.handled.contains(&envelope.event_type)
            && let Some(omitted) = self.left_out.admit(Instant::now())
        {
            warn!(
                omitted,
                event_type = envelope.event_type,
                "thin events of type {} are not stored: add it to LITESTRIPE_EVENT_TYPES",
                envelope.event_type
            );
        }
        Outcome::ThinIgnored
    }
}

pub(crate) fn service(
    ingress: Arc<Ingress>,
) -> impl Service<
    Request<Incoming>,
    Response = Response<impl hyper::body::Body<Data = impl Send, Error = warp::Error> + Send>,
    Error = Infallible,
    Future: Send,
> + Clone
+ Send {
    TowerToHyperService::new(warp::service(routes(ingress)))
}

fn routes(
    ingress: Arc<Ingress>,
) -> impl Filter<Extract = (warp::reply::Response,), Error = Infallible> + Clone + Send + Sync {
    let ingress = warp::any().map(move || Arc::clone(&ingress));
    let hook = warp::path!("ls" / "hook" / String)
        .and(ingress.clone())
        .and(warp::method())
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(hook);
    let healthz = warp::path!("healthz")
        .and(warp::method())
        .map(|method| read_only(&method, healthz));
    let readyz = warp::path!("readyz")
        .and(warp::method())
        .and(ingress.clone())
        .map(|method, ingress: Arc<Ingress>| read_only(&method, || readyz(&ingress)));
    let metrics = warp::path!("metrics")
        .and(warp::method())
        .and(ingress)
        .map(|method, ingress: Arc<Ingress>| read_only(&method, || metrics(&ingress)));
    let elsewhere = warp::any().map(|| close(error(StatusCode::NOT_FOUND, "not found")));
    let others = healthz
        .or(readyz)
        .unify()
        .or(metrics)
        .unify()
        .or(elsewhere)
        .unify();
    // The hook is in one `or`, not in four: each `or` moves and polls the filters inside it once
    // more.
    hook.or(others).unify()
}

async fn hook<B: Buf>(
    uuid: String,
    ingress: Arc<Ingress>,
    method: Method,
    headers: HeaderMap,
    chunks: impl Stream<Item = Result<B, warp::Error>>,
) -> warp::reply::Response {
    let (received, began) = (OffsetDateTime::now_utc(), Instant::now());
    if let Err(refusal) = ingress.check_address(&method, &uuid) {
        return ingress.answer(Err(refusal), began, &Span::none());
    }
    let span = trace::begin(&headers);
    let delivery = deliver(&ingress, &headers, chunks, received, &span);
    let delivered = delivery.instrument(span.clone()).await;
    span.in_scope(|| ingress.answer(delivered, began, &span))
}

/// Checks a delivery and stores its event. The order of the checks is DESIGN's.
async fn deliver<B: Buf>(
    ingress: &Ingress,
    headers: &HeaderMap,
    chunks: impl Stream<Item = Result<B, warp::Error>>,
    received: OffsetDateTime,
    span: &Span,
) -> Result<Outcome, Refusal> {
    let limit = ingress
        .settings
        .body_limit
        .min(ingress.publisher.body_bytes_max());
    let reading = body::read(chunks, content_length(headers), limit, &ingress.bodies);
    let body = tokio::time::timeout(BODY_WITHIN, reading)
        .await
        .map_err(|_| Refusal::Slow)??;
    let header = signature_header(headers);
    let secrets = Arc::clone(&ingress.secrets.borrow());
    let body = signature::verify(
        &header,
        body,
        &secrets,
        received,
        ingress.settings.tolerance,
    )?;
    if let Some(secret) = secrets.get(body.secret()) {
        secret.record_use(received);
    }
    let envelope = Envelope::read(&body)?;
    trace::record_event(span, &envelope.id, &envelope.event_type);
    if !ingress.settings.event_types.contains(&envelope.event_type) {
        return Ok(ingress.ignore(&envelope));
    }
    let event_type = EventType::parse(envelope.event_type).map_err(|_| Refusal::NotASubject)?;
    let verified = Instant::now();
    let id = enabled!(Level::DEBUG).then(|| envelope.id.clone());
    let delivery = Delivery {
        id: envelope.id,
        event_type,
        body,
        signature: header,
        received,
        trace: trace::context(span, headers),
    };
    let stored = ingress.publisher.store(delivery).await?;
    ingress.metrics.record_published(verified.elapsed());
    if let Some(id) = id {
        debug!(event_id = %id, "stored {id}");
    }
    Ok(match stored {
        Stored::New => Outcome::Stored,
        Stored::Duplicate => Outcome::Duplicate,
    })
}

/// Why a delivery is not answered 200.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("method not allowed")]
    Method,
    #[error("not found")]
    UnknownHook,
    #[error("the body took too long")]
    Slow,
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error(transparent)]
    NotAnEvent(#[from] NotAnEvent),
    #[error(
        "the event's type is not lower-case letters, digits and _, in parts joined by single dots"
    )]
    NotASubject,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Refusal {
    /// The status of the answer, and the outcome under which the delivery is counted.
    fn verdict(&self) -> (StatusCode, Outcome) {
        match self {
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, Outcome::Method),
            Self::UnknownHook => (StatusCode::NOT_FOUND, Outcome::UnknownHook),
            Self::Slow => (StatusCode::REQUEST_TIMEOUT, Outcome::Incomplete),
            Self::Body(BodyError::Broken) => (StatusCode::BAD_REQUEST, Outcome::Incomplete),
            Self::Body(BodyError::NoRoom) => (StatusCode::SERVICE_UNAVAILABLE, Outcome::NoRoom),
            Self::Body(BodyError::TooLarge { .. }) | Self::Store(StoreError::TooLarge) => {
                (StatusCode::PAYLOAD_TOO_LARGE, Outcome::TooLarge)
            }
            Self::Signature(SignatureError::Missing | SignatureError::Malformed) => {
                (StatusCode::BAD_REQUEST, Outcome::Unsigned)
            }
            Self::Signature(SignatureError::NoMatch | SignatureError::NotText) => {
                (StatusCode::BAD_REQUEST, Outcome::Mismatch)
            }
            Self::Signature(SignatureError::Stale { .. }) => {
                (StatusCode::BAD_REQUEST, Outcome::Stale)
            }
            Self::NotAnEvent(_) | Self::NotASubject => {
                (StatusCode::BAD_REQUEST, Outcome::NotAnEvent)
            }
            Self::Store(StoreError::Unavailable(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, Outcome::Unavailable)
            }
        }
    }

    fn status(&self) -> StatusCode {
        self.verdict().0
    }

    fn answer(&self) -> warp::reply::Response {
        let mut answer = error(self.status(), &self.to_string());
        if matches!(self, Self::Method) {
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("POST"));
        }
        if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
            answer
                .headers_mut()
                .insert(RETRY_AFTER, RETRY_AFTER_S.into());
        }
        // The client may still be sending the rest of the body.
        if matches!(
            self,
            Self::Method | Self::UnknownHook | Self::Slow | Self::Body(_)
        ) {
            close(answer)
        } else {
            answer
        }
    }

    fn log(&self, refused: &Throttle) {
        debug!("answering {}: {self}", self.status());
        let Self::Signature(error) = self else { return };
        let Some(omitted) = refused.admit(Instant::now()) else {
            return;
        };
        match error {
            SignatureError::Stale { age } => warn!(
                omitted,
                age_s = age.as_secs(),
                "refused a delivery that was signed {} s ago: is this machine's clock right? (STRIPE_WEBHOOK_TOLERANCE)",
                age.as_secs()
            ),
            SignatureError::NoMatch => {
                warn!(
                    omitted,
                    "refused a delivery: {error}; does the signing secret belong to this endpoint?"
                );
            }
            SignatureError::Missing | SignatureError::Malformed | SignatureError::NotText => {
                warn!(omitted, "refused a delivery: {error}");
            }
        }
    }
}

fn healthz() -> warp::reply::Response {
    json(StatusCode::OK, &json!({ "status": "ok" }))
}

fn readyz(ingress: &Ingress) -> warp::reply::Response {
    match ingress.publisher.readiness() {
        Ok(()) => json(StatusCode::OK, &json!({ "status": "ready" })),
        Err(trouble) => error(StatusCode::SERVICE_UNAVAILABLE, &trouble.to_string()),
    }
}

fn metrics(ingress: &Ingress) -> warp::reply::Response {
    let secrets = Arc::clone(&ingress.secrets.borrow());
    let page = ingress.metrics.page(&State {
        bodies_in_flight_bytes: ingress.bodies.bytes(),
        is_ready: ingress.publisher.readiness().is_ok(),
        group_commit: ingress.publisher.group_commit(),
        secrets: &secrets,
    });
    let mut answer = Response::new(page.into());
    answer.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    answer
}

fn read_only(
    method: &Method,
    answer: impl FnOnce() -> warp::reply::Response,
) -> warp::reply::Response {
    if method == Method::GET || method == Method::HEAD {
        let mut answer = answer();
        answer
            .headers_mut()
            .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        return answer;
    }
    let mut answer = error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
    answer
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    close(answer)
}

/// Returns the signature header as a web framework gives it to the SDK: repeated headers joined by
/// commas, bytes above ASCII as Latin-1.
fn signature_header(headers: &HeaderMap) -> String {
    let mut joined = String::new();
    for (index, value) in headers.get_all(header::STRIPE_SIGNATURE).iter().enumerate() {
        if index > 0 {
            joined.push(',');
        }
        match value.to_str() {
            Ok(text) => joined.push_str(text),
            Err(_) => joined.extend(value.as_bytes().iter().copied().map(char::from)),
        }
    }
    joined
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
}

fn error(status: StatusCode, message: &str) -> warp::reply::Response {
    json(status, &ErrorBody { error: message })
}

fn json(status: StatusCode, body: &impl Serialize) -> warp::reply::Response {
    answer(
        status,
        serde_json::to_vec(body)
            .expect("strings can be written as JSON")
            .into(),
    )
}

fn answer(status: StatusCode, body: Bytes) -> warp::reply::Response {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// Closes the connection after this answer.
fn close(mut answer: warp::reply::Response) -> warp::reply::Response {
    answer
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

#[cfg(test)]
mod tests;
