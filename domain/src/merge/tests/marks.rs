//! Marks distinguish states of one second by fields that the digest leaves out.

use serde_json::{Value, json};

use super::law::as_an_earlier_version_stored;
use crate::event::{self, Event, MetadataKeys, Snapshot};
use crate::merge::digest::Digest;
use crate::merge::{State, Visible};

const UPDATED: &str = "customer.subscription.updated";

/// How many bytes of JSON marks and details may add to an event of the newest second.
const BYTES_MAX: usize = 150;

fn subscription(plan: &str, fields: &Value) -> Value {
    let mut object = json!({ "id": "sub_1", "customer": "cus_1", "status": "active", "metadata": { "plan": plan } });
    for (name, value) in fields.as_object().expect("an object") {
        object[name.as_str()] = value.clone();
    }
    object
}

/// Builds an update to `plan` and the values in `fields`, from those in `previous`.
fn step(id: &str, plan: &str, fields: Value, previous: Value) -> Event {
    let body = json!({ "id": id, "type": UPDATED, "created": 1, "livemode": true,
        "data": { "object": subscription(plan, &fields), "previous_attributes": previous } });
    let event = event::decode(body.to_string().as_bytes(), &MetadataKeys::All);
    event.expect("it decodes").expect("it is handled")
}

fn plan(plan: &str) -> Value {
    json!({ "metadata": { "plan": plan } })
}

fn merged<'a>(events: impl IntoIterator<Item = &'a Event>) -> State {
    let mut state = State::default();
    for event in events {
        state.merge(event);
    }
    state
}

fn row(events: &[Event]) -> Visible {
    let state = merged(events);
    let reversed = merged(events.iter().rev().chain(events));
    assert_eq!(reversed, state, "order and repetition do not matter");
    state.visible()
}

/// Checks the plan in the row, or that it is uncertain.
#[track_caller]
fn check(events: &[Event], expected: Option<&str>) {
    let row = row(events).subscription;
    let shown = row.subscription_metadata["plan"].as_str();
    assert_eq!((!row.uncertain).then_some(shown), expected);
}

/// Changes the plan from a to b and back, each time with a new invoice.
fn there_and_back_with_invoices() -> [Event; 2] {
    let invoiced = |from: &str, invoice: &str| json!({ "metadata": { "plan": from }, "latest_invoice": invoice });
    [
        step(
            "evt_2",
            "b",
            json!({ "latest_invoice": "in_2" }),
            invoiced("a", "in_1"),
        ),
        step(
            "evt_1",
            "a",
            json!({ "latest_invoice": "in_3" }),
            invoiced("b", "in_2"),
        ),
    ]
}

#[test]
fn way_back_is_certain_if_a_marked_field_differs() {
    check(&there_and_back_with_invoices(), Some("a"));
    for (field, one, two) in [
        ("default_payment_method", json!(null), json!("pm_1")),
        ("schedule", json!(null), json!("sub_sched_1")),
        ("pending_update", json!({ "expires_at": 1 }), json!(null)),
        ("billing_cycle_anchor", json!(1), json!(2)),
        ("trial_start", json!(null), json!(2)),
        (
            "collection_method",
            json!("send_invoice"),
            json!("charge_automatically"),
        ),
        (
            "cancellation_details",
            json!({ "reason": null }),
            json!({ "reason": "payment_failed" }),
        ),
    ] {
        let events = [
            step("evt_2", "b", json!({ field: one }), plan("a")),
            step(
                "evt_1",
                "a",
                json!({ field: two }),
                json!({ "metadata": { "plan": "b" }, field: one }),
            ),
        ];
        check(&events, Some("a"));
    }
}

#[test]
fn way_back_without_another_difference_is_uncertain() {
    let events = [
        step("evt_2", "b", json!({ "latest_invoice": "in_1" }), plan("a")),
        step("evt_1", "a", json!({ "latest_invoice": "in_1" }), plan("b")),
    ];
    check(&events, None);
}

#[test]
fn field_that_one_rendering_lacks_is_not_compared() {
    let [there, back] = there_and_back_with_invoices();
    let without_invoice = step("evt_2", "b", json!({}), plan("a"));
    check(&[without_invoice.clone(), back.clone()], None);
    // As a second rendering of the same event it changes nothing.
    check(&[without_invoice, there, back], Some("a"));
}

#[test]
fn change_of_a_marked_field_alone_leaves_the_row_certain() {
    let invoice = |id: &str, from: &str, to: &str| {
        step(
            id,
            "a",
            json!({ "latest_invoice": to }),
            json!({ "latest_invoice": from }),
        )
    };
    // Two events for one change, and a missing step, do not matter: all show the same row.
    check(
        &[
            invoice("evt_1", "in_1", "in_2"),
            invoice("evt_2", "in_1", "in_2"),
        ],
        Some("a"),
    );
    check(
        &[
            invoice("evt_1", "in_1", "in_2"),
            invoice("evt_2", "in_5", "in_6"),
        ],
        Some("a"),
    );
    check(
        &[
            step("evt_0", "a", json!({ "latest_invoice": "in_1" }), plan("b")),
            invoice("evt_1", "in_1", "in_2"),
            invoice("evt_2", "in_1", "in_2"),
        ],
        Some("a"),
    );
}

#[test]
fn pauses_of_one_second_are_ordered_and_shown() {
    let pause = |behavior: &str| json!({ "pause_collection": { "behavior": behavior, "resumes_at": null } });
    let none = || json!({ "pause_collection": null });
    let events = [
        step("evt_2", "a", pause("void"), none()),
        step(
            "evt_1",
            "a",
            pause("keep_as_draft"),
            json!({ "pause_collection": { "behavior": "void" } }),
        ),
    ];
    let shown = row(&events).subscription;
    let behavior = shown.pause_collection.and_then(|pause| pause.behavior);
    assert_eq!(behavior.as_deref(), Some("keep_as_draft"));
    assert!(!shown.uncertain);

    let back = step("evt_0", "a", none(), pause("keep_as_draft"));
    let circle = [events.as_slice(), &[back]].concat();
    assert!(row(&circle).subscription.uncertain);
}

#[test]
fn state_that_an_earlier_version_stored_walks_as_before_and_is_completed_by_a_replay() {
    let events = there_and_back_with_invoices();
    let [there, back] = &events;
    let mut state = as_an_earlier_version_stored(&merged([there]));
    state.merge(back);
    assert!(
        state.visible().subscription.uncertain,
        "one of the events has no marks"
    );
    state.merge(there);
    assert_eq!(state, merged(&events));
    assert!(!state.visible().subscription.uncertain);
}

#[test]
fn digest_is_the_one_of_the_version_before() {
    let json = r#"{"customer":"cus_1","status":"active","created":1,"start_date":2,"cancel_at":3,
        "cancel_at_period_end":true,"canceled_at":4,"ended_at":5,"trial_end":6,"current_period_start":7,
        "current_period_end":8,"items":[{"price":"price_1","product":"prod_1","quantity":1,"lookup_key":null}],
        "metadata":{"plan":"a"},
        "details":{"trial_start":9,"collection_method":"send_invoice","has_more_items":true}}"#;
    let snapshot: Snapshot = serde_json::from_str(json).expect("a snapshot");
    let digest = |snapshot: &Snapshot| format!("{:?}", Digest::from_snapshot(snapshot));
    assert_eq!(digest(&snapshot), "b5b9755af8e7c3c5e4527d4e9e24412d");
    assert_eq!(
        digest(&Snapshot::default()),
        "44136fa355b3678a1146ad16f7e8649e"
    );
}

#[test]
fn marks_of_an_event_are_short() {
    let fields = json!({
        "latest_invoice": "in_1", "default_payment_method": "pm_1", "schedule": null, "pending_update": null,
        "billing_cycle_anchor": 1, "trial_start": null, "collection_method": "charge_automatically",
        "pause_collection": null, "cancellation_details": { "reason": null },
    });
    let previous = json!({ "metadata": { "plan": "a" }, "latest_invoice": "in_0" });
    let state = merged([&step("evt_1", "b", fields, previous)]);
    let length = |state: &State| serde_json::to_string(state).expect("JSON").len();
    let added = length(&state) - length(&as_an_earlier_version_stored(&state));
    assert!(added <= BYTES_MAX, "{added} bytes");
}
