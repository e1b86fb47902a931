//! The snapshot register: which snapshot of Stripe's events is the last.
//!
//! Owns the phases of a subscription's life, and the order of events within a second. Stripe's
//! `created` counts whole seconds, so several events often have the same one: which came last? The
//! previous attributes of an event say what it changed. Each event of a second is therefore a step
//! from one state to another, and together they are a walk over states (in a graph: events are
//! edges, states are nodes). A walk ends at the state that it enters once more than it leaves, in
//! whatever order its steps are listed (see `walk`). If no walk explains the events, the register
//! reports that it is uncertain; it never guesses silently.

use std::collections::BTreeMap;

use litestripe_contract::event::EventId;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::walk::{self, End};
use crate::event::{Before, Event, Snapshot, SubscriptionEvent};

/// How many events of one second saturate the register: from then on it keeps only the largest id.
/// Real seconds have one to four events.
const EVENTS_MAX: usize = 32;

/// A phase of a subscription's life. Phases only move forward, whatever the events' times say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Phase {
    #[serde(rename = "incomplete")]
    Incomplete,
    /// Neither incomplete nor terminal. Includes statuses that we do not know.
    #[serde(rename = "live")]
    Live,
    #[serde(rename = "terminal")]
    Terminal,
}

impl Phase {
    pub(super) fn from_snapshot(snapshot: &Snapshot) -> Self {
        match snapshot.status.as_deref() {
            Some("incomplete") => Self::Incomplete,
            Some("canceled" | "incomplete_expired") => Self::Terminal,
            _ => Self::Live,
        }
    }
}

/// The events of the newest second of the latest phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Register {
    phase: Phase,
    /// `created` of all the events.
    second: i64,
    events: BTreeMap<EventId, Edge>,
    /// The snapshots after the events, each stored once.
    snapshots: BTreeMap<Digest, Snapshot>,
    /// Whether [`EVENTS_MAX`] events came in this second. If so, only the largest id is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    saturated: bool,
}

/// An event as a step from one state to another. Of two renderings of one event, the larger is
/// kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Edge {
    after: Digest,
    /// `None` if the event created the subscription.
    before: Option<Digest>,
    /// Whether the previous attributes could not be read. If so, `before` equals `after`, although
    /// the event may have changed the state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unreadable: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    livemode: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account: Option<String>,
}

/// The last snapshot, and the event that led to it.
pub(super) struct Last<'a> {
    pub(super) id: &'a EventId,
    pub(super) created: i64,
    pub(super) snapshot: &'a Snapshot,
    pub(super) livemode: bool,
    pub(super) account: Option<&'a str>,
    pub(super) uncertain: bool,
}

/// Merges a subscription event. Returns whether the register changed.
pub(super) fn merge(
    register: &mut Option<Register>,
    event: &Event,
    body: &SubscriptionEvent,
) -> bool {
    let place = (Phase::from_snapshot(&body.snapshot), event.created);
    match register {
        Some(held) if held.place() > place => false,
        Some(held) if held.place() == place => held.add(event, body),
        _ => {
            let mut new = Register::empty(place);
            new.add(event, body);
            *register = Some(new);
            true
        }
    }
}

impl Register {
    fn empty((phase, second): (Phase, i64)) -> Self {
        let (events, snapshots) = (BTreeMap::new(), BTreeMap::new());
        Self {
            phase,
            second,
            events,
            snapshots,
            saturated: false,
        }
    }

    /// Returns the position in the subscription's life: the phase counts first, then the second.
    pub(super) fn place(&self) -> (Phase, i64) {
        (self.phase, self.second)
    }

    fn add(&mut self, event: &Event, body: &SubscriptionEvent) -> bool {
        let edge = Edge::from_event(event, body);
        if self.events.get(&event.id).is_some_and(|held| *held >= edge) {
            return false;
        }
        if self.saturated
            && self
                .events
                .last_key_value()
                .is_some_and(|(id, _)| *id > event.id)
        {
            return false;
        }
        self.store(edge.after, event, &body.snapshot);
        self.events.insert(event.id.clone(), edge);
        self.saturated |= self.events.len() >= EVENTS_MAX;
        self.prune();
        true
    }

    /// Stores the snapshot of an event, without metadata if that was erased. If several events end
    /// in the same state, metadata that was not erased is kept, whichever event is merged first.
    fn store(&mut self, digest: Digest, event: &Event, snapshot: &Snapshot) {
        let metadata = event.metadata().filter(|map| !map.is_empty());
        let held = self
            .snapshots
            .entry(digest)
            .or_insert_with(|| snapshot.without_metadata());
        if let Some(metadata) = metadata.filter(|_| held.metadata.is_empty()) {
            held.metadata.clone_from(metadata);
        }
    }

    /// Empties the metadata of all snapshots. Returns whether there was any.
    pub(super) fn erase_metadata(&mut self) -> bool {
        let maps = self
            .snapshots
            .values_mut()
            .map(|snapshot| &mut snapshot.metadata);
        maps.fold(false, |any, map| any | !std::mem::take(map).is_empty())
    }

    /// Drops the parts that are not needed: all events except the largest id if saturated, and
    /// snapshots without an event.
    fn prune(&mut self) {
        if self.saturated {
            self.events = self.events.pop_last().into_iter().collect();
        }
        let events = &self.events;
        self.snapshots
            .retain(|digest, _| events.values().any(|edge| edge.after == *digest));
    }

    /// Returns whether an unreadable step leaves the end of the walk in doubt. Without this check,
    /// A → B → A with an unreadable second step would look like A → B. If all events end in the
    /// same state, their steps do not matter.
    fn is_end_in_doubt(&self) -> bool {
        self.snapshots.len() > 1 && self.events.values().any(|edge| edge.unreadable)
    }

    /// Returns the last snapshot, and whether that is certain.
    ///
    /// `None` only for a state that this program did not write: every event has its snapshot.
    pub(super) fn last(&self) -> Option<Last<'_>> {
        let steps: Vec<_> = self
            .events
            .values()
            .map(|edge| (edge.before, edge.after))
            .collect();
        let (end, certain) = match walk::end(&steps) {
            End::Certain(end) => (Some(end), true),
            End::Likely(end) => (Some(end), false),
            End::Unknown => (None, false),
        };
        // The largest id among the events that lead to the end, or among all if the end is unknown.
        let leads_there = |edge: &Edge| end.is_none_or(|end| edge.after == end);
        let (id, edge) = self
            .events
            .iter()
            .rev()
            .find(|(_, edge)| leads_there(edge))?;
        Some(Last {
            id,
            created: self.second,
            snapshot: self.snapshots.get(&edge.after)?,
            livemode: edge.livemode,
            account: edge.account.as_deref(),
            uncertain: self.saturated || !certain || self.is_end_in_doubt(),
        })
    }
}

impl Edge {
    fn from_event(event: &Event, body: &SubscriptionEvent) -> Self {
        let after = Digest::from_snapshot(&body.snapshot);
        let before = match &body.before {
            Before::Nothing => None,
            Before::Same | Before::Unreadable => Some(after),
            Before::Snapshot(snapshot) => Some(Digest::from_snapshot(snapshot)),
        };
        let unreadable = body.before == Before::Unreadable;
        Self {
            after,
            before,
            unreadable,
            livemode: event.livemode,
            account: event.stripe_account_id.clone(),
        }
    }
}
