//! Events that can never be applied.
//!
//! Owns storing such an event as a dead letter with its reason. Invariants: a message is terminated
//! only after the PubAck of its dead letter, and a poisoned event does not hold up any other.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self};
use backon::{ExponentialBuilder, Retryable as _};
use futures_util::StreamExt as _;
use litestripe_contract::subject::{self, DEAD_LETTERS_STREAM};
use litestripe_contract::{exit, header};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use crate::metrics;
use crate::stream::consumer::{Batch, Poisoned};

/// Bytes of dead letters in flight, at most: beyond it the next batch waits. A single batch that is
/// larger waits until no other is in flight.
const IN_FLIGHT_BYTES_MAX: u32 = 16 << 20;

/// Dead letters of one batch in flight, at most.
const IN_FLIGHT: usize = 16;

/// The event type of a message if its subject does not have one.
const UNKNOWN_TYPE: &str = "unknown";

/// Stores dead letters, in its own tasks.
#[derive(Clone)]
pub struct DeadLetters {
    jetstream: jetstream::Context,
    tasks: TaskTracker,
    room: Arc<Semaphore>,
}

impl DeadLetters {
    pub fn new(jetstream: jetstream::Context) -> Self {
        let room = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX as usize));
        Self {
            jetstream,
            tasks: TaskTracker::new(),
            room,
        }
    }

    /// Stores the `poisoned` messages of `batch` as dead letters, each with its reason. If that
    /// fails, the message is redelivered, and storing it is retried then. Returns once the dead
    /// letters are in flight, which takes a while only if they are many or large.
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
        let jetstream = self.jetstream.clone();
        self.tasks.spawn(async move {
            let letters = messages.into_iter().zip(reasons);
            let store =
                |(message, reason): (Poisoned, String)| store_one(&jetstream, message, reason);
            futures_util::stream::iter(letters)
                .for_each_concurrent(IN_FLIGHT, store)
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

async fn store_one(jetstream: &jetstream::Context, message: Poisoned, reason: String) {
    let Some(sequence) = message.stream_sequence() else {
        return error!("cannot store a message without a stream sequence as a dead letter");
    };
    let event_type = subject::event_type(message.subject());
    let name = event_type
        .as_ref()
        .map_or(UNKNOWN_TYPE, |name| name.as_str());
    let (body, headers) = message.content();
    let headers = labelled(&headers, sequence, &reason);
    let subject = format!("{}{name}", subject::DEAD_LETTERS_PREFIX);
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
    match publish.retry(backoff).when(is_temporary).await {
        Ok(ack) if ack.duplicate && !is_stored(jetstream, ack.sequence, &body).await => warn!(
            stream_sequence = sequence,
            "cannot store event {sequence} as a dead letter yet: the duplicate window holds the dead letter of another \
             event {sequence}, from before STRIPE_EVENTS was recreated"
        ),
        Ok(_) => {
            metrics::dead_letter();
            warn!(
                stream_sequence = sequence,
                event_type = name,
                reason,
                "event {sequence} is now a dead letter: {reason}"
            );
            message.terminate().await;
        }
        Err(error) => error!(
            stream_sequence = sequence,
            "cannot store event {sequence} as a dead letter, will retry: {}",
            exit::chain(&error)
        ),
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
