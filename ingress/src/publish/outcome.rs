//! What came of storing an event.
//!
//! Owns the ways it may end, for one attempt and for all of them, and which errors of JetStream lead to
//! which. May not know how an event is sent.

use std::error::Error as _;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use litestripe_contract::{exit, subject};

/// How an event is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    New,
    /// Since an earlier delivery.
    Before,
}

/// Why an event is not known to be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// It, with its headers, is larger than the server or the stream takes.
    #[error("the event is larger than NATS takes")]
    TooLarge,
    /// It may or may not be: Stripe must deliver it again.
    #[error("the event could not be stored: {0}")]
    Unavailable(Trouble),
}

/// What is wrong with the broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("not connected to NATS")]
    NotConnected,
    /// Nobody answers for the stream: an election, a restart, or it is really missing.
    #[error("stream {} does not answer", subject::EVENTS_STREAM)]
    NoStream,
    #[error("JetStream did not acknowledge in time")]
    NoAck,
    /// For instance because the stream is full.
    #[error("JetStream refused: {description} ({code})")]
    Refused { code: u64, description: String },
}

#[derive(Debug, Clone)]
pub(super) enum AttemptError {
    TooLarge,
    Again(Trouble),
    Never(Trouble),
}

impl From<PublishError> for AttemptError {
    fn from(error: PublishError) -> Self {
        match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => Self::TooLarge,
            PublishErrorKind::StreamNotFound => Self::Again(Trouble::NoStream),
            PublishErrorKind::TimedOut | PublishErrorKind::MaxAckPending => {
                Self::Again(Trouble::NoAck)
            }
            PublishErrorKind::BrokenPipe => Self::Again(Trouble::NotConnected),
            PublishErrorKind::WrongLastMessageId
            | PublishErrorKind::WrongLastSequence
            | PublishErrorKind::Other => {
                match error.source().and_then(|source| source.downcast_ref()) {
                    Some(error) => Self::from_api(error),
                    None => Self::Never(Trouble::Refused {
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
            // No leader yet, or the attempt before this one is still being replicated.
            ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT => {
                Self::Again(refused)
            }
            ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => Self::TooLarge,
            _ => Self::Never(refused),
        }
    }
}
