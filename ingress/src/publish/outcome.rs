//! What came of storing an event.
//!
//! Owns the ways it may end, for one attempt and for all of them, and which errors of JetStream lead to
//! which. May not know how an event is sent.

use std::fmt;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use litestripe_contract::{exit, subject};

/// How an event is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Just now.
    New,
    /// Since an earlier delivery.
    Before,
}

/// Why an event is not known to be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It, with its headers, is larger than the server or the stream takes.
    #[error("the event is larger than NATS takes")]
    TooLarge,
    /// It may or may not be: Stripe must deliver it again.
    #[error("the event could not be stored: {0}")]
    Unavailable(Trouble),
}

/// What is wrong with the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// There is no connection.
    NotConnected,
    /// Nobody answers for the stream: an election, a restart, or it is really missing.
    NoStream,
    /// No PubAck came in time.
    NoAck,
    /// JetStream refused, for instance because the stream is full.
    Refused {
        /// JetStream's error code.
        code: u64,
        /// JetStream's words.
        description: String,
    },
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => f.write_str("not connected to NATS"),
            Self::NoStream => write!(f, "stream {} does not answer", subject::EVENTS_STREAM),
            Self::NoAck => f.write_str("JetStream did not acknowledge in time"),
            Self::Refused { code, description } => write!(f, "JetStream refused: {description} ({code})"),
        }
    }
}

/// What one attempt to publish came to.
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
            PublishErrorKind::TimedOut | PublishErrorKind::MaxAckPending => Self::Again(Trouble::NoAck),
            PublishErrorKind::BrokenPipe => Self::Again(Trouble::NotConnected),
            PublishErrorKind::WrongLastMessageId | PublishErrorKind::WrongLastSequence | PublishErrorKind::Other => {
                match api_error(&error) {
                    Some(error) => Self::from_api(error),
                    None => Self::Never(Trouble::Refused { code: 0, description: exit::chain(&error) }),
                }
            }
        }
    }
}

impl AttemptError {
    fn from_api(error: &jetstream::Error) -> Self {
        let code = error.error_code();
        let refused = Trouble::Refused { code: code.0, description: error.to_string() };
        match code {
            // No leader yet, or the attempt before this one is still being replicated.
            ErrorCode::CLUSTER_NOT_AVAILABLE | ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT => Self::Again(refused),
            ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => Self::TooLarge,
            _ => Self::Never(refused),
        }
    }
}

fn api_error(error: &PublishError) -> Option<&jetstream::Error> {
    std::error::Error::source(error)?.downcast_ref()
}
