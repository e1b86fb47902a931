//! Metadata by event type, as the original Litestripe kept it.
//!
//! Owns one register per event type. It holds the whole map of the newest event of that type, so
//! that a key that was removed at Stripe disappears with the next event of the type. Metadata that
//! was fetched because of a thin event has its own register per type, because fetches are ordered
//! by when they were made.

use std::collections::BTreeMap;

use litestripe_contract::event::{EventId, EventType, HANDLED_TYPES, THIN_PREFIX};
use serde::{Deserialize, Serialize};

use super::Latest;
use crate::event::{Event, Fetch, FetchStamp};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Registers(BTreeMap<EventType, Option<Latest<BTreeMap<String, String>>>>);

impl Registers {
    pub(super) fn merge(&mut self, event: &Event, map: &BTreeMap<String, String>) -> bool {
        let register = self.0.entry(event.event_type.clone()).or_default();
        Latest::merge(register, event, || map.clone())
    }

    /// Returns the type of the event `id`, if it is the newest of its type.
    pub(super) fn event_type(&self, id: &EventId) -> Option<&EventType> {
        let holds =
            |latest: &Option<Latest<_>>| latest.as_ref().is_some_and(|latest| latest.id == *id);
        self.0
            .iter()
            .find(|(_, latest)| holds(latest))
            .map(|(event_type, _)| event_type)
    }

    /// Empties all maps but keeps their stamps. Returns whether one was not empty.
    pub(super) fn erase(&mut self) -> bool {
        let maps = self
            .0
            .values_mut()
            .flatten()
            .map(|latest| &mut latest.value);
        maps.fold(false, |any, map| any | !std::mem::take(map).is_empty())
    }

    /// Returns all values by `<event type>.<key>`. The newer of event and fetch counts; in the same
    /// second the event, because it holds the state of that moment.
    pub(super) fn visible(&self, fetched: &FetchedRegisters) -> BTreeMap<String, String> {
        let mut visible = BTreeMap::new();
        let mut show = |event_type: &EventType, map: &BTreeMap<String, String>| {
            for (key, value) in map {
                visible.insert(format!("{event_type}.{key}"), value.clone());
            }
        };
        let events = self.0.iter();
        let events = events.filter_map(|(name, latest)| Some((name, latest.as_ref()?)));
        for (event_type, latest) in events {
            let newer = fetched.0.get(event_type);
            let newer = newer.filter(|fetched| fetched.created > latest.created);
            show(
                event_type,
                newer.map_or(&latest.value, |newer| &newer.value),
            );
        }
        for (event_type, newest) in &fetched.0 {
            if self.0.get(event_type).is_none_or(Option::is_none) {
                show(event_type, &newest.value);
            }
        }
        visible
    }
}

/// The metadata that was fetched because of thin events, by the type of the snapshot event.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct FetchedRegisters(BTreeMap<EventType, Fetched>);

/// The map of the last fetch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Fetched {
    /// `created` of the newest thin event of the type, whichever fetch answered it.
    created: i64,
    stamp: FetchStamp,
    id: EventId,
    value: BTreeMap<String, String>,
}

impl FetchedRegisters {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Merges the map of a fetch under the types of the thin events that led to it. A type without
    /// a snapshot event is left out: it always comes with one that has a snapshot event, and
    /// snapshot and thin events have to lead to the same metadata.
    pub(super) fn merge(
        &mut self,
        id: &EventId,
        fetch: &Fetch,
        map: &BTreeMap<String, String>,
    ) -> bool {
        let mut changed = false;
        for notification in &fetch.notifications {
            let Some(event_type) = snapshot_type(&notification.event_type) else {
                continue;
            };
            let new = Fetched {
                created: notification.created.unix(),
                stamp: fetch.stamp,
                id: id.clone(),
                value: map.clone(),
            };
            changed |= self.merge_one(event_type, new);
        }
        changed
    }

    fn merge_one(&mut self, event_type: EventType, mut new: Fetched) -> bool {
        let Some(held) = self.0.get_mut(&event_type) else {
            self.0.insert(event_type, new);
            return true;
        };
        let created = new.created.max(held.created);
        let is_raised = created > held.created;
        (new.created, held.created) = (created, created);
        let order = |fetched: &Fetched| (fetched.stamp, fetched.id.clone(), fetched.value.clone());
        let is_newer = order(&new) > order(held);
        if is_newer {
            *held = new;
        }
        is_newer | is_raised
    }

    /// Empties all maps but keeps their stamps. Returns whether one was not empty.
    pub(super) fn erase(&mut self) -> bool {
        let maps = self.0.values_mut().map(|fetched| &mut fetched.value);
        maps.fold(false, |any, map| any | !std::mem::take(map).is_empty())
    }
}

/// Returns the type of the snapshot event for the same change. `None` if there is none.
fn snapshot_type(thin: &EventType) -> Option<EventType> {
    let name = thin.as_str().strip_prefix(THIN_PREFIX)?;
    HANDLED_TYPES
        .contains(&name)
        .then(|| EventType::parse(name).ok())?
}
