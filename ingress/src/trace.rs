//! The span of a delivery.
//!
//! Owns what it says: never the hook's UUID, the signature or anything of the body but the event's
//! id and type. While traces are off no span is made, and these functions only pass the delivery's
//! own context on.

use litestripe_contract::event::EventId;
use litestripe_contract::header;
use litestripe_contract::telemetry::traces::{self, TARGET};
use litestripe_contract::trace::TraceContext;
use tracing::{Span, info_span};
use warp::http::StatusCode;
use warp::http::header::HeaderMap;

/// Begins the span of a delivery, as a child of the context in its headers.
///
/// Begin it only for a request that has the hook's UUID, so that the spans of others do not fill
/// the queue.
pub(crate) fn begin(headers: &HeaderMap) -> Span {
    let span = info_span!(
        target: TARGET,
        parent: None,
        "POST /ls/hook/{uuid}",
        otel.kind = "server",
        http.request.method = "POST",
        http.route = "/ls/hook/{uuid}",
        http.response.status_code = tracing::field::Empty,
        stripe.event.id = tracing::field::Empty,
        "stripe.event.type" = tracing::field::Empty,
        litestripe.outcome = tracing::field::Empty,
        otel.status_code = tracing::field::Empty,
    );
    if !span.is_disabled()
        && let Some(context) = received(headers)
    {
        traces::set_parent(&span, &context);
    }
    span
}

/// Records which event it is about.
pub(crate) fn record_event(span: &Span, id: &EventId, event_type: &str) {
    if !span.is_disabled() {
        span.record("stripe.event.id", id.as_str());
        span.record("stripe.event.type", event_type);
    }
}

/// Records how it was answered. OpenTelemetry: only a status of 500 or more is an error of the
/// server.
pub(crate) fn record_answer(span: &Span, status: StatusCode, outcome: &'static str) {
    if span.is_disabled() {
        return;
    }
    span.record("http.response.status_code", status.as_u16());
    span.record("litestripe.outcome", outcome);
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
}

/// Returns the context that the event carries on: that of its delivery's span, or while traces are
/// off, that of the delivery's headers.
pub(crate) fn context(span: &Span, headers: &HeaderMap) -> Option<TraceContext> {
    traces::context(span).or_else(|| received(headers))
}

fn received(headers: &HeaderMap) -> Option<TraceContext> {
    let traceparent = headers.get(header::TRACEPARENT)?.to_str().ok()?;
    let states = headers.get_all(header::TRACESTATE).iter();
    let states: Vec<&str> = states.filter_map(|value| value.to_str().ok()).collect();
    TraceContext::parse(traceparent, Some(&states.join(",")))
}

#[cfg(test)]
mod tests;
