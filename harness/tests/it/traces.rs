//! Traces: one linked story from the delivery to the subscriber, and nothing of it unless an
//! operator asks for it. The programs are the real ones; the collector decodes what they send.

use std::time::Duration;

use bytes::Bytes;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_harness::bridge::{Bridge, DatabaseKind, HOOK, Options, SECRET};
use litestripe_harness::collector::{Collector, Ids, Span};
use litestripe_harness::proxy::{Mode, Proxy};
use litestripe_harness::stripe::api::{API_KEY, Api, Trouble};
use litestripe_harness::stripe::{self, Delivery, Event, Purchase};
use litestripe_harness::{eventually, port};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::orphans::{COMPLETED, CREATED, DEADLINE, now};
use crate::stripe_api::{SUBSCRIPTIONS, there_and_back, until_certain, with_key};

on_both_databases!(
    one_story_leads_from_the_delivery_to_the_subscriber,
    thin_event_is_in_one_trace_with_what_it_leads_to,
);

/// The trace to which a proxy in front of ingress adds a delivery.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const TRACESTATE: &str = "vendor=opaque";

const PERSONAL: &str = "PERSONAL@example.com";

async fn one_story_leads_from_the_delivery_to_the_subscriber(database: DatabaseKind) {
    let collector = Collector::start().await;
    let token = NamedTempFile::new().expect("a file can be made");
    let put_token = |text| std::fs::write(token.path(), text).expect("it can be written");
    put_token("authorization=Bearer%20first\n");
    let options = traced(Options::new(database), &collector)
        .ingress(
            "OTEL_EXPORTER_OTLP_HEADERS_FILE",
            token.path().display().to_string(),
        )
        .ingress("LITESTRIPE_LOG_FORMAT", "json")
        .ingress("RUST_LOG", "debug");
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now());
    let changes = json!({ "customer_details": { "email": PERSONAL } });
    deliver(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created, changes),
    )
    .await;
    bridge.wait_until_applied().await;
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    deliver(&bridge, &event).await;
    let signals = bridge.check().await;

    // Ingress continues the trace of its caller, and the event carries it on.
    let id = event.value["id"].as_str().expect("an event has an id");
    let is_delivery = |span: &Span| span.attribute("stripe.event.id") == id;
    let delivery = collector.span("the delivery's span", is_delivery).await;
    assert_eq!(delivery.service, "litestripe-ingress");
    assert_eq!(delivery.name, "POST /ls/hook/{uuid}");
    assert_eq!(delivery.kind, SpanKind::Server);
    assert_eq!(
        (delivery.ids.trace.as_str(), delivery.parent.as_str()),
        (TRACE, CALLER)
    );
    assert_eq!(delivery.tracestate, TRACESTATE);
    assert_eq!(delivery.attribute("http.response.status_code"), "200");
    assert_eq!(delivery.attribute("litestripe.outcome"), "stored");
    let stored = bridge.stream(EVENTS_STREAM).await.get_raw_message(2).await;
    let stored = stored.expect("it is the second event").headers;
    let carried = stored.get("traceparent").expect("it carries the trace");
    assert_eq!(Ids::from_traceparent(carried.as_str()), delivery.ids);
    assert_eq!(
        stored.get("tracestate").map(|state| state.as_str()),
        Some(TRACESTATE)
    );

    // The worker's span of the event is below it, and the batch's links to it.
    let is_event = |span: &Span| span.attribute("messaging.message.id") == id;
    let applied = collector.span("the event's span", is_event).await;
    assert_eq!(applied.service, "litestripe-worker");
    assert_eq!(applied.name, format!("process stripe.events.{CREATED}"));
    assert_eq!(applied.kind, SpanKind::Consumer);
    assert_eq!(applied.ids.trace, TRACE);
    assert_eq!(applied.parent, delivery.ids.span);
    assert_eq!(
        applied.attribute("stripe.subscription.id"),
        purchase.subscription
    );
    let is_batch = |span: &Span| span.links.contains(&delivery.ids);
    let batch = collector.span("the batch's span", is_batch).await;
    assert_eq!(
        (batch.name.as_str(), batch.parent.as_str()),
        ("process STRIPE_EVENTS", "")
    );
    assert_ne!(batch.ids.trace, TRACE, "it serves several deliveries");
    assert_eq!(applied.links.as_slice(), std::slice::from_ref(&batch.ids));
    let is_transaction = |span: &Span| span.parent == batch.ids.span;
    let transaction = collector
        .span("the transaction's span", is_transaction)
        .await;
    assert_eq!(transaction.name, "transaction");
    assert_eq!(transaction.ids.trace, batch.ids.trace);
    let system = match database {
        DatabaseKind::Sqlite => "sqlite",
        DatabaseKind::Postgres => "postgresql",
    };
    assert_eq!(transaction.attribute("db.system.name"), system);

    // The signal carries it on to subscribers, and its publication links to it.
    let of_event = |signal: &Value| signal["event"]["id"] == id;
    let signal = signals.iter().find(|signal| of_event(&signal.body));
    let headers = &signal.expect("the event is signalled").headers;
    assert_eq!(Ids::from_traceparent(&headers["traceparent"]), applied.ids);
    assert_eq!(headers["tracestate"], TRACESTATE);
    // One whose PubAck is late is published again.
    let is_publication = |span: &Span| {
        span.name == "send LITESTRIPE_SIGNALS"
            && span.links.contains(&applied.ids)
            && span.attribute("litestripe.signals_sent") == "1"
    };
    let publication = collector
        .span("the publication's span", is_publication)
        .await;
    assert_eq!(publication.kind, SpanKind::Producer);

    // JSON log lines name the span in which they are written.
    let log = bridge.ingress().log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let stored = |line: &Value| line["message"] == format!("stored {id}");
    let line = lines.into_iter().find(stored).expect("it is logged");
    assert_eq!(line["trace_id"], TRACE);
    assert_eq!(line["span_id"], delivery.ids.span.as_str());

    let has_sent = |token: &str| {
        let requests = collector.requests();
        let mut tokens = requests
            .iter()
            .map(|(headers, _)| headers.get("authorization"));
        tokens.any(|sent| sent.is_some_and(|sent| sent == token))
    };
    assert!(has_sent("Bearer first"));
    put_token("authorization=Bearer%20second");
    eventually("the new token to be sent", DEADLINE, async || {
        deliver(&bridge, &event).await;
        has_sent("Bearer second")
            .then_some(())
            .ok_or_else(|| "it is not".to_owned())
    })
    .await;
    let secrets = [HOOK, SECRET, PERSONAL, &purchase.customer];
    check_that_nothing_secret_was_sent(&bridge, &collector, &secrets).await;
}

#[tokio::test]
async fn calls_to_stripe_are_spans_with_request_ids_and_lead_to_the_signals() {
    let (api, collector) = (Api::start().await, Collector::start().await);
    let options = traced(with_key(DatabaseKind::Sqlite, &api), &collector);
    let bridge = Bridge::start(options.worker("OTEL_SERVICE_NAME", "billing")).await;
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    api.answer_next(SUBSCRIPTIONS, Trouble::status(500));
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    until_certain(&bridge, &purchase).await;

    let call = async |status: &str| {
        let is_call = |span: &Span| {
            span.kind == SpanKind::Client && span.attribute("http.response.status_code") == status
        };
        let call = collector.span("a request's span", is_call).await;
        assert_eq!(call.service, "billing");
        assert_eq!(call.name, "GET /v1/subscriptions/{id}");
        assert_eq!(call.attribute("server.address"), "127.0.0.1");
        assert_eq!(call.attribute("stripe.request_id"), "req_ofTheStub");
        call
    };
    let (failed, answered) = (call("500").await, call("200").await);
    assert!(failed.is_error && !answered.is_error);
    assert_eq!(answered.attribute("http.request.resend_count"), "1");
    let asked = collector
        .span("the question's span", |span| span.name == "ask fetch")
        .await;
    assert_eq!(
        (&failed.parent, &answered.parent),
        (&asked.ids.span, &asked.ids.span)
    );

    // It is below the event that led to it, which no caller has put into a trace.
    let is_event = |span: &Span| span.ids.span == asked.parent;
    let event = collector.span("the event's span", is_event).await;
    assert_eq!(event.service, "billing");
    assert_eq!(event.ids.trace, asked.ids.trace);

    // What Stripe answered enters the stream as an event of that trace.
    let is_snapshot = |span: &Span| span.name == "process stripe.events.litestripe.snapshot";
    let snapshot = collector.span("the snapshot's span", is_snapshot).await;
    assert_eq!(
        (&snapshot.ids.trace, &snapshot.parent),
        (&asked.ids.trace, &asked.ids.span)
    );
    let signals = bridge.check().await;
    let last = signals.last().expect("the fetch is signalled");
    assert_eq!(
        Ids::from_traceparent(&last.headers["traceparent"]),
        snapshot.ids
    );
    let secrets = [API_KEY, &purchase.customer];
    check_that_nothing_secret_was_sent(&bridge, &collector, &secrets).await;
}

async fn thin_event_is_in_one_trace_with_what_it_leads_to(database: DatabaseKind) {
    let (api, collector) = (Api::start().await, Collector::start().await);
    let bridge = Bridge::start(traced(with_key(database, &api), &collector)).await;
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    // The first attempt fails.
    api.answer_next(SUBSCRIPTIONS, Trouble::status(401));
    let created = format!("v1.{CREATED}");
    let thin = purchase.subscription_notification(&created, now() * 1000);
    deliver_body(&bridge, thin.body()).await;
    let answered = |span: &Span| span.name == "process stripe.events.litestripe.snapshot";
    let snapshot = collector.span("the snapshot's span", answered).await;
    let signals = bridge.check().await;

    let parent = async |span: &Span| {
        let parent = span.parent.clone();
        let is_parent = |span: &Span| span.ids.span == parent;
        collector.span("the span above", is_parent).await
    };
    let asked = parent(&snapshot).await;
    let event = parent(&asked).await;
    let delivery = parent(&event).await;
    assert_eq!(
        [&asked, &event, &delivery].map(|span| span.name.as_str()),
        [
            "ask notification",
            &format!("process stripe.events.{created}"),
            "POST /ls/hook/{uuid}"
        ]
    );
    let is_failure = |span: &Span| span.name == asked.name && span.is_error;
    let failure = collector.span("the failed attempt", is_failure).await;
    assert_eq!(
        (&failure.parent, failure.attribute("error.type")),
        (&event.ids.span, "no_answer")
    );
    assert!(!asked.is_error);
    assert_eq!(delivery.parent, CALLER);
    assert_eq!(snapshot.tracestate, TRACESTATE);
    let last = signals.last().expect("it is signalled");
    assert_eq!(
        Ids::from_traceparent(&last.headers["traceparent"]),
        snapshot.ids
    );
    assert_eq!(snapshot.ids.trace, TRACE);
}

#[tokio::test]
async fn poison_is_in_the_trace_of_its_delivery() {
    let collector = Collector::start().await;
    let options = traced(Options::new(DatabaseKind::Sqlite), &collector)
        .worker("LITESTRIPE_LOG_FORMAT", "json");
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now());
    let poison = json!({ "status": PERSONAL, "customer": 7 });
    deliver(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, poison),
    )
    .await;
    let is_stored = |span: &Span| span.name == "send STRIPE_DEAD_LETTERS";
    let stored = collector.span("the dead letter's span", is_stored).await;
    assert_eq!(stored.ids.trace, TRACE);
    assert_eq!(stored.attribute("error.type"), "poison");
    assert!(stored.is_error);
    let is_delivery = |span: &Span| span.ids.span == stored.parent;
    let delivery = collector.span("the delivery's span", is_delivery).await;
    assert_eq!(delivery.name, "POST /ls/hook/{uuid}");
    let links_to_it = |span: &Span| span.links.contains(&delivery.ids);
    let batch = collector.span("the batch's span", links_to_it).await;
    assert_eq!(batch.name, "process STRIPE_EVENTS");

    let log = bridge.workers[0].log();
    let is_dead = |line: &&str| line.contains("is now a dead letter");
    let line = log.lines().find(is_dead).expect("it is logged");
    let line: Value = serde_json::from_str(line).expect("it is JSON");
    assert_eq!(line["trace_id"], TRACE);
    assert_eq!(line["span_id"], stored.ids.span.as_str());
    check_that_nothing_secret_was_sent(&bridge, &collector, &[PERSONAL]).await;
}

#[tokio::test]
async fn batch_links_to_each_of_its_deliveries() {
    const EVENTS: usize = 200;
    let collector = Collector::start().await;
    let options = traced(Options::new(DatabaseKind::Sqlite), &collector);
    let mut bridge = Bridge::start(options.workers(0)).await;
    let purchase = Purchase::new(now());
    for second in 0..EVENTS {
        let second = i64::try_from(second).expect("it is small");
        let event = purchase.subscription_event(CREATED, purchase.created + second, json!({}));
        deliver(&bridge, &event).await;
    }
    bridge.start_worker();
    // The broker usually sends more than half of them at once: more than the 128 links that a span
    // may have by default.
    eventually("links to all deliveries", DEADLINE, async || {
        let spans = collector.spans();
        let batches = spans
            .iter()
            .filter(|span| span.name == "process STRIPE_EVENTS");
        let counts: Vec<_> = batches
            .map(|batch| {
                let events = batch.attribute("messaging.batch.message_count");
                (events.parse::<usize>().ok(), batch.links.len())
            })
            .collect();
        assert!(
            counts.iter().all(|(events, links)| *events == Some(*links)),
            "{counts:?}"
        );
        let linked: usize = counts.iter().map(|(_, links)| links).sum();
        (linked == EVENTS)
            .then_some(())
            .ok_or(format!("{counts:?}"))
    })
    .await;
}

#[tokio::test]
async fn nothing_is_sent_and_contexts_pass_unchanged_unless_an_endpoint_is_set() {
    let (api, collector) = (Api::start().await, Collector::start().await);
    let plain = with_key(DatabaseKind::Sqlite, &api)
        .ingress("LITESTRIPE_LOG_FORMAT", "json")
        .ingress("RUST_LOG", "trace");
    let disabled = traced(plain.clone(), &collector)
        .ingress("OTEL_SDK_DISABLED", "true")
        .worker("OTEL_TRACES_EXPORTER", "none");
    for options in [plain, disabled] {
        let bridge = Bridge::start(options).await;
        let purchase = Purchase::new(now());
        deliver(
            &bridge,
            &purchase.subscription_event(CREATED, purchase.created, json!({})),
        )
        .await;
        let thin = Purchase::new(now() - 60);
        api.put_subscription(thin.subscription());
        let created = thin.subscription_notification(&format!("v1.{CREATED}"), now() * 1000);
        deliver_body(&bridge, created.body()).await;
        eventually("both rows", DEADLINE, async || {
            let rows = bridge.rows().await;
            (rows.len() == 2).then_some(()).ok_or(format!("{rows:?}"))
        })
        .await;
        let signals = bridge.check().await;
        assert_eq!(signals.len(), 2, "{signals:#?}");
        for signal in signals {
            assert_eq!(signal.headers["traceparent"], traceparent());
            assert_eq!(signal.headers["tracestate"], TRACESTATE);
        }
        stop(&bridge).await;
        let log = bridge.ingress().log();
        assert!(
            log.contains("stored evt_") && !log.contains("trace_id"),
            "{log}"
        );
    }
    assert_eq!(collector.requests().len(), 0);
}

/// Also the log of a program whose traces are recorded has no line about them.
#[tokio::test]
async fn collector_that_is_away_is_logged_once_and_gets_spans_when_it_is_back() {
    let collector = Collector::start().await;
    let proxy = Proxy::start(collector.port()).await;
    proxy.set(Mode::Cut);
    let options = traced(Options::new(DatabaseKind::Sqlite), &collector);
    let bridge = Bridge::start(away(options, proxy.port())).await;
    let purchase = Purchase::new(now());
    let story =
        |seconds| purchase.checkout_session_event(COMPLETED, purchase.created + seconds, json!({}));
    let nodes = || bridge.workers.iter().chain(&bridge.ingress);
    deliver(&bridge, &story(0)).await;
    for node in nodes() {
        node.wait_for_log("cannot send traces to http://127.0.0.1", DEADLINE)
            .await;
    }
    deliver(&bridge, &story(1)).await;
    bridge.check().await;

    proxy.set(Mode::Pass);
    for node in nodes() {
        // A program tries again as soon as it has spans.
        eventually("traces to be sent again", DEADLINE, async || {
            deliver(&bridge, &story(2)).await;
            let is_sent = node.log().contains("traces are sent again");
            is_sent.then_some(()).ok_or_else(|| node.log())
        })
        .await;
        assert_eq!(node.count_in_log("cannot send traces"), 1, "{}", node.log());
        assert!(!node.log().contains("STRIPE_EVENTS{"), "{}", node.log());
        assert!(!node.log().contains("/ls/hook"), "{}", node.log());
    }
    collector
        .span("a span", |span| span.service == "litestripe-worker")
        .await;
}

#[tokio::test]
async fn collector_that_does_not_answer_delays_neither_deliveries_nor_the_stop() {
    let proxy = Proxy::start(port::free()).await;
    proxy.set(Mode::HalfOpen);
    let collector = Collector::start().await;
    // Longer than a test waits for the end of a program.
    let minutes = Duration::from_secs(600).as_millis().to_string();
    let options = traced(Options::new(DatabaseKind::Sqlite), &collector)
        .ingress("OTEL_EXPORTER_OTLP_TIMEOUT", minutes.clone())
        .worker("OTEL_EXPORTER_OTLP_TIMEOUT", minutes)
        // So that most spans find the queue full.
        .ingress("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        .worker("OTEL_BSP_MAX_QUEUE_SIZE", "8");
    let bridge = Bridge::start(away(options, proxy.port())).await;
    let purchase = Purchase::new(now());
    for second in 0..30 {
        let event =
            purchase.checkout_session_event(COMPLETED, purchase.created + second, json!({}));
        deliver(&bridge, &event).await;
    }
    assert!(!bridge.check().await.is_empty());
    stop(&bridge).await;
}

/// An operator's sampler decides about deliveries without a context, and a caller's decision holds.
#[tokio::test]
async fn only_what_the_sampler_takes_is_recorded() {
    let collector = Collector::start().await;
    let options = traced(Options::new(DatabaseKind::Sqlite), &collector)
        .ingress("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        .worker("OTEL_TRACES_SAMPLER", "parentbased_always_off");
    let bridge = Bridge::start(options).await;
    let (recorded, left_out) = (Purchase::new(now()), Purchase::new(now()));
    let created =
        |purchase: &Purchase| purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.deliver(&created(&left_out)).await;
    deliver(&bridge, &created(&recorded)).await;
    let signals = bridge.check().await;
    // Before the stop, which gives up what the collector does not take within 2 s.
    for name in [
        "POST /ls/hook/{uuid}",
        &format!("process stripe.events.{CREATED}"),
    ] {
        let is_recorded = |span: &Span| span.ids.trace == TRACE && span.name == name;
        collector.span(name, is_recorded).await;
    }
    stop(&bridge).await;
    let spans = collector.spans();
    assert!(
        spans.iter().all(|span| span.ids.trace == TRACE),
        "{spans:#?}"
    );
    let unrecorded = signals
        .iter()
        .filter(|signal| signal.headers["traceparent"].ends_with("-00"));
    assert_eq!(
        unrecorded.count(),
        1,
        "a subscriber learns that it is not recorded"
    );
}

/// Has the programs send their spans to `collector`.
fn traced(options: Options, collector: &Collector) -> Options {
    let settings = collector.settings().into_iter();
    settings.fold(options, |options, (name, value)| {
        options.ingress(name, value.clone()).worker(name, value)
    })
}

/// Has the programs send them to another port.
fn away(options: Options, port: u16) -> Options {
    let (name, endpoint) = (
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        format!("http://127.0.0.1:{port}/v1/traces"),
    );
    options
        .ingress(name, endpoint.clone())
        .worker(name, endpoint)
}

fn traceparent() -> String {
    format!("00-{TRACE}-{CALLER}-01")
}

/// Delivers an event within the trace of a proxy.
async fn deliver(bridge: &Bridge, event: &Event) {
    deliver_body(bridge, event.body()).await;
}

async fn deliver_body(bridge: &Bridge, body: Bytes) {
    let delivery = Delivery::new(body, SECRET);
    let request = stripe::client()
        .post(bridge.hook())
        .header(
            "Stripe-Signature",
            delivery.signature().expect("it is signed"),
        )
        .header("traceparent", traceparent())
        .header("tracestate", TRACESTATE)
        .body(delivery.body().clone());
    assert_eq!(request.send().await.expect("ingress answers").status(), 200);
}

async fn stop(bridge: &Bridge) {
    for node in bridge.workers.iter().chain(&bridge.ingress) {
        assert!(node.stop().await.success(), "{}", node.log());
    }
}

/// Stops the programs first: until then they send spans.
async fn check_that_nothing_secret_was_sent(
    bridge: &Bridge,
    collector: &Collector,
    secrets: &[&str],
) {
    stop(bridge).await;
    for (_, body) in collector.requests() {
        let text = String::from_utf8_lossy(&body);
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} was sent: {text}");
        }
    }
}
