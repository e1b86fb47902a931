//! Third-party clients: Stripe's official SDK signs and verifies, nats-py subscribes.

use std::time::Duration;

use bytes::Bytes;
use litestripe_contract::header;
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET};
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{Event, MONTH, Notification, Purchase};
use litestripe_harness::tools;
use litestripe_ingress::signature::{self, SigningSecret};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const DEADLINE: Duration = Duration::from_secs(90);

/// The types of thin events about subscriptions and Checkout Sessions in version 16.1 of the SDK,
/// each with the class that reads it. Half of them have no twin among the snapshot events.
const THIN_TYPES: [(&str, &str); 25] = [
    (
        "v1.checkout.session.async_payment_failed",
        "V1CheckoutSessionAsyncPaymentFailed",
    ),
    (
        "v1.checkout.session.async_payment_succeeded",
        "V1CheckoutSessionAsyncPaymentSucceeded",
    ),
    (
        "v1.checkout.session.completed",
        "V1CheckoutSessionCompleted",
    ),
    ("v1.checkout.session.expired", "V1CheckoutSessionExpired"),
    (
        "v1.customer.subscription.active",
        "V1CustomerSubscriptionActive",
    ),
    (
        "v1.customer.subscription.cancel_at_changed",
        "V1CustomerSubscriptionCancelAtChanged",
    ),
    (
        "v1.customer.subscription.created",
        "V1CustomerSubscriptionCreated",
    ),
    (
        "v1.customer.subscription.default_payment_method_changed",
        "V1CustomerSubscriptionDefaultPaymentMethodChanged",
    ),
    (
        "v1.customer.subscription.deleted",
        "V1CustomerSubscriptionDeleted",
    ),
    (
        "v1.customer.subscription.incomplete",
        "V1CustomerSubscriptionIncomplete",
    ),
    (
        "v1.customer.subscription.incomplete_expired",
        "V1CustomerSubscriptionIncompleteExpired",
    ),
    (
        "v1.customer.subscription.item_added",
        "V1CustomerSubscriptionItemAdded",
    ),
    (
        "v1.customer.subscription.item_price_changed",
        "V1CustomerSubscriptionItemPriceChanged",
    ),
    (
        "v1.customer.subscription.item_quantity_changed",
        "V1CustomerSubscriptionItemQuantityChanged",
    ),
    (
        "v1.customer.subscription.item_removed",
        "V1CustomerSubscriptionItemRemoved",
    ),
    (
        "v1.customer.subscription.item_tax_rates_changed",
        "V1CustomerSubscriptionItemTaxRatesChanged",
    ),
    (
        "v1.customer.subscription.past_due",
        "V1CustomerSubscriptionPastDue",
    ),
    (
        "v1.customer.subscription.paused",
        "V1CustomerSubscriptionPaused",
    ),
    (
        "v1.customer.subscription.pending_update_applied",
        "V1CustomerSubscriptionPendingUpdateApplied",
    ),
    (
        "v1.customer.subscription.pending_update_expired",
        "V1CustomerSubscriptionPendingUpdateExpired",
    ),
    (
        "v1.customer.subscription.resumed",
        "V1CustomerSubscriptionResumed",
    ),
    (
        "v1.customer.subscription.trialing",
        "V1CustomerSubscriptionTrialing",
    ),
    (
        "v1.customer.subscription.trial_will_end",
        "V1CustomerSubscriptionTrialWillEnd",
    ),
    (
        "v1.customer.subscription.unpaid",
        "V1CustomerSubscriptionUnpaid",
    ),
    (
        "v1.customer.subscription.updated",
        "V1CustomerSubscriptionUpdated",
    ),
];

#[tokio::test]
async fn stripes_sdk_signs_and_nats_py_receives_the_documented_body() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let (purchase, event) = purchase();
    let file = file_of(&event);
    let launch = python("deliver.py")
        .args([&bridge.hook(), &bridge.broker.url(), SECRET])
        .arg(file.path());

    let [received] = lines(&launch)
        .await
        .try_into()
        .expect("it prints one object");

    assert_eq!(received["status"], 200);
    assert_eq!(received["answer"], json!({ "status": "success" }));
    assert_eq!(received["subject"], "subscription.changed");
    let row = bridge.row(&purchase.subscription).await;
    let at = |unix_s: i64| {
        let at = OffsetDateTime::from_unix_timestamp(unix_s).expect("it is a valid time");
        at.format(&Rfc3339).expect("RFC 3339 can write it")
    };
    assert_eq!(
        received["body"],
        json!({
            "stripe_subscription_id": purchase.subscription,
            "stripe_customer_id": purchase.customer,
            "client_reference_id": null,
            "status": "active",
            "access": "granted",
            "created": at(purchase.created),
            "start_date": at(purchase.created),
            "cancel_at": null,
            "canceled_at": null,
            "cancellation_reason": null,
            "ended_at": null,
            "trial_start": null,
            "trial_end": null,
            "current_period_start": at(purchase.created),
            "current_period_end": at(purchase.created + MONTH),
            "cancel_at_period_end": false,
            "collection_method": "charge_automatically",
            "pause_collection": null,
            "items": [{
                "price": "price_1QyTpwLkdIwHu7ixT3aM0nth",
                "product": "prod_RsAIwXl5kSTEam",
                "quantity": 1,
                "lookup_key": "team_monthly",
            }],
            "metadata": { "customer.subscription.created.workspace": "acme" },
            "subscription_metadata": { "workspace": "acme" },
            "livemode": false,
            "stripe_account_id": null,
            "uncertain": false,
            "revision": row.revision,
            "previous_revision": null,
            "changed": [
                "stripe_customer_id", "status", "created", "start_date", "current_period_start",
                "current_period_end", "collection_method", "items", "metadata", "subscription_metadata",
            ],
            "previous": {
                "stripe_customer_id": null,
                "status": null,
                "created": null,
                "start_date": null,
                "current_period_start": null,
                "current_period_end": null,
                "collection_method": null,
                "items": [],
                "metadata": {},
                "subscription_metadata": {},
            },
            "event": {
                "id": event.id(),
                "type": "customer.subscription.created",
                "created": at(purchase.created),
            },
            "replayed": false,
        })
    );
    let id = format!("{}:{}", purchase.subscription, row.revision);
    for (name, value) in [
        ("Nats-Msg-Id", id.as_str()),
        ("ce-id", &id),
        ("ce-specversion", "1.0"),
        ("ce-type", "litestripe.v1.subscription.changed"),
        ("ce-subject", &purchase.subscription),
        ("ce-time", &at(purchase.created)),
    ] {
        assert_eq!(received["headers"][name], value, "{name}");
    }
    bridge.check().await;
}

#[tokio::test]
async fn deliveries_that_are_not_validly_signed_events_are_refused_and_not_stored() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let (_, event) = purchase();
    let file = file_of(&event);
    let answers = lines(
        &python("refused.py")
            .args([&bridge.hook(), SECRET])
            .arg(file.path()),
    )
    .await;

    let statuses: Vec<_> = answers
        .iter()
        .map(|answer| (answer["name"].as_str(), answer["status"].as_u64()))
        .collect();
    let expected = [
        ("tampered body", 400),
        ("old timestamp", 400),
        ("wrong secret", 400),
        ("missing header", 400),
        ("empty header", 400),
        ("another scheme", 400),
        ("unknown UUID", 404),
        ("body over the limit", 413),
        ("no JSON", 400),
        ("JSON that is no object", 400),
        ("no id", 400),
        ("no type", 400),
        ("accepted", 200),
    ];
    assert_eq!(
        statuses,
        expected.map(|(name, status)| (Some(name), Some(status)))
    );
    for answer in &answers {
        let body: Value = serde_json::from_str(answer["answer"].as_str().expect("it is text"))
            .expect("it is JSON");
        let (name, status) = (&answer["name"], &answer["status"]);
        assert_eq!(body["error"].is_string(), status != 200, "{name}: {body}");
        // We refuse all that the SDK refuses. It does not check the path, the size, or that the
        // body is an event.
        assert!(
            answer["sdk"] == true || status == 400,
            "{name}: the SDK refuses it"
        );
    }
    assert_eq!(
        bridge.stored_events().await,
        1,
        "only the accepted delivery is stored"
    );
    bridge.check().await;
}

/// Each type that the SDK knows is signed by it, stored, and parsed by it from the stored bytes.
/// Its fetches show that the stub of Stripe's API answers as the SDK expects.
#[tokio::test]
async fn stripes_sdk_signs_thin_events_and_parses_them_from_the_stored_bytes() {
    const ACCOUNT: &str = "acct_1OfAnotherShop";
    let api = Api::start().await;
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 10);
    let connected = Purchase::new(purchase.created);
    for purchase in [&purchase, &connected] {
        api.put_subscription(purchase.subscription());
        api.put_checkout_session(purchase.checkout_session());
    }
    api.assign(&connected.subscription, ACCOUNT);
    api.assign(&connected.checkout_session, ACCOUNT);
    let mut notifications = thin_events(&purchase);
    for notification in thin_events(&connected) {
        notifications.push(notification.in_context(ACCOUNT).caused_by("req_1", "key_1"));
    }
    for notification in &notifications {
        let snapshot_event = format!("evt_of_{}", notification.id());
        api.put_v2_event(notification.whole(Value::Null, Some(&snapshot_event)));
    }

    let sent: Vec<_> = notifications.iter().map(Notification::body).collect();
    let sent: Vec<_> = sent.iter().map(text).collect();
    let file = json_file(&json!(sent));
    let hook = bridge.hook();
    let answers = lines(&python("notify.py").args([&hook, SECRET]).arg(file.path())).await;

    assert_eq!(answers.len(), notifications.len());
    let stream = bridge.stream(EVENTS_STREAM).await;
    let mut messages = Vec::new();
    for (sequence, (notification, answer)) in (1..).zip(notifications.iter().zip(&answers)) {
        assert_eq!(answer["status"], 200, "{}", notification.event_type());
        let message = stream.get_raw_message(sequence).await;
        let message = message.unwrap_or_else(|_| panic!("{} is stored", notification.event_type()));
        let subject = format!("{EVENTS_PREFIX}{}", notification.event_type());
        assert_eq!(message.subject.as_str(), subject);
        assert_eq!(
            message.payload,
            notification.body(),
            "the bytes are unchanged"
        );
        let header = |name| message.headers.get(name).map(|value| value.as_str());
        assert_eq!(header(header::MESSAGE_ID), Some(notification.id()));
        assert_eq!(
            header(header::STRIPE_SIGNATURE),
            answer["signature"].as_str()
        );
        messages.push(json!({
            "body": text(&message.payload),
            "signature": header(header::STRIPE_SIGNATURE),
        }));
    }

    let file = json_file(&json!(messages));
    let parsed = lines(
        &python("parse.py")
            .args([SECRET, api.url(), API_KEY])
            .arg(file.path()),
    )
    .await;
    let classes = THIN_TYPES.iter().chain(&THIN_TYPES);
    for ((parsed, notification), (_, class)) in parsed.iter().zip(&notifications).zip(classes) {
        let value = &notification.value;
        let related = &value["related_object"];
        assert_eq!(
            *parsed,
            json!({
                "class": format!("{class}EventNotification"),
                "id": value["id"],
                "type": value["type"],
                "created": value["created"],
                "livemode": false,
                "context": value["context"],
                "request": value["reason"]["request"]["id"],
                "related": [related["id"], related["type"], related["url"]],
                "fetched": [related["id"], related["type"]],
                "snapshot_event": format!("evt_of_{}", notification.id()),
            })
        );
    }
    assert_eq!(parsed.len(), notifications.len());
    let without_context = api.requests(&purchase.subscription);
    assert!(
        without_context
            .iter()
            .all(|request| request.context().is_none())
    );
}

/// Random headers, each with the SDK's verdict. `SEED` selects the set.
#[tokio::test]
async fn ingress_accepts_exactly_what_stripes_sdk_accepts() {
    const COUNT: usize = 6000;
    let seed = std::env::var("SEED")
        .unwrap_or_else(|_| OffsetDateTime::now_utc().unix_timestamp().to_string());
    eprintln!("SEED={seed}");
    let cases = lines(&python("verdicts.py").args([&seed, &COUNT.to_string()])).await;
    assert_eq!(cases.len(), COUNT);

    let accepted = cases.iter().filter(|case| case["accepted"] == true).count();
    assert!(
        (COUNT / 6..COUNT * 5 / 6).contains(&accepted),
        "{accepted} of {COUNT} are accepted: too one-sided"
    );
    let disagreements: Vec<_> = cases
        .iter()
        .filter(|case| is_accepted(case) != (case["accepted"] == true))
        .collect();
    assert!(
        disagreements.is_empty(),
        "{} disagreements with the SDK:\n{disagreements:#?}",
        disagreements.len()
    );
}

fn is_accepted(case: &Value) -> bool {
    let text = |field: &str| case[field].as_str().expect("it is text");
    let secrets = case["secrets"]
        .as_array()
        .expect("it is a list")
        .iter()
        .filter_map(Value::as_str);
    let secrets: Vec<_> = secrets.map(SigningSecret::new).collect();
    let now_s = case["now"].as_f64().expect("it is a number");
    // Eighths of a second are exact in both languages.
    let received = OffsetDateTime::UNIX_EPOCH + time::Duration::seconds_f64(now_s);
    let tolerance = Duration::from_secs(case["tolerance"].as_u64().expect("it is a number"));
    signature::verify(
        text("header"),
        bytes_of(text("body")),
        &secrets,
        received,
        tolerance,
    )
    .is_ok()
}

fn bytes_of(hex: &str) -> Bytes {
    let pairs = (0..hex.len()).step_by(2).map(|at| &hex[at..at + 2]);
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).expect("it is hexadecimal"))
        .collect()
}

fn purchase() -> (Purchase, Event) {
    let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 10);
    let changes = json!({ "metadata": { "workspace": "acme" } });
    let event =
        purchase.subscription_event("customer.subscription.created", purchase.created, changes);
    (purchase, event)
}

/// A thin event of each type about the purchase.
fn thin_events(purchase: &Purchase) -> Vec<Notification> {
    let created_ms = purchase.created * 1000;
    let types = (0..).zip(THIN_TYPES);
    types
        .map(|(n, (event_type, _))| {
            if event_type.starts_with("v1.checkout.session.") {
                purchase.checkout_session_notification(event_type, created_ms + n)
            } else {
                purchase.subscription_notification(event_type, created_ms + n)
            }
        })
        .collect()
}

fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).expect("it is text")
}

fn json_file(value: &Value) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file can be made");
    std::fs::write(file.path(), value.to_string()).expect("it can be written");
    file
}

fn file_of(event: &Event) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file can be made");
    std::fs::write(file.path(), event.body()).expect("it can be written");
    file
}

/// A script of `harness/python`.
pub(crate) fn python(script: &str) -> Launch {
    let python = tools::python().expect("there is a Python, or one can be made");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/python");
    Program::at(python)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(format!("{folder}/{script}"))
}

/// What a script prints, a JSON value a line.
pub(crate) async fn lines(launch: &Launch) -> Vec<Value> {
    let finished = launch.run(DEADLINE).await;
    assert!(
        finished.status.success(),
        "{}:\n{}\n{}",
        finished.status,
        finished.stdout,
        finished.stderr
    );
    finished
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("it prints JSON"))
        .collect()
}
