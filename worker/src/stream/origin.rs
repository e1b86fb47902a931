//! The stream that messages came from.
//!
//! Owns whether they may still be settled. A stream may be deleted and created anew, with a
//! consumer of the same name. An ack of a message of the old one would settle the message that has
//! its sequence now, and that event would never be applied. So after each reconnect, and when the
//! server ends a pull request, the stream's id is compared before anything is settled.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream;
use litestripe_domain::arrival::StreamId;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::progress;

/// How often the stream is looked for while the broker does not answer.
const RETRY: Duration = Duration::from_millis(100);

/// One stream, as long as it exists.
pub(super) struct Origin {
    stream: StreamId,
    jetstream: jetstream::Context,
    /// The number of the connection on which the stream was last seen.
    seen_on: AtomicU64,
    is_gone: AtomicBool,
}

/// Whether the stream still exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existence {
    Exists,
    /// There is none, or another one of its name.
    Gone,
    /// The broker does not answer.
    Unknown,
}

impl Origin {
    /// `connection` is the number of the connection on which `stream` was seen.
    pub(super) fn new(stream: StreamId, jetstream: jetstream::Context, connection: u64) -> Self {
        Self {
            stream,
            jetstream,
            seen_on: AtomicU64::new(connection),
            is_gone: AtomicBool::new(false),
        }
    }

    pub(super) fn stream(&self) -> StreamId {
        self.stream
    }

    pub(super) fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// Returns whether the stream exists. Asks the broker only if the client has reconnected since
    /// it was last seen.
    pub(super) async fn existence(&self) -> Existence {
        if self.is_gone.load(Ordering::Relaxed) {
            return Existence::Gone;
        }
        let client = self.jetstream.client();
        if client.connection_state() != State::Connected {
            return Existence::Unknown;
        }
        if self.seen_on.load(Ordering::Relaxed) == connection(&client) {
            return Existence::Exists;
        }
        self.check().await
    }

    /// Asks the broker whether the stream exists.
    pub(super) async fn check(&self) -> Existence {
        let connection = connection(&self.jetstream.client());
        match progress::end(&self.jetstream).await {
            Ok(Some((stream, _))) if stream == self.stream => {
                self.seen_on.store(connection, Ordering::Relaxed);
                Existence::Exists
            }
            Ok(_) => {
                if !self.is_gone.swap(true, Ordering::Relaxed) {
                    warn!(
                        "the stream that events were fetched from is gone: those in flight are not acknowledged"
                    );
                }
                Existence::Gone
            }
            Err(error) => {
                debug!("cannot see whether the stream exists: {error}");
                Existence::Unknown
            }
        }
    }

    /// Returns whether the stream exists. Waits for the broker's answer for up to `max`.
    pub(super) async fn exists_within(&self, max: Duration) -> bool {
        let end = Instant::now() + max;
        loop {
            match self.existence().await {
                Existence::Exists => return true,
                Existence::Gone => return false,
                Existence::Unknown if Instant::now() >= end => return false,
                Existence::Unknown => sleep(RETRY).await,
            }
        }
    }
}

/// Returns the number of connections that the client has made so far.
pub(crate) fn connection(client: &async_nats::Client) -> u64 {
    client.statistics().connects.load(Ordering::Relaxed)
}
