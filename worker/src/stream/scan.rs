//! Reading a stream from end to end, and removing messages from it.
//!
//! Owns the readers: consumers without acks, which are deleted after the work, with pulls that are
//! limited in bytes. May not know what is searched for. Every function fails if the broker does not
//! answer.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use async_nats::jetstream::{self, ErrorCode, context::GetStreamErrorKind};
use futures_util::{StreamExt as _, TryStreamExt as _};

/// Messages and bytes requested at a time.
const PULL_MESSAGES: usize = 500;
const PULL_BYTES: usize = 8 << 20;

/// How long one pull request stays open, and how often the server sends a heartbeat for it.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const PULL_HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a reader waits for a message before it asks whether any are left.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The time after which the server removes a reader that was not deleted.
const REMOVE_AFTER: Duration = Duration::from_secs(60);

/// Removals in flight at a time. Each is synced to disk.
const REMOVALS_IN_FLIGHT: usize = 16;

/// A stream could not be read, or a message could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {stream}")]
pub struct ScanError {
    doing: &'static str,
    stream: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    doing: &'static str,
    stream: &'static str,
) -> impl Fn(E) -> ScanError {
    move |source| ScanError {
        doing,
        stream,
        source: source.into(),
    }
}

pub(crate) struct ScannedMessage<'a> {
    pub(crate) sequence: u64,
    pub(crate) body: &'a [u8],
}

/// Calls `visit` for every message of the stream from the sequence `from` up to the last one that
/// exists now. Returns the last sequence, or 0 if the stream does not exist.
pub(crate) async fn read(
    jetstream: &jetstream::Context,
    name: &'static str,
    from: u64,
    mut visit: impl FnMut(ScannedMessage<'_>),
) -> Result<u64, ScanError> {
    let reading = "read";
    let Some(stream) = find(jetstream, name).await? else {
        return Ok(0);
    };
    let last = stream.cached_info().state.last_sequence;
    if stream.cached_info().state.messages == 0 || last < from {
        return Ok(last);
    }
    let from = DeliverPolicy::ByStartSequence {
        start_sequence: from.max(1),
    };
    let config = pull::Config {
        inactive_threshold: REMOVE_AFTER,
        ..reader(jetstream, "erase", from)
    };
    let mut consumer = stream
        .create_consumer(config)
        .await
        .map_err(failed(reading, name))?;
    let mut left = consumer.cached_info().num_pending;
    let pull = consumer.stream().max_messages_per_batch(PULL_MESSAGES);
    let pull = pull.max_bytes_per_batch(PULL_BYTES.max(2 * jetstream.client().max_payload()));
    let pull = pull.expires(PULL_EXPIRES).heartbeat(PULL_HEARTBEAT);
    let mut messages = pull.messages().await.map_err(failed(reading, name))?;
    while left > 0 {
        let Ok(next) = tokio::time::timeout(SILENCE_MAX, messages.next()).await else {
            // The messages that are left may have been removed meanwhile.
            left = consumer
                .info()
                .await
                .map_err(failed(reading, name))?
                .num_pending;
            if left > 0 {
                return Err(failed(reading, name)("the NATS server sends no messages"));
            }
            break;
        };
        let next = next
            .ok_or("the consumer is gone")
            .map_err(failed(reading, name))?;
        let message = next.map_err(failed(reading, name))?;
        let info = message.info().map_err(failed(reading, name))?;
        if info.stream_sequence <= last {
            visit(ScannedMessage {
                sequence: info.stream_sequence,
                body: &message.payload,
            });
        }
        left = if info.stream_sequence < last {
            info.pending
        } else {
            0
        };
    }
    drop(messages);
    // If this fails, the server removes the reader soon.
    let _ = stream.delete_consumer(&consumer.cached_info().name).await;
    Ok(last)
}

/// Returns the configuration of a consumer without acks. Its name contains `purpose`, for an
/// operator who lists consumers; and without a name the request to create it would have a subject
/// of another form, which the broker's permissions would have to allow too.
pub(crate) fn reader(
    jetstream: &jetstream::Context,
    purpose: &str,
    from: DeliverPolicy,
) -> pull::Config {
    let unique = jetstream.client().new_inbox();
    pull::Config {
        name: Some(format!(
            "litestripe-{purpose}-{}",
            unique.rsplit('.').next().unwrap_or_default()
        )),
        deliver_policy: from,
        ack_policy: AckPolicy::None,
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    }
}

/// Returns the body of a message, or `None` if it does not exist.
pub(crate) async fn body(
    jetstream: &jetstream::Context,
    name: &'static str,
    sequence: u64,
) -> Result<Option<bytes::Bytes>, ScanError> {
    let Some(stream) = find(jetstream, name).await? else {
        return Ok(None);
    };
    match stream.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.payload)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(failed("read a message of", name)(error)),
    }
}

/// Removes messages permanently: the server overwrites their bytes on disk. Returns how many
/// existed.
pub(crate) async fn remove(
    jetstream: &jetstream::Context,
    name: &'static str,
    sequences: impl IntoIterator<Item = u64>,
) -> Result<u64, ScanError> {
    let Some(stream) = find(jetstream, name).await? else {
        return Ok(0);
    };
    let removals =
        futures_util::stream::iter(sequences).map(|sequence| remove_one(&stream, name, sequence));
    removals
        .buffer_unordered(REMOVALS_IN_FLIGHT)
        .try_fold(0, |sum, one| async move { Ok(sum + u64::from(one)) })
        .await
}

async fn remove_one(stream: &Stream, name: &'static str, sequence: u64) -> Result<bool, ScanError> {
    let Err(refused) = stream.delete_message(sequence).await else {
        return Ok(true);
    };
    // Another process or the stream's age limit may have removed it already.
    match stream.get_raw_message(sequence).await {
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(false),
        _ => Err(failed("remove a message from", name)(refused)),
    }
}

pub(crate) async fn find(
    jetstream: &jetstream::Context,
    name: &'static str,
) -> Result<Option<Stream>, ScanError> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(None)
            }
            _ => Err(failed("find", name)(error)),
        },
    }
}
