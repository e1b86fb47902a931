//! How signals are published.
//!
//! Owns their order: in one atomic batch, or those of one subscription (or orphan) one after
//! another, each only once the one before has its PubAck. May not know the outbox.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::HeaderName;
use async_nats::jetstream;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::publish::PublishAck;
use bytes::Bytes;
use futures_util::StreamExt as _;
use litestripe_contract::atomic_batch::BatchId;
use litestripe_contract::header::{self, ce};
use litestripe_contract::subject::SIGNALS_STREAM;
use litestripe_contract::{exit, signal::Timestamp};
use litestripe_entity::signal_outbox::Model;
use tokio::time::Instant;
use tracing::{debug, error, info};

use super::cost::{SignalCosts, Way};
use crate::metrics;
use crate::stream::connection;

/// The most bytes of a batch's bodies. The server stages a batch before it stores it.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// An upper bound for a signal's headers, in bytes.
const HEADERS_BYTES: usize = 4 << 10;

/// How long no batches are made after the server has refused one for another reason than that it
/// has a member already, such as a limit.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// How often the stream is asked again whether it accepts batches.
const ASK_EVERY: Duration = Duration::from_secs(60);

/// How long it may take to answer that. Until then signals are sent one by one.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// How long a subscription with a signal that is too large is skipped before the relay tries it
/// again: the signal may be gone.
const SKIP_FOR: Duration = Duration::from_secs(60);

/// Subscriptions that are skipped, at most. With more of them, other subscriptions may have to
/// wait.
const SKIPPED_MAX: usize = 10_000;

/// Subscriptions with a signal in flight, at a time.
const CHAINS_IN_FLIGHT: usize = 256;

/// Publishes signals, and remembers what the server does not accept.
pub(super) struct Sender {
    jetstream: jetstream::Context,
    costs: Arc<SignalCosts>,
    batches: Mutex<Batches>,
    blocked: Mutex<Blocked>,
}

/// Whether batches are made.
#[derive(Default)]
struct Batches {
    /// Whether the stream accepts them.
    are_allowed: bool,
    /// On which of the client's connections that was asked, and when.
    asked: Option<(u64, Instant)>,
    /// None is made until then.
    refused_until: Option<Instant>,
}

/// Subscriptions and orphans with a next signal that is larger than the server accepts. They wait
/// until it does and are skipped meanwhile: if the relay read them every time, enough of them would
/// hold up all others.
#[derive(Default)]
struct Blocked {
    /// The server's limit when they were found.
    max_payload: usize,
    /// When the relay began to skip each of them.
    since: HashMap<String, Instant>,
    /// The outbox ids of the signals that were logged.
    logged: HashSet<i64>,
}

/// What was sent of some signals.
#[derive(Default)]
pub(super) struct Sent {
    /// The outbox ids of those that have their PubAck.
    pub(super) ids: Vec<i64>,
    /// Whether some are larger than the server accepts, and are skipped from now on.
    pub(super) has_blocked: bool,
    /// Why the others wait, if the broker is the reason.
    pub(super) failure: Option<PublishError>,
}

/// A row of the outbox, with its body as it is published.
struct Signal {
    row: Model,
    body: Bytes,
}

/// What became of a batch.
enum BatchOutcome {
    Stored,
    /// No member is stored, or some are stored already: each gets its own answer.
    PublishSingly,
    Unknown(PublishError),
}

impl Sender {
    pub(super) fn new(jetstream: jetstream::Context, costs: Arc<SignalCosts>) -> Self {
        Self {
            jetstream,
            costs,
            batches: Mutex::default(),
            blocked: Mutex::default(),
        }
    }

    /// Asks the server whether the stream accepts batches, once for each connection and once a
    /// minute.
    pub(super) async fn ask(&self) {
        let connection = connection(&self.jetstream.client());
        let now = Instant::now();
        let is_known = |(on, at): (u64, Instant)| on == connection && now - at < ASK_EVERY;
        if locked(&self.batches).asked.is_some_and(is_known) {
            return;
        }
        let asking = self.jetstream.get_stream(SIGNALS_STREAM);
        let Ok(Ok(stream)) = tokio::time::timeout(ANSWER_MAX, asking).await else {
            // The next round asks again.
            locked(&self.batches).are_allowed = false;
            return;
        };
        let are_allowed = stream.cached_info().config.allow_atomic_publish;
        let mut batches = locked(&self.batches);
        if batches.asked.is_none() && !are_allowed {
            info!(
                "signals are sent one by one: stream {SIGNALS_STREAM} does not allow atomic batches (allow_atomic, NATS 2.12)"
            );
        }
        batches.are_allowed = are_allowed;
        batches.asked = Some((connection, now));
    }

    /// Publishes `rows`, which are sorted by id, until `deadline`.
    pub(super) async fn send(&self, rows: Vec<Model>, deadline: Instant) -> Sent {
        let mut sent = Sent::default();
        let mut signals = rows.into_iter().map(Signal::from).collect::<Vec<_>>();
        while !signals.is_empty() && sent.failure.is_none() && Instant::now() < deadline {
            let rest = signals.split_off(batch_length(&signals));
            let batch = std::mem::replace(&mut signals, rest);
            self.send_some(batch, deadline, &mut sent).await;
        }
        metrics::signals_sent(sent.ids.len());
        sent
    }

    async fn send_some(&self, signals: Vec<Signal>, deadline: Instant, sent: &mut Sent) {
        let (count, began) = (signals.len(), Instant::now());
        let way = self.way(&signals, began);
        if way == Way::Batch {
            match self.send_batch(&signals, deadline).await {
                BatchOutcome::Stored => {
                    signals.iter().for_each(Signal::record_stored);
                    sent.ids.extend(signals.iter().map(|signal| signal.row.id));
                    return self.record(way, count, began);
                }
                BatchOutcome::Unknown(error) => {
                    sent.failure = Some(error);
                    return;
                }
                BatchOutcome::PublishSingly => {}
            }
        }
        let chains = futures_util::stream::iter(chains(signals));
        let mut sending = chains
            .map(|chain| self.send_chain(chain, deadline))
            .buffer_unordered(CHAINS_IN_FLIGHT);
        let before = sent.ids.len();
        while let Some(of_chain) = sending.next().await {
            sent.ids.extend(of_chain.ids);
            sent.has_blocked |= of_chain.has_blocked;
            sent.failure = sent.failure.take().or(of_chain.failure);
        }
        if way == Way::OneByOne && sent.ids.len() - before == count {
            self.record(way, count, began);
        }
    }

    fn way(&self, signals: &[Signal], now: Instant) -> Way {
        let max_payload = self.jetstream.client().max_payload();
        let fits = |signal: &Signal| signal.body.len() + HEADERS_BYTES <= max_payload;
        let batches = locked(&self.batches);
        let is_refused = batches.refused_until.is_some_and(|until| now < until);
        if batches.are_allowed && !is_refused && signals.iter().all(fits) {
            self.costs.choose(signals.len(), now)
        } else {
            Way::OneByOne
        }
    }

    fn record(&self, way: Way, count: usize, began: Instant) {
        let now = Instant::now();
        self.costs.record(way, count, now - began, now);
    }

    /// Publishes `signals` as one batch, in their order.
    async fn send_batch(&self, signals: &[Signal], deadline: Instant) -> BatchOutcome {
        let client = self.jetstream.client();
        let id = BatchId::new(&client);
        let Some((last, others)) = signals.split_last() else {
            return BatchOutcome::Stored;
        };
        for (index, signal) in others.iter().enumerate() {
            let mut headers = signal.headers();
            id.add(&mut headers, index + 1);
            let body = signal.body.clone();
            let sending = client.publish_with_headers(signal.row.subject.clone(), headers, body);
            if sending.await.is_err() {
                return BatchOutcome::PublishSingly;
            }
        }
        let mut headers = last.headers();
        id.add_last(&mut headers, signals.len());
        let committing = self.publish(last, headers);
        match tokio::time::timeout_at(deadline, committing).await {
            Ok(Ok(ack)) if id.is_stored(&ack, signals.len()) => BatchOutcome::Stored,
            Ok(Ok(_)) => self.refuse_batches("it acknowledged one message of the batch"),
            Ok(Err(error)) => self.outcome_of(error),
            Err(_) => BatchOutcome::Unknown(PublishError::new(PublishErrorKind::TimedOut)),
        }
    }

    fn outcome_of(&self, error: PublishError) -> BatchOutcome {
        match error.kind() {
            // The members may or may not be stored.
            PublishErrorKind::TimedOut
            | PublishErrorKind::StreamNotFound
            | PublishErrorKind::BrokenPipe => BatchOutcome::Unknown(error),
            // A worker died, or lost its connection, before it removed signals that were sent.
            _ if code(&error) == Some(ErrorCode::ATOMIC_PUBLISH_CONTAINS_DUPLICATE_MESSAGE) => {
                BatchOutcome::PublishSingly
            }
            _ => self.refuse_batches(&exit::chain(&error)),
        }
    }

    fn refuse_batches(&self, reason: &str) -> BatchOutcome {
        debug!("a batch of signals was refused, sending them one by one: {reason}");
        locked(&self.batches).refused_until = Some(Instant::now() + REFUSED_FOR);
        BatchOutcome::PublishSingly
    }

    /// Publishes the signals of one subscription, up to the first that fails.
    async fn send_chain(&self, chain: Vec<Signal>, deadline: Instant) -> Sent {
        let mut sent = Sent::default();
        for signal in chain {
            let publishing = self.publish(&signal, signal.headers());
            match tokio::time::timeout_at(deadline, publishing).await {
                Ok(Ok(_)) => {
                    signal.record_stored();
                    sent.ids.push(signal.row.id);
                }
                Ok(Err(error)) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                    sent.has_blocked = self.block(signal.row.entity_id, signal.row.id);
                    break;
                }
                Ok(Err(error)) => {
                    sent.failure = Some(error);
                    break;
                }
                Err(_) => break,
            }
        }
        sent
    }

    async fn publish(
        &self,
        signal: &Signal,
        headers: HeaderMap,
    ) -> Result<PublishAck, PublishError> {
        let (subject, body) = (signal.row.subject.clone(), signal.body.clone());
        let ack = (self.jetstream).publish_with_headers(subject, headers, body);
        ack.await?.await
    }

    /// Skips the subscription, with all signals behind this one. Logs each signal once. Returns
    /// whether it is skipped from now on.
    fn block(&self, entity_id: String, id: i64) -> bool {
        let mut blocked = locked(&self.blocked);
        if blocked.since.len() >= SKIPPED_MAX {
            return false;
        }
        blocked.since.insert(entity_id, Instant::now());
        if blocked.logged.insert(id) {
            error!(
                outbox_id = id,
                "signal {id} is larger than the NATS server's max_payload: raise it, the signal waits"
            );
        }
        true
    }

    /// Returns the subscriptions and orphans to skip now. Drops those that were skipped for
    /// [`SKIP_FOR`], and all when the server's limit has changed.
    pub(super) fn refresh_skipped(&self) -> Vec<String> {
        let mut blocked = locked(&self.blocked);
        let max_payload = self.jetstream.client().max_payload();
        if blocked.max_payload != max_payload {
            *blocked = Blocked {
                max_payload,
                ..Blocked::default()
            };
        }
        blocked.since.retain(|_, since| since.elapsed() < SKIP_FOR);
        blocked.since.keys().cloned().collect()
    }

    /// Whether any subscription is skipped.
    pub(super) fn is_skipping(&self) -> bool {
        !locked(&self.blocked).since.is_empty()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn code(error: &PublishError) -> Option<ErrorCode> {
    let refused: &jetstream::Error = error.source()?.downcast_ref()?;
    Some(refused.error_code())
}

/// Returns how many of the first signals may be in one batch: at least one.
fn batch_length(signals: &[Signal]) -> usize {
    let mut bytes = 0;
    let fitting = signals.iter().take_while(|signal| {
        bytes += signal.body.len();
        bytes <= BATCH_BYTES_MAX
    });
    fitting.count().clamp(1, signals.len().max(1))
}

/// Groups the signals by subscription or orphan, each group in its order.
fn chains(signals: Vec<Signal>) -> Vec<Vec<Signal>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut chains: Vec<Vec<Signal>> = Vec::new();
    for signal in signals {
        let place = *places
            .entry(signal.row.entity_id.clone())
            .or_insert_with(|| {
                chains.push(Vec::new());
                chains.len() - 1
            });
        chains[place].push(signal);
    }
    chains
}

impl From<Model> for Signal {
    fn from(mut row: Model) -> Self {
        let body = std::mem::take(&mut row.body).into();
        Self { row, body }
    }
}

impl Signal {
    fn record_stored(&self) {
        metrics::signal_stored(self.row.received_at_ms);
    }

    fn headers(&self) -> HeaderMap {
        let row = &self.row;
        let mut headers = HeaderMap::new();
        let mut insert = |name, value: &str| headers.insert(HeaderName::from_static(name), value);
        insert(header::MESSAGE_ID, &row.message_id);
        insert(ce::SPECVERSION, "1.0");
        insert(ce::ID, &row.message_id);
        insert(ce::SOURCE, ce::SOURCE_VALUE);
        insert(ce::TYPE, &format!("{}{}", ce::TYPE_PREFIX, row.subject));
        insert(ce::SUBJECT, &row.entity_id);
        insert(ce::DATACONTENTTYPE, "application/json");
        if let Ok(created) = Timestamp::from_unix(row.event_created) {
            insert(ce::TIME, &created.to_string());
        }
        if let Some(traceparent) = &row.traceparent {
            insert(header::TRACEPARENT, traceparent);
        }
        if let Some(tracestate) = &row.tracestate {
            insert(header::TRACESTATE, tracestate);
        }
        headers
    }
}
