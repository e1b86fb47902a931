//! The merge: a row's state and an event give a new state, and the visible columns are a function of
//! the state.
//!
//! Owns what makes order and repetition not matter. May not do I/O, read a clock, or know the
//! database. Invariant: the state is a join-semilattice. Every part of it only moves up an order of
//! its own (a later event, a later phase, a larger set), so that merging is commutative, associative
//! and idempotent, and the row depends on which events came, not on how.

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
    /// Whether the event of the subscription's creation was seen.
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
    /// An event that was merged before, or that a later one has superseded, changes nothing.
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
        // A snapshot we fetched has no type of Stripe's to keep metadata under.
        let of_stripe = event.event_type.as_str() != SNAPSHOT_TYPE;
        event
            .metadata()
            .is_some_and(|map| of_stripe && self.metadata.merge(event, map))
    }

    /// Empties all metadata. Returns whether there was any.
    ///
    /// Stamps and digests stay: which event is the last, and which came before, is the same as
    /// before, and an older event brings nothing back.
    pub(crate) fn erase_metadata(&mut self) -> bool {
        let of_types = self.metadata.erase();
        let of_snapshots = self
            .subscription
            .as_mut()
            .is_some_and(snapshot::Register::erase_metadata);
        of_types | of_snapshots
    }

    pub(crate) fn event_type(&self, id: &EventId) -> Option<&EventType> {
        self.metadata.event_type(id)
    }
}

/// A register that keeps the value of the newest event: newest by `created`, then by id, bytewise,
/// then, of two renderings of one event, the larger value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Latest<T> {
    created: i64,
    id: EventId,
    value: T,
}

impl<T: Ord> Latest<T> {
    /// Puts `event`'s value into `register`, if it is newer. `value` is only made when it is.
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
