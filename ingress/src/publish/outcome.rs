//! The outcomes of storing an event.
//!
//! Owns the outcomes of one attempt and of all attempts together, and which JetStream error leads
//! to which outcome. May not know how an event is sent.

use std::error::Error as _;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use litestripe_contract::{exit, subject};

/// How an event came to be in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    New,
    /// An earlier delivery stored it.
    Duplicate,
}

/// Why an event is not known to be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// With its headers it is larger than the server or the stream accepts.
    #[error("the event is larger than NATS accepts")]
    TooLarge,
    /// It may or may not be stored: Stripe must deliver it again.
    #[error("the event could not be stored: {0}")]
    Unavailable(Trouble),
}

/// What is wrong with the broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("not connected to NATS")]
    NotConnected,
    /// An election or a restart is going on, or the stream does not exist.
    #[error("stream {} does not answer", subject::EVENTS_STREAM)]
    NoStream,
    #[error("JetStream did not acknowledge in time")]
    NoAck,
    /// For example because the stream is full.
    #[error("JetStream refused: {description} ({code})")]
    Refused { code: u64, description: String },
}

/// Why one attempt to publish failed.
#[derive(Debug, Clone)]
pub(super) enum AttemptError {
    TooLarge,
    /// A later attempt may succeed.
    Retry(Trouble),
    /// Another attempt within the deadline would fail too.
    GiveUp(Trouble),
}

impl From<PublishError> for AttemptError {
    fn from(error: PublishError) -> Self {
        match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => Self::TooLarge,
            PublishErrorKind::StreamNotFound => Self::Retry(Trouble::NoStream),
            PublishErrorKind::TimedOut | PublishErrorKind::MaxAckPending => {
                Self::Retry(Trouble::NoAck)
            }
            PublishErrorKind::BrokenPipe => Self::Retry(Trouble::NotConnected),
            PublishErrorKind::WrongLastMessageId
            | PublishErrorKind::WrongLastSequence
            | PublishErrorKind::Other => {
                match error.source().and_then(|source| source.downcast_ref()) {
                    Some(error) => Self::from_api(error),
                    None => Self::GiveUp(Trouble::Refused {
                        code: 0,
                        description: exit::chain(&error),
                    }),
                }
            }
        }
    }
}

impl AttemptError {
    fn from_api(error: &jetstream::Error) -> Self {
        let code = error.error_code();
        let refused = Trouble::Refused {
            code: code.0,
            description: error.to_string(),
        };
        match code {
            // There is no leader yet, or the attempt before this one is still being replicated.
            ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT => {
                Self::Retry(refused)
            }
            ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => Self::TooLarge,
            _ => Self::GiveUp(refused),
        }
    }
}
