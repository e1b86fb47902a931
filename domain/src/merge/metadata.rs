//! Metadata by event type, as the original Litestripe kept it.
//!
//! Owns one register per event type. It holds the whole map of the newest event of that type, so
//! that a key that was removed at Stripe disappears with the next event of the type.

use std::collections::BTreeMap;

use litestripe_contract::event::{EventId, EventType};
use serde::{Deserialize, Serialize};

use super::Latest;
use crate::event::Event;

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

    /// Returns all values by `<event type>.<key>`.
    pub(super) fn visible(&self) -> BTreeMap<String, String> {
        let mut visible = BTreeMap::new();
        for (event_type, latest) in &self.0 {
            for (key, value) in latest.iter().flat_map(|latest| &latest.value) {
                visible.insert(format!("{event_type}.{key}"), value.clone());
            }
        }
        visible
    }
}
