//! The events that the stream holds: their ids, and the changes that thin events announced.
//!
//! Owns reading them, through consumers that ack nothing and that the server deletes soon after the
//! backfill. Only the headers are read, except of thin events, which are small and name their
//! object in the body.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{Consumer, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt as _;
use litestripe_contract::event::{EventId, THIN_PREFIX};
use litestripe_contract::header;
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM};
use litestripe_domain::event::api::Change;
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

/// The events that the stream holds, to be compared with those that Stripe lists.
pub(super) struct StoredIds {
    ids: HashSet<[u8; 16]>,
    all: Reader,
    /// How many thin events there are of each key.
    thin: HashMap<[u8; 16], usize>,
    thin_events: Reader,
}

/// Reads messages of the stream as they come.
struct Reader {
    jetstream: jetstream::Context,
    stream: Stream,
    /// Only the headers of all events, or the bodies of thin events.
    filter: Filter,
    consumer: Option<Consumer<pull::Config>>,
    /// Where the next consumer starts reading.
    from: DeliverPolicy,
    /// The consumer sequence of the last message. A gap means that a message was lost in transit.
    last: u64,
}

#[derive(Clone, Copy)]
enum Filter {
    Headers,
    ThinEvents,
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
        let reader = |filter| Reader {
            jetstream: jetstream.clone(),
            stream: stream.clone(),
            filter,
            consumer: None,
            from: DeliverPolicy::ByStartTime { start_time: since },
            last: 0,
        };
        Ok(Self {
            ids: HashSet::new(),
            all: reader(Filter::Headers),
            thin: HashMap::new(),
            thin_events: reader(Filter::ThinEvents),
        })
    }

    pub(super) fn contains(&self, id: &EventId) -> bool {
        self.ids.contains(&short_hash(id.as_str()))
    }

    /// Returns how many thin events there are for the same change.
    pub(super) fn thin_events(&self, change: &Change) -> usize {
        let key = short_hash(&change.to_string());
        self.thin.get(&key).copied().unwrap_or_default()
    }

    /// Reads the ids of all events that the stream holds by now.
    pub(super) async fn catch_up(&mut self) -> Result<(), BackfillError> {
        let Self {
            ids,
            all,
            thin,
            thin_events,
        } = self;
        let add_id = |message: &jetstream::Message| {
            let headers = message.headers.as_ref();
            let id = headers.and_then(|headers| headers.get(header::MESSAGE_ID));
            ids.extend(id.map(|id| short_hash(id.as_str())));
        };
        all.catch_up(add_id).await?;
        let add_thin = |message: &jetstream::Message| {
            if let Some(change) = Change::from_thin(&message.payload) {
                *thin.entry(short_hash(&change.to_string())).or_default() += 1;
            }
        };
        thin_events.catch_up(add_thin).await
    }
}

impl Reader {
    async fn catch_up(
        &mut self,
        mut add: impl FnMut(&jetstream::Message),
    ) -> Result<(), BackfillError> {
        let mut failures = 0;
        loop {
            match self.pull(&mut add).await {
                Ok(0) => return Ok(()),
                Ok(_) => failures = 0,
                Err(error) if failures == ATTEMPTS_MAX => return Err(BackfillError::Read(error)),
                // The consumer may be gone, or messages were lost: a new one resumes behind the
                // last message read.
                Err(error) => {
                    debug!("reading {EVENTS_STREAM} resumes with a new consumer: {error}");
                    failures += 1;
                    self.consumer = None;
                }
            }
        }
    }

    /// Reads the next messages. Returns how many were pending before.
    async fn pull(&mut self, add: &mut impl FnMut(&jetstream::Message)) -> Result<u64, PullError> {
        let mut consumer = match self.consumer.take() {
            Some(consumer) => consumer,
            None => {
                self.last = 0;
                self.stream.create_consumer(self.config()).await?
            }
        };
        let pending = consumer.info().await?.num_pending;
        if pending > 0 {
            let count = usize::try_from(pending).unwrap_or(PULL_MAX).min(PULL_MAX);
            let mut messages = consumer.fetch().max_messages(count).messages().await?;
            for _ in 0..count {
                let message = tokio::time::timeout(MESSAGE_TIMEOUT, messages.next()).await?;
                let message = message.ok_or("a pull ended early")??;
                self.advance_past(&message)?;
                add(&message);
            }
        }
        self.consumer = Some(consumer);
        Ok(pending)
    }

    fn config(&self) -> pull::Config {
        let config = pull::Config {
            inactive_threshold: INACTIVE_THRESHOLD,
            ..scan::reader(&self.jetstream, "backfill", self.from)
        };
        match self.filter {
            Filter::Headers => pull::Config {
                headers_only: true,
                ..config
            },
            Filter::ThinEvents => pull::Config {
                // Not `filter_subject`, which would be part of the request's subject, and so of the
                // permissions that a worker needs.
                filter_subjects: vec![format!("{EVENTS_PREFIX}{THIN_PREFIX}>")],
                ..config
            },
        }
    }

    /// Records that `message` was read. Fails if a message before it is missing.
    fn advance_past(&mut self, message: &jetstream::Message) -> Result<(), PullError> {
        let place = message.info()?;
        if place.consumer_sequence != self.last + 1 {
            return Err("messages were lost".into());
        }
        self.last = place.consumer_sequence;
        self.from = DeliverPolicy::ByStartSequence {
            start_sequence: place.stream_sequence + 1,
        };
        Ok(())
    }
}
