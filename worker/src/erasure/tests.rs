//! Tests of what an erasure covers.

use litestripe_domain::event::{self, Event, MetadataKeys};
use serde_json::{Value, json};

use super::Known;

/// When `cus_1`, `sub_1` and `cs_1` were erased.
const AT: i64 = 1000;

fn event(event_type: &str, created: i64, object: Value) -> Event {
    let body = json!({ "id": "evt_1", "type": event_type, "created": created, "data": { "object": object } });
    let event = event::decode(body.to_string().as_bytes(), &MetadataKeys::All);
    event.expect("it decodes").expect("it is handled")
}

#[track_caller]
fn check(event_type: &str, created: i64, object: Value, covered: bool) {
    let erased = ["cus_1", "sub_1", "cs_1"]
        .map(|id| (id.to_owned(), AT))
        .into();
    let known = Known {
        erased,
        sequence: 0,
    };
    assert_eq!(
        known.covers(&event(event_type, created, object.clone())),
        covered,
        "{event_type} {created} {object}"
    );
}

#[test]
fn erasure_covers_events_up_to_its_second() {
    let of_customer = || json!({ "id": "sub_2", "customer": "cus_1", "status": "active" });
    check("customer.subscription.updated", AT - 1, of_customer(), true);
    check("customer.subscription.updated", AT, of_customer(), true);
    check(
        "customer.subscription.updated",
        AT + 1,
        of_customer(),
        false,
    );
}

#[test]
fn one_of_the_ids_is_enough() {
    let subscription = |id: &str, customer: Option<&str>| json!({ "id": id, "customer": customer });
    check(
        "customer.subscription.created",
        AT,
        subscription("sub_1", None),
        true,
    );
    check(
        "customer.subscription.created",
        AT,
        subscription("sub_2", Some("cus_2")),
        false,
    );
    let session = |id: &str, customer: Option<&str>, subscription: Option<&str>| json!({ "id": id, "object": "checkout.session", "customer": customer, "subscription": subscription });
    check(
        "checkout.session.completed",
        AT,
        session("cs_1", None, None),
        true,
    );
    check(
        "checkout.session.completed",
        AT,
        session("cs_2", Some("cus_1"), None),
        true,
    );
    check(
        "checkout.session.completed",
        AT,
        session("cs_2", None, Some("sub_1")),
        true,
    );
    check(
        "checkout.session.completed",
        AT,
        session("cs_2", None, None),
        false,
    );
    check(
        "checkout.session.completed",
        AT,
        session("cs_2", Some("cus_12"), Some("sub_12")),
        false,
    );
}

#[test]
fn fetched_snapshot_counts_as_old_as_its_object() {
    let subscription =
        |created: Option<i64>| json!({ "id": "sub_1", "customer": "cus_1", "created": created });
    check(
        "litestripe.snapshot",
        AT + 500,
        subscription(Some(AT - 9)),
        true,
    );
    check(
        "litestripe.snapshot",
        AT + 500,
        subscription(Some(AT + 9)),
        false,
    );
    check("litestripe.snapshot", AT + 500, subscription(None), false);
    check(
        "customer.subscription.updated",
        AT + 500,
        subscription(Some(AT - 9)),
        false,
    );
}
