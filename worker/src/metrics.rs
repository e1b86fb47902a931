//! Names and help texts of the worker's metrics, in one place.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

const APPLIED: &str = "litestripe_worker_events_applied_total";
const IGNORED: &str = "litestripe_worker_events_ignored_total";
const DEAD_LETTERS: &str = "litestripe_worker_dead_letters_total";
const SIGNALS: &str = "litestripe_worker_signals_sent_total";
const PURGED: &str = "litestripe_worker_events_purged_total";
const BACKFILLED: &str = "litestripe_worker_events_backfilled_total";
const BACKFILLS: &str = "litestripe_worker_backfills_total";
const STREAM_BYTES: &str = "litestripe_worker_events_stream_bytes";
const STREAM_BYTES_MAX: &str = "litestripe_worker_events_stream_bytes_max";
const WAITING: &str = "litestripe_worker_waiting";
const PROBLEMS: &str = "litestripe_worker_problems";
const OPEN_QUESTIONS: &str = "litestripe_worker_open_questions";
const FAILING_QUESTIONS: &str = "litestripe_worker_failing_questions";
const OLDEST_QUESTION: &str = "litestripe_worker_oldest_failing_question_seconds";
const STRIPE_REQUESTS: &str = "litestripe_worker_stripe_requests_total";
const BUILD: &str = "litestripe_build_info";

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// The counters without labels. Each shows 0 from the start.
const COUNTERS: [&str; 6] = [APPLIED, IGNORED, DEAD_LETTERS, SIGNALS, PURGED, BACKFILLED];

fn help(name: &str) -> &'static str {
    match name {
        APPLIED => "Events applied and committed, including repeated deliveries",
        IGNORED => "Events skipped because the worker does not handle their type",
        DEAD_LETTERS => "Events moved to STRIPE_DEAD_LETTERS because they can never be applied",
        SIGNALS => "Signals published and stored by JetStream",
        PURGED => {
            "Applied events purged from STRIPE_EVENTS before their maximum age, to make room for new ones"
        }
        BACKFILLED => {
            "Missed events that a backfill fetched from Stripe and stored in STRIPE_EVENTS"
        }
        BACKFILLS => "Scheduled backfills of this worker, by outcome",
        STREAM_BYTES => "Size of STRIPE_EVENTS in bytes",
        STREAM_BYTES_MAX => "Size in bytes at which STRIPE_EVENTS refuses new events",
        WAITING => {
            "1 while the worker waits for the database, the broker, a key for Stripe, or to publish signals"
        }
        PROBLEMS => {
            "Reasons for which the worker is not ready although all it needs answers: see /readyz"
        }
        OPEN_QUESTIONS => "Open questions of all workers, by kind",
        FAILING_QUESTIONS => "Open questions whose last attempt failed, by kind",
        OLDEST_QUESTION => "How long the oldest of those has been open, by kind",
        STRIPE_REQUESTS => "Requests to Stripe's API by outcome, each attempt counted",
        _ => "Always 1; the label is the version of the program",
    }
}

/// Starts recording. Only `run` calls it; without it the functions below do nothing.
pub(crate) fn install() {
    let Ok(handle) = PrometheusBuilder::new().install_recorder() else {
        return;
    };
    for name in COUNTERS {
        describe_counter!(name, help(name));
        counter!(name).absolute(0);
    }
    describe_counter!(BACKFILLS, help(BACKFILLS));
    describe_counter!(STRIPE_REQUESTS, help(STRIPE_REQUESTS));
    for outcome in StripeOutcome::ALL {
        counter!(STRIPE_REQUESTS, "outcome" => outcome.as_str()).absolute(0);
    }
    for name in [
        STREAM_BYTES,
        STREAM_BYTES_MAX,
        WAITING,
        PROBLEMS,
        OPEN_QUESTIONS,
        FAILING_QUESTIONS,
        OLDEST_QUESTION,
        BUILD,
    ] {
        describe_gauge!(name, help(name));
    }
    for outcome in ["complete", "failed"] {
        counter!(BACKFILLS, "outcome" => outcome).absolute(0);
    }
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    waiting_for_database(false);
    waiting_for_signals(false);
    waiting_for_broker(false);
    waiting_for_key(false);
    let upkeep = handle.clone();
    if HANDLE.set(handle).is_ok() {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(5)).await;
                upkeep.run_upkeep();
            }
        });
    }
}

/// Renders all metrics in Prometheus' text format.
pub(crate) fn render() -> String {
    HANDLE
        .get()
        .map(PrometheusHandle::render)
        .unwrap_or_default()
}

pub(crate) fn applied(count: usize) {
    counter!(APPLIED).increment(count as u64);
}

pub(crate) fn ignored() {
    counter!(IGNORED).increment(1);
}

pub(crate) fn dead_letter() {
    counter!(DEAD_LETTERS).increment(1);
}

pub(crate) fn signals_sent(count: usize) {
    counter!(SIGNALS).increment(count as u64);
}

pub(crate) fn events_purged(count: u64) {
    counter!(PURGED).increment(count);
}

pub(crate) fn events_backfilled(count: u64) {
    counter!(BACKFILLED).increment(count);
}

pub(crate) fn backfill_ended(is_complete: bool) {
    let outcome = if is_complete { "complete" } else { "failed" };
    counter!(BACKFILLS, "outcome" => outcome).increment(1);
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is read by people")]
pub(crate) fn events_stream_fill(bytes: u64, bytes_max: u64) {
    gauge!(STREAM_BYTES).set(bytes as f64);
    gauge!(STREAM_BYTES_MAX).set(bytes_max as f64);
}

pub(crate) fn waiting_for_database(waiting: bool) {
    gauge!(WAITING, "for" => "database").set(f64::from(waiting));
}

/// Waiting for NATS, or for one of the streams.
pub(crate) fn waiting_for_broker(waiting: bool) {
    gauge!(WAITING, "for" => "broker").set(f64::from(waiting));
}

/// Signals wait in the outbox because they cannot be published.
pub(crate) fn waiting_for_signals(waiting: bool) {
    gauge!(WAITING, "for" => "signals").set(f64::from(waiting));
}

/// Thin events wait for a key of their mode.
pub(crate) fn waiting_for_key(waiting: bool) {
    gauge!(WAITING, "for" => "stripe_key").set(f64::from(waiting));
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is read by people")]
pub(crate) fn problems(count: usize) {
    gauge!(PROBLEMS).set(count as f64);
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is read by people")]
pub(crate) fn questions(kind: &'static str, open: u64, failing: u64, oldest_s: f64) {
    gauge!(OPEN_QUESTIONS, "kind" => kind).set(open as f64);
    gauge!(FAILING_QUESTIONS, "kind" => kind).set(failing as f64);
    gauge!(OLDEST_QUESTION, "kind" => kind).set(oldest_s);
}

/// The outcome of one request to Stripe's API.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StripeOutcome {
    Ok,
    NotFound,
    /// Another 4xx, such as a missing permission.
    Refused,
    /// A rate limit, a server error or no answer.
    Failed,
}

impl StripeOutcome {
    const ALL: [Self; 4] = [Self::Ok, Self::NotFound, Self::Refused, Self::Failed];

    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

pub(crate) fn stripe_request(outcome: StripeOutcome) {
    counter!(STRIPE_REQUESTS, "outcome" => outcome.as_str()).increment(1);
}
