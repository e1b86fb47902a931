//! Which parts of an event are kept, and which events are refused. Whole bodies, as Stripe's API
//! versions render them, are in `cases/`; here one field varies at a time.

mod fuzz;

use litestripe_contract::signal::Timestamp;
use serde_json::{Value, json};

use super::*;

const NESTING_DEEP: usize = 10_000;

fn body(event_type: &str, object: Value) -> Value {
    json!({
        "id": "evt_1", "object": "event", "api_version": "2025-03-31.basil", "created": 1_700_000_000,
        "data": { "object": object }, "livemode": true, "pending_webhooks": 1, "request": null,
        "type": event_type,
    })
}

fn subscription() -> Value {
    json!({
        "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active",
        "created": 1_690_000_000, "start_date": 1_690_000_000, "cancel_at": null,
        "cancel_at_period_end": false, "canceled_at": null, "ended_at": null, "trial_end": 1_695_000_000,
        "items": { "object": "list", "data": [
            { "id": "si_1", "price": { "id": "price_1", "product": "prod_1", "lookup_key": "pro" },
              "quantity": 2, "current_period_start": 1_700_000_000, "current_period_end": 1_702_000_000 },
            { "id": "si_2", "price": { "id": "price_2", "product": { "id": "prod_2", "name": "Seats" } },
              "current_period_start": 1_699_000_000, "current_period_end": 1_703_000_000 },
        ] },
        "metadata": { "plan": "pro", "seats": "2" },
    })
}

fn session() -> Value {
    json!({
        "id": "cs_1", "object": "checkout.session", "mode": "subscription", "status": "complete",
        "payment_status": "paid", "client_reference_id": "user-1", "customer": "cus_1",
        "subscription": "sub_1", "customer_email": "given@example.com",
        "customer_details": { "email": "entered@example.com", "name": "Jane" },
        "metadata": { "campaign": "spring" }, "created": 1_699_999_000,
    })
}

fn updated(object: Value, previous: Value) -> Value {
    let mut body = body("customer.subscription.updated", object);
    body["data"]["previous_attributes"] = previous;
    body
}

/// Returns `value` with the part at `pointer` replaced.
fn with(mut value: Value, pointer: &str, new: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    match value.pointer_mut(parent).expect("the parent exists") {
        Value::Object(map) => map.insert(key.to_owned(), new),
        Value::Array(list) => Some(std::mem::replace(
            &mut list[key.parse::<usize>().expect("index")],
            new,
        )),
        _ => panic!("no parent at {pointer}"),
    };
    value
}

fn without(mut value: Value, pointer: &str) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    value
        .pointer_mut(parent)
        .expect("parent")
        .as_object_mut()
        .expect("object")
        .remove(key);
    value
}

fn read(body: &Value) -> Event {
    decode(body.to_string().as_bytes(), &MetadataKeys::All)
        .expect("it decodes")
        .expect("it is handled")
}

fn read_subscription(body: &Value) -> SubscriptionEvent {
    match read(body).body {
        Body::Subscription(event) => *event,
        other => panic!("{other:?}"),
    }
}

fn read_session(object: Value) -> CheckoutSession {
    match read(&body("checkout.session.completed", object)).body {
        Body::CheckoutSession(session) => *session,
        other => panic!("{other:?}"),
    }
}

fn snapshot(object: Value) -> Snapshot {
    read_subscription(&body("customer.subscription.updated", object)).snapshot
}

/// Returns the snapshot before the event, also if it equals the one after it.
fn before(object: Value, previous: Value) -> Snapshot {
    let event = read_subscription(&updated(object, previous));
    match event.before {
        Before::Snapshot(before) => *before,
        Before::Same => event.snapshot,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn check_refused(body: &str, reason: &str) {
    match decode(body.as_bytes(), &MetadataKeys::All) {
        Err(error) => assert_eq!(error.to_string(), reason),
        Ok(event) => panic!("read as {event:?}"),
    }
}

#[track_caller]
fn check_field_refused(pointer: &str, new: Value, reason: &str) {
    let object = with(subscription(), pointer, new);
    check_refused(
        &body("customer.subscription.updated", object).to_string(),
        reason,
    );
}

#[test]
fn kept_fields_of_a_subscription_are_read() {
    let event = read(&body(
        "customer.subscription.trial_will_end",
        subscription(),
    ));
    assert_eq!(event.id.as_str(), "evt_1");
    assert_eq!(
        event.event_type.as_str(),
        "customer.subscription.trial_will_end"
    );
    assert_eq!((event.created, event.livemode), (1_700_000_000, true));
    assert_eq!(event.stripe_account_id, None);
    assert_eq!(event.stripe_subscription_id(), Some("sub_1"));
    let Body::Subscription(event) = event.body else {
        panic!("no subscription")
    };
    let item = |price: &str, product: &str, quantity, lookup_key: Option<&str>| Item {
        price: Some(price.to_owned()),
        product: Some(product.to_owned()),
        quantity,
        lookup_key: lookup_key.map(str::to_owned),
    };
    let metadata =
        [("plan", "pro"), ("seats", "2")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(event.before, Before::Same);
    assert_eq!(
        event.snapshot,
        Snapshot {
            customer: Some("cus_1".to_owned()),
            status: Some("active".to_owned()),
            created: Some(1_690_000_000),
            start_date: Some(1_690_000_000),
            trial_end: Some(1_695_000_000),
            current_period_start: Some(1_699_000_000),
            current_period_end: Some(1_703_000_000),
            items: vec![
                item("price_1", "prod_1", Some(2), Some("pro")),
                item("price_2", "prod_2", None, None)
            ],
            metadata: metadata.into(),
            ..Snapshot::default()
        }
    );
}

#[test]
fn snapshot_reads_back_from_its_json() {
    for object in [subscription(), json!({ "id": "sub_1" })] {
        let snapshot = snapshot(object);
        let json = serde_json::to_string(&snapshot).expect("it is JSON");
        assert_eq!(
            serde_json::from_str::<Snapshot>(&json).expect("it reads back"),
            snapshot
        );
    }
    assert_eq!(
        serde_json::to_string(&Snapshot::default()).expect("it is JSON"),
        "{}"
    );
}

#[test]
fn missing_field_reads_as_null() {
    let names = [
        "customer",
        "status",
        "created",
        "cancel_at_period_end",
        "trial_end",
        "items",
        "metadata",
    ];
    for name in names {
        let pointer = format!("/{name}");
        let null = snapshot(with(subscription(), &pointer, Value::Null));
        assert_eq!(snapshot(without(subscription(), &pointer)), null, "{name}");
    }
    let empty = Snapshot::default();
    assert_eq!(snapshot(json!({ "id": "sub_1" })), empty);
    assert_eq!(snapshot(json!({ "id": "sub_1", "items": {} })), empty);
    assert_eq!(
        snapshot(json!({ "id": "sub_1", "items": { "data": null } })),
        empty
    );
}

#[test]
fn period_on_the_subscription_wins_over_its_items() {
    let own = with(subscription(), "/current_period_end", json!(1_705_000_000));
    let read = snapshot(own.clone());
    assert_eq!(read.current_period_end, Some(1_705_000_000));
    assert_eq!(
        read.current_period_start,
        Some(1_699_000_000),
        "start and end are read independently"
    );
    let null = snapshot(with(own, "/current_period_end", Value::Null));
    assert_eq!(null.current_period_end, Some(1_703_000_000));
}

#[test]
fn expanded_object_reads_as_its_id() {
    let expanded = with(
        subscription(),
        "/customer",
        json!({ "id": "cus_1", "email": "a@example.com" }),
    );
    assert_eq!(snapshot(expanded), snapshot(subscription()));
    assert_eq!(
        snapshot(with(subscription(), "/customer", json!({}))).customer,
        None
    );
    let mut expanded = session();
    expanded["subscription"] = subscription();
    expanded["customer"] = json!({ "id": "cus_1", "deleted": true });
    assert_eq!(read_session(expanded), read_session(session()));
}

#[test]
fn an_items_price_may_be_an_id_or_a_plan() {
    let price = |new: Value| {
        let item = snapshot(with(subscription(), "/items/data/0", new))
            .items
            .swap_remove(0);
        (item.price, item.product)
    };
    let (some, product) = (Some("price_9".to_owned()), Some("prod_9".to_owned()));
    let plan = json!({ "id": "price_9", "product": "prod_9" });
    assert_eq!(price(json!({ "price": "price_9" })), (some.clone(), None));
    assert_eq!(
        price(json!({ "plan": plan })),
        (some.clone(), product.clone())
    );
    assert_eq!(
        price(json!({ "price": null, "plan": plan })),
        (some.clone(), product)
    );
    assert_eq!(price(json!({ "plan": "price_9" })), (some, None));
    assert_eq!(price(json!({})), (None, None));
}

#[test]
fn before_is_the_snapshot_with_previous_attributes_applied() {
    let after = snapshot(subscription());
    assert_eq!(
        before(
            subscription(),
            json!({ "status": "trialing", "trial_end": null, "latest_invoice": "in_1" })
        ),
        Snapshot {
            status: Some("trialing".to_owned()),
            trial_end: None,
            ..after.clone()
        }
    );
    assert_eq!(
        before(
            subscription(),
            json!({ "metadata": { "plan": "basic", "seats": null, "gone": "x" } })
        )
        .metadata,
        [("gone", "x"), ("plan", "basic")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    );
    assert_eq!(
        before(subscription(), json!({ "metadata": null })).metadata,
        BTreeMap::new()
    );
    let one = before(
        subscription(),
        json!({ "items": { "data": [{ "price": "price_0", "quantity": 1 }] } }),
    );
    assert_eq!(one.items.len(), 1);
    assert_eq!(
        one.current_period_start, None,
        "the item's period went with it"
    );
    assert_eq!(
        before(subscription(), json!({ "items": { "url": "/v1" } })),
        after
    );
    assert_eq!(
        before(subscription(), json!({ "customer": { "name": "Jane" } })),
        after
    );
}

#[test]
fn before_reads_the_period_where_its_api_version_has_it() {
    let old = with(subscription(), "/current_period_end", json!(1_705_000_000));
    let before_old = before(old.clone(), json!({ "current_period_end": 1_702_500_000 }));
    assert_eq!(before_old.current_period_end, Some(1_702_500_000));
    let items = json!({ "items": { "data": [{ "current_period_end": 1_702_000_000 }] } });
    assert_eq!(
        before(old, items.clone()).current_period_end,
        Some(1_705_000_000)
    );
    assert_eq!(
        before(subscription(), items).current_period_end,
        Some(1_702_000_000)
    );
}

#[test]
fn event_without_a_kept_change_has_the_same_state_before_and_after() {
    for previous in [
        Value::Null,
        json!({}),
        json!({ "latest_invoice": null }),
        json!({ "status": "active" }),
    ] {
        assert_eq!(
            read_subscription(&updated(subscription(), previous)).before,
            Before::Same
        );
    }
    let snapshot = read_subscription(&body(SNAPSHOT_TYPE, subscription()));
    assert_eq!(snapshot.before, Before::Same);
    let created = read_subscription(&body("customer.subscription.created", subscription()));
    assert_eq!(created.before, Before::Nothing);
}

#[test]
fn previous_attributes_that_cannot_be_read_do_not_refuse_the_event() {
    for previous in [
        json!([]),
        json!("x"),
        json!({ "status": 7 }),
        json!({ "metadata": { "plan": "\0" } }),
    ] {
        let read = read_subscription(&updated(subscription(), previous));
        assert_eq!(read.before, Before::Unreadable);
        assert_eq!(read.snapshot, snapshot(subscription()));
    }
}

#[test]
fn kept_fields_of_a_session_are_read() {
    let read = read_session(session());
    assert_eq!(read.id, "cs_1");
    assert_eq!(read.mode.as_deref(), Some("subscription"));
    assert_eq!(read.status.as_deref(), Some("complete"));
    assert_eq!(read.payment_status.as_deref(), Some("paid"));
    assert_eq!(read.client_reference_id.as_deref(), Some("user-1"));
    assert_eq!(read.stripe_customer_id.as_deref(), Some("cus_1"));
    assert_eq!(read.stripe_subscription_id.as_deref(), Some("sub_1"));
    assert_eq!(
        read.metadata,
        [("campaign".to_owned(), "spring".to_owned())].into()
    );
    assert_eq!(read.created, Some(1_699_999_000));
    let empty = with(session(), "/client_reference_id", json!(""));
    assert_eq!(read_session(empty).client_reference_id, None);
}

#[test]
fn email_entered_at_checkout_wins_and_is_hidden_in_debug() {
    let email = |session| {
        read_session(session)
            .customer_email
            .map(|email| email.expose().to_owned())
    };
    assert_eq!(email(session()).as_deref(), Some("entered@example.com"));
    let not_entered = with(session(), "/customer_details", json!({ "email": null }));
    assert_eq!(email(not_entered).as_deref(), Some("given@example.com"));
    let neither = with(
        without(session(), "/customer_details"),
        "/customer_email",
        Value::Null,
    );
    assert_eq!(email(neither), None);
    assert!(!format!("{:?}", read_session(session())).contains('@'));
}

#[test]
fn a_resolution_is_read() {
    let object = json!({ "object": RESOLUTION_TYPE, "orphan_id": "cs_1", "stripe_subscription_id": null,
        "client_reference_id": "user-1" });
    let event = read(&body(RESOLUTION_TYPE, object.clone()));
    assert_eq!(event.stripe_subscription_id(), None);
    let Body::Resolution(resolution) = event.body else {
        panic!("no resolution")
    };
    assert_eq!(
        (&*resolution.orphan_id, &*resolution.client_reference_id),
        ("cs_1", "user-1")
    );
    let empty = with(object, "/client_reference_id", json!(""));
    check_refused(
        &body(RESOLUTION_TYPE, empty).to_string(),
        "`data.object.client_reference_id` is missing",
    );
}

#[test]
fn livemode_and_account_are_the_events() {
    let mut connected = body("customer.subscription.updated", subscription());
    connected["account"] = json!("acct_1");
    assert_eq!(
        read(&connected).stripe_account_id.as_deref(),
        Some("acct_1")
    );
    connected["livemode"] = json!(false);
    connected["data"]["object"]["livemode"] = json!(true);
    assert!(!read(&connected).livemode);
    assert!(read(&without(connected, "/livemode")).livemode);
}

#[test]
fn account_is_read_from_where_the_rendering_has_it() {
    let check = |fields: Value, expected: Option<&str>| {
        let mut body = body("customer.subscription.updated", subscription());
        for (name, value) in fields.as_object().expect("an object") {
            body[name.as_str()] = value.clone();
        }
        assert_eq!(
            read(&body).stripe_account_id.as_deref(),
            expected,
            "{fields}"
        );
    };
    check(json!({ "account": "acct_1" }), Some("acct_1"));
    check(json!({ "context": "acct_1" }), Some("acct_1"));
    check(json!({ "context": "org_1/acct_1" }), Some("acct_1"));
    check(json!({ "user_id": "acct_1" }), Some("acct_1"));
    check(
        json!({ "account": "acct_1", "context": "acct_2", "user_id": "acct_3" }),
        Some("acct_1"),
    );
    check(
        json!({ "account": " ", "context": null, "user_id": "acct_3" }),
        Some("acct_3"),
    );
    check(
        json!({ "account": "", "context": "org_1/ ", "user_id": "" }),
        None,
    );
}

#[test]
fn blank_text_counts_as_absent() {
    let blank = || json!(" \t");
    let kept = snapshot(with(subscription(), "/customer", blank()));
    assert_eq!(kept.customer, None);
    let kept = snapshot(with(subscription(), "/status", json!("")));
    assert_eq!(kept.status, None);
    let kept = snapshot(with(
        subscription(),
        "/items/data/0/price/lookup_key",
        blank(),
    ));
    assert_eq!(kept.items[0].lookup_key, None);
    let kept = snapshot(with(subscription(), "/metadata/plan", blank()));
    assert_eq!(
        kept.metadata["plan"], " \t",
        "metadata is the operator's own"
    );
    for name in [
        "client_reference_id",
        "customer",
        "subscription",
        "payment_status",
    ] {
        let session = read_session(with(session(), &format!("/{name}"), blank()));
        let kept = [
            session.client_reference_id,
            session.stripe_customer_id,
            session.stripe_subscription_id,
            session.payment_status,
        ];
        assert_eq!(kept.iter().flatten().count(), 3, "{name}");
    }
    let session = read_session(with(session(), "/customer_details/email", blank()));
    assert_eq!(
        session
            .customer_email
            .map(|email| email.expose().to_owned()),
        Some("given@example.com".to_owned())
    );
    check_field_refused("/id", blank(), "`data.object.id` is missing");
}

#[test]
fn subscription_may_have_any_number_of_items() {
    let item = &subscription()["items"]["data"][0];
    let items = json!({ "data": vec![item; 2_000], "has_more": false });
    let kept = snapshot(with(subscription(), "/items", items));
    assert_eq!(kept.items.len(), 2_000);
    assert!(!kept.details.has_more_items);
}

#[test]
fn first_page_of_the_items_is_read_as_such() {
    let object = with(subscription(), "/items/has_more", json!(true));
    let event = read_subscription(&updated(object, json!({ "items": { "data": [] } })));
    assert!(event.snapshot.details.has_more_items);
    assert_eq!(event.snapshot.items.len(), 2);
}

#[test]
fn details_are_read_and_have_marks() {
    let mut object = subscription();
    object["trial_start"] = json!(1_690_000_000);
    object["collection_method"] = json!("send_invoice");
    object["pause_collection"] = json!({ "behavior": "void", "resumes_at": 1_700_000_000 });
    object["cancellation_details"] =
        json!({ "comment": "PERSONAL", "feedback": "unused", "reason": "payment_failed" });
    let event = read_subscription(&updated(
        object,
        json!({ "pause_collection": { "resumes_at": null }, "cancellation_details": { "reason": null } }),
    ));
    let pause = |resumes_at: Option<i64>| PauseCollection {
        behavior: Some("void".to_owned()),
        resumes_at: resumes_at.map(|at| Timestamp::from_unix(at).expect("a time")),
    };
    let details = Details {
        cancellation_reason: Some("payment_failed".to_owned()),
        trial_start: Some(1_690_000_000),
        collection_method: Some("send_invoice".to_owned()),
        pause_collection: Some(pause(Some(1_700_000_000))),
        ..Details::default()
    };
    assert_eq!(event.snapshot.details, details);
    let Before::Snapshot(before) = event.before else {
        panic!("{:?}", event.before)
    };
    assert_eq!(before.details.pause_collection, Some(pause(None)));
    assert_eq!(before.details.cancellation_reason, None);
    assert_eq!(before.details.trial_start, details.trial_start);
    assert_ne!(event.marks, event.marks_before);
    assert!(event.marks.join(&event.marks_before).is_none());
}

#[test]
fn field_that_is_only_marked_is_not_validated_and_its_absence_is_no_null() {
    let marks = |fields: Value| {
        let mut object = subscription();
        for (name, value) in fields.as_object().expect("an object") {
            object[name.as_str()] = value.clone();
        }
        read_subscription(&body("customer.subscription.updated", object)).marks
    };
    let (absent, null) = (marks(json!({})), marks(json!({ "latest_invoice": null })));
    assert_ne!(absent, null);
    assert!(absent.join(&null).is_some(), "absent says nothing");
    let id = marks(json!({ "latest_invoice": "in_1" }));
    assert_eq!(
        id,
        marks(json!({ "latest_invoice": { "id": "in_1", "total": 5 } }))
    );
    assert!(id.join(&null).is_none());
    assert_eq!(
        marks(json!({ "latest_invoice": 5, "billing_cycle_anchor": "soon" })),
        absent
    );
    let pending = marks(json!({ "pending_update": { "expires_at": 1 } }));
    assert_eq!(
        pending,
        marks(json!({ "pending_update": { "expires_at": 2 } }))
    );
}

#[test]
fn marks_read_back_from_their_text_also_with_those_of_a_later_version() {
    let mut object = subscription();
    object["latest_invoice"] = json!("in_1");
    object["schedule"] = json!(null);
    let marks = read_subscription(&body("customer.subscription.updated", object)).marks;
    let text = marks.to_string();
    assert_eq!(text, "----7d1db59b-n--");
    assert_eq!(text.parse(), Ok(marks));
    assert_eq!(format!("{text}n0123abcd").parse(), Ok(marks));
    assert_eq!("".parse(), Ok(Marks::default()));
    for invalid in ["x", "----7d1db59", "----7d1db59é"] {
        assert!(invalid.parse::<Marks>().is_err(), "{invalid}");
    }
}

#[test]
fn unhandled_types_are_ignored_whatever_they_hold() {
    for data in [json!(null), json!([1]), json!({ "object": 7 })] {
        let body = json!({ "type": "customer.subscription.renamed", "data": data, "created": "x" });
        assert_eq!(
            decode(body.to_string().as_bytes(), &MetadataKeys::All),
            Ok(None)
        );
    }
}

#[test]
fn fields_that_are_not_kept_are_not_validated() {
    let deep = format!("{}{}", "[".repeat(NESTING_DEEP), "]".repeat(NESTING_DEEP));
    for odd in [
        r#""\ud800""#,
        r#""\u0000""#,
        "1e999",
        "-0",
        "123456789012345678901234567890",
        &deep,
    ] {
        let event = body("customer.subscription.updated", subscription()).to_string();
        let odd = format!(r#""odd": {odd}, "\udc00": {odd}, "#);
        let event = event
            .replace(
                r#""pending_webhooks""#,
                &format!(r#"{odd}"pending_webhooks""#),
            )
            .replace(r#""cancel_at":"#, &format!(r#"{odd}"cancel_at":"#))
            .replace(r#""product":"#, &format!(r#"{odd}"product":"#));
        let read = decode(event.as_bytes(), &MetadataKeys::All);
        assert!(matches!(read, Ok(Some(_))), "{read:?}");
    }
}

#[test]
fn last_value_of_a_repeated_field_counts() {
    let event = body("customer.subscription.updated", subscription()).to_string();
    let event = event.replace(
        r#""status":"active""#,
        r#""status":7,"metadata":{"a":"b"},"status":"past_due""#,
    );
    let Ok(Some(Event {
        body: Body::Subscription(read),
        ..
    })) = decode(event.as_bytes(), &MetadataKeys::All)
    else {
        panic!("it decodes");
    };
    assert_eq!(read.snapshot.status.as_deref(), Some("past_due"));
}

#[test]
fn metadata_that_is_not_text_is_kept_as_json() {
    let metadata =
        json!({ "n": 1.50, "b": true, "z": null, "o": { "a": [1, "x"] }, "t": "\u{1F600}" });
    let read = snapshot(with(subscription(), "/metadata", metadata)).metadata;
    let read: Vec<_> = read
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    assert_eq!(
        read,
        [
            ("b", "true"),
            ("n", "1.5"),
            ("o", r#"{"a":[1,"x"]}"#),
            ("t", "\u{1F600}")
        ]
    );
}

#[test]
fn metadata_keys_are_all_none_or_a_list() {
    let only = |list: &[&str]| {
        Ok(MetadataKeys::Only(
            list.iter().map(|key| (*key).to_owned()).collect(),
        ))
    };
    assert_eq!("*".parse(), Ok(MetadataKeys::All));
    assert_eq!("".parse(), only(&[]));
    assert_eq!("plan, tier".parse(), only(&["plan", "tier"]));
    for wrong in ["plan,", ",", "*,plan"] {
        assert_eq!(
            wrong.parse::<MetadataKeys>(),
            Err(InvalidMetadataKeys),
            "{wrong}"
        );
    }
}

#[test]
fn metadata_keys_that_are_not_kept_leave_no_trace() {
    let keys = "plan".parse().expect("a key");
    let mut event = updated(subscription(), json!({ "metadata": { "seats": "1" } }));
    event["data"]["object"]["metadata"]["bad"] = json!("\0");
    let Ok(Some(Event {
        body: Body::Subscription(read),
        ..
    })) = decode(event.to_string().as_bytes(), &keys)
    else {
        panic!("it decodes");
    };
    assert_eq!(
        read.snapshot.metadata,
        [("plan".to_owned(), "pro".to_owned())].into()
    );
    assert_eq!(read.before, Before::Same);
}

#[test]
fn body_that_is_not_an_event_is_refused() {
    check_refused("", "the body is not JSON (line 1, column 0)");
    check_refused(r#"{"id": "#, "the body is not JSON (line 1, column 7)");
    check_refused("[]", "the body is not an object");
    check_refused("{}", "`type` is missing");
    check_refused(r#"{"type":"Über"}"#, "`type` is not a valid event type");
    let event = body("customer.subscription.updated", subscription());
    for (pointer, new, reason) in [
        ("/id", json!(null), "`id` is missing"),
        ("/id", json!(7), "`id` is not text that can be kept"),
        ("/id", json!("e vt"), "`id` is not a valid id"),
        (
            "/id",
            json!("e".repeat(256)),
            "`id` is longer than 255 bytes",
        ),
        ("/type", json!(null), "`type` is missing"),
        ("/created", json!(null), "`created` is missing"),
        ("/created", json!(1.5), "`created` is not a whole number"),
        (
            "/created",
            json!("1700000000"),
            "`created` is not a whole number",
        ),
        (
            "/created",
            json!(u64::MAX),
            "`created` is not a whole number",
        ),
        (
            "/created",
            json!(253_402_300_800_i64),
            "`created` lies outside the years 0 to 9999",
        ),
        (
            "/livemode",
            json!("true"),
            "`livemode` is neither true nor false",
        ),
        (
            "/account",
            json!({}),
            "`account` is not text that can be kept",
        ),
        ("/data", json!(null), "`data` is missing"),
        ("/data", json!([]), "`data` is not an object"),
        ("/data/object", json!(null), "`data.object` is missing"),
        (
            "/data/object",
            json!("sub_1"),
            "`data.object` is not an object",
        ),
    ] {
        check_refused(&with(event.clone(), pointer, new).to_string(), reason);
    }
}

#[test]
fn invalid_kept_field_is_refused() {
    let long = |bytes: usize| json!("x".repeat(bytes));
    check_field_refused("/id", json!(null), "`data.object.id` is missing");
    check_field_refused("/id", json!("sub 1"), "`data.object.id` is not a valid id");
    check_field_refused(
        "/customer",
        json!(7),
        "`data.object.customer` is neither an id nor an object",
    );
    check_field_refused(
        "/customer",
        long(256),
        "`data.object.customer` is longer than 255 bytes",
    );
    check_field_refused(
        "/status",
        long(65),
        "`data.object.status` is longer than 64 bytes",
    );
    check_field_refused(
        "/status",
        json!("a\0"),
        "`data.object.status` holds a NUL character",
    );
    check_field_refused(
        "/cancel_at",
        json!("soon"),
        "`data.object.cancel_at` is not a whole number",
    );
    let range = "`data.object.trial_end` lies outside the years 0 to 9999";
    check_field_refused("/trial_end", json!(i64::MAX), range);
    let flag = "`data.object.cancel_at_period_end` is neither true nor false";
    check_field_refused("/cancel_at_period_end", json!(0), flag);
    check_field_refused(
        "/items",
        json!(7),
        "`data.object.items` is not a list of objects",
    );
    check_field_refused(
        "/items/data",
        json!({}),
        "`data.object.items.data` is not a list of objects",
    );
    check_field_refused(
        "/items/data/0",
        json!(null),
        "`data.object.items.data` is not a list of objects",
    );
    let quantity = "`data.object.items.data[].quantity` is not a whole number";
    check_field_refused("/items/data/0/quantity", json!(0.5), quantity);
    check_field_refused(
        "/items/data/0/price",
        json!([]),
        "`data.object.items.data[].price` is not an object",
    );
    check_field_refused(
        "/metadata",
        json!([]),
        "`data.object.metadata` is not an object",
    );
    check_field_refused(
        "/metadata/plan",
        json!("\0"),
        "`data.object.metadata` holds a NUL character",
    );
    check_field_refused(
        "/metadata/a\0",
        json!(""),
        "`data.object.metadata` holds a NUL character",
    );
    let large = "`data.object.metadata` is longer than 131072 bytes";
    check_field_refused("/metadata/plan", long(128 * 1024), large);
}

#[test]
fn kept_text_that_is_not_unicode_or_nested_too_deep_is_refused() {
    let event = body("customer.subscription.updated", subscription()).to_string();
    let lone = event.replace(r#""pro","seats""#, r#""\ud800","seats""#);
    check_refused(&lone, "`data.object.metadata` is not text that can be kept");
    let lone = event.replace(r#""plan":"#, r#""\udc00":"#);
    check_refused(&lone, "`data.object.metadata` is not text that can be kept");
    let lone = event.replace(r#""active""#, r#""\ud800""#);
    check_refused(&lone, "`data.object.status` is not text that can be kept");
    let deep = format!(
        r#"{}{},"seats""#,
        "[".repeat(NESTING_DEEP),
        "]".repeat(NESTING_DEEP)
    );
    let deep = event.replace(r#""pro","seats""#, &deep);
    check_refused(&deep, "`data.object.metadata` is not text that can be kept");
}

#[test]
fn subscription_is_completed_with_the_items_behind_its_first_page() {
    let object = with(subscription(), "/items/has_more", json!(true));
    let (body, whole) = (object.to_string(), subscription().to_string());
    assert_eq!(
        api::items(body.as_bytes()),
        Some(api::Items::More(Some("si_2".to_owned())))
    );
    assert_eq!(api::items(whole.as_bytes()), Some(api::Items::All));
    let page = json!({ "has_more": false, "data": [{
        "id": "si_3", "metadata": { "note": "PERSONAL" }, "plan": { "id": "price_3" }, "quantity": 7,
        "price": { "id": "price_3", "product": "prod_3", "lookup_key": null, "nickname": "PERSONAL" },
        "current_period_start": 1_600_000_000, "current_period_end": 1_900_000_000, "discounts": [],
    }] });
    let page = api::item_page(page.to_string().as_bytes()).expect("a page of items");
    let completed = api::with_items(body.as_bytes(), &page.objects).expect("a subscription");
    assert_eq!(api::items(&completed), Some(api::Items::All));
    let completed: Value = serde_json::from_slice(&completed).expect("it is JSON");
    assert_eq!(
        completed["items"]["data"][2],
        json!({
            "price": { "id": "price_3", "product": "prod_3" }, "quantity": 7,
            "current_period_start": 1_600_000_000, "current_period_end": 1_900_000_000,
        })
    );
    let kept = snapshot(completed);
    assert_eq!(kept.items.len(), 3);
    assert!(!kept.details.has_more_items);
    assert_eq!(kept.items[2].price.as_deref(), Some("price_3"));
    assert_eq!(kept.current_period_start, Some(1_600_000_000));
    assert_eq!(kept.current_period_end, Some(1_900_000_000));
}

#[test]
fn page_that_cannot_be_continued_is_refused() {
    assert!(api::page(br#"{"data":[],"has_more":true}"#).is_none());
    assert!(api::page(br#"{"data":[],"has_more":false}"#).is_some());
    assert!(api::page(br#"{"data":[{"id":"sub_1"}],"has_more":true}"#).is_some());
    assert!(api::items(br#"{"items":{"data":[{}],"has_more":true}}"#).is_none());
    let from_the_beginning = Some(api::Items::More(None));
    assert_eq!(
        api::items(br#"{"items":{"data":[],"has_more":true}}"#),
        from_the_beginning
    );
}

#[test]
fn page_of_events_keeps_their_json_and_counts_skipped_entries() {
    let body = br#"{"object":"list","data":[
        {"id":"evt_1", "type":"customer.subscription.created",  "data":{"object":{}}},
        {"id":"evt_2"},
        {"type":"customer.subscription.created"},
        {"id":"evt_3","type":"no subject > at all"},
        {"id":"evt_4","type":"customer.subscription.deleted"}
    ],"has_more":true}"#;
    let page = api::event_page(body).expect("it is a page");
    let events: Vec<_> = page
        .events
        .iter()
        .map(|event| (event.id.as_str(), event.raw.get()))
        .collect();
    let expected = [
        (
            "evt_1",
            r#"{"id":"evt_1", "type":"customer.subscription.created",  "data":{"object":{}}}"#,
        ),
        (
            "evt_4",
            r#"{"id":"evt_4","type":"customer.subscription.deleted"}"#,
        ),
    ];
    assert_eq!(
        (events.as_slice(), page.skipped, page.after.as_deref()),
        (expected.as_slice(), 3, Some("evt_4"))
    );

    let last =
        api::event_page(br#"{"data":[{"id":"evt_1"}],"has_more":false}"#).expect("it is a page");
    assert_eq!((last.events.len(), last.skipped, last.after), (0, 1, None));
    // Without an id it is unknown where the next page starts.
    assert!(api::event_page(br#"{"data":[{}],"has_more":true}"#).is_none());
    assert!(api::event_page(b"<html>").is_none());
}
