//! Fetched states: their order among themselves and against Stripe's events.

use serde_json::{Value, json};

use crate::event::{self, Event, MetadataKeys};
use crate::merge::{State, Visible};

const UPDATED: &str = "customer.subscription.updated";
const THIN_UPDATED: &str = "v1.customer.subscription.updated";

fn decode(body: &Value) -> Event {
    let event = event::decode(body.to_string().as_bytes(), &MetadataKeys::All);
    event.expect("it decodes").expect("it is handled")
}

fn subscription(status: &str, plan: &str) -> Value {
    json!({ "id": "sub_1", "customer": "cus_1", "status": status, "metadata": { "plan": plan } })
}

/// Builds a fetch that surely holds every change up to `as_of`, made at (`date`, `mark`) and led to
/// by thin events of `types`, each created at `as_of`.
fn fetch(as_of: i64, (date, mark): (i64, u64), object: Value, types: &[&str]) -> Event {
    let created = time::OffsetDateTime::from_unix_timestamp(as_of).expect("a time");
    let created = created.format(&time::format_description::well_known::Rfc3339);
    let created = created.expect("RFC 3339 can write it");
    let notifications: Vec<_> = types
        .iter()
        .map(|name| json!({ "id": "evt_thin", "type": name, "created": created }))
        .collect();
    decode(&json!({
        "id": format!("litestripe.snapshot.sub_1.{date}.{mark}"), "type": "litestripe.snapshot", "created": as_of,
        "data": { "object": object }, "fetched": { "date": date, "mark": mark }, "notifications": notifications,
    }))
}

fn update(id: &str, created: i64, status: &str, plan: &str) -> Event {
    decode(&json!({
        "id": id, "type": UPDATED, "created": created, "data": { "object": subscription(status, plan) },
    }))
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

/// Checks the plan in the row. No fetch leaves it uncertain.
#[track_caller]
fn check(events: &[Event], plan: &str) {
    let row = row(events).subscription;
    assert_eq!(row.subscription_metadata["plan"], plan);
    assert!(!row.uncertain);
}

fn active(as_of: i64, stamp: (i64, u64), plan: &str) -> Event {
    fetch(as_of, stamp, subscription("active", plan), &[])
}

#[test]
fn later_fetch_wins_although_its_answer_was_slow() {
    // The first answer took no time, the second one four seconds.
    check(&[active(98, (100, 1), "a"), active(96, (102, 2), "b")], "b");
}

#[test]
fn later_fetch_of_the_same_second_wins() {
    check(
        &[active(98, (100, 9), "a"), active(98, (100, 10), "b")],
        "b",
    );
}

#[test]
fn later_fetch_holds_what_an_earlier_one_surely_held() {
    let events = [
        active(98, (100, 1), "a"),
        active(96, (102, 2), "b"),
        update("evt_1", 97, "active", "old"),
    ];
    check(&events, "b");
}

#[test]
fn event_after_the_second_that_a_fetch_surely_holds_wins() {
    let fetched = active(98, (100, 1), "fetched");
    check(
        &[fetched.clone(), update("evt_1", 98, "active", "event")],
        "fetched",
    );
    check(&[fetched, update("evt_1", 101, "active", "event")], "event");
}

/// The fetch was made after the second of the event began, and says something else.
#[test]
fn event_is_uncertain_if_a_fetch_may_be_newer() {
    let fetched = active(98, (100, 1), "fetched");
    let event = update("evt_1", 99, "active", "event");
    let row = row(&[fetched.clone(), event]).subscription;
    assert_eq!(row.subscription_metadata["plan"], "event");
    assert!(row.uncertain);

    // Unless the event says that it followed.
    let previous = json!({ "metadata": { "plan": "fetched" } });
    let event = decode(&json!({
        "id": "evt_1", "type": UPDATED, "created": 99,
        "data": { "object": subscription("active", "event"), "previous_attributes": previous },
    }));
    check(&[fetched, event], "event");
}

#[test]
fn later_phase_wins_whatever_the_times_say() {
    let canceled = |as_of, stamp| fetch(as_of, stamp, subscription("canceled", "end"), &[]);
    check(
        &[update("evt_1", 200, "active", "a"), canceled(98, (100, 1))],
        "end",
    );
    check(&[active(198, (200, 2), "a"), canceled(98, (100, 1))], "end");
    check(
        &[
            active(198, (200, 2), "a"),
            update("evt_1", 98, "canceled", "end"),
        ],
        "end",
    );
}

#[test]
fn fetch_settles_events_of_one_second_that_leave_the_order_open() {
    let one = update("evt_1", 98, "active", "a");
    let two = update("evt_2", 98, "active", "b");
    assert!(row(&[one.clone(), two.clone()]).subscription.uncertain);
    check(&[one, two, active(98, (100, 1), "b")], "b");
}

#[test]
fn fetched_metadata_is_kept_under_the_type_without_its_prefix() {
    let types = [
        THIN_UPDATED,
        "v1.customer.subscription.created",
        "v1.customer.subscription.active",
    ];
    let fetched = fetch(98, (100, 1), subscription("active", "a"), &types);
    let row = row(&[fetched]);
    let metadata: Vec<_> = row.subscription.metadata.into_iter().collect();
    let plan = |name: &str| (format!("customer.subscription.{name}.plan"), "a".to_owned());
    assert_eq!(metadata, [plan("created"), plan("updated")]);
    assert!(row.created_event_seen);
}

#[test]
fn metadata_of_an_event_wins_over_that_fetched_for_the_same_second() {
    let fetched = |as_of, stamp, plan: &str| {
        fetch(as_of, stamp, subscription("active", plan), &[THIN_UPDATED])
    };
    let event = update("evt_1", 98, "active", "event");
    let check = |events: &[Event], expected: &str| {
        let metadata = row(events).subscription.metadata;
        assert_eq!(metadata["customer.subscription.updated.plan"], expected);
    };
    check(&[event.clone(), fetched(98, (100, 1), "later")], "event");
    check(&[event.clone(), fetched(99, (101, 1), "later")], "later");
    check(&[event, fetched(97, (101, 1), "earlier")], "event");
    // Of two fetches the later, whichever thin event is newer.
    let two = [
        fetched(99, (101, 1), "first"),
        fetched(98, (102, 2), "second"),
    ];
    check(&two, "second");
}

#[test]
fn erased_metadata_does_not_come_back_with_a_repetition() {
    let mut state = State::default();
    let mut fetched = fetch(98, (100, 1), subscription("active", "a"), &[THIN_UPDATED]);
    state.merge(&fetched);
    assert!(state.erase_metadata());
    fetched.redact();
    state.merge(&fetched);
    let row = state.visible().subscription;
    assert!(row.metadata.is_empty() && row.subscription_metadata.is_empty());
    assert_eq!(row.status.as_deref(), Some("active"));
}
