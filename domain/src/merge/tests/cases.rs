//! Single cases of the merge.

use litestripe_contract::signal::{Subscription, Timestamp};
use serde_json::{Value, json};

use crate::event::{self, Event, MetadataKeys};
use crate::merge::walk::{self, End};
use crate::merge::{State, Visible, changes};

const UPDATED: &str = "customer.subscription.updated";
const CREATED: &str = "customer.subscription.created";
const DELETED: &str = "customer.subscription.deleted";
const SNAPSHOT: &str = "litestripe.snapshot";
const COMPLETED: &str = "checkout.session.completed";

fn event(id: &str, event_type: &str, created: i64, data: Value) -> Event {
    let body =
        json!({ "id": id, "type": event_type, "created": created, "livemode": true, "data": data });
    let event = event::decode(body.to_string().as_bytes(), &MetadataKeys::All);
    event.expect("it decodes").expect("it is handled")
}

/// Renders a subscription in `status` with `plan` in its metadata.
fn subscription(status: &str, plan: &str) -> Value {
    json!({ "id": "sub_1", "customer": "cus_1", "status": status, "metadata": { "plan": plan } })
}

/// Builds an update from the plan `from` to the plan `to`.
fn step(id: &str, created: i64, from: &str, to: &str) -> Event {
    let previous = json!({ "metadata": { "plan": from } });
    event(
        id,
        UPDATED,
        created,
        json!({ "object": subscription("active", to), "previous_attributes": previous }),
    )
}

/// Builds an event without previous attributes.
fn plain_event(id: &str, event_type: &str, created: i64, status: &str, plan: &str) -> Event {
    event(
        id,
        event_type,
        created,
        json!({ "object": subscription(status, plan) }),
    )
}

fn session(
    id: &str,
    event_type: &str,
    created: i64,
    session: &str,
    reference: Option<&str>,
) -> Event {
    let object = json!({ "id": session, "subscription": "sub_1", "customer": "cus_9",
        "client_reference_id": reference, "metadata": { "from": session } });
    event(id, event_type, created, json!({ "object": object }))
}

fn row(events: &[Event]) -> Visible {
    let mut state = State::default();
    for event in events {
        state.merge(event);
    }
    let mut reversed = State::default();
    for event in events.iter().rev().chain(events) {
        reversed.merge(event);
    }
    assert_eq!(reversed, state, "order and repetition do not matter");
    state.visible()
}

/// Checks the plan in the row, whether the row is uncertain, and its last event.
#[track_caller]
fn check(events: &[Event], plan: &str, uncertain: bool, last: &str) {
    let row = row(events);
    assert_eq!(
        row.subscription
            .subscription_metadata
            .get("plan")
            .map(String::as_str),
        Some(plan)
    );
    assert_eq!(row.subscription.uncertain, uncertain);
    assert_eq!(
        row.last_event.map(|(id, _)| id.to_string()).as_deref(),
        Some(last)
    );
}

#[test]
fn a_later_second_replaces_an_earlier_one() {
    check(
        &[step("evt_9", 1, "a", "b"), step("evt_1", 2, "b", "c")],
        "c",
        false,
        "evt_1",
    );
}

#[test]
fn walk_decides_within_a_second_whatever_the_ids() {
    let steps = [
        step("evt_3", 1, "a", "b"),
        step("evt_2", 1, "b", "c"),
        step("evt_1", 1, "c", "d"),
    ];
    check(&steps, "d", false, "evt_1");
    let through_again = [
        step("evt_3", 1, "a", "b"),
        step("evt_2", 1, "b", "a"),
        step("evt_1", 1, "a", "c"),
    ];
    check(&through_again, "c", false, "evt_1");
    let started_here = [
        plain_event("evt_2", CREATED, 1, "active", "a"),
        step("evt_1", 1, "a", "b"),
    ];
    check(&started_here, "b", false, "evt_1");
}

#[test]
fn events_that_all_end_in_the_same_state_are_certain() {
    check(
        &[step("evt_1", 1, "a", "b"), step("evt_2", 1, "a", "b")],
        "b",
        false,
        "evt_2",
    );
    let twin = plain_event("evt_2", "customer.subscription.resumed", 1, "active", "b");
    check(&[step("evt_1", 1, "a", "b"), twin], "b", false, "evt_2");
}

#[test]
fn event_without_a_kept_change_stays_in_place() {
    let touched = event(
        "evt_3",
        UPDATED,
        1,
        json!({ "object": subscription("active", "a"),
        "previous_attributes": { "latest_invoice": "in_1" } }),
    );
    check(&[touched, step("evt_1", 1, "a", "b")], "b", false, "evt_1");
}

#[test]
fn a_walk_that_ends_where_it_began_is_uncertain() {
    check(
        &[step("evt_2", 1, "a", "b"), step("evt_1", 1, "b", "a")],
        "b",
        true,
        "evt_2",
    );
}

#[test]
fn missing_step_makes_the_row_uncertain() {
    check(
        &[step("evt_1", 1, "a", "b"), step("evt_2", 1, "c", "d")],
        "d",
        true,
        "evt_2",
    );
    let apart = plain_event(
        "evt_2",
        "customer.subscription.trial_will_end",
        1,
        "active",
        "z",
    );
    check(&[step("evt_1", 1, "a", "b"), apart], "b", true, "evt_1");
    let forked = [
        step("evt_1", 1, "a", "b"),
        step("evt_2", 1, "a", "c"),
        step("evt_3", 1, "d", "c"),
    ];
    check(&forked, "b", true, "evt_1");
}

#[test]
fn unreadable_step_makes_the_row_uncertain_unless_all_ends_are_the_same() {
    let unreadable = |id: &str, plan: &str| {
        let data = json!({ "object": subscription("active", plan), "previous_attributes": { "status": 7 } });
        event(id, UPDATED, 1, data)
    };
    // The unreadable step leads back to a. If it were ignored, the row would show b as certain.
    check(
        &[step("evt_1", 1, "a", "b"), unreadable("evt_2", "a")],
        "b",
        true,
        "evt_1",
    );
    check(&[unreadable("evt_2", "a")], "a", false, "evt_2");
    check(
        &[step("evt_1", 1, "b", "a"), unreadable("evt_2", "a")],
        "a",
        false,
        "evt_2",
    );
}

#[test]
fn two_events_for_one_change_make_the_row_uncertain_unless_all_ends_are_the_same() {
    let there_twice = [
        step("evt_1", 1, "a", "b"),
        step("evt_2", 1, "a", "b"),
        step("evt_3", 1, "b", "a"),
    ];
    check(&there_twice, "b", true, "evt_2");
}

#[test]
fn later_snapshot_settles_an_uncertain_row() {
    let steps = [step("evt_2", 1, "a", "b"), step("evt_1", 1, "b", "a")];
    let fetched = plain_event("snapshot-1", SNAPSHOT, 2, "active", "a");
    check(
        &[steps[0].clone(), steps[1].clone(), fetched.clone()],
        "a",
        false,
        "snapshot-1",
    );
    let row = row(&[fetched]);
    assert!(
        row.subscription.metadata.is_empty(),
        "a snapshot has no event type of Stripe's"
    );
}

#[test]
fn later_phase_wins_whatever_the_times_say() {
    let late_incomplete = plain_event("evt_9", CREATED, 9, "incomplete", "a");
    check(
        &[
            late_incomplete,
            plain_event("evt_1", UPDATED, 1, "active", "b"),
        ],
        "b",
        false,
        "evt_1",
    );
    let deleted = plain_event("evt_1", DELETED, 5, "canceled", "a");
    check(
        &[
            deleted.clone(),
            plain_event("evt_2", UPDATED, 6, "past_due", "b"),
        ],
        "a",
        false,
        "evt_1",
    );
    let renamed = plain_event("evt_3", UPDATED, 6, "canceled", "c");
    check(&[deleted, renamed], "c", false, "evt_3");
    let unknown = plain_event("evt_1", UPDATED, 1, "renamed_by_stripe", "a");
    check(
        &[unknown, plain_event("evt_2", UPDATED, 2, "active", "b")],
        "b",
        false,
        "evt_2",
    );
}

#[test]
fn a_null_clears_its_column() {
    let planned = event(
        "evt_1",
        UPDATED,
        1,
        json!({ "object": { "id": "sub_1", "cancel_at": 99 } }),
    );
    let cleared = event(
        "evt_2",
        UPDATED,
        2,
        json!({ "object": { "id": "sub_1", "cancel_at": null } }),
    );
    assert!(
        row(std::slice::from_ref(&planned))
            .subscription
            .cancel_at
            .is_some()
    );
    assert_eq!(row(&[planned, cleared]).subscription.cancel_at, None);
}

#[test]
fn a_second_with_too_many_events_keeps_the_largest_id_and_stays_uncertain() {
    let steps = |n: usize| -> Vec<Event> {
        let name = |n: usize| format!("p{n}");
        (0..n)
            .map(|n| step(&format!("evt_{:03}", 500 - n), 1, &name(n), &name(n + 1)))
            .collect()
    };
    check(&steps(31), "p31", false, "evt_470");
    check(&steps(32), "p1", true, "evt_500");
    check(&steps(300), "p1", true, "evt_500");
    let mut state = State::default();
    for event in steps(300) {
        state.merge(&event);
    }
    let json = serde_json::to_string(&state).expect("a state is JSON");
    assert!(json.len() < 1000, "{json}");
    let mut later = steps(40);
    later.push(step("evt_000", 2, "x", "y"));
    check(&later, "y", false, "evt_000");
}

#[test]
fn two_renderings_of_one_event_lead_to_the_same_row_in_either_order() {
    let one = step("evt_1", 1, "a", "b");
    let other = step("evt_1", 1, "a", "c");
    let row = row(&[one, other]);
    assert!(!row.subscription.uncertain);
    assert_eq!(
        row.subscription.metadata["customer.subscription.updated.plan"], "c",
        "the larger map"
    );
}

#[test]
fn newest_session_with_a_client_reference_id_sets_it() {
    let events = [
        session("evt_1", COMPLETED, 1, "cs_1", Some("user-1")),
        session(
            "evt_2",
            "checkout.session.async_payment_succeeded",
            2,
            "cs_2",
            None,
        ),
    ];
    let row = row(&events);
    assert_eq!(
        row.subscription.client_reference_id.as_deref(),
        Some("user-1")
    );
    assert_eq!(row.checkout_session_id.as_deref(), Some("cs_2"));
    assert_eq!(
        row.last_event.map(|(id, at)| (id.to_string(), at)),
        Some(("evt_2".to_owned(), 2))
    );
}

#[test]
fn operators_resolution_sets_the_client_reference_id_like_a_session() {
    let object = json!({ "orphan_id": "sub_1", "stripe_subscription_id": "sub_1", "client_reference_id": "user-7" });
    let resolved = event(
        "resolution-1",
        "litestripe.resolution",
        5,
        json!({ "object": object }),
    );
    let sessions = [
        session("evt_1", COMPLETED, 1, "cs_1", None),
        resolved.clone(),
    ];
    let resolved_row = row(&sessions);
    assert_eq!(
        resolved_row.subscription.client_reference_id.as_deref(),
        Some("user-7")
    );
    assert_eq!(resolved_row.checkout_session_id.as_deref(), Some("cs_1"));
    assert_eq!(
        resolved_row
            .last_event
            .map(|(id, _)| id.to_string())
            .as_deref(),
        Some("resolution-1")
    );
    let later = session("evt_2", COMPLETED, 6, "cs_2", Some("user-8"));
    assert_eq!(
        row(&[resolved, later])
            .subscription
            .client_reference_id
            .as_deref(),
        Some("user-8")
    );
}

#[test]
fn session_fills_the_row_until_a_subscription_event_arrives() {
    let session = session("evt_1", COMPLETED, 1, "cs_1", Some("user-1"));
    let before = row(std::slice::from_ref(&session));
    assert_eq!(before.subscription.status, None);
    assert_eq!(
        before.subscription.stripe_customer_id.as_deref(),
        Some("cus_9")
    );
    assert!(before.subscription.livemode && !before.created_event_seen);
    assert_eq!(before.head_created, None);
    let after = row(&[session, plain_event("evt_0", CREATED, 1, "active", "a")]);
    assert_eq!(
        after.subscription.stripe_customer_id.as_deref(),
        Some("cus_1")
    );
    assert_eq!(
        after.subscription.client_reference_id.as_deref(),
        Some("user-1")
    );
    assert!(after.created_event_seen);
    assert_eq!(after.head_created, Some(1));
    assert_eq!(
        after.last_event.map(|(id, _)| id.to_string()).as_deref(),
        Some("evt_0")
    );
}

#[test]
fn metadata_is_kept_by_event_type_and_replaced_by_the_next_event_of_the_type() {
    let cleared = event(
        "evt_3",
        UPDATED,
        3,
        json!({ "object": { "id": "sub_1", "status": "active" } }),
    );
    let row = row(&[
        plain_event("evt_1", CREATED, 1, "active", "a"),
        step("evt_2", 2, "a", "b"),
        session("evt_4", COMPLETED, 1, "cs_1", None),
        cleared,
    ]);
    let metadata: Vec<_> = row.subscription.metadata.into_iter().collect();
    let entry = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(
        metadata,
        [
            entry("checkout.session.completed.from", "cs_1"),
            entry("customer.subscription.created.plan", "a")
        ]
    );
}

#[test]
fn state_is_compact_and_an_empty_one_reads_from_an_empty_object() {
    let mut state = State::default();
    assert_eq!(
        serde_json::from_str::<State>("{}").expect("it reads"),
        state
    );
    state.merge(&step("evt_1", 1, "a", "b"));
    let json = serde_json::to_string(&state).expect("a state is JSON");
    assert!(json.len() < 500, "{} bytes: {json}", json.len());
    assert_eq!(
        serde_json::from_str::<State>(&json).expect("it reads back"),
        state
    );
}

#[test]
fn changes_name_the_fields_and_their_previous_values() {
    let before = Subscription {
        status: Some("trialing".to_owned()),
        ..Subscription::default()
    };
    let cancel_at = Timestamp::from_unix(1_795_430_000).ok();
    let after = Subscription {
        status: Some("active".to_owned()),
        cancel_at,
        ..before.clone()
    };
    assert_eq!(changes(&before, &before), None);
    let there = changes(&before, &after).expect("it changed");
    assert_eq!(there.changed, ["status", "cancel_at"]);
    assert_eq!(
        Value::Object(there.previous),
        json!({ "status": "trialing", "cancel_at": null })
    );
    let back = changes(&after, &before).expect("it changed");
    assert_eq!(
        Value::Object(back.previous),
        json!({ "status": "active", "cancel_at": "2026-11-23T10:33:20Z" })
    );
}

/// Tries every walk of up to six steps over four nodes, from nothing or from any node, including
/// steps in place; and each of these walks with one step repeated.
#[test]
fn certain_end_of_a_walk_is_always_its_real_end() {
    const NODES: u8 = 4;
    let (mut walks, mut certain) = (0, 0);
    let mut check = |steps: &[walk::Step<u8>], end: u8| {
        walks += 1;
        if let End::Certain(claimed) = walk::end(steps) {
            certain += 1;
            assert_eq!(claimed, end, "{steps:?}");
        }
    };
    for length in 1..=6_u32 {
        for path in 0..u32::from(NODES).pow(length + 1) {
            let node = |place: u32| (path / u32::from(NODES).pow(place) % u32::from(NODES)) as u8;
            for from_nothing in [false, true] {
                let first = (!from_nothing).then(|| node(0));
                let from = |place: u32| if place == 0 { first } else { Some(node(place)) };
                let steps: Vec<_> = (0..length)
                    .map(|place| (from(place), node(place + 1)))
                    .collect();
                check(&steps, node(length));
                for twice in &steps {
                    let repeated: Vec<_> = steps.iter().chain([twice]).copied().collect();
                    check(&repeated, node(length));
                }
            }
        }
    }
    eprintln!("{walks} walks, {certain} of them certain");
}
