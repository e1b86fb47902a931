//! The fetch register: the newest state of the subscription that a worker fetched from Stripe.
//!
//! Owns the order of fetches. Stripe's `created` cannot order them: that of a fetched state is the
//! last second of which it surely holds every change, so a slow answer has an earlier `created`
//! than a quick answer before it. So fetches are ordered by when they were made (`FetchStamp`),
//! after the phase of the subscription's life. Between a fetched state and Stripe's events, that
//! second counts: an event of a later second may be newer than the fetched state.

use litestripe_contract::event::EventId;
use serde::{Deserialize, Serialize};

use super::snapshot::{self, Last, Phase};
use crate::event::{Event, Fetch, FetchStamp, Snapshot, SubscriptionEvent};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Register {
    phase: Phase,
    stamp: FetchStamp,
    id: EventId,
    /// The last second, by Stripe's clock, of which the snapshot surely holds every change: the
    /// latest of all fetches of the phase, because what an earlier fetch holds, a later one holds
    /// too.
    as_of: i64,
    snapshot: Snapshot,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    livemode: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account: Option<String>,
}

/// Merges a fetched subscription. Returns whether the register changed.
pub(super) fn merge(
    register: &mut Option<Register>,
    event: &Event,
    fetch: &Fetch,
    body: &SubscriptionEvent,
) -> bool {
    let mut new = Register::new(event, fetch, body);
    let Some(held) = register else {
        *register = Some(new);
        return true;
    };
    if new.phase == held.phase {
        let as_of = new.as_of.max(held.as_of);
        let is_raised = as_of > held.as_of;
        (new.as_of, held.as_of) = (as_of, as_of);
        if !new.is_newer_than(held) {
            return is_raised;
        }
    } else if new.phase < held.phase {
        return false;
    }
    *held = new;
    true
}

impl Register {
    fn new(event: &Event, fetch: &Fetch, body: &SubscriptionEvent) -> Self {
        let mut snapshot = body.snapshot.without_metadata();
        // Empty if it was erased.
        snapshot.metadata = event.metadata().cloned().unwrap_or_default();
        Self {
            phase: Phase::from_snapshot(&snapshot),
            stamp: fetch.stamp,
            id: event.id.clone(),
            as_of: event.created,
            snapshot,
            livemode: event.livemode,
            account: event.stripe_account_id.clone(),
        }
    }

    /// Whether this is the later fetch. Of two renderings of one fetch the bytewise larger counts,
    /// as for events.
    fn is_newer_than(&self, held: &Self) -> bool {
        let order = |register: &Self| (register.stamp, register.id.clone());
        let json = |register: &Self| serde_json::to_string(&register.snapshot).ok();
        match order(self).cmp(&order(held)) {
            std::cmp::Ordering::Equal => json(self) > json(held),
            order => order.is_gt(),
        }
    }

    /// Returns the position in the subscription's life, comparable to that of the events' register.
    pub(super) fn place(&self) -> (Phase, i64) {
        (self.phase, self.as_of)
    }

    /// Whether the fetched state may be newer than the state after `events`, although the second of
    /// `events` is later than `as_of`.
    ///
    /// An object is fetched within a second after its thin event, so the fetched state often holds
    /// a change of a later second than `as_of`. If the snapshot event for that change never
    /// arrives, nothing else shows that the row lacks it. A fetched state that occurs in `events`
    /// came before their end.
    pub(super) fn may_be_newer_than(&self, events: &snapshot::Register) -> bool {
        let (phase, second) = events.place();
        self.phase == phase && self.stamp.date >= second && !events.has_state(&self.snapshot)
    }

    pub(super) fn last(&self) -> Last<'_> {
        Last {
            id: &self.id,
            created: self.as_of,
            snapshot: &self.snapshot,
            details: &self.snapshot.details,
            livemode: self.livemode,
            account: self.account.as_deref(),
            uncertain: self.snapshot.details.has_more_items,
        }
    }

    /// Empties the snapshot's metadata. Returns whether there was any.
    pub(super) fn erase_metadata(&mut self) -> bool {
        !std::mem::take(&mut self.snapshot.metadata).is_empty()
    }
}
