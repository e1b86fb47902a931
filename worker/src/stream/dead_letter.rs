//! Events that can never be applied.
//!
//! Owns putting one aside with its reason. Invariant: a message is terminated only after the PubAck
//! of its dead letter, and a poisoned event holds up nobody.

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

/// Bytes that are on their way, at most: beyond it the next batch waits. One that is larger waits until
/// no other is.
const OUTSTANDING_BYTES_MAX: u32 = 16 << 20;

/// Dead letters of one batch that are published at a time.
const PUBLISHED_AT_A_TIME: usize = 16;

/// What stands for the event type of a message whose subject names none.
const UNKNOWN_TYPE: &str = "unknown";

/// Puts events aside, in tasks of its own.
#[derive(Clone)]
pub struct DeadLetters {
    jetstream: jetstream::Context,
    tasks: TaskTracker,
    room: Arc<Semaphore>,
}

impl DeadLetters {
    pub fn new(jetstream: jetstream::Context) -> Self {
        let room = Arc::new(Semaphore::new(OUTSTANDING_BYTES_MAX as usize));
        Self {
            jetstream,
            tasks: TaskTracker::new(),
            room,
        }
    }

    /// Puts the messages of `batch` that `poisoned` names aside, each with its reason. One that
    /// cannot be put aside is delivered again, and tried again then. Returns once they are on their way,
    /// which takes a while only when there are many or large ones.
    pub async fn put_aside(&self, batch: Batch, mut poisoned: Vec<(usize, String)>) {
        if poisoned.is_empty() {
            return;
        }
        poisoned.sort_by_key(|(index, _)| *index);
        let (indexes, reasons): (Vec<_>, Vec<_>) = poisoned.into_iter().unzip();
        let doomed = batch.take(&indexes);
        let bytes = doomed.iter().map(Poisoned::bytes).sum::<usize>();
        let bytes = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(OUTSTANDING_BYTES_MAX);
        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(bytes).await else {
            return;
        };
        let jetstream = self.jetstream.clone();
        self.tasks.spawn(async move {
            let letters = doomed.into_iter().zip(reasons);
            let put_aside =
                |(message, reason): (Poisoned, String)| put_one_aside(&jetstream, message, reason);
            futures_util::stream::iter(letters)
                .for_each_concurrent(PUBLISHED_AT_A_TIME, put_aside)
                .await;
            drop(room);
        });
    }

    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn put_one_aside(jetstream: &jetstream::Context, doomed: Poisoned, reason: String) {
    let Some(sequence) = doomed.stream_sequence() else {
        return error!("a message without a stream sequence cannot be put aside");
    };
    let event_type = subject::event_type(doomed.subject());
    let name = event_type
        .as_ref()
        .map_or(UNKNOWN_TYPE, |name| name.as_str());
    let (body, headers) = doomed.content();
    let headers = labelled(&headers, sequence, &reason);
    let subject = format!("{}{name}", subject::DEAD_LETTERS_PREFIX);
    let publish = || async {
        jetstream
            .publish_with_headers(subject.clone(), headers.clone(), body.clone())
            .await?
            .await
    };
    let patience = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_times(3)
        .with_jitter();
    let passing = |error: &PublishError| {
        matches!(
            error.kind(),
            PublishErrorKind::TimedOut
                | PublishErrorKind::StreamNotFound
                | PublishErrorKind::BrokenPipe
        )
    };
    match publish.retry(patience).when(passing).await {
        Ok(ack) if ack.duplicate && !is_stored(jetstream, ack.sequence, &body).await => warn!(
            stream_sequence = sequence,
            "event {sequence} cannot be put aside yet: the dead letter of another event {sequence}, of before STRIPE_EVENTS \
             was made anew, is in the duplicate window"
        ),
        Ok(_) => {
            metrics::dead_letter();
            warn!(
                stream_sequence = sequence,
                event_type = name,
                reason,
                "event {sequence} is now a dead letter: {reason}"
            );
            doomed.terminate().await;
        }
        Err(error) => error!(
            stream_sequence = sequence,
            "event {sequence} cannot be put aside and will be tried again: {}",
            exit::chain(&error)
        ),
    }
}

/// Whether the dead letter at `sequence` is of this event. A duplicate is as a rule, after a PubAck or
/// a termination that was lost.
async fn is_stored(jetstream: &jetstream::Context, sequence: u64, body: &[u8]) -> bool {
    let Ok(stream) = jetstream.get_stream_no_info(DEAD_LETTERS_STREAM).await else {
        return false;
    };
    stream
        .get_raw_message(sequence)
        .await
        .is_ok_and(|letter| letter.payload == body)
}

/// The event's own headers and what a dead letter adds to them. JetStream's own spoke of the stream
/// the event was in: `Nats-Expected-Stream` would keep it out of any other.
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
    // A header is one line of printable text.
    let reason: String = reason
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    headers.insert(header::REASON, reason.as_str());
    headers
}
