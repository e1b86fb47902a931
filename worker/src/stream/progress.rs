//! How far the workers have applied the event stream.
//!
//! Owns the one formula for it, which all other code uses. Every function fails if the broker is
//! unreachable or the stream is missing.

use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::context::{
    ConsumerInfoError, ConsumerInfoErrorKind, GetStreamError, GetStreamErrorKind, RequestError,
};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{InfoError, RawMessageError, RawMessageErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_domain::arrival::StreamId;
use serde::Deserialize;
use time::OffsetDateTime;

/// The broker's answer about a consumer, as far as async-nats' `Info` leaves it out.
#[derive(Deserialize)]
struct ConsumerTime {
    /// When the broker answered, by its clock. Absent before nats-server 2.10.
    #[serde(default, with = "time::serde::rfc3339::option")]
    ts: Option<OffsetDateTime>,
}

/// The broker did not answer how far the events are applied.
#[derive(Debug, thiserror::Error)]
pub enum ProgressError {
    #[error("cannot read how far the events are applied")]
    Stream(#[from] GetStreamError),
    #[error("cannot read how far the events are applied")]
    Consumer(#[from] ConsumerInfoError),
    #[error("cannot read the next event to be applied")]
    Message(#[from] RawMessageError),
    #[error("cannot read the broker's time")]
    Time(#[source] RequestError),
    #[error("the broker does not say its time")]
    NoTime(#[source] jetstream::Error),
    #[error("cannot read when the stream was created")]
    Created(#[source] InfoError),
}

/// A consumer's position, from its info.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Everything up to this sequence is acked.
    pub ack_floor: u64,
    delivered: u64,
    pending: u64,
    pub unacked: usize,
}

impl Progress {
    /// Returns the sequence up to which everything is applied. More may be applied.
    pub(crate) fn floor(&self) -> u64 {
        if self.unacked == 0 {
            self.delivered
        } else {
            self.ack_floor
        }
    }

    /// Whether every message that the consumer knows of is applied. That includes all messages
    /// stored before the consumer was created, but perhaps not the newest: the server stores a
    /// message and answers its publisher before it informs the stream's consumers.
    fn is_idle(&self) -> bool {
        (self.unacked, self.pending) == (0, 0)
    }

    /// Returns a number that grows with every message that the server settles, and otherwise at most
    /// with gaps between messages that it delivers for the first time.
    pub(crate) fn settled(&self) -> u64 {
        self.delivered.saturating_sub(self.unacked as u64)
    }

    /// Returns the sequence up to which everything is reapplied. Only right for a consumer that was
    /// created after the messages that it is for, as that of a replay.
    pub(crate) fn reapplied_until(&self) -> u64 {
        if self.is_idle() {
            u64::MAX
        } else {
            self.floor()
        }
    }
}

impl From<&Info> for Progress {
    fn from(info: &Info) -> Self {
        Self {
            ack_floor: info.ack_floor.stream_sequence,
            delivered: info.delivered.stream_sequence,
            pending: info.num_pending,
            unacked: info.num_ack_pending,
        }
    }
}

/// Returns the sequence up to which the workers have applied every event that the stream holds;
/// `u64::MAX` if nothing is left to apply. Returns `None` if the workers' consumer does not exist,
/// or is ahead of the stream: its position says nothing then.
pub async fn applied_until(jetstream: &jetstream::Context) -> Result<Option<u64>, ProgressError> {
    let Some(progress) = find(jetstream, WORKER_CONSUMER).await? else {
        return Ok(None);
    };
    // Read after the position, so that a new event is not missing.
    if end(jetstream)
        .await?
        .is_none_or(|(_, end)| progress.delivered > end)
    {
        return Ok(None);
    }
    if !progress.is_idle() {
        return Ok(Some(progress.floor()));
    }
    // The consumer may not know of the newest message yet, so ask the stream.
    let next = first_from(jetstream, progress.floor().saturating_add(1)).await?;
    Ok(Some(
        next.map_or(u64::MAX, |next| next.sequence.saturating_sub(1)),
    ))
}

/// Returns the position of the consumer `name`, or `None` if the consumer does not exist.
pub(crate) async fn find(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Option<Progress>, ProgressError> {
    let info = find_info(jetstream, name).await?;
    Ok(info.as_ref().map(Progress::from))
}

async fn find_info(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Option<Info>, ProgressError> {
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    match stream.consumer_info(name).await {
        Ok(info) => Ok(Some(info)),
        Err(error)
            if matches!(
                error.kind(),
                ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns the position of the event stream's last event; 0 if the stream does not exist yet.
pub(crate) async fn last_position(jetstream: &jetstream::Context) -> Result<u64, ProgressError> {
    let end = end(jetstream).await?;
    Ok(end.map_or(0, |(stream, last)| stream.position(last)))
}

/// Returns which stream holds the events and its last sequence; `None` if there is none.
pub(crate) async fn end(
    jetstream: &jetstream::Context,
) -> Result<Option<(StreamId, u64)>, ProgressError> {
    match jetstream.get_stream(EVENTS_STREAM).await {
        Ok(stream) => {
            let info = stream.cached_info();
            let id = StreamId::from_created(info.created);
            Ok(Some((id, info.state.last_sequence)))
        }
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn is_missing(error: &GetStreamError) -> bool {
    matches!(
        error.kind(),
        GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND
    )
}

/// Whether every event is applied for which `is_before` holds of its time by the broker's clock.
pub(crate) async fn has_applied_all(
    jetstream: &jetstream::Context,
    is_before: impl Fn(OffsetDateTime) -> bool,
) -> Result<bool, ProgressError> {
    let Some(applied_until) = applied_until(jetstream).await? else {
        return Ok(false);
    };
    let Some(oldest) = applied_until.checked_add(1) else {
        return Ok(true);
    };
    let oldest = first_from(jetstream, oldest).await?;
    Ok(oldest.is_none_or(|oldest| !is_before(oldest.time)))
}

/// Returns how long ago the broker stored the oldest event that is not applied, by its clock; zero if
/// all are applied. `info` is that of the workers' consumer.
pub(crate) async fn oldest_unapplied(
    jetstream: &jetstream::Context,
    info: &Info,
) -> Result<Duration, ProgressError> {
    let progress = Progress::from(info);
    if progress.is_idle() {
        return Ok(Duration::ZERO);
    }
    let oldest = first_from(jetstream, progress.floor().saturating_add(1)).await?;
    let now = broker_time(jetstream).await?;
    let now = now.unwrap_or_else(OffsetDateTime::now_utc);
    let age = oldest.map(|oldest| now - oldest.time);
    Ok(age.and_then(|age| age.try_into().ok()).unwrap_or_default())
}

/// Returns the time by the broker's clock. `None` if the broker's answer lacks it, or if
/// the workers' consumer does not exist: its info is the only answer with the time that the worker
/// may request.
pub(crate) async fn broker_time(
    jetstream: &jetstream::Context,
) -> Result<Option<OffsetDateTime>, ProgressError> {
    let subject = format!("CONSUMER.INFO.{EVENTS_STREAM}.{WORKER_CONSUMER}");
    // The server takes an empty object for an empty request, and refuses a null.
    let answer = jetstream
        .request(subject, &serde_json::json!({}))
        .await
        .map_err(ProgressError::Time)?;
    match answer {
        Response::Ok(ConsumerTime { ts }) => Ok(ts),
        Response::Err { error }
            if [ErrorCode::CONSUMER_NOT_FOUND, ErrorCode::STREAM_NOT_FOUND]
                .contains(&error.error_code()) =>
        {
            Ok(None)
        }
        Response::Err { error } => Err(ProgressError::NoTime(error)),
    }
}

/// Returns when the event stream was created.
pub(crate) async fn stream_created(
    jetstream: &jetstream::Context,
) -> Result<OffsetDateTime, ProgressError> {
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    let info = stream.get_info().await.map_err(ProgressError::Created)?;
    Ok(info.created)
}

/// Returns which stream holds the events, and the sequence of its first event.
pub(crate) async fn begin(
    jetstream: &jetstream::Context,
) -> Result<(StreamId, u64), ProgressError> {
    let stream = jetstream.get_stream(EVENTS_STREAM).await?;
    let info = stream.cached_info();
    let id = StreamId::from_created(info.created);
    Ok((id, info.state.first_sequence))
}

/// What the workers do with a consumer: if it does not change, they do nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Requests that wait for messages.
    pub(crate) requests: usize,
    delivered: u64,
    ack_floor: u64,
}

/// Returns what the workers do with the consumer `name`, which need not exist.
pub(crate) async fn activity(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Activity, ProgressError> {
    let info = find_info(jetstream, name).await?;
    Ok(info.map_or_else(Activity::default, |info| Activity {
        requests: info.num_waiting,
        delivered: info.delivered.consumer_sequence,
        ack_floor: info.ack_floor.consumer_sequence,
    }))
}

/// Returns how long the stream holds an event; zero if that is not limited.
pub(crate) async fn max_age(jetstream: &jetstream::Context) -> Result<Duration, ProgressError> {
    let stream = jetstream.get_stream(EVENTS_STREAM).await?;
    Ok(stream.cached_info().config.max_age)
}

/// Whether a stream that holds its messages for `max_age` will hold one that was `stored` then for
/// at least half of that from `now` on.
pub(crate) fn expires_late(stored: OffsetDateTime, max_age: Duration, now: OffsetDateTime) -> bool {
    let half = time::Duration::try_from(max_age / 2).unwrap_or(time::Duration::MAX);
    max_age.is_zero() || now - stored < half
}

/// Returns the first event that the stream holds at or after `sequence`.
async fn first_from(
    jetstream: &jetstream::Context,
    sequence: u64,
) -> Result<Option<StreamMessage>, ProgressError> {
    next_of(jetstream, &format!("{EVENTS_PREFIX}>"), sequence).await
}

/// Returns the first event of `subject` that the stream holds at or after `sequence`.
pub(crate) async fn next_of(
    jetstream: &jetstream::Context,
    subject: &str,
    sequence: u64,
) -> Result<Option<StreamMessage>, ProgressError> {
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    match stream
        .get_first_raw_message_by_subject(subject, sequence)
        .await
    {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_delivered_messages_are_applied_if_none_is_unacked() {
        let progress = |unacked, pending| Progress {
            ack_floor: 3,
            delivered: 9,
            pending,
            unacked,
        };
        let ends = |progress: Progress| (progress.floor(), progress.reapplied_until());
        assert_eq!(ends(progress(2, 5)), (3, 3));
        assert_eq!(ends(progress(2, 0)), (3, 3));
        assert_eq!(ends(progress(0, 5)), (9, 9));
        assert_eq!(ends(progress(0, 0)), (9, u64::MAX));
    }
}
