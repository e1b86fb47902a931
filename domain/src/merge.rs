//! The merge: a row's state and an event give a new state, and the visible columns are a function
//! of the state.
//!
//! Stripe delivers events in any order and more than once. The merge makes a row depend only on the
//! set of events that arrived, never on their order, repetition or batches. The state consists of
//! registers, and each register keeps the largest value that it has seen, in its own order: a
//! later event, a later phase of the subscription's life, a larger set of events. Keeping the
//! larger of two values is commutative, associative and idempotent, and so is the merge. (In
//! mathematical terms, the state is a join-semilattice.)
//!
//! `snapshot` decides which snapshot of the subscription is the latest, with the help of `walk` and
//! `digest`. `checkout` keeps what Checkout Sessions say, `metadata` the metadata by event type.
//! `visible` computes the columns from the state.
//!
//! Owns the invariant that order and repetition do not matter. May not do I/O, read a clock, or
//! know the database.

mod checkout;
mod digest;
mod metadata;
mod snapshot;
mod visible;
mod walk;

use litestripe_contract::event::{EventId, EventType, SNAPSHOT_TYPE};
use serde::{Deserialize, Serialize};

use crate::event::{Before, Body, Event};

pub use visible::{Changes, Visible, changes};

/// A row's merge state. Its JSON is the column `merge_state`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subscription: Option<snapshot::Register>,
    /// Whether the subscription's creation event has been merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    created_seen: bool,
    #[serde(default)]
    checkout: checkout::Registers,
    #[serde(default)]
    metadata: metadata::Registers,
}

impl State {
    /// Merges an event of this row's subscription. Returns whether the state changed.
    ///
    /// An event that was merged before, or that a later event supersedes, changes nothing.
    pub fn merge(&mut self, event: &Event) -> bool {
        match &event.body {
            Body::Subscription(body) => {
                let first = body.before == Before::Nothing && !self.created_seen;
                self.created_seen |= first;
                let moved = snapshot::merge(&mut self.subscription, event, body);
                first | moved | self.merge_metadata(event)
            }
            Body::CheckoutSession(session) => {
                let moved = self.checkout.merge_session(event, session);
                moved | self.merge_metadata(event)
            }
            Body::Resolution(resolution) => self
                .checkout
                .merge_reference(event, &resolution.client_reference_id),
        }
    }

    fn merge_metadata(&mut self, event: &Event) -> bool {
        // Metadata is kept by Stripe's event types. A snapshot that a worker fetched has none of
        // them.
        let has_stripe_type = event.event_type.as_str() != SNAPSHOT_TYPE;
        event
            .metadata()
            .is_some_and(|map| has_stripe_type && self.metadata.merge(event, map))
    }

    /// Empties all metadata. Returns whether there was any.
    ///
    /// Stamps and digests stay. So the same event remains the last one, events that were merged
    /// before are still recognised, and an older event cannot bring metadata back.
    pub(crate) fn erase_metadata(&mut self) -> bool {
        let had_by_type = self.metadata.erase();
        let had_in_snapshots = self
            .subscription
            .as_mut()
            .is_some_and(snapshot::Register::erase_metadata);
        had_by_type | had_in_snapshots
    }

    /// Returns the type of the event `id`, if a metadata register knows it.
    pub(crate) fn event_type(&self, id: &EventId) -> Option<&EventType> {
        self.metadata.event_type(id)
    }
}

/// A register that keeps the value of the newest event. The newest event has the largest `created`,
/// then the bytewise largest id. Of two renderings of one event, the larger value is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Latest<T> {
    created: i64,
    id: EventId,
    value: T,
}

impl<T: Ord> Latest<T> {
    /// Stores `event`'s value in `register` if it is newer. Calls `value` only if the event is not
    /// older. Returns whether the register changed.
    fn merge(register: &mut Option<Self>, event: &Event, value: impl FnOnce() -> T) -> bool {
        if register
            .as_ref()
            .is_some_and(|held| held.stamp() > (event.created, &event.id))
        {
            return false;
        }
        let new = Some(Self {
            created: event.created,
            id: event.id.clone(),
            value: value(),
        });
        let newer = new > *register;
        if newer {
            *register = new;
        }
        newer
    }

    fn stamp(&self) -> (i64, &EventId) {
        (self.created, &self.id)
    }
}

#[cfg(test)]
mod tests;
