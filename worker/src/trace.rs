//! The worker's spans.
//!
//! Owns what they say, by OpenTelemetry's conventions for messages, databases and HTTP: ids of
//! events and subscriptions, counts and outcomes, never a value of a body, a text of an error or the
//! id of a customer. While traces are off no span is made: see `telemetry::traces`.
//!
//! A batch and a publication of signals are traces of their own, because each serves several
//! deliveries. What is done for one event, a question included, is a span in the trace of its
//! delivery, and its signals carry that on: a subscriber's span is then in the same trace, below the
//! event that led to it.

use litestripe_contract::subject::{
    DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM, WORKER_CONSUMER, for_event_type,
};
use litestripe_contract::telemetry::traces::{self, TARGET};
use litestripe_contract::trace::TraceContext;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::question::Question;
use litestripe_entity::signal_outbox::Model;
use tracing::field::Empty;
use tracing::{Span, info_span};
use url::Url;

use crate::error::StoreError;
use crate::settings::DatabaseKind;
use crate::stream::consumer::Poisoned;
use crate::stripe::api::Call;

/// Why an event is not acked, as spans name it: it can never be applied.
pub(crate) const POISON: &str = "poison";

/// The database refuses it, and it is delivered again later.
pub(crate) const REFUSED: &str = "refused";

/// The worker stops, or must not ack. It is delivered again at once.
pub(crate) const HANDED_BACK: &str = "handed_back";

/// The spans of a batch that is applied: its own, which links to its events, and one for each event,
/// in the trace of its delivery. They end when this is dropped.
pub(crate) struct Applying {
    batch: Span,
    /// Each with the index of its message, ascending.
    events: Vec<(usize, Span)>,
}

impl Applying {
    /// Begins the spans of a batch of `messages`, which belong to `deliveries`. What its events lead
    /// to belongs to their spans from now on.
    pub(crate) fn begin(
        messages: usize,
        deliveries: impl Iterator<Item = TraceContext>,
        arrivals: &mut [Arrival],
    ) -> Self {
        let batch = info_span!(
            target: TARGET,
            parent: None,
            "process STRIPE_EVENTS",
            otel.kind = "consumer",
            messaging.system = "nats",
            messaging.operation.name = "process",
            "messaging.operation.type" = "process",
            messaging.destination.name = EVENTS_STREAM,
            messaging.consumer.group.name = WORKER_CONSUMER,
            messaging.batch.message_count = messages,
            otel.status_code = Empty,
            "error.type" = Empty,
        );
        if batch.is_disabled() {
            let events = Vec::new();
            return Self { batch, events };
        }
        traces::link(&batch, deliveries);
        let context = traces::context(&batch);
        let begin = |arrival: &mut Arrival| {
            let event = event(arrival);
            if let Some(delivery) = &arrival.trace {
                traces::set_parent(&event, delivery);
            }
            traces::link(&event, &context);
            arrival.trace = traces::context(&event);
            (arrival.index, event)
        };
        let events = arrivals.iter_mut().map(begin).collect();
        Self { batch, events }
    }

    pub(crate) fn batch(&self) -> &Span {
        &self.batch
    }

    /// Records why nothing of the batch is acked.
    pub(crate) fn record_failure_of_all(&self, why: &'static str) {
        let events = self.events.iter().map(|(_, event)| event);
        for span in events.chain([&self.batch]) {
            record_error(span, why);
        }
    }

    /// Records why the event of the message `index` was not applied.
    pub(crate) fn record_failure(&self, index: usize, why: &'static str) {
        if let Ok(place) = self
            .events
            .binary_search_by_key(&index, |(index, _)| *index)
        {
            record_error(&self.events[place].1, why);
        }
    }
}

fn event(arrival: &Arrival) -> Span {
    let subject = for_event_type(&arrival.event.event_type);
    info_span!(
        target: TARGET,
        parent: None,
        "process",
        otel.name = %format_args!("process {subject}"),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "process",
        "messaging.operation.type" = "process",
        messaging.destination.name = subject,
        messaging.consumer.group.name = WORKER_CONSUMER,
        messaging.message.id = arrival.event.id.as_str(),
        litestripe.stream_sequence = arrival.stream_sequence,
        stripe.subscription.id = arrival.event.stripe_subscription_id(),
        otel.status_code = Empty,
        "error.type" = Empty,
    )
}

/// Begins the span of the transaction that saves `events`.
pub(crate) fn transaction(kind: DatabaseKind, events: usize) -> Span {
    let system = match kind {
        DatabaseKind::Postgres => "postgresql",
        DatabaseKind::Sqlite => "sqlite",
    };
    info_span!(
        target: TARGET,
        "transaction",
        otel.kind = "client",
        db.system.name = system,
        litestripe.events = events,
        otel.status_code = Empty,
        "error.type" = Empty,
    )
}

pub(crate) fn record_saved<T>(span: &Span, saved: &Result<T, StoreError>) {
    if let Err(error) = saved {
        record_error(span, error.disposition().name());
    }
}

/// Begins the span of publishing `signals`, which links to the events that led to them.
pub(crate) fn publication(signals: &[Model]) -> Span {
    let span = info_span!(
        target: TARGET,
        parent: None,
        "send LITESTRIPE_SIGNALS",
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        "messaging.operation.type" = "send",
        messaging.destination.name = SIGNALS_STREAM,
        messaging.batch.message_count = signals.len(),
        litestripe.signals_sent = Empty,
        otel.status_code = Empty,
        "error.type" = Empty,
    );
    if !span.is_disabled() {
        let context = |row: &Model| {
            TraceContext::parse(row.traceparent.as_deref()?, row.tracestate.as_deref())
        };
        let contexts: Vec<_> = signals.iter().filter_map(context).collect();
        traces::link(&span, &contexts);
    }
    span
}

pub(crate) fn record_published(span: &Span, sent: usize, has_failed: bool) {
    span.record("litestripe.signals_sent", sent);
    if has_failed {
        record_error(span, "no_puback");
    }
}

/// Begins the span of asking a question, below the event that led to it, however long ago that was:
/// the answer belongs to the same story.
pub(crate) fn question(question: &Question) -> Span {
    let span = info_span!(
        target: TARGET,
        parent: None,
        "ask",
        otel.name = %format_args!("ask {}", question.kind().as_str()),
        litestripe.question.kind = question.kind().as_str(),
        stripe.event.id = question.event.id.as_str(),
        otel.status_code = Empty,
        "error.type" = Empty,
    );
    if let Some(event) = &question.trace {
        traces::set_parent(&span, event);
    }
    span
}

/// Records that the question which is asked in the current span has no answer yet.
pub(crate) fn record_no_answer() {
    record_error(&Span::current(), "no_answer");
}

/// Begins the span of storing `message` as a dead letter, below its delivery.
pub(crate) fn dead_letter(message: &Poisoned) -> Span {
    let span = info_span!(
        target: TARGET,
        parent: None,
        "send STRIPE_DEAD_LETTERS",
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        "messaging.operation.type" = "send",
        messaging.destination.name = DEAD_LETTERS_STREAM,
        litestripe.stream_sequence = message.stream_sequence(),
        otel.status_code = "ERROR",
        "error.type" = POISON,
    );
    if !span.is_disabled()
        && let Some(delivery) = message.trace()
    {
        traces::set_parent(&span, &delivery);
    }
    span
}

/// Begins the span of one request to Stripe's API at the URL `base`. `attempt` counts from 0.
pub(crate) fn stripe_request(call: &Call<'_>, base: &str, attempt: u64) -> Span {
    let host = |base| Some(Url::parse(base).ok()?.host_str()?.to_owned());
    let method = call.method.as_str();
    info_span!(
        target: TARGET,
        "request",
        otel.name = %format_args!("{method} {}", call.path.template()),
        otel.kind = "client",
        http.request.method = method,
        http.request.resend_count = (attempt > 0).then_some(attempt),
        server.address = host(base),
        url.template = call.path.template(),
        http.response.status_code = Empty,
        stripe.request_id = Empty,
        otel.status_code = Empty,
        "error.type" = Empty,
    )
}

/// Records what Stripe answered. OpenTelemetry: of a client, also a status of 400 to 499 is an
/// error.
pub(crate) fn record_response(span: &Span, response: &reqwest::Result<reqwest::Response>) {
    if span.is_disabled() {
        return;
    }
    let Ok(response) = response else {
        return record_error(span, "no_answer");
    };
    let status = response.status();
    span.record("http.response.status_code", status.as_u16());
    let request_id = response.headers().get("request-id");
    if let Some(id) = request_id.and_then(|id| id.to_str().ok()) {
        span.record("stripe.request_id", id);
    }
    if !status.is_success() {
        record_error(span, status.as_str());
    }
}

pub(crate) fn record_error(span: &Span, error_type: &str) {
    if !span.is_disabled() {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", error_type);
    }
}
