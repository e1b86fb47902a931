//! How far the workers have applied the event stream: the one answer, from one formula. Fails when the broker
//! is away or the stream is missing.

use async_nats::jetstream;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamError};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM, WORKER_CONSUMER};
use time::OffsetDateTime;

/// The broker does not say how far the events are applied.
#[derive(Debug, thiserror::Error)]
pub enum ProgressError {
    #[error("cannot see how far the events are applied")]
    Stream(#[from] GetStreamError),
    #[error("cannot see how far the events are applied")]
    Consumer(#[from] ConsumerInfoError),
    #[error("cannot see which event is the next to be applied")]
    Message(#[from] RawMessageError),
}

/// How far a consumer has come, as its info says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Everything up to this sequence is acked.
    pub ack_floor: u64,
    delivered: u64,
    pending: u64,
    unacked: usize,
}

impl Progress {
    /// Everything up to this sequence is applied, and perhaps more.
    pub(crate) fn floor(&self) -> u64 {
        if self.unacked == 0 {
            self.delivered
        } else {
            self.ack_floor
        }
    }

    /// Whether everything is applied that the consumer knows of: surely what was stored before the consumer
    /// was created, but perhaps not the newest message. The server stores a message and answers the publisher
    /// before the stream's consumers hear of it.
    fn is_idle(&self) -> bool {
        (self.unacked, self.pending) == (0, 0)
    }

    /// Up to this sequence everything is applied again. For a consumer that is younger than the messages that
    /// it is there for.
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

/// Up to this sequence the workers have applied every event that the stream holds; `u64::MAX` if nothing
/// is left to apply. None when no worker was ever there.
pub async fn applied_until(jetstream: &jetstream::Context) -> Result<Option<u64>, ProgressError> {
    let Some(progress) = find(jetstream, WORKER_CONSUMER).await? else {
        return Ok(None);
    };
    if !progress.is_idle() {
        return Ok(Some(progress.floor()));
    }
    // What comes next may be a message that the consumer has not heard of yet.
    let next = first_from(jetstream, progress.floor().saturating_add(1)).await?;
    Ok(Some(
        next.map_or(u64::MAX, |next| next.sequence.saturating_sub(1)),
    ))
}

/// How far the consumer `name` has come. None when it does not exist.
pub(crate) async fn find(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Option<Progress>, ProgressError> {
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    match stream.consumer_info(name).await {
        Ok(info) => Ok(Some(Progress::from(&info))),
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

/// Whether every event that was stored before `end` is applied.
pub(crate) async fn has_applied_all_before(
    jetstream: &jetstream::Context,
    end: OffsetDateTime,
) -> Result<bool, ProgressError> {
    let Some(applied_until) = applied_until(jetstream).await? else {
        return Ok(false);
    };
    let Some(oldest) = applied_until.checked_add(1) else {
        return Ok(true);
    };
    let oldest = first_from(jetstream, oldest).await?;
    Ok(oldest.is_none_or(|oldest| oldest.time > end))
}

/// The first event that the stream holds from `sequence` on.
async fn first_from(
    jetstream: &jetstream::Context,
    sequence: u64,
) -> Result<Option<StreamMessage>, ProgressError> {
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    match stream
        .get_first_raw_message_by_subject(format!("{EVENTS_PREFIX}>"), sequence)
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
    fn what_was_delivered_is_applied_once_nothing_of_it_is_unacked() {
        let progress = |unacked, pending| Progress {
            ack_floor: 3,
            delivered: 9,
            pending,
            unacked,
        };
        let said = |progress: Progress| (progress.floor(), progress.reapplied_until());
        assert_eq!(said(progress(2, 5)), (3, 3));
        assert_eq!(said(progress(2, 0)), (3, 3));
        assert_eq!(said(progress(0, 5)), (9, 9));
        assert_eq!(said(progress(0, 0)), (9, u64::MAX));
    }
}
