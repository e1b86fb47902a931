//! The owners of bodies of each kind.

use serde_json::{Value, json};

use super::Owner;

fn ids(body: &Value) -> (Option<String>, Vec<String>) {
    let owner = Owner::parse(body.to_string().as_bytes()).expect("it is JSON");
    (owner.customer, owner.payments)
}

fn event(event_type: &str, object: Value) -> Value {
    json!({ "id": "evt_1", "type": event_type, "data": { "object": object } })
}

#[track_caller]
fn check(body: &Value, customer: Option<&str>, payments: &[&str]) {
    let payments: Vec<_> = payments.iter().copied().map(str::to_owned).collect();
    assert_eq!(ids(body), (customer.map(str::to_owned), payments), "{body}");
}

#[test]
fn events_and_signals_name_their_customer_and_their_payment() {
    let subscription = json!({ "id": "sub_1", "object": "subscription", "customer": "cus_1" });
    check(
        &event("customer.subscription.updated", subscription),
        Some("cus_1"),
        &["sub_1"],
    );
    let expanded = json!({ "id": "sub_1", "customer": { "id": "cus_1", "email": "x" } });
    check(
        &event("customer.subscription.updated", expanded),
        Some("cus_1"),
        &["sub_1"],
    );
    let guest = json!({ "id": "cs_1", "object": "checkout.session", "customer": null, "subscription": null });
    check(&event("checkout.session.completed", guest), None, &["cs_1"]);
    let session = json!({ "id": "cs_1", "object": "checkout.session", "customer": "cus_1", "subscription": "sub_1" });
    check(
        &event("litestripe.snapshot", session),
        Some("cus_1"),
        &["cs_1", "sub_1"],
    );
    let customer = json!({ "id": "cus_1", "object": "customer", "email": "x" });
    check(&event("customer.updated", customer), Some("cus_1"), &[]);
    let invoice =
        json!({ "id": "in_1", "object": "invoice", "customer": "cus_1", "subscription": "sub_1" });
    check(&event("invoice.paid", invoice), Some("cus_1"), &["sub_1"]);
    let product = json!({ "id": "prod_1", "object": "product" });
    check(&event("product.updated", product), None, &[]);
    let resolution = json!({ "orphan_id": "sub_1", "stripe_customer_id": "cus_1", "checkout_session_id": "cs_1" });
    check(
        &event("litestripe.resolution", resolution),
        Some("cus_1"),
        &["cs_1", "sub_1"],
    );
    check(
        &json!({ "stripe_subscription_id": "sub_1", "stripe_customer_id": null }),
        None,
        &["sub_1"],
    );
}

#[test]
fn text_is_found_anywhere_but_only_as_a_whole() {
    let body = json!({ "a": [{ "b": "cus_1" }], "c": "cus_12", "cus_3": 1 }).to_string();
    let owner = Owner::parse(body.as_bytes()).expect("it is JSON");
    assert!(owner.contains_text(|text| text == "cus_1"));
    assert!(!owner.contains_text(|text| text == "cus_2" || text == "cus_3"));
}
