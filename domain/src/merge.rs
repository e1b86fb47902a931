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
//! `snapshot` decides which snapshot of Stripe's events is the latest, with the help of `walk` and
//! `digest`; `fetched` decides which fetched snapshot is. `checkout` keeps what Checkout Sessions
//! say, `metadata` the metadata by event type. `visible` computes the columns from the state.
//!
//! Owns the invariant that order and repetition do not matter. May not do I/O, read a clock, or
//! know the database.

mod checkout;
mod digest;
mod fetched;
mod metadata;
mod snapshot;
mod visible;
mod walk;

use litestripe_contract::event::{EventId, EventType};
use serde::{Deserialize, Serialize};

use crate::event::{Before, Body, Event, SubscriptionEvent};

pub use visible::{Changes, Visible, changes};

/// The last second that a `Timestamp` can hold: the end of the year 9999.
const TIMESTAMP_MAX: i64 = 253_402_300_799;

/// A row's merge state. Its JSON is the column `merge_state`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subscription: Option<snapshot::Register>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fetched: Option<fetched::Register>,
    /// Whether the subscription's creation event has been merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    created_seen: bool,
    /// Whether Stripe was searched for the subscription's Checkout Session and has none that names
    /// a user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    searched: bool,
    #[serde(default)]
    checkout: checkout::Registers,
    #[serde(default)]
    metadata: metadata::Registers,
    #[serde(default, skip_serializing_if = "metadata::FetchedRegisters::is_empty")]
    fetched_metadata: metadata::FetchedRegisters,
    /// Whether the question for a user was stored since the row needs one. Not merged: it follows
    /// from the rest and the settings whenever an event changes the row. Rows of the previous
    /// version lack it, so their next event stores the question.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    awaits_user: bool,
}

impl State {
    /// Merges an event of this row's subscription. Returns whether the state changed.
    ///
    /// An event that was merged before, or that a later event supersedes, changes nothing.
    pub fn merge(&mut self, event: &Event) -> bool {
        match &event.body {
            Body::Subscription(body) => {
                let first = is_creation(event, body) && !self.created_seen;
                self.created_seen |= first;
                let searched = event.fetch.as_ref().is_some_and(|fetch| fetch.searched);
                let first_search = searched && !self.searched;
                self.searched |= searched;
                let moved = match &event.fetch {
                    Some(fetch) => fetched::merge(&mut self.fetched, event, fetch, body),
                    None => snapshot::merge(&mut self.subscription, event, body),
                };
                first | first_search | moved | self.merge_metadata(event)
            }
            Body::CheckoutSession(session) => {
                let moved = self.checkout.merge_session(event, session);
                moved | self.merge_metadata(event)
            }
            Body::Resolution(resolution) => self
                .checkout
                .merge_reference(event, &resolution.client_reference_id),
            Body::Notification(_) => false,
        }
    }

    /// Returns `created` for an operator's resolution made at `now`, so that it wins over the
    /// client reference id of the row: Stripe's clock, or another operator's, may be ahead of this
    /// one. Both in seconds since the Unix epoch.
    pub fn resolution_created(&self, now: i64) -> i64 {
        let known = self.checkout.client_reference_created();
        known.map_or(now, |created| {
            now.max(created.saturating_add(1).min(TIMESTAMP_MAX))
        })
    }

    /// Returns the part that is merged, which depends on nothing but the row's events.
    #[must_use]
    pub fn merged(self) -> Self {
        Self {
            awaits_user: false,
            ..self
        }
    }

    /// Records whether the row awaits a user. Returns whether it did before.
    pub(crate) fn record_awaits_user(&mut self, awaits: bool) -> bool {
        std::mem::replace(&mut self.awaits_user, awaits)
    }

    /// Merges the metadata under the event's type, or under those of the thin events that a fetch
    /// answers.
    fn merge_metadata(&mut self, event: &Event) -> bool {
        let Some(map) = event.metadata() else {
            return false;
        };
        match &event.fetch {
            Some(fetch) => self.fetched_metadata.merge(&event.id, fetch, map),
            None => self.metadata.merge(event, map),
        }
    }

    /// Empties all metadata. Returns whether there was any.
    ///
    /// Stamps and digests stay. So the same event remains the last one, events that were merged
    /// before are still recognised, and an older event cannot bring metadata back.
    pub(crate) fn erase_metadata(&mut self) -> bool {
        let had_by_type = self.metadata.erase() | self.fetched_metadata.erase();
        let had_in_snapshots = self
            .subscription
            .as_mut()
            .is_some_and(snapshot::Register::erase_metadata);
        let had_in_fetched = self
            .fetched
            .as_mut()
            .is_some_and(fetched::Register::erase_metadata);
        had_by_type | had_in_snapshots | had_in_fetched
    }

    /// Returns the last snapshot: the fetched one, unless an event may be newer.
    fn last_snapshot(&self) -> Option<snapshot::Last<'_>> {
        match (&self.subscription, &self.fetched) {
            (Some(events), Some(fetched)) if events.place() > fetched.place() => {
                let last = events.last()?;
                let uncertain = last.uncertain || fetched.may_be_newer_than(events);
                Some(snapshot::Last { uncertain, ..last })
            }
            (_, Some(fetched)) => Some(fetched.last()),
            (events, None) => events.as_ref()?.last(),
        }
    }

    /// Returns the type of the event `id`, if a metadata register knows it.
    pub(crate) fn event_type(&self, id: &EventId) -> Option<&EventType> {
        self.metadata.event_type(id)
    }
}

/// Returns whether the event says that the subscription was just created.
fn is_creation(event: &Event, body: &SubscriptionEvent) -> bool {
    let notifications = event.fetch.iter().flat_map(|fetch| &fetch.notifications);
    body.before == Before::Nothing
        || notifications
            .map(|notification| notification.event_type.as_str())
            .any(|event_type| event_type == "v1.customer.subscription.created")
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
