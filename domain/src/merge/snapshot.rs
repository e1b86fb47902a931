//! The snapshot register: which snapshot of Stripe's events is the last.
//!
//! Owns the phases of a subscription's life, and the order of events within a second. Stripe's
//! `created` counts whole seconds, so several events often have the same one: which came last? The
//! previous attributes of an event say what it changed. Each event of a second is therefore a step
//! from one state to another, and together they are a walk over states (in a graph: events are
//! edges, states are nodes). A walk ends at the state that it enters once more than it leaves, in
//! whatever order its steps are listed (see `walk`). If no walk explains the events, the register
//! reports that it is uncertain; it never guesses silently.
//!
//! States are compared by their digests and by their marks, which cover fields that the digest
//! leaves out. The walk can be followed with any set of these fields, so the largest set is tried
//! first and the digest alone last, and the first set that determines the end counts.

use std::collections::BTreeMap;

use litestripe_contract::event::EventId;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::walk::{self, End};
use crate::event::{Before, Details, Event, Marks, Snapshot, SubscriptionEvent};

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
    /// The snapshots after the events without their details, each stored once.
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
    /// Empty if an earlier version stored the event.
    #[serde(default, skip_serializing_if = "Marks::is_empty")]
    marks: Marks,
    /// The marks before it, if they differ.
    #[serde(rename = "were", default, skip_serializing_if = "Option::is_none")]
    marks_before: Option<Marks>,
    #[serde(default, skip_serializing_if = "Details::is_empty")]
    details: Details,
}

/// A state, reduced to its digest and the marks that are compared.
type Node = (Digest, Marks);

/// The last snapshot, and the event that led to it.
pub(super) struct Last<'a> {
    pub(super) id: &'a EventId,
    pub(super) created: i64,
    /// Without its details.
    pub(super) snapshot: &'a Snapshot,
    pub(super) details: &'a Details,
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

    /// Returns whether this is the state before or after one of the events.
    pub(super) fn has_state(&self, snapshot: &Snapshot) -> bool {
        let digest = Digest::from_snapshot(snapshot);
        self.events.values().any(|edge| {
            let is_after = edge.after == digest && edge.details == snapshot.details;
            // The details before an event are known only as marks.
            let changed = edge.after != digest || edge.marks_before.is_some();
            is_after || (edge.before == Some(digest) && changed)
        })
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
            .or_insert_with(|| snapshot.without_metadata_and_details());
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

    /// Returns the last snapshot, and whether that is certain.
    ///
    /// `None` only for a state that this program did not write: every event has its snapshot.
    pub(super) fn last(&self) -> Option<Last<'_>> {
        let (end, certain) = self.end();
        let is_at_end = |edge: &Edge| end.is_none_or(|(known, node)| edge.node(&known) == node);
        // The largest id among the events that lead to the end, or among all if the end is unknown.
        // Those with the most marks come first: an event that an earlier version stored, or whose
        // rendering lacks fields, has fewer details of the end.
        let (id, edge) = self
            .events
            .iter()
            .filter(|(_, edge)| is_at_end(edge))
            .max_by_key(|(id, edge)| (edge.marks.shown().count(), *id))?;
        Some(Last {
            id,
            created: self.second,
            snapshot: self.snapshots.get(&edge.after)?,
            details: &edge.details,
            livemode: edge.livemode,
            account: edge.account.as_deref(),
            uncertain: self.saturated
                || !certain
                || self.is_end_in_doubt()
                || edge.details.has_more_items,
        })
    }

    /// Returns the end of the walk with the fields by which its nodes are compared, and whether it
    /// is certain. `None` if any event may be the last.
    fn end(&self) -> (Option<(Marks, Node)>, bool) {
        let mut likely = None;
        for known in self.known() {
            let steps: Vec<_> = self.events.values().map(|edge| edge.step(&known)).collect();
            match walk::end(&steps) {
                End::Certain(end) => {
                    let last = self.events.values().filter(|edge| edge.node(&known) == end);
                    if show_the_same(last) {
                        return (Some((known, end)), true);
                    }
                    likely = likely.or(Some((known, end)));
                }
                End::Likely(end) => likely = likely.or(Some((known, end))),
                End::Unknown => {}
            }
        }
        (likely, false)
    }

    /// Returns the sets of fields by which states may be compared, the largest first. Only
    /// fields that every event has can be compared.
    fn known(&self) -> Vec<Marks> {
        let marks = self
            .events
            .values()
            .flat_map(|edge| [edge.marks, edge.marks_before()]);
        let all = marks.reduce(|known, marks| known.among(&marks));
        let all = all.unwrap_or_default();
        let mut known = vec![all, all.shown(), Marks::default()];
        known.dedup();
        known
    }

    /// Returns whether an unreadable step leaves the end of the walk in doubt. Without this check,
    /// A → B → A with an unreadable second step would look like A → B. If all events end in the
    /// same state, their steps do not matter.
    fn is_end_in_doubt(&self) -> bool {
        let one_state = self.snapshots.len() <= 1 && show_the_same(self.events.values());
        !one_state && self.events.values().any(|edge| edge.unreadable)
    }
}

/// Returns whether the events, which have the same digest, show the same row. They may differ in a
/// field that not all events of the second have.
fn show_the_same<'a>(mut edges: impl Iterator<Item = &'a Edge>) -> bool {
    edges
        .try_fold(Marks::default(), |shown, edge| {
            shown.join(&edge.marks.shown())
        })
        .is_some()
}

impl Edge {
    /// Returns the state after the event, reduced to the fields of `known`.
    fn node(&self, known: &Marks) -> Node {
        (self.after, self.marks.among(known))
    }

    fn step(&self, known: &Marks) -> walk::Step<Node> {
        let before = |digest| (digest, self.marks_before().among(known));
        (self.before.map(before), self.node(known))
    }

    fn marks_before(&self) -> Marks {
        self.marks_before.unwrap_or(self.marks)
    }

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
            marks: body.marks,
            marks_before: Some(body.marks_before).filter(|before| *before != body.marks),
            details: body.snapshot.details.clone(),
        }
    }
}
