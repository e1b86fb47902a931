//! The owners of bodies of each kind.

use serde_json::{Value, json};

use super::Owner;

fn owner(body: &Value) -> Owner {
    Owner::parse(body.to_string().as_bytes()).expect("it is JSON")
}

fn event(event_type: &str, object: Value) -> Value {
    json!({ "id": "evt_1", "type": event_type, "data": { "object": object } })
}

#[track_caller]
fn check(body: &Value, customers: &[&str], payments: &[&str]) {
    let owner = owner(body);
    assert_eq!(owner.customers, customers, "{body}");
    assert_eq!(owner.payments, payments, "{body}");
}

#[test]
fn events_and_signals_name_their_customer_and_their_payment() {
    let subscription = json!({ "id": "sub_1", "object": "subscription", "customer": "cus_1" });
    check(
        &event("customer.subscription.updated", subscription),
        &["cus_1"],
        &["sub_1"],
    );
    let expanded = json!({ "id": "sub_1", "customer": { "id": "cus_1", "email": "x" } });
    check(
        &event("customer.subscription.updated", expanded),
        &["cus_1"],
        &["sub_1"],
    );
    let guest = json!({ "id": "cs_1", "object": "checkout.session", "customer": null, "subscription": null });
    check(&event("checkout.session.completed", guest), &[], &["cs_1"]);
    let session = json!({ "id": "cs_1", "object": "checkout.session", "customer": "cus_1", "subscription": "sub_1" });
    check(
        &event("litestripe.snapshot", session),
        &["cus_1"],
        &["cs_1", "sub_1"],
    );
    let customer = json!({ "id": "cus_1", "object": "customer", "email": "x" });
    check(&event("customer.updated", customer), &["cus_1"], &[]);
    let invoice =
        json!({ "id": "in_1", "object": "invoice", "customer": "cus_1", "subscription": "sub_1" });
    check(&event("invoice.paid", invoice), &["cus_1"], &["sub_1"]);
    let product = json!({ "id": "prod_1", "object": "product" });
    check(&event("product.updated", product), &[], &[]);
    let resolution = json!({ "orphan_id": "sub_1", "stripe_customer_id": "cus_1", "checkout_session_id": "cs_1" });
    check(
        &event("litestripe.resolution", resolution),
        &["cus_1"],
        &["cs_1", "sub_1"],
    );
    check(
        &json!({ "stripe_subscription_id": "sub_1", "stripe_customer_id": null }),
        &[],
        &["sub_1"],
    );
}

#[test]
fn customer_account_stands_for_the_customer_too() {
    let subscription = json!({ "id": "sub_1", "object": "subscription", "customer": null, "customer_account": "acct_1" });
    check(
        &event("customer.subscription.updated", subscription),
        &["acct_1"],
        &["sub_1"],
    );
    let both = json!({ "id": "sub_1", "object": "subscription", "customer": "cus_1", "customer_account": "acct_1" });
    check(
        &event("customer.subscription.updated", both),
        &["cus_1", "acct_1"],
        &["sub_1"],
    );
}

#[test]
fn text_is_found_anywhere_but_only_as_a_whole() {
    let body = json!({ "a": [{ "b": "cus_1" }], "c": "cus_12", "cus_3": 1 });
    assert!(owner(&body).belongs_to(|text| text == "cus_1"));
    assert!(!owner(&body).belongs_to(|text| text == "cus_2" || text == "cus_3"));
}

#[test]
fn events_of_a_connected_account_do_not_belong_to_its_holder_as_a_customer() {
    let guest = json!({ "id": "cs_1", "object": "checkout.session", "on_behalf_of": "acct_1" });
    let mut body = event("checkout.session.completed", guest);
    body["account"] = json!("acct_1");
    assert!(!owner(&body).belongs_to(|text| text == "acct_1"));
    body["data"]["object"]["customer_account"] = json!("acct_1");
    assert!(owner(&body).belongs_to(|text| text == "acct_1"));
}

#[test]
fn time_of_an_event_is_read_from_both_styles() {
    let created = |created: Value| owner(&json!({ "created": created })).created();
    assert_eq!(created(json!(1000)), Some(1000));
    assert_eq!(created(json!("1970-01-01T00:16:40.5Z")), Some(1000));
    assert_eq!(created(json!("yesterday")), None);
    assert_eq!(owner(&json!({})).created(), None);
}
