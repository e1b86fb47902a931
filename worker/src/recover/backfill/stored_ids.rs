//! The ids of the events that the stream holds.
//!
//! Owns reading them: only the headers, through its own consumer, which acks nothing and which the
//! server deletes soon after the backfill.

use std::collections::HashSet;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{Consumer, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt as _;
use litestripe_contract::event::EventId;
use litestripe_contract::header;
use litestripe_contract::subject::EVENTS_STREAM;
use time::OffsetDateTime;
use tracing::debug;

use super::BackfillError;
use crate::recover::short_hash;
use crate::stream::scan;

/// The most messages of one pull: async-nats drops messages that it cannot buffer, above 65,536.
const PULL_MAX: usize = 2000;

/// The timeout of the next message of a pull.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// After this time unused, the server deletes the consumer. A page usually waits less than this for
/// the request budget; otherwise a new consumer continues.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(10 * 60);

/// Pulls that may fail in a row.
const ATTEMPTS_MAX: u32 = 5;

pub(super) struct StoredIds {
    jetstream: jetstream::Context,
    stream: Stream,
    consumer: Option<Consumer<pull::Config>>,
    /// Where the next consumer starts reading.
    from: DeliverPolicy,
    /// The consumer sequence of the last message. A gap means that a message was lost in transit.
    last: u64,
    ids: HashSet<[u8; 16]>,
}

/// Why a pull ended early.
type PullError = Box<dyn std::error::Error + Send + Sync>;

impl StoredIds {
    /// Prepares reading the ids of events stored at `since` or later. Reads none yet.
    pub(super) async fn open(
        jetstream: &jetstream::Context,
        since: OffsetDateTime,
    ) -> Result<Self, BackfillError> {
        let found = scan::find(jetstream, EVENTS_STREAM)
            .await
            .map_err(|error| BackfillError::Read(error.into()))?;
        let stream = found.ok_or(BackfillError::NoStream)?;
        let from = DeliverPolicy::ByStartTime { start_time: since };
        Ok(Self {
            jetstream: jetstream.clone(),
            stream,
            consumer: None,
            from,
            last: 0,
            ids: HashSet::new(),
        })
    }

    pub(super) fn contains(&self, id: &EventId) -> bool {
        self.ids.contains(&short_hash(id.as_str()))
    }

    /// Reads the ids of all events that the stream holds by now.
    pub(super) async fn catch_up(&mut self) -> Result<(), BackfillError> {
        let mut failures = 0;
        loop {
            match self.pull().await {
                Ok(0) => return Ok(()),
                Ok(_) => failures = 0,
                Err(error) if failures == ATTEMPTS_MAX => return Err(BackfillError::Read(error)),
                // The consumer may be gone, or messages were lost: a new one resumes behind the
                // last id read.
                Err(error) => {
                    debug!(
                        "reading the ids in {EVENTS_STREAM} resumes with a new consumer: {error}"
                    );
                    failures += 1;
                    self.consumer = None;
                }
            }
        }
    }

    /// Reads the next messages. Returns how many were pending before.
    async fn pull(&mut self) -> Result<u64, PullError> {
        let mut consumer = match self.consumer.take() {
            Some(consumer) => consumer,
            None => {
                self.last = 0;
                let config = scan::reader(&self.jetstream, "backfill", self.from);
                let config = pull::Config {
                    headers_only: true,
                    inactive_threshold: INACTIVE_THRESHOLD,
                    ..config
                };
                self.stream.create_consumer(config).await?
            }
        };
        let pending = consumer.info().await?.num_pending;
        if pending > 0 {
            let count = usize::try_from(pending).unwrap_or(PULL_MAX).min(PULL_MAX);
            let mut messages = consumer.fetch().max_messages(count).messages().await?;
            for _ in 0..count {
                let message = tokio::time::timeout(MESSAGE_TIMEOUT, messages.next()).await?;
                self.add(&message.ok_or("a pull ended early")??)?;
            }
        }
        self.consumer = Some(consumer);
        Ok(pending)
    }

    fn add(&mut self, message: &jetstream::Message) -> Result<(), PullError> {
        let place = message.info()?;
        if place.consumer_sequence != self.last + 1 {
            return Err("messages were lost".into());
        }
        self.last = place.consumer_sequence;
        self.from = DeliverPolicy::ByStartSequence {
            start_sequence: place.stream_sequence + 1,
        };
        let id = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::MESSAGE_ID));
        self.ids.extend(id.map(|id| short_hash(id.as_str())));
        Ok(())
    }
}
