//! Names and help texts of the worker's metrics, in one place.
//!
//! A scrape reads neither the database nor the broker: `figures` and `stream::findings` read every few
//! seconds what these hold, whether anybody scrapes or not. So a scrape costs them nothing, and is
//! answered at once while they are away.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use litestripe_contract::signal::OrphanReason;
use litestripe_contract::subject::DEAD_LETTERS_STREAM;
use litestripe_domain::question::Kind;
use metrics::{
    Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use time::OffsetDateTime;

use crate::start::broker::STREAMS;
use crate::store::figures::Figures;
use crate::stream::seen::Seen;

const APPLIED: &str = "litestripe_worker_events_applied_total";
const IGNORED: &str = "litestripe_worker_events_ignored_total";
const DEAD_LETTERS: &str = "litestripe_worker_dead_letters_total";
const SIGNALS: &str = "litestripe_worker_signals_sent_total";
const PURGED: &str = "litestripe_worker_events_purged_total";
const BACKFILLED: &str = "litestripe_worker_events_backfilled_total";
const BACKFILLS: &str = "litestripe_worker_backfills_total";
const STRIPE_REQUESTS: &str = "litestripe_worker_stripe_requests_total";

const WAITING: &str = "litestripe_worker_waiting";
const PROBLEMS: &str = "litestripe_worker_problems";
const EVENTS_PENDING: &str = "litestripe_worker_events_pending";
const ACK_PENDING: &str = "litestripe_worker_ack_pending";
const OLDEST_UNAPPLIED: &str = "litestripe_worker_oldest_unapplied_seconds";
const STORED_DEAD_LETTERS: &str = "litestripe_worker_stored_dead_letters";
const PENDING_DEAD_LETTERS: &str = "litestripe_worker_pending_dead_letters";
const STREAM_BYTES: &str = "litestripe_worker_stream_bytes";
const STREAM_BYTES_MAX: &str = "litestripe_worker_stream_bytes_max";
const OUTBOX_SIGNALS: &str = "litestripe_worker_outbox_signals";
const OUTBOX_OLDEST: &str = "litestripe_worker_outbox_oldest_seconds";
const OPEN_ORPHANS: &str = "litestripe_worker_open_orphans";
const UNCERTAIN_ROWS: &str = "litestripe_worker_uncertain_rows";
const WITHHELD_ROWS: &str = "litestripe_worker_withheld_rows";
const UNFINISHED_REPLAYS: &str = "litestripe_worker_unfinished_replays";
const OPEN_QUESTIONS: &str = "litestripe_worker_open_questions";
const FAILING_QUESTIONS: &str = "litestripe_worker_failing_questions";
const OLDEST_QUESTION: &str = "litestripe_worker_oldest_question_seconds";
const BUILD: &str = "litestripe_build_info";

const COMMIT_DELAY: &str = "litestripe_worker_commit_delay_seconds";
const SIGNAL_DELAY: &str = "litestripe_worker_signal_delay_seconds";
const TRANSACTION: &str = "litestripe_worker_transaction_seconds";
const STRIPE_REQUEST: &str = "litestripe_worker_stripe_request_seconds";

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
static HISTOGRAMS: OnceLock<Histograms> = OnceLock::new();

/// The counters without labels. Each shows 0 from the start.
const COUNTERS: [&str; 6] = [APPLIED, IGNORED, DEAD_LETTERS, SIGNALS, PURGED, BACKFILLED];

const GAUGES: [&str; 19] = [
    WAITING,
    PROBLEMS,
    EVENTS_PENDING,
    ACK_PENDING,
    OLDEST_UNAPPLIED,
    STORED_DEAD_LETTERS,
    PENDING_DEAD_LETTERS,
    STREAM_BYTES,
    STREAM_BYTES_MAX,
    OUTBOX_SIGNALS,
    OUTBOX_OLDEST,
    OPEN_ORPHANS,
    UNCERTAIN_ROWS,
    WITHHELD_ROWS,
    UNFINISHED_REPLAYS,
    OPEN_QUESTIONS,
    FAILING_QUESTIONS,
    OLDEST_QUESTION,
    BUILD,
];

/// From a commit on the same machine to an outage of two hours, in seconds.
const DELAY_BUCKETS: [f64; 16] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
    7200.0,
];

/// From a small batch on a fast disk to the longest time that saving a batch may take.
const TRANSACTION_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
];

/// Up to the longest time that an answer may take.
const STRIPE_BUCKETS: [f64; 8] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];

const HISTOGRAM_BUCKETS: [(&str, &[f64]); 4] = [
    (COMMIT_DELAY, &DELAY_BUCKETS),
    (SIGNAL_DELAY, &DELAY_BUCKETS),
    (TRANSACTION, &TRANSACTION_BUCKETS),
    (STRIPE_REQUEST, &STRIPE_BUCKETS),
];

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
        STRIPE_REQUESTS => "Requests to Stripe's API by outcome, each attempt counted",
        WAITING => "1 while the worker waits for this, else 0",
        PROBLEMS => {
            "Reasons for which the worker is not ready although all it needs answers: see /readyz"
        }
        EVENTS_PENDING => "Events in STRIPE_EVENTS not delivered to a worker yet",
        ACK_PENDING => "Events delivered to workers and not acked yet",
        OLDEST_UNAPPLIED => "Age of the oldest event that is not applied, by the broker's clock",
        STORED_DEAD_LETTERS => "Dead letters in STRIPE_DEAD_LETTERS",
        PENDING_DEAD_LETTERS => "Dead letters that cannot be stored in STRIPE_DEAD_LETTERS yet",
        STREAM_BYTES => "Size of the stream in bytes",
        STREAM_BYTES_MAX => "Limit of the stream's size in bytes",
        OUTBOX_SIGNALS => "Signals committed and not yet stored by JetStream; counted up to 10000",
        OUTBOX_OLDEST => "Age of the oldest of them",
        OPEN_ORPHANS => "Payments without a known user, by reason; counted up to 10000",
        UNCERTAIN_ROWS => "Subscriptions whose state is uncertain; counted up to 10000",
        WITHHELD_ROWS => {
            "Subscriptions of which no signal was ever sent, because a rebuild did not find their user or was silent; counted up to 10000"
        }
        UNFINISHED_REPLAYS => {
            "Replays that are running or were interrupted, and lost rows that no replay has rebuilt"
        }
        OPEN_QUESTIONS => "Open questions of all workers, by kind; counted up to 10000",
        FAILING_QUESTIONS => {
            "Open questions whose last attempt failed, by kind; counted up to 10000"
        }
        OLDEST_QUESTION => {
            "How long the oldest open question has waited, by kind: since it was saved if it fails, else since it was due"
        }
        COMMIT_DELAY => "From the receipt of a delivery to the commit of its event",
        SIGNAL_DELAY => "From the receipt of a delivery to the PubAck of a signal of its event",
        TRANSACTION => "Duration of a batch's transaction, with the wait for its connection",
        STRIPE_REQUEST => "Duration of a request to Stripe's API, by outcome",
        BUILD => "Always 1; the labels name the program and its version",
        _ => unreachable!("{name} has no help text"),
    }
}

/// The histograms, at hand: they are recorded for each event.
struct Histograms {
    commit_delay: Histogram,
    signal_delay: Histogram,
    transaction: Histogram,
    stripe_request: [Histogram; StripeOutcome::ALL.len()],
}

/// Starts recording. Only `run` calls it; without it the functions below do nothing.
pub(crate) fn install() {
    let builder =
        HISTOGRAM_BUCKETS
            .into_iter()
            .fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
                builder
                    .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                    .expect("there are buckets")
            });
    let Ok(handle) = builder.install_recorder() else {
        return;
    };
    for name in COUNTERS {
        describe_counter!(name, help(name));
        counter!(name).absolute(0);
    }
    describe_counter!(BACKFILLS, help(BACKFILLS));
    for outcome in ["complete", "failed"] {
        counter!(BACKFILLS, "outcome" => outcome).absolute(0);
    }
    describe_counter!(STRIPE_REQUESTS, help(STRIPE_REQUESTS));
    for outcome in StripeOutcome::ALL {
        counter!(STRIPE_REQUESTS, "outcome" => outcome.as_str()).absolute(0);
    }
    for name in GAUGES {
        describe_gauge!(name, help(name));
    }
    for (name, _) in HISTOGRAM_BUCKETS {
        describe_histogram!(name, help(name));
    }
    let _ = HISTOGRAMS.set(Histograms {
        commit_delay: histogram!(COMMIT_DELAY),
        signal_delay: histogram!(SIGNAL_DELAY),
        transaction: histogram!(TRANSACTION),
        stripe_request: StripeOutcome::ALL
            .map(|outcome| histogram!(STRIPE_REQUEST, "outcome" => outcome.as_str())),
    });
    Collector::default().describe();
    gauge!(BUILD, "program" => env!("CARGO_PKG_NAME"), "version" => env!("CARGO_PKG_VERSION"))
        .set(1.0);
    tables(None);
    streams(None);
    waiting_for_signals(false);
    waiting_for_key(false);
    waiting_for_clocks(false);
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

/// Renders all metrics in Prometheus' text format. `problems` is how many reasons there are for
/// which the worker is not ready although all it needs answers.
pub(crate) fn render(is_connected: bool, problems: usize) -> String {
    let Some(handle) = HANDLE.get() else {
        return String::new();
    };
    waiting("database", DATABASE.is_awaited());
    waiting("broker", BROKER.is_awaited() || !is_connected);
    waiting("operator", problems > 0);
    gauge!(PROBLEMS).set(problems as f64);
    Collector::default().collect();
    handle.render()
}

/// The parts of the worker that wait for the same thing.
#[derive(Debug)]
pub(crate) struct Awaited(AtomicUsize);

pub(crate) static DATABASE: Awaited = Awaited(AtomicUsize::new(0));

/// NATS, or one of the streams.
pub(crate) static BROKER: Awaited = Awaited(AtomicUsize::new(0));

impl Awaited {
    /// Records that one more part waits, until the result is dropped.
    pub(crate) fn begin(&'static self) -> Waiting {
        self.0.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    /// Whether a part waits.
    pub(crate) fn is_awaited(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// A part of the worker that waits.
#[derive(Debug)]
pub(crate) struct Waiting(&'static Awaited);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn waiting(what: &'static str, waits: bool) {
    gauge!(WAITING, "for" => what).set(f64::from(waits));
}

/// Signals wait in the outbox because they cannot be published.
pub(crate) fn waiting_for_signals(waits: bool) {
    waiting("signals", waits);
}

/// Thin events wait for a key of their mode.
pub(crate) fn waiting_for_key(waits: bool) {
    waiting("stripe_key", waits);
}

/// A clock differs from this program's.
pub(crate) fn waiting_for_clocks(waits: bool) {
    waiting("clocks", waits);
}

/// Records that these events are committed, each by the time at which ingress received it.
pub(crate) fn committed(received: impl Iterator<Item = OffsetDateTime>) {
    let Some(histograms) = HISTOGRAMS.get() else {
        return;
    };
    let now = OffsetDateTime::now_utc();
    received.for_each(|received| histograms.commit_delay.record(since(received, now)));
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

/// Records that a signal has its PubAck. `received_at_ms` is when ingress received its event, in
/// milliseconds since the Unix epoch.
pub(crate) fn signal_stored(received_at_ms: Option<i64>) {
    let received = received_at_ms
        .and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok());
    if let (Some(histograms), Some(received)) = (HISTOGRAMS.get(), received) {
        let now = OffsetDateTime::now_utc();
        histograms.signal_delay.record(since(received, now));
    }
}

pub(crate) fn transaction(took: Duration) {
    if let Some(histograms) = HISTOGRAMS.get() {
        histograms.transaction.record(took);
    }
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

/// Records what the tables hold; `None` if the database does not answer.
pub(crate) fn tables(figures: Option<&Figures>) {
    let show = |name, value: fn(&Figures) -> f64| {
        gauge!(name).set(figures.map_or(f64::NAN, value));
    };
    show(OUTBOX_SIGNALS, |figures| figures.signals.count as f64);
    show(OUTBOX_OLDEST, |figures| {
        let oldest = figures.signals.oldest;
        oldest.map_or(0.0, |oldest| since(oldest, figures.now))
    });
    show(UNCERTAIN_ROWS, |figures| figures.uncertain_rows as f64);
    show(WITHHELD_ROWS, |figures| figures.withheld_rows as f64);
    show(UNFINISHED_REPLAYS, |figures| {
        figures.unfinished_replays as f64
    });
    show(PENDING_DEAD_LETTERS, |figures| {
        figures.pending_dead_letters as f64
    });
    for reason in OrphanReason::ALL {
        let open = figures.map_or(f64::NAN, |figures| figures.open_orphans(reason) as f64);
        gauge!(OPEN_ORPHANS, "reason" => reason.as_str()).set(open);
    }
    for kind in Kind::ALL {
        let (open, failing, oldest) = figures.map_or((f64::NAN, f64::NAN, f64::NAN), |figures| {
            let questions = figures.questions(kind);
            (
                questions.open.count as f64,
                questions.failing.count as f64,
                questions.oldest_wait(figures.now).as_seconds_f64(),
            )
        });
        gauge!(OPEN_QUESTIONS, "kind" => kind.as_str()).set(open);
        gauge!(FAILING_QUESTIONS, "kind" => kind.as_str()).set(failing);
        gauge!(OLDEST_QUESTION, "kind" => kind.as_str()).set(oldest);
    }
}

/// Records what the broker holds; `None` if it does not answer. A stream or consumer that does not
/// exist has no figures.
pub(crate) fn streams(seen: Option<&Seen>) {
    let show = |name, value: Option<f64>| gauge!(name).set(value.unwrap_or(f64::NAN));
    let consumer = seen.and_then(|seen| seen.consumer.as_ref());
    show(
        EVENTS_PENDING,
        consumer.map(|consumer| consumer.num_pending as f64),
    );
    show(
        ACK_PENDING,
        consumer.map(|consumer| consumer.num_ack_pending as f64),
    );
    let oldest = seen.and_then(|seen| seen.oldest_unapplied);
    show(OLDEST_UNAPPLIED, oldest.map(|age| age.as_secs_f64()));
    for name in STREAMS {
        let stream = seen.and_then(|seen| seen.stream(name));
        let bytes = stream.map_or(f64::NAN, |stream| stream.state.bytes as f64);
        let limit = stream.map_or(f64::NAN, |stream| match stream.config.max_bytes {
            max if max > 0 => max as f64,
            _ => f64::INFINITY,
        });
        gauge!(STREAM_BYTES, "stream" => name).set(bytes);
        gauge!(STREAM_BYTES_MAX, "stream" => name).set(limit);
        if name == DEAD_LETTERS_STREAM {
            show(
                STORED_DEAD_LETTERS,
                stream.map(|stream| stream.state.messages as f64),
            );
        }
    }
}

/// Returns the seconds from `past` to `now`, not below 0: clocks differ.
fn since(past: OffsetDateTime, now: OffsetDateTime) -> f64 {
    (now - past).as_seconds_f64().max(0.0)
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
    /// In the order of the enum.
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

pub(crate) fn stripe_request(outcome: StripeOutcome, took: Duration) {
    counter!(STRIPE_REQUESTS, "outcome" => outcome.as_str()).increment(1);
    let histograms = HISTOGRAMS.get();
    let of_outcome = histograms.and_then(|all| all.stripe_request.get(outcome as usize));
    if let Some(histogram) = of_outcome {
        histogram.record(took);
    }
}
