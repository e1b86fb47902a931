//! Random histories of a subscription as Stripe would report them: several events in the same
//! second, each update with its previous attributes nested as Stripe nests them.

use litestripe_harness::stripe::{Event, MONTH, Purchase};
use serde_json::{Map, Value, json};

use super::random::Random;
use crate::orphans::{COMPLETED, CREATED, SUCCEEDED, UPDATED, with};

const DELETED: &str = "customer.subscription.deleted";
const PAUSED: &str = "customer.subscription.paused";
const RESUMED: &str = "customer.subscription.resumed";

/// All the events of one subscription, in the order in which they happened.
pub(crate) struct History {
    pub(crate) subscription: String,
    pub(crate) events: Vec<Event>,
    /// The subscription at the end.
    pub(crate) truth: Value,
}

/// Generates a history of `length` events that begins at `start` (Unix seconds).
pub(crate) fn generate(random: &mut Random, start: i64, length: usize) -> History {
    let purchase = Purchase::new(start);
    let trial = random.percent(30);
    let first = if trial {
        purchase.on_trial()
    } else {
        json!({ "status": "incomplete" })
    };
    let object = with(purchase.subscription(), first);
    let livemode = random.percent(50);
    let mut generator = Generator {
        random,
        purchase,
        object,
        now: start,
        livemode,
        events: Vec::new(),
    };
    generator.emit(CREATED, None);
    if !trial {
        generator.change(json!({ "status": "active" }), UPDATED);
    }
    while generator.events.len() < length {
        generator.step();
    }
    History {
        subscription: generator.purchase.subscription,
        events: generator.events,
        truth: generator.object,
    }
}

struct Generator<'a> {
    random: &'a mut Random,
    purchase: Purchase,
    object: Value,
    now: i64,
    livemode: bool,
    events: Vec<Event>,
}

impl Generator<'_> {
    fn step(&mut self) {
        if self.random.percent(50) {
            self.now += self.random.pick(&[1, 1, 5, 3600, MONTH]);
        }
        let ended = self.object["status"] == "canceled";
        match self.random.below(20) {
            0 | 1 => self.session(),
            2 if !ended && self.random.percent(20) => {
                self.change(
                    json!({ "status": "canceled", "ended_at": self.now, "canceled_at": self.now }),
                    DELETED,
                );
            }
            3 | 4 if !ended => self.change_status(),
            5 | 6 if !ended => {
                let start = self.object["items"]["data"][0]["current_period_end"]
                    .as_i64()
                    .unwrap_or(self.now);
                self.change(
                    json!({ "items": self.purchase.items(start, start + MONTH) }),
                    UPDATED,
                );
            }
            7 | 8 if !ended => {
                let planned = self.object["cancel_at_period_end"] == true;
                let at = (!planned).then_some(self.now);
                self.change(
                    json!({ "cancel_at_period_end": !planned, "cancel_at": at, "canceled_at": at }),
                    UPDATED,
                );
            }
            9..=11 if !ended => {
                let mut items = self.object["items"].clone();
                items["data"][0]["quantity"] = json!(self.random.below(5) + 1);
                self.change(json!({ "items": items }), UPDATED);
            }
            12 => {
                // A field that we do not keep.
                let invoice = format!("in_{}", self.random.below(1000));
                self.change(json!({ "latest_invoice": invoice }), UPDATED);
            }
            _ => self.change_metadata(),
        }
    }

    fn change_status(&mut self) {
        match self.object["status"].as_str() {
            Some("paused") => self.change(json!({ "status": "active" }), RESUMED),
            Some("active") if self.random.percent(50) => {
                self.change(json!({ "status": "past_due" }), UPDATED)
            }
            Some("active") => self.change(json!({ "status": "paused" }), PAUSED),
            _ => self.change(json!({ "status": "active" }), UPDATED),
        }
    }

    fn change_metadata(&mut self) {
        let mut metadata = self.object["metadata"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        let key = self.random.pick(&["plan", "seats", "näme"]);
        match self.random.below(4) {
            0 => drop(metadata.remove(key)),
            value => drop(metadata.insert(key.to_owned(), value.to_string().into())),
        }
        self.change(json!({ "metadata": metadata }), UPDATED);
    }

    fn session(&mut self) {
        let reference =
            self.random
                .pick(&[json!("user_1"), json!("user_2"), json!(""), Value::Null]);
        let event_type = self.random.pick(&[COMPLETED, COMPLETED, SUCCEEDED]);
        let changes = json!({
            "client_reference_id": reference,
            "payment_status": self.random.pick(&["paid", "unpaid", "no_payment_required"]),
            "metadata": { "campaign": self.random.below(9).to_string() },
        });
        let mut event = self
            .purchase
            .checkout_session_event(event_type, self.now, changes);
        event.value["livemode"] = self.livemode.into();
        self.events.push(event);
    }

    /// Changes fields and emits an event if any value differs.
    fn change(&mut self, changes: Value, event_type: &str) {
        let after = with(self.object.clone(), changes);
        let previous = previous_attributes(&self.object, &after);
        self.object = after;
        if !previous.is_empty() {
            self.emit(event_type, Some(previous));
        }
    }

    fn emit(&mut self, event_type: &str, previous: Option<Map<String, Value>>) {
        let mut event = Event::new(event_type, self.now, self.object.clone());
        event.value["livemode"] = self.livemode.into();
        self.events.push(match previous {
            Some(previous) => event.with_previous_attributes(previous.into()),
            None => event,
        });
    }
}

/// Returns the old values: of objects only the keys that changed (null if the key was absent), of
/// arrays the whole array.
fn previous_attributes(before: &Value, after: &Value) -> Map<String, Value> {
    let nothing = Map::new();
    let (before, after) = (
        before.as_object().unwrap_or(&nothing),
        after.as_object().unwrap_or(&nothing),
    );
    let mut previous = Map::new();
    for (key, old) in before
        .iter()
        .filter(|(key, old)| after.get(*key) != Some(old))
    {
        let nested = after
            .get(key)
            .filter(|new| new.is_object() && old.is_object());
        let old = nested.map_or_else(|| old.clone(), |new| previous_attributes(old, new).into());
        previous.insert(key.clone(), old);
    }
    for key in after.keys().filter(|key| !before.contains_key(*key)) {
        previous.insert(key.clone(), Value::Null);
    }
    previous
}
