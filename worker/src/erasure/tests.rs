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

/// Whether a message that need not be an event that is handled is covered.
#[track_caller]
fn check_message(body: &str, covered: bool) {
    let erased = ["cus_1", "sub_1", "acct_1"]
        .map(|id| (id.to_owned(), AT))
        .into();
    let known = Known {
        erased,
        sequence: 0,
    };
    assert_eq!(known.covers_message(body.as_bytes()), covered, "{body}");
}

#[test]
fn messages_of_types_that_are_not_handled_are_covered_too() {
    let updated = |customer: &str, created: i64| {
        let object = json!({ "id": customer, "object": "customer", "email": "x" });
        json!({ "id": "evt_1", "type": "customer.updated", "created": created, "data": { "object": object } })
            .to_string()
    };
    check_message(&updated("cus_1", AT), true);
    check_message(&updated("cus_1", AT + 1), false);
    check_message(&updated("cus_12", AT), false);
    let thin = json!({ "id": "evt_1", "type": "v1.customer.updated", "object": "v2.core.event",
        "created": "1970-01-01T00:16:39.9Z", "related_object": { "id": "cus_1", "type": "customer" } });
    check_message(&thin.to_string(), true);
}

#[test]
fn poisoned_messages_are_covered_unless_they_are_known_to_be_newer() {
    let poison = |created: Value, id: Value| {
        let object = json!({ "id": id, "object": "subscription", "customer": "cus_1" });
        json!({ "id": "evt_1", "type": "customer.subscription.updated", "created": created, "data": { "object": object } })
            .to_string()
    };
    check_message(&poison(json!("yesterday"), json!("sub_2")), true);
    check_message(&poison(json!(AT), json!(17)), true);
    check_message(&poison(json!(AT + 1), json!(17)), false);
    check_message(r#"{"customer":"cus_1","cut o"#, true);
    check_message(r#"{"customer":"cus_12","cut o"#, false);
    check_message("", false);
}

#[test]
fn account_of_a_customer_is_enough() {
    let of = |customer: Value| json!({ "id": "sub_9", "customer": customer, "customer_account": "acct_1" });
    let event = |object: Value| {
        json!({ "id": "evt_1", "type": "customer.subscription.updated", "created": AT, "account": "acct_1",
            "data": { "object": object } })
            .to_string()
    };
    check_message(&event(of(json!(null))), true);
    check_message(&event(of(json!("cus_9"))), true);
    check_message(&event(json!({ "id": "sub_9", "customer": null })), false);
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
