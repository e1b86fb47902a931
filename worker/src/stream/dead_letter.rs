//! Events that can never be applied.
//!
//! Owns storing such an event as a dead letter with its reason. Invariants: a message is terminated
//! only after the PubAck of its dead letter, or once the database holds that it is pending; and a
//! poisoned event does not hold up any other. A dead letter that cannot be stored, for lack of room
//! or because it is too large, is pending: its message must not hold the consumer's ack floor, on
//! which grace periods and purges wait. Its body stays in `STRIPE_EVENTS` until it is stored. An event
//! that an erasure covers becomes no dead letter.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::stream::RawMessageErrorKind;
use async_nats::jetstream::{self};
use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use futures_util::StreamExt as _;
use litestripe_contract::subject::{self, DEAD_LETTERS_STREAM, EVENTS_STREAM};
use litestripe_contract::{exit, header};
use litestripe_domain::arrival::StreamId;
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, debug, error, info, warn};

use crate::erasure::{self, Erasures};
use crate::error::StoreError;
use crate::metrics;
use crate::store::dead_letter as table;
use crate::store::lease::Lease;
use crate::store::{Store, Transaction, detached, question};
use crate::stream::consumer::{Batch, Poisoned};
use crate::trace;
use crate::wait::pause;

/// Bytes of dead letters in flight, at most: beyond it the next batch waits. A single batch that is
/// larger waits until no other is in flight.
const IN_FLIGHT_BYTES_MAX: u32 = 16 << 20;

/// Dead letters of one batch in flight, at most.
const IN_FLIGHT: usize = 16;

/// The pauses between attempts to store a pending dead letter: the first, doubled with each
/// attempt, up to the longest.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(5 * 60);

/// How often it is checked whether one is due.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Pending dead letters read at a time.
const PENDING_BATCH: u64 = 100;

/// The event type of a message if its subject does not have one.
const UNKNOWN_TYPE: &str = "unknown";

/// Stores dead letters, in its own tasks.
#[derive(Clone)]
pub struct DeadLetters {
    letters: Letters,
    tasks: TaskTracker,
    room: Arc<Semaphore>,
}

impl DeadLetters {
    pub fn new(store: &Store, erasures: &Erasures, jetstream: &jetstream::Context) -> Self {
        let room = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX as usize));
        Self {
            letters: Letters::new(store, erasures, jetstream),
            tasks: TaskTracker::new(),
            room,
        }
    }

    /// Stores the `poisoned` messages of `batch` as dead letters, each with its reason. What cannot
    /// be stored is recorded as pending. If that fails too, the message is redelivered. Returns
    /// once the dead letters are in flight, which takes a while only if they are many or large.
    pub async fn store(&self, batch: Batch, mut poisoned: Vec<(usize, String)>) {
        if poisoned.is_empty() {
            return;
        }
        poisoned.sort_by_key(|(index, _)| *index);
        let (indexes, reasons): (Vec<_>, Vec<_>) = poisoned.into_iter().unzip();
        let messages = batch.take(&indexes);
        let bytes = messages.iter().map(Poisoned::bytes).sum::<usize>();
        let bytes = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(IN_FLIGHT_BYTES_MAX);
        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(bytes).await else {
            return;
        };
        let letters = self.letters.clone();
        self.tasks.spawn(async move {
            let poisoned = messages.into_iter().zip(reasons);
            let settle = |(message, reason): (Poisoned, String)| {
                let span = trace::dead_letter(&message);
                settle(&letters, message, reason).instrument(span)
            };
            futures_util::stream::iter(poisoned)
                .for_each_concurrent(IN_FLIGHT, settle)
                .await;
            drop(room);
        });
    }

    /// Waits for the dead letters in flight.
    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Stores the dead letter, or records it as pending. Then terminates the message.
async fn settle(letters: &Letters, message: Poisoned, reason: String) {
    let Some(sequence) = message.stream_sequence() else {
        return error!("cannot store a message without a stream sequence as a dead letter");
    };
    let letter = Letter {
        stream: message.stream(),
        sequence,
        event_type: event_type(message.subject()),
        reason,
    };
    let (body, headers) = message.content();
    let Err(refused) = letters.store(&letter, &body, &headers).await else {
        return message.terminate().await;
    };
    let error = exit::chain(&refused);
    let now = OffsetDateTime::now_utc();
    let pending = table::Pending {
        stream: letter.stream,
        sequence,
        event_type: letter.event_type.clone(),
        reason: letter.reason.clone(),
        error: error.clone(),
        attempts: 1,
        since: now,
    };
    let store = letters.store.clone();
    let recording =
        detached(
            async move { table::insert(store.connection(), pending, now + RETRY_FIRST).await },
        );
    match recording.await {
        Ok(()) => {
            error!(
                stream_sequence = sequence,
                event_type = letter.event_type,
                "event {sequence} can never be applied ({}), and its dead letter cannot be stored yet, which is \
                 retried: {error}",
                letter.reason
            );
            message.terminate().await;
        }
        Err(unrecorded) => error!(
            stream_sequence = sequence,
            "cannot store event {sequence} as a dead letter, will retry: {error}; {}",
            exit::chain(&unrecorded)
        ),
    }
}

fn event_type(subject: &str) -> String {
    let event_type = subject::event_type(subject);
    event_type.map_or_else(|| UNKNOWN_TYPE.to_owned(), String::from)
}

/// Why a dead letter was not stored.
#[derive(Debug, thiserror::Error)]
enum LetterError {
    #[error("cannot publish to {DEAD_LETTERS_STREAM}")]
    Publish(#[from] PublishError),
    #[error(
        "the duplicate window holds the dead letter of another event of this sequence, from before {EVENTS_STREAM} \
         was created anew"
    )]
    OtherStream,
    #[error("cannot find out whether an erasure covers the event")]
    Erasures(#[source] StoreError),
    #[error(
        "cannot find out whether an erasure covers the dead letter {sequence}, which is stored"
    )]
    Unchecked { sequence: u64, source: StoreError },
}

/// Where dead letters are stored, and whose are not.
#[derive(Clone)]
struct Letters {
    store: Store,
    erasures: Erasures,
    jetstream: jetstream::Context,
}

impl Letters {
    fn new(store: &Store, erasures: &Erasures, jetstream: &jetstream::Context) -> Self {
        Self {
            store: store.clone(),
            erasures: erasures.clone(),
            jetstream: jetstream.clone(),
        }
    }

    /// Stores the dead letter of the event with this body and these headers. If an erasure covers the
    /// event, it has the event removed instead.
    ///
    /// The erasures are read again after the PubAck, because one may have been recorded meanwhile. One
    /// that is recorded later reads the dead letters after its record, and finds this one.
    async fn store(
        &self,
        letter: &Letter,
        body: &Bytes,
        headers: &HeaderMap,
    ) -> Result<(), LetterError> {
        let event = (EVENTS_STREAM, letter.sequence);
        let is_erased = self.remove_if_erased(body, vec![event]).await;
        if is_erased.map_err(LetterError::Erasures)? {
            info!(
                stream_sequence = letter.sequence,
                "event {} is of an erased person and becomes no dead letter", letter.sequence
            );
            return Ok(());
        }
        let sequence = letter.publish(&self.jetstream, body, headers).await?;
        let stored = (DEAD_LETTERS_STREAM, sequence);
        let check = || self.remove_if_erased(body, vec![event, stored]);
        check
            .retry(erasure::attempts())
            .when(StoreError::is_temporary)
            .await
            .map_err(|source| LetterError::Unchecked { sequence, source })?;
        Ok(())
    }

    /// Has workers remove the messages at `places`, which have this body, if an erasure covers it.
    /// Returns whether one does.
    async fn remove_if_erased(
        &self,
        body: &[u8],
        places: Vec<(&'static str, u64)>,
    ) -> Result<bool, StoreError> {
        let (store, erasures) = (self.store.clone(), self.erasures.clone());
        detached(async move { erasures.refresh(store.connection()).await }).await?;
        if !self.erasures.covers_message(body) {
            return Ok(false);
        }
        let remove = async move |tx: Transaction| {
            let now = OffsetDateTime::now_utc();
            let removals = places.iter();
            let removals =
                removals.map(|(stream, sequence)| erasure::removal(stream, *sequence, now));
            question::save(&tx, removals.collect(), now).await?;
            tx.commit()
                .await
                .map_err(StoreError::doing("commit removals"))
        };
        self.store.uncancelled(remove).await?;
        Ok(true)
    }
}

/// An event that is to become a dead letter.
struct Letter {
    stream: StreamId,
    sequence: u64,
    event_type: String,
    reason: String,
}

impl Letter {
    /// Publishes the dead letter of the event with this body and these headers. Returns its sequence.
    async fn publish(
        &self,
        jetstream: &jetstream::Context,
        body: &Bytes,
        headers: &HeaderMap,
    ) -> Result<u64, LetterError> {
        let Self {
            sequence,
            event_type,
            reason,
            ..
        } = self;
        let headers = labelled(headers, *sequence, reason);
        let subject = format!("{}{event_type}", subject::DEAD_LETTERS_PREFIX);
        let publish = || async {
            jetstream
                .publish_with_headers(subject.clone(), headers.clone(), body.clone())
                .await?
                .await
        };
        let backoff = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(100))
            .with_max_times(3)
            .with_jitter();
        let is_temporary = |error: &PublishError| {
            matches!(
                error.kind(),
                PublishErrorKind::TimedOut
                    | PublishErrorKind::StreamNotFound
                    | PublishErrorKind::BrokenPipe
            )
        };
        let ack = publish.retry(backoff).when(is_temporary).await?;
        if ack.duplicate && !is_stored(jetstream, ack.sequence, body).await {
            return Err(LetterError::OtherStream);
        }
        metrics::dead_letter();
        warn!(
            stream_sequence = sequence,
            event_type, reason, "event {sequence} is now a dead letter: {reason}"
        );
        Ok(ack.sequence)
    }
}

/// Stores pending dead letters, one worker at a time.
pub(crate) struct Pending {
    letters: Letters,
}

/// Why the pending dead letters cannot be stored at all now.
#[derive(Debug, thiserror::Error)]
enum PendingError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read {EVENTS_STREAM}")]
    Broker(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Pending {
    pub(crate) fn new(store: &Store, erasures: &Erasures, jetstream: &jetstream::Context) -> Self {
        let letters = Letters::new(store, erasures, jetstream);
        Self { letters }
    }

    /// Stores pending dead letters as they become due, until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut lease = Lease::new(self.letters.store.clone(), "dead letters");
        while pause(CHECK_EVERY, &shutdown).await.is_some() {
            if let Err(error) = self.store_if_due(&mut lease, &shutdown).await {
                debug!("cannot store pending dead letters: {}", exit::chain(&error));
            }
        }
    }

    async fn store_if_due(
        &self,
        lease: &mut Lease,
        shutdown: &CancellationToken,
    ) -> Result<(), PendingError> {
        if self.due().await?.is_empty() {
            return Ok(());
        }
        // Another worker may hold the lease.
        let stored = lease.hold_during(self.store_due(shutdown)).await?;
        stored.unwrap_or(Ok(()))
    }

    async fn due(&self) -> Result<Vec<table::Pending>, StoreError> {
        table::due(
            self.letters.store.connection(),
            OffsetDateTime::now_utc(),
            PENDING_BATCH,
        )
        .await
    }

    async fn store_due(&self, shutdown: &CancellationToken) -> Result<(), PendingError> {
        // Read again, because another worker may just have stored them.
        for letter in self.due().await? {
            if shutdown.is_cancelled() {
                break;
            }
            self.store_one(letter).await?;
        }
        Ok(())
    }

    async fn store_one(&self, pending: table::Pending) -> Result<(), PendingError> {
        let db = self.letters.store.connection();
        let sequence = pending.sequence;
        let Some((body, headers)) = self.event(&pending).await? else {
            error!(
                stream_sequence = sequence,
                "event {sequence} is no longer in {EVENTS_STREAM}, and its dead letter could not be stored before: \
                 {}",
                pending.error
            );
            return Ok(table::remove(db, &pending).await?);
        };
        let letter = Letter {
            stream: pending.stream,
            sequence,
            event_type: pending.event_type.clone(),
            reason: pending.reason.clone(),
        };
        match self.letters.store(&letter, &body, &headers).await {
            Ok(()) => table::remove(db, &pending).await?,
            Err(error) => {
                let error = exit::chain(&error);
                debug!("cannot store event {sequence} as a dead letter yet: {error}");
                let doublings = u32::try_from(pending.attempts).unwrap_or(0).min(16);
                let delay = RETRY_FIRST.saturating_mul(1 << doublings).min(RETRY_MAX);
                let due_at = OffsetDateTime::now_utc() + delay;
                table::postpone(db, &pending, &error, due_at).await?;
            }
        }
        Ok(())
    }

    /// Returns the event's body and headers. `None` if it is not in the stream any more.
    async fn event(
        &self,
        pending: &table::Pending,
    ) -> Result<Option<(Bytes, HeaderMap)>, PendingError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| PendingError::Broker(error);
        let stream = self.letters.jetstream.get_stream(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| failed(error.into()))?;
        if StreamId::from_created(stream.cached_info().created) != pending.stream {
            return Ok(None);
        }
        match stream.get_raw_message(pending.sequence).await {
            Ok(event) => Ok(Some((event.payload, event.headers))),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// Whether the dead letter at `sequence` has this event's body. A duplicate usually does: its
/// PubAck or the message's termination was lost.
async fn is_stored(jetstream: &jetstream::Context, sequence: u64, body: &[u8]) -> bool {
    let Ok(stream) = jetstream.get_stream_no_info(DEAD_LETTERS_STREAM).await else {
        return false;
    };
    stream
        .get_raw_message(sequence)
        .await
        .is_ok_and(|letter| letter.payload == body)
}

/// Returns the event's headers and those that a dead letter adds. Leaves out JetStream's own, which
/// are about the stream that the event was in: `Nats-Expected-Stream` would keep it out of any
/// other.
fn labelled(stored: &HeaderMap, sequence: u64, reason: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in stored.iter() {
        let name: &str = name.as_ref();
        if !name.starts_with("Nats-") {
            values
                .iter()
                .for_each(|value| headers.append(name, value.clone()));
        }
    }
    headers.insert(header::MESSAGE_ID, format!("dead:{sequence}"));
    headers.insert(header::STREAM_SEQUENCE, sequence.to_string());
    // A header must be one line of printable text.
    let reason: String = reason
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    headers.insert(header::REASON, reason.as_str());
    headers
}
