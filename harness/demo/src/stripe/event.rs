//! An event as Stripe's API renders it.

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::unique;

/// The API version of the bodies.
const API_VERSION: &str = "2026-07-29.dahlia";

/// An event. Tests may change `value` before it is rendered.
#[derive(Clone, Debug)]
pub struct Event {
    /// The whole event object.
    pub value: Value,
}

impl Event {
    /// An event of that type and time (Unix seconds) about `object`, with a new id.
    pub fn new(event_type: &str, created: i64, object: Value) -> Self {
        let value = json!({
            "id": format!("evt_1{}", unique(23)),
            "object": "event",
            "api_version": API_VERSION,
            "created": created,
            "data": { "object": object },
            "livemode": false,
            "pending_webhooks": 1,
            "request": { "id": null, "idempotency_key": null },
            "type": event_type,
        });
        Self { value }
    }

    /// Sets `data.previous_attributes`, which events about a change have.
    #[must_use]
    pub fn with_previous_attributes(mut self, previous: Value) -> Self {
        self.value["data"]["previous_attributes"] = previous;
        self
    }

    /// Its id, `evt_…`.
    pub fn id(&self) -> &str {
        self.text("/id")
    }

    /// Its type, such as `customer.subscription.updated`.
    pub fn event_type(&self) -> &str {
        self.text("/type")
    }

    /// Its time in Unix seconds; 0 if it has none.
    pub fn created(&self) -> i64 {
        self.value["created"].as_i64().unwrap_or_default()
    }

    /// Describes the event's object in a few words for people: `sub_… active until 2026-12-23`.
    pub fn summary(&self) -> String {
        let object = &self.value["data"]["object"];
        let text = |field: &str| object[field].as_str();
        // A Checkout Session's id has 66 characters; the first ones suffice to recognise it.
        let mut summary = text("id")
            .unwrap_or_default()
            .chars()
            .take(28)
            .collect::<String>();
        let _ = write!(summary, " {}", text("status").unwrap_or_default());
        if let Some(paid) = text("payment_status") {
            let user = text("client_reference_id").unwrap_or("none");
            let _ = write!(summary, ", {paid}, client reference id {user}");
        }
        let end = object["items"]["data"][0]["current_period_end"].as_i64();
        if let Some(end) = end.and_then(|end| OffsetDateTime::from_unix_timestamp(end).ok()) {
            let _ = write!(summary, " until {}", end.date());
        }
        if object["cancel_at_period_end"] == true && text("status") != Some("canceled") {
            summary.push_str(", cancels then");
        }
        summary
    }

    /// Renders the body as in Stripe's webhooks: indented by two, `id` and `object` first.
    pub fn body(&self) -> Bytes {
        render_body(&self.value)
    }

    /// Renders the body in one line, as other transports do.
    pub fn compact_body(&self) -> Bytes {
        self.value.to_string().into()
    }

    fn text(&self, pointer: &str) -> &str {
        self.value
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

/// Renders an object as in Stripe's webhooks.
pub(super) fn render_body(value: &Value) -> Bytes {
    let mut text = String::new();
    render(value, 0, &mut text);
    text.into()
}

fn render(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth + 1);
    let (open, close) = match value {
        Value::Array(list) if !list.is_empty() => ('[', ']'),
        Value::Object(map) if !map.is_empty() => ('{', '}'),
        simple => return text.push_str(&simple.to_string()),
    };
    let mut separator = "\n";
    text.push(open);
    let mut member = |key: Option<&String>, member: &Value| {
        text.push_str(separator);
        separator = ",\n";
        text.push_str(&indent);
        if let Some(key) = key {
            let _ = write!(text, "{}: ", Value::String(key.clone()));
        }
        render(member, depth + 1, text);
    };
    match value {
        Value::Array(list) => list.iter().for_each(|element| member(None, element)),
        Value::Object(map) => in_order(map).for_each(|(key, value)| member(Some(key), value)),
        _ => {}
    }
    let _ = write!(text, "\n{}{close}", "  ".repeat(depth));
}

/// Returns the members in Stripe's order: `id`, `object`, then the others by name.
fn in_order(map: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    let mut members: Vec<_> = map.iter().collect();
    members.sort_by_key(|(key, _)| match key.as_str() {
        "id" => (0, ""),
        "object" => (1, ""),
        other => (2, other),
    });
    members.into_iter()
}
