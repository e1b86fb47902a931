//! Events for the benchmarks, about the harness's subscription.

use serde_json::{Value, json};

/// Builds an event about a subscription, about as large as Stripe's.
pub(crate) fn subscription(event_type: &str, id: &str, created: i64) -> Vec<u8> {
    let object: Value = serde_json::from_str(include_str!(
        "../../../harness/demo/src/stripe/subscription.json"
    ))
    .expect("the harness's template is JSON");
    let mut object = object;
    object["id"] = "sub_1QyaBcDeFgHiJkLmNoPqRsTu".into();
    object["customer"] = "cus_QyaBcDeFgHiJkL".into();
    object["metadata"] = json!({ "plan": id });
    let event = json!({
        "id": id, "object": "event", "api_version": "2026-07-29.dahlia", "created": created,
        "data": { "object": object }, "livemode": false, "pending_webhooks": 1,
        "request": { "id": null, "idempotency_key": null }, "type": event_type,
    });
    event.to_string().into_bytes()
}
