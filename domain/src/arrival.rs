//! An event as it came to a worker. Pure.

use crate::event::{Before, Body, Event};
use crate::signal::{self, Cause};

/// An event of a batch, and where it came from.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The place of its message in the batch.
    pub index: usize,
    /// The event.
    pub event: Event,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
    /// Its sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}

impl Arrival {
    /// What a signal says of it.
    #[must_use]
    pub fn cause(&self) -> Cause {
        Cause { event: signal::reference(&self.event), traceparent: self.traceparent.clone() }
    }

    /// Whether it is the event of a subscription's creation.
    #[must_use]
    pub fn is_creation(&self) -> bool {
        matches!(&self.event.body, Body::Subscription(body) if body.before == Before::Nothing)
    }
}
