//! Whether the broker takes a replay's acks.
//!
//! A replay is finished once its events are acked. A user who may not publish acks gets no answer to
//! them, so the replay would apply its events again and again.

use super::ReplayError;
use crate::stream::consumer::ACK_PENDING_MAX;
use crate::stream::progress::Progress;

/// The acks since the server last settled a message.
#[derive(Default)]
pub(super) struct Acks {
    sent: u64,
    settled: Option<u64>,
}

impl Acks {
    /// Starts with what the server had settled before the first ack.
    pub(super) fn after(progress: Option<Progress>) -> Self {
        Self {
            sent: 0,
            settled: progress.map(|progress| progress.settled()),
        }
    }

    pub(super) fn record_sent(&mut self, count: usize) {
        self.sent += count as u64;
    }

    /// Whether enough acks are sent to check them even if the replay is not idle.
    pub(super) fn are_due(&self) -> bool {
        self.sent >= 2 * ACK_PENDING_MAX
    }

    /// Fails if two acks for each message that waits for one had no effect. One of them may have
    /// been lost with a connection.
    pub(super) fn check(&mut self, progress: Progress) -> Result<(), ReplayError> {
        let settled = Some(progress.settled());
        if self.settled != settled {
            *self = Self { sent: 0, settled };
        }
        let unacked = progress.unacked as u64;
        if unacked > 0 && self.sent >= 2 * unacked {
            return Err(ReplayError::AcksRefused);
        }
        Ok(())
    }
}
