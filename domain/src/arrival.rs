//! An event as a worker received it, and where the stream held it. Pure.

use litestripe_contract::trace::TraceContext;
use time::OffsetDateTime;

use crate::event::{Body, CheckoutSession, Event};
use crate::signal::{self, Cause};

/// An event of a batch, with the position of its message.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The position of its message in the batch.
    pub index: usize,
    pub event: Event,
    /// The trace that the signals it leads to belong to.
    pub trace: Option<TraceContext>,
    /// When ingress received it, by the clock of ingress. `None` if it came in another way.
    pub received: Option<OffsetDateTime>,
    /// The stream that held it.
    pub stream: StreamId,
    /// Its sequence in that stream.
    pub stream_sequence: u64,
}

/// Which `STRIPE_EVENTS` a sequence is about: when it was created, in microseconds since the Unix
/// epoch. A stream that is deleted and created again has the same name, and its sequences start
/// again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(i64);

impl StreamId {
    /// Returns the id of the stream that was created at `created`.
    pub fn from_created(created: OffsetDateTime) -> Self {
        Self(i64::try_from(created.unix_timestamp_nanos() / 1000).unwrap_or(i64::MAX))
    }

    /// Returns the id that a table holds.
    pub fn from_column(created: i64) -> Self {
        Self(created)
    }

    /// Returns the value for a table.
    pub fn to_column(self) -> i64 {
        self.0
    }

    /// Returns the position of the event `sequence`: a number that grows along a stream, and also
    /// from one stream to the next of the same name, as long as a stream gets fewer than a million
    /// events for each second of its life. So positions can be compared, and sequences cannot.
    pub fn position(self, sequence: u64) -> u64 {
        u64::try_from(self.0).unwrap_or(0).saturating_add(sequence)
    }

    /// Returns the sequence of a position in this stream. `None` if it is in an earlier one.
    pub fn sequence(self, position: u64) -> Option<u64> {
        position.checked_sub(u64::try_from(self.0).unwrap_or(0))
    }
}

impl Arrival {
    /// Returns its position: see [`StreamId::position`].
    pub fn position(&self) -> u64 {
        self.stream.position(self.stream_sequence)
    }

    /// Returns what a signal says about it.
    pub fn cause(&self) -> Cause {
        Cause {
            event: signal::reference(&self.event),
            trace: self.trace.clone(),
            received: self.received,
        }
    }

    pub(crate) fn session(&self) -> Option<&CheckoutSession> {
        match &self.event.body {
            Body::CheckoutSession(session) => Some(session),
            Body::Subscription(_) | Body::Resolution(_) | Body::Notification(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_grow_along_a_stream_and_from_one_stream_to_the_next() {
        let at = |second| {
            StreamId::from_created(OffsetDateTime::from_unix_timestamp(second).expect("a time"))
        };
        let (first, second) = (at(1_795_000_000), at(1_795_003_600));
        assert!(first.position(1) < first.position(2));
        assert!(first.position(1_000_000_000) < second.position(0));
        assert_eq!(second.sequence(second.position(7)), Some(7));
        assert_eq!(second.sequence(first.position(7)), None);
        let longest = at(253_402_300_799);
        assert!(longest.position(u64::MAX >> 20) < i64::MAX.cast_unsigned());
    }
}
