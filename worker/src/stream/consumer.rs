//! The durable consumer all workers share.
//!
//! Owns fetching and what becomes of a message: the only file that names `AckKind`. May not know
//! what is in a message.
//!
//! A message is acked only after its event was committed. One that is not acked within `ACK_WAIT`
//! is delivered again, as often as it takes: there is no last delivery. Everything fails when the broker
//! is away or the stream is missing.

use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy};
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamError};
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{self, AckKind, ErrorCode, Message};
use async_nats::{Subject, SubscribeError};
use litestripe_contract::header;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use time::OffsetDateTime;
use tokio::time::Instant;
use tracing::{debug, info};

use super::progress::{self, Progress, ProgressError};
use super::pull::Pull;

/// After which a message that was not acked is delivered again.
const ACK_WAIT: Duration = Duration::from_secs(60);

/// Deliveries in flight over all workers, at most. Bounds what the server remembers.
const ACK_PENDING_MAX: i64 = 20_000;

/// The same of a replay: who runs it again after a crash waits this long for what was in flight.
const REPLAY_ACK_WAIT: Duration = Duration::from_secs(20);

/// How long the position of a replay is kept that nobody works at.
const REPLAY_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How soon a message that is handed back is delivered again: at once, but not in a hot loop.
const HAND_BACK_DELAY: Duration = Duration::from_millis(500);

/// How long a worker that ends waits for messages that are on their way to it: until all that it asked for
/// have come, or none for so long, or those that come one by one are not worth it.
const CLOSE_QUIET: Duration = Duration::from_millis(200);
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// How long it waits for the server's answer before that.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// The consumer could not be opened. Whoever waits for the broker tries again.
#[derive(Debug, thiserror::Error)]
#[error("cannot open consumer {WORKER_CONSUMER} on {EVENTS_STREAM}")]
pub(crate) struct OpenError(#[source] ConsumerError);

/// Messages of the durable consumer, as they come.
pub struct Batches {
    consumer: Consumer<Config>,
    pull: Pull,
    /// Messages at a time, at most.
    batch: usize,
}

/// Opens the durable consumer, creating it if it is missing: it then delivers everything that the
/// stream holds, which is harmless because merging is idempotent.
pub(crate) async fn open(
    jetstream: &jetstream::Context,
    batch: usize,
) -> Result<Batches, OpenError> {
    let config = durable(WORKER_CONSUMER, DeliverPolicy::All);
    Batches::open(jetstream, WORKER_CONSUMER, config, batch)
        .await
        .map_err(OpenError)
}

/// A consumer beside the workers', for events that are applied again.
#[derive(Debug, Clone)]
pub(crate) struct ReplayConsumer {
    /// Its name: whoever opens it under the same name goes on at its position.
    pub name: String,
    /// Where it begins, when it is new.
    pub first_sequence: u64,
    /// The subjects it delivers; none for all.
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

    /// The first event that the stream holds, and the last one up to which all are applied again: none
    /// while the consumer does not exist.
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

/// The sequence of the first event that was stored at `time` or later; one past the last if none was.
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
    // Of a consumer that delivered nothing yet, this is where it stands.
    Ok(consumer.cached_info().delivered.stream_sequence + 1)
}

/// A consumer cannot be used. Whoever waits for the broker tries again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsumerError {
    #[error("cannot find {EVENTS_STREAM}")]
    Stream(#[from] GetStreamError),
    #[error("cannot use a consumer on {EVENTS_STREAM}")]
    Consumer(#[from] jetstream::stream::ConsumerError),
    #[error("cannot subscribe to a consumer's messages")]
    Subscribe(#[from] SubscribeError),
}

impl ConsumerError {
    /// Whether the broker has understood what is asked for and will not do it, however often it is asked.
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
        max_ack_pending: ACK_PENDING_MAX,
        // As many as the stream has, whatever LITESTRIPE_STREAM_REPLICAS says by now.
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
        let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
        let consumer: Consumer<Config> = stream.get_or_create_consumer(name, config).await?;
        let pull = Pull::new(consumer.clone(), jetstream.clone(), batch).await?;
        Ok(Self {
            consumer,
            pull,
            batch,
        })
    }

    /// The messages that are there, at least one. None when the consumer is gone and must be opened
    /// again.
    ///
    /// Cancel safety: a cancelled wait loses no message.
    pub async fn next(&mut self) -> Option<Batch> {
        self.next_at_most(self.batch).await
    }

    /// The same, but not more than `limit` messages.
    pub async fn next_at_most(&mut self, limit: usize) -> Option<Batch> {
        loop {
            if self.pull.is_doubted && self.is_gone().await {
                return None;
            }
            self.pull.is_doubted = false;
            let messages = self.pull.next(limit).await?;
            if !messages.is_empty() {
                return Some(Batch { messages });
            }
        }
    }

    /// Whether the server says that there is no such consumer or stream. An election, in which nobody
    /// answers, is waited out.
    async fn is_gone(&self) -> bool {
        let Err(error) = self.consumer.get_info().await else {
            return false;
        };
        debug!("looking for the consumer: {error}");
        matches!(
            error.kind(),
            ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound
        )
    }

    /// Hands back what was fetched ahead or is on its way, so that others need not wait for `ACK_WAIT`.
    pub async fn close(mut self) {
        // Its answer comes behind what the server has sent, but for what another of its threads still has.
        let _ = tokio::time::timeout(CLOSE_PATIENCE, self.consumer.get_info()).await;
        let end = Instant::now() + CLOSE_MAX;
        let mut handed_back = 0;
        while let Ok(Some(messages)) =
            tokio::time::timeout_at(end, self.pull.rest(CLOSE_QUIET)).await
        {
            let batch = Batch { messages };
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
}

/// A message, as far as the rest of the worker may know it.
pub struct Delivery<'a> {
    pub payload: &'a [u8],
    message: &'a Message,
}

impl Delivery<'_> {
    pub fn traceparent(&self) -> Option<String> {
        let headers = self.message.headers.as_ref()?;
        headers
            .get(header::TRACEPARENT)
            .map(|value| value.as_str().to_owned())
    }

    /// Its sequence in the stream; 0 for a message that has none, which the server never sends.
    pub fn stream_sequence(&self) -> u64 {
        self.message.info().map_or(0, |info| info.stream_sequence)
    }
}

impl Batch {
    pub fn messages(&self) -> impl Iterator<Item = Delivery<'_>> {
        self.messages.iter().map(|message| Delivery {
            payload: &message.payload,
            message,
        })
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

    /// Says that all events but those at `except` are applied.
    ///
    /// An ack that gets lost only leads to another delivery, so it is not waited for.
    pub async fn ack_except(&self, except: impl IntoIterator<Item = usize>) {
        let except: Vec<usize> = except.into_iter().collect();
        for (index, message) in self.messages.iter().enumerate() {
            if !except.contains(&index) {
                settle(message, AckKind::Ack).await;
            }
        }
    }

    /// Says that we are still at it: the server waits for another `ACK_WAIT`.
    pub async fn keep_alive(&self) {
        self.settle_all(AckKind::Progress).await;
    }

    /// Gives the messages to whichever worker asks next.
    pub async fn hand_back(&self) {
        self.settle_all(AckKind::Nak(Some(HAND_BACK_DELAY))).await;
    }

    async fn settle_all(&self, kind: AckKind) {
        for message in &self.messages {
            settle(message, kind).await;
        }
    }

    /// Takes out the messages at `indexes`, which are to be put aside.
    pub fn take(self, indexes: &[usize]) -> Vec<Poisoned> {
        let wanted = |(index, message)| indexes.contains(&index).then_some(Poisoned { message });
        self.messages
            .into_iter()
            .enumerate()
            .filter_map(wanted)
            .collect()
    }
}

/// A message that is never to be delivered again, once its event is a dead letter.
pub struct Poisoned {
    message: Message,
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

    pub fn stream_sequence(&self) -> Option<u64> {
        self.message.info().ok().map(|info| info.stream_sequence)
    }

    pub async fn terminate(self) {
        settle(&self.message, AckKind::Term).await;
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place where messages are settled"
)]
async fn settle(message: &Message, kind: AckKind) {
    if let Err(error) = message.ack_with(kind).await {
        debug!("a message could not be settled and will be delivered again: {error}");
    }
}
