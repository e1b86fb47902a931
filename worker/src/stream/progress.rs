//! How far the workers have applied the event stream: the one answer, from one formula. Fails when the broker
//! is away or the stream is missing.

use async_nats::jetstream;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamError};
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
    #[error("cannot see when the oldest event that is not applied was stored")]
    Message(#[from] RawMessageError),
}

/// How far a consumer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Everything up to this sequence is acked.
    pub ack_floor: u64,
    pub delivered: u64,
    pub pending: u64,
    pub unacked: usize,
}

impl Progress {
    /// Up to this sequence everything is applied: all there is, if nothing waits.
    pub(crate) fn applied_until(&self) -> u64 {
        match (self.unacked, self.pending) {
            (0, 0) => u64::MAX,
            (0, _) => self.delivered,
            _ => self.ack_floor,
        }
    }

    pub(crate) fn has_applied(&self, sequence: u64) -> bool {
        self.applied_until() >= sequence
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

/// How far the workers have come. None when no worker was ever there.
pub(crate) async fn of_workers(
    jetstream: &jetstream::Context,
) -> Result<Option<Progress>, ProgressError> {
    of_consumer(jetstream, WORKER_CONSUMER).await
}

/// How far the consumer `name` has come. None when it does not exist.
pub(crate) async fn of_consumer(
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
    let Some(progress) = of_workers(jetstream).await? else {
        return Ok(false);
    };
    let Some(oldest) = progress.applied_until().checked_add(1) else {
        return Ok(true);
    };
    let stream = jetstream.get_stream_no_info(EVENTS_STREAM).await?;
    match stream
        .get_first_raw_message_by_subject(format!("{EVENTS_PREFIX}>"), oldest)
        .await
    {
        Ok(message) => Ok(message.time > end),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(true),
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
        assert_eq!(progress(2, 5).applied_until(), 3);
        assert_eq!(progress(0, 5).applied_until(), 9);
        assert_eq!(progress(0, 0).applied_until(), u64::MAX);
        assert!(progress(2, 0).has_applied(3) && !progress(2, 0).has_applied(4));
    }
}
