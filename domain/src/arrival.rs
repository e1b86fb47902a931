//! An event as it came to a worker. Pure.

use crate::event::{Before, Body, CheckoutSession, Event};
use crate::signal::{self, Cause};

/// An event of a batch, and where it came from.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The place of its message in the batch.
    pub index: usize,
    pub event: Event,
    pub traceparent: Option<String>,
    /// Its sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}

impl Arrival {
    /// What a signal says of it.
    pub fn cause(&self) -> Cause {
        Cause {
            event: signal::reference(&self.event),
            traceparent: self.traceparent.clone(),
        }
    }

    pub(crate) fn session(&self) -> Option<&CheckoutSession> {
        match &self.event.body {
            Body::CheckoutSession(session) => Some(session),
            Body::Subscription(_) | Body::Resolution(_) => None,
        }
    }

    pub(crate) fn is_creation(&self) -> bool {
        matches!(&self.event.body, Body::Subscription(body) if body.before == Before::Nothing)
    }
}
