//! The durable consumer that all workers share, and the consumer of a replay.
//!
//! Owns fetching and acking messages: the only file that names `AckKind`. May not know what is in a
//! message.
//!
//! A message is acked only after its event is committed. One that is not acked within `ACK_WAIT` is
//! redelivered, without a limit. Every function fails if the broker is unreachable or the stream is
//! missing.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy};
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamError};
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{self, AckKind, ErrorCode, Message};
use async_nats::{Subject, SubscribeError};
use litestripe_contract::header;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_contract::telemetry::traces;
use litestripe_contract::trace::TraceContext;
use litestripe_domain::arrival::StreamId;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;
use tracing::{debug, info};

use super::origin::{self, Existence, Origin};
use super::position;
use super::progress::{self, Progress, ProgressError};
use super::pull::Pull;

/// The time after which a message that was not acked is redelivered.
const ACK_WAIT: Duration = Duration::from_secs(60);

/// Messages in flight over all workers, at most. Bounds the server's memory for them.
pub(crate) const ACK_PENDING_MAX: u64 = 20_000;

/// `ACK_WAIT` of a replay. Shorter, because an operator who runs it again after a crash waits this
/// long for the messages that were in flight.
const REPLAY_ACK_WAIT: Duration = Duration::from_secs(20);

/// How long the server keeps the position of a replay that no process runs.
const REPLAY_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How soon a message that was handed back is redelivered. Short, but long enough to prevent a hot
/// loop.
const HAND_BACK_DELAY: Duration = Duration::from_millis(500);

/// A worker that shuts down waits for the messages that it has requested until all have arrived,
/// until none has arrived for `CLOSE_QUIET`, or for `CLOSE_MAX` altogether.
const CLOSE_QUIET: Duration = Duration::from_millis(200);
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// How long the broker may take to answer whether the stream still exists, before an ack is given
/// up: then the message is redelivered anyway.
const SETTLE_MAX: Duration = ACK_WAIT;

/// How soon that is asked again before messages are used.
const CHECK_RETRY: Duration = Duration::from_millis(250);

/// How long it waits for the server's answer before that.
const CLOSE_ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// The consumer could not be opened. Callers retry.
#[derive(Debug, thiserror::Error)]
#[error("cannot open consumer {WORKER_CONSUMER} on {EVENTS_STREAM}")]
pub(crate) struct OpenError(#[source] ConsumerError);

/// Messages of a durable consumer, as they arrive.
pub struct Batches {
    consumer: Consumer<Config>,
    pull: Pull,
    origin: Arc<Origin>,
    /// Messages that wait for the check whether they are of the stream that was opened.
    received: Vec<Message>,
    /// Messages at a time, at most.
    batch: usize,
}

/// Opens the workers' durable consumer. Creates it if it is missing: it then delivers everything
/// that the stream holds, which is harmless because merging is idempotent. The same happens if it
/// is ahead of the stream.
pub(crate) async fn open(
    jetstream: &jetstream::Context,
    batch: usize,
) -> Result<Batches, OpenError> {
    position::mend(jetstream).await;
    let config = durable(WORKER_CONSUMER, DeliverPolicy::All);
    Batches::open(jetstream, WORKER_CONSUMER, config, batch)
        .await
        .map_err(OpenError)
}

/// The durable consumer of a replay, separate from the workers' consumer.
#[derive(Debug, Clone)]
pub(crate) struct ReplayConsumer {
    /// Opening an existing consumer of this name resumes from its position.
    pub name: String,
    /// Where a new consumer begins.
    pub first_sequence: u64,
    /// The subjects to deliver; empty for all.
    pub subjects: Vec<String>,
}

impl ReplayConsumer {
    pub(crate) async fn open(
        &self,
        jetstream: &jetstream::Context,
        batch: usize,
    ) -> Result<Batches, ConsumerError> {
        let from = DeliverPolicy::ByStartSequence {
            start_sequence: self.first_sequence,
        };
        let config = Config {
            filter_subjects: self.subjects.clone(),
            ack_wait: REPLAY_ACK_WAIT,
            inactive_threshold: REPLAY_KEPT,
            ..durable(&self.name, from)
        };
        Batches::open(jetstream, &self.name, config, batch).await
    }

    pub(crate) async fn progress(
        &self,
        jetstream: &jetstream::Context,
    ) -> Result<Option<Progress>, ProgressError> {
        progress::find(jetstream, &self.name).await
    }

    /// Returns the sequence of the first event that the stream holds, and the sequence up to which
    /// all events are reapplied. While the consumer does not exist, that is the one before its
    /// first.
    pub(crate) async fn floor(
        &self,
        jetstream: &jetstream::Context,
    ) -> Result<(u64, u64), ProgressError> {
        let stream = jetstream.get_stream(EVENTS_STREAM).await?;
        let progress = self.progress(jetstream).await?;
        let applied_until = progress.map_or(0, |progress| progress.reapplied_until());
        let floor = applied_until.max(self.first_sequence.saturating_sub(1));
        Ok((stream.cached_info().state.first_sequence, floor))
    }

    pub(crate) async fn remove(&self, jetstream: &jetstream::Context) -> Result<(), ConsumerError> {
        let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
        match stream.delete_consumer(&self.name).await {
            Err(error) if !is_not_found(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Returns the sequence of the first event that was stored at `time` or later, or one past the last
/// event if there is none.
pub(crate) async fn sequence_at(
    jetstream: &jetstream::Context,
    time: OffsetDateTime,
) -> Result<u64, ConsumerError> {
    let name = format!("litestripe-replay-at-{}", time.unix_timestamp_nanos());
    let config = Config {
        // Named, so that a broker's permissions can allow it.
        name: Some(name),
        deliver_policy: DeliverPolicy::ByStartTime { start_time: time },
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(5),
        ..Config::default()
    };
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    let consumer = stream.create_consumer(config).await?;
    // A consumer that has not delivered anything yet reports the position before its first message.
    Ok(consumer.cached_info().delivered.stream_sequence + 1)
}

/// A consumer cannot be used. A worker or a replay retries, unless it is a refusal; other callers
/// fail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsumerError {
    #[error("cannot find {EVENTS_STREAM}")]
    Stream(#[from] GetStreamError),
    #[error("cannot use a consumer on {EVENTS_STREAM}")]
    Consumer(#[from] jetstream::stream::ConsumerError),
    #[error("cannot subscribe to a consumer's messages")]
    Subscribe(#[from] SubscribeError),
    #[error("{EVENTS_STREAM} was created anew meanwhile")]
    CreatedAnew,
}

impl ConsumerError {
    /// Whether the broker has refused the request itself, so that a retry cannot succeed.
    pub(crate) fn is_refusal(&self) -> bool {
        let Self::Consumer(error) = self else {
            return false;
        };
        matches!(error.kind(), ConsumerErrorKind::JetStream(refused) if refused.code() == 400)
    }
}

fn is_not_found(error: &jetstream::stream::ConsumerError) -> bool {
    matches!(error.kind(), ConsumerErrorKind::JetStream(refused) if refused.error_code() == ErrorCode::CONSUMER_NOT_FOUND)
}

fn durable(name: &str, deliver_policy: DeliverPolicy) -> Config {
    Config {
        durable_name: Some(name.to_owned()),
        deliver_policy,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: ACK_PENDING_MAX as i64,
        // 0 means as many as the stream has: LITESTRIPE_STREAM_REPLICAS may have changed since.
        num_replicas: 0,
        ..Config::default()
    }
}

impl Batches {
    async fn open(
        jetstream: &jetstream::Context,
        name: &str,
        config: Config,
        batch: usize,
    ) -> Result<Self, ConsumerError> {
        let connection = origin::connection(&jetstream.client());
        let stream = jetstream.get_stream(EVENTS_STREAM).await?;
        let consumer: Consumer<Config> = stream.get_or_create_consumer(name, config).await?;
        // Only if it is the same stream before and after is the consumer one of this stream.
        let [id, after] = [&stream, &jetstream.get_stream(EVENTS_STREAM).await?]
            .map(|stream| StreamId::from_created(stream.cached_info().created));
        if id != after {
            return Err(ConsumerError::CreatedAnew);
        }
        let pull = Pull::new(consumer.clone(), jetstream.clone(), batch).await?;
        Ok(Self {
            consumer,
            pull,
            origin: Arc::new(Origin::new(id, jetstream.clone(), connection)),
            received: Vec::new(),
            batch,
        })
    }

    /// The stream that the messages are from.
    pub fn stream(&self) -> StreamId {
        self.origin.stream()
    }

    /// Waits for messages and returns those that have arrived, at least one. Returns `None` if the
    /// consumer does not exist any more and must be opened again.
    ///
    /// # Cancel safety
    /// A cancelled wait loses no message.
    pub async fn next(&mut self) -> Option<Batch> {
        self.next_at_most(self.batch).await
    }

    /// Like [`Batches::next`], but returns at most `limit` messages.
    pub async fn next_at_most(&mut self, limit: usize) -> Option<Batch> {
        loop {
            if self.pull.needs_check {
                match self.existence().await {
                    Existence::Exists => self.pull.needs_check = false,
                    Existence::Gone => return None,
                    Existence::Unknown => {
                        tokio::time::sleep(CHECK_RETRY).await;
                        continue;
                    }
                }
            }
            if self.received.is_empty() {
                self.received = self.pull.next(limit).await?;
            }
            if !self.received.is_empty() && !self.pull.needs_check {
                let received = std::mem::take(&mut self.received);
                return Some(self.batch(received));
            }
        }
    }

    fn batch(&self, messages: Vec<Message>) -> Batch {
        Batch {
            messages,
            origin: Arc::clone(&self.origin),
        }
    }

    /// Asks the server whether the stream and the consumer exist.
    async fn existence(&self) -> Existence {
        match self.origin.check().await {
            Existence::Exists if self.is_consumer_gone().await => Existence::Gone,
            Existence::Exists if self.mend_position().await => Existence::Gone,
            existence => existence,
        }
    }

    /// Makes the workers' consumer anew if it is ahead of the stream. Returns whether it was.
    async fn mend_position(&self) -> bool {
        let is_workers = self.consumer.cached_info().name == WORKER_CONSUMER;
        is_workers && position::mend(self.origin.jetstream()).await
    }

    /// Whether the server answers that the consumer does not exist. Without an answer, as during an
    /// election, it counts as existing.
    async fn is_consumer_gone(&self) -> bool {
        let Err(error) = self.consumer.get_info().await else {
            return false;
        };
        debug!("cannot read the consumer's info: {error}");
        matches!(
            error.kind(),
            ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound
        )
    }

    /// Hands back the messages that were fetched ahead or are in flight, so that other workers need
    /// not wait for `ACK_WAIT`.
    pub async fn close(mut self) {
        // The answer arrives after the messages that the server has sent, except for those that
        // another thread of the server is still sending.
        let _ = tokio::time::timeout(CLOSE_ANSWER_TIMEOUT, self.consumer.get_info()).await;
        let end = Instant::now() + CLOSE_MAX;
        let received = std::mem::take(&mut self.received);
        let received = self.batch(received);
        received.hand_back().await;
        let mut handed_back = received.messages.len();
        while let Ok(Some(messages)) =
            tokio::time::timeout_at(end, self.pull.remaining(CLOSE_QUIET)).await
        {
            let batch = self.batch(messages);
            batch.hand_back().await;
            handed_back += batch.messages.len();
        }
        if handed_back > 0 {
            info!(
                messages = handed_back,
                "handed back {handed_back} messages that were fetched ahead"
            );
        }
    }
}

/// Messages that are settled together.
pub struct Batch {
    messages: Vec<Message>,
    origin: Arc<Origin>,
}

/// The parts of a message that the rest of the worker may know.
pub struct Delivery<'a> {
    pub payload: &'a [u8],
    message: &'a Message,
    stream: StreamId,
}

impl Delivery<'_> {
    pub fn subject(&self) -> &str {
        &self.message.subject
    }

    pub fn trace(&self) -> Option<TraceContext> {
        trace(self.message)
    }

    /// When ingress received it. `None` for what came in another way.
    pub fn received(&self) -> Option<OffsetDateTime> {
        let received = self.message.headers.as_ref()?.get(header::RECEIVED_AT)?;
        OffsetDateTime::parse(received.as_str(), &Rfc3339).ok()
    }

    /// The stream sequence; 0 for a message without one, which the server never sends.
    pub fn stream_sequence(&self) -> u64 {
        self.message.info().map_or(0, |info| info.stream_sequence)
    }

    /// The position: see [`StreamId::position`].
    pub fn position(&self) -> u64 {
        self.stream.position(self.stream_sequence())
    }
}

impl Batch {
    /// How often the message of this index has been delivered, to any worker. The server counts,
    /// so that the count survives a restart.
    pub fn deliveries(&self, index: usize) -> u64 {
        let info = self
            .messages
            .get(index)
            .and_then(|message| message.info().ok());
        info.map_or(1, |info| info.delivered.unsigned_abs())
    }

    pub fn messages(&self) -> impl Iterator<Item = Delivery<'_>> {
        self.messages.iter().map(|message| Delivery {
            payload: &message.payload,
            message,
            stream: self.origin.stream(),
        })
    }

    /// The stream that the messages are from.
    pub fn stream(&self) -> StreamId {
        self.origin.stream()
    }

    pub fn count(&self) -> usize {
        self.messages.len()
    }

    pub fn append(&mut self, mut other: Self) {
        self.messages.append(&mut other.messages);
    }

    pub fn last_sequence(&self) -> u64 {
        self.messages()
            .map(|message| message.stream_sequence())
            .max()
            .unwrap_or(0)
    }

    /// Acks all messages except those with the indexes `except`.
    ///
    /// Does not wait for the server's confirmation: a lost ack only leads to a redelivery. Waits
    /// for a lost connection, and then acks only if the stream is still the one that the messages
    /// are from.
    pub async fn ack_except(&self, except: impl IntoIterator<Item = usize>) {
        if !self.origin.exists_within(SETTLE_MAX).await {
            return;
        }
        let except: Vec<usize> = except.into_iter().collect();
        for (index, message) in self.messages.iter().enumerate() {
            if !except.contains(&index) {
                settle(message, AckKind::Ack).await;
            }
        }
    }

    /// Reports the messages as in progress: the server waits for another `ACK_WAIT`.
    pub async fn keep_alive(&self) {
        self.settle_all(AckKind::Progress).await;
    }

    /// Naks the messages, so that the server delivers them to any worker.
    pub async fn hand_back(&self) {
        self.settle_all(AckKind::Nak(Some(HAND_BACK_DELAY))).await;
    }

    /// Naks the message of this index, so that the server delivers it again after `delay`.
    pub async fn postpone(&self, index: usize, delay: Duration) {
        if let Some(message) = self.messages.get(index)
            && self.origin.existence().await == Existence::Exists
        {
            settle(message, AckKind::Nak(Some(delay))).await;
        }
    }

    async fn settle_all(&self, kind: AckKind) {
        if self.origin.existence().await != Existence::Exists {
            return;
        }
        for message in &self.messages {
            settle(message, kind).await;
        }
    }

    /// Takes out the messages with these `indexes`, which become dead letters.
    pub fn take(self, indexes: &[usize]) -> Vec<Poisoned> {
        let Self { messages, origin } = self;
        let wanted = |(index, message)| {
            indexes.contains(&index).then(|| Poisoned {
                message,
                origin: Arc::clone(&origin),
            })
        };
        messages
            .into_iter()
            .enumerate()
            .filter_map(wanted)
            .collect()
    }
}

/// A message whose event can never be applied. It is terminated once its dead letter is stored.
pub struct Poisoned {
    message: Message,
    origin: Arc<Origin>,
}

impl Poisoned {
    pub fn subject(&self) -> &Subject {
        &self.message.subject
    }

    pub fn content(&self) -> (bytes::Bytes, async_nats::HeaderMap) {
        (
            self.message.payload.clone(),
            self.message.headers.clone().unwrap_or_default(),
        )
    }

    pub fn bytes(&self) -> usize {
        self.message.length
    }

    pub fn trace(&self) -> Option<TraceContext> {
        trace(&self.message)
    }

    pub fn stream_sequence(&self) -> Option<u64> {
        self.message.info().ok().map(|info| info.stream_sequence)
    }

    /// The stream that it is from.
    pub fn stream(&self) -> StreamId {
        self.origin.stream()
    }

    /// Terminates the message: it is not delivered again.
    pub async fn terminate(self) {
        if !self.origin.exists_within(SETTLE_MAX).await {
            return;
        }
        settle(&self.message, AckKind::Term).await;
    }
}

fn trace(message: &Message) -> Option<TraceContext> {
    traces::from_headers(message.headers.as_ref()?)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place where messages are settled"
)]
async fn settle(message: &Message, kind: AckKind) {
    if let Err(error) = message.ack_with(kind).await {
        debug!("cannot settle a message, it will be redelivered: {error}");
    }
}
