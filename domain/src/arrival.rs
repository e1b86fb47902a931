//! An event as a worker received it. Pure.

use crate::event::{Body, CheckoutSession, Event};
use crate::signal::{self, Cause};

/// An event of a batch, with the position of its message.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The position of its message in the batch.
    pub index: usize,
    pub event: Event,
    pub traceparent: Option<String>,
    /// Its sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}

impl Arrival {
    /// Returns what a signal says about it.
    pub fn cause(&self) -> Cause {
        Cause {
            event: signal::reference(&self.event),
            traceparent: self.traceparent.clone(),
        }
    }

    pub(crate) fn session(&self) -> Option<&CheckoutSession> {
        match &self.event.body {
            Body::CheckoutSession(session) => Some(session),
            Body::Subscription(_) | Body::Resolution(_) | Body::Notification(_) => None,
        }
    }
}
