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
const BUILD: &str = "litestripe_build_info";

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Starts recording. Before it, and in commands other than `run`, everything below does nothing.
pub fn install() {
    let Ok(handle) = PrometheusBuilder::new().install_recorder() else { return };
    describe_counter!(APPLIED, "Events whose effect is committed, repetitions included");
    describe_counter!(IGNORED, "Events of types that the worker does not handle");
    describe_counter!(DEAD_LETTERS, "Events put aside because they can never be applied");
    describe_counter!(SIGNALS, "Signals that JetStream has stored");
    describe_counter!(PURGED, "Applied events purged to make room for new ones");
    describe_counter!(BACKFILLED, "Events that never arrived, fetched from Stripe into STRIPE_EVENTS");
    describe_counter!(BACKFILLS, "Backfills that this worker made by itself, by how they ended");
    describe_gauge!(STREAM_BYTES, "Bytes in STRIPE_EVENTS");
    describe_gauge!(STREAM_BYTES_MAX, "Bytes at which STRIPE_EVENTS refuses new events");
    describe_gauge!(WAITING, "1 while the worker waits for what the label names");
    describe_gauge!(BUILD, "Always 1; the label tells the version");
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    for name in [APPLIED, IGNORED, DEAD_LETTERS, SIGNALS, PURGED, BACKFILLED] {
        counter!(name).absolute(0);
    }
    for outcome in ["complete", "failed"] {
        counter!(BACKFILLS, "outcome" => outcome).absolute(0);
    }
    waiting_for_database(false);
    waiting_for_signals(false);
    waiting_for_broker(false);
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

/// Everything recorded so far, as Prometheus reads it.
#[must_use]
pub fn render() -> String {
    HANDLE.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// `count` events are committed.
pub fn applied(count: usize) {
    counter!(APPLIED).increment(count as u64);
}

/// An event is of a type that we do not handle.
pub fn ignored() {
    counter!(IGNORED).increment(1);
}

/// An event became a dead letter.
pub fn dead_letter() {
    counter!(DEAD_LETTERS).increment(1);
}

/// `count` signals have their PubAck.
pub fn signals_sent(count: usize) {
    counter!(SIGNALS).increment(count as u64);
}

/// `count` applied events were purged.
pub fn events_purged(count: u64) {
    counter!(PURGED).increment(count);
}

/// A backfill has published `count` events.
pub fn events_backfilled(count: u64) {
    counter!(BACKFILLED).increment(count);
}

/// A backfill has ended, completely or not.
pub fn backfill_ended(is_complete: bool) {
    counter!(BACKFILLS, "outcome" => if is_complete { "complete" } else { "failed" }).increment(1);
}

/// How full the events stream is.
#[expect(clippy::cast_precision_loss, reason = "a gauge is read by people")]
pub fn events_stream_fill(bytes: u64, bytes_max: u64) {
    gauge!(STREAM_BYTES).set(bytes as f64);
    gauge!(STREAM_BYTES_MAX).set(bytes_max as f64);
}

/// Whether a batch waits for the database.
pub fn waiting_for_database(waiting: bool) {
    gauge!(WAITING, "for" => "database").set(f64::from(u8::from(waiting)));
}

/// Whether the worker waits for NATS, or for a stream of its.
pub fn waiting_for_broker(waiting: bool) {
    gauge!(WAITING, "for" => "broker").set(f64::from(u8::from(waiting)));
}

/// Whether signals wait in the outbox because they cannot be published.
pub fn waiting_for_signals(waiting: bool) {
    gauge!(WAITING, "for" => "signals").set(f64::from(u8::from(waiting)));
}
