//! No personal data leaves the raw stream, except an orphan's email, in its table.

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET};
use litestripe_harness::stripe::{Delivery, Event, Purchase};
use serde_json::{Value, json};
use time::Duration;

use super::{COMPLETED, CREATED, UPDATED, now};

on_both_databases!(personal_data_stays_in_the_raw_stream_and_in_the_email_column);

/// Part of every value that Stripe sends about a person.
const PERSONAL: &str = "PERSONAL";
/// Part of metadata values, which may be stored (the operator chooses them) but not logged.
const METADATA: &str = "OPERATORS-OWN";
const OPEN: &str = "PERSONAL-open@example.com";

async fn personal_data_stays_in_the_raw_stream_and_in_the_email_column(database: DatabaseKind) {
    let options = Options::new(database)
        .worker("RUST_LOG", "debug")
        .ingress("RUST_LOG", "debug");
    let bridge = Bridge::start(options.ingress("LITESTRIPE_EVENT_TYPES", "*")).await;
    let (open, resolved, known) = (
        Purchase::new(now()),
        Purchase::new(now()),
        Purchase::new(now()),
    );
    bridge
        .deliver_all(&[
            session(&open, 0, json!(null), OPEN),
            session(&resolved, 0, json!(null), "PERSONAL-resolved@example.com"),
            session(&known, 0, json!("user_1"), "PERSONAL-known@example.com"),
            subscription(&known, CREATED, 0),
            subscription(&open, CREATED, 0),
            Event::new("customer.updated", now(), person()),
        ])
        .await;
    bridge.wait_until_applied().await;
    bridge
        .deliver(&session(
            &resolved,
            1,
            json!("user_2"),
            "PERSONAL-resolved@example.com",
        ))
        .await;
    refused(&bridge).await;
    poisoned(&bridge).await;

    let signals = bridge.check().await;
    let mut seen: Vec<_> = signals
        .iter()
        .map(|signal| format!("signal {:?} {}", signal.headers, signal.body))
        .collect();
    let letters = bridge.dead_letters().await;
    assert_eq!(letters.len(), 2);
    seen.extend(
        letters
            .iter()
            .map(|letter| format!("dead letter {:?}", letter.headers)),
    );
    let rows = bridge.database.dump().await.expect("the database answers");
    assert!(
        rows.iter().any(|row| row.contains(METADATA)),
        "metadata is kept"
    );
    seen.extend(rows);
    let with_metadata = seen.len();
    for node in bridge.workers.iter().chain(&bridge.ingress) {
        seen.extend(node.log().lines().map(|line| format!("log {line}")));
        seen.push(node.page("/metrics").await.expect("it answers").1);
    }
    seen.push(
        bridge
            .worker()
            .arg("status")
            .run(std::time::Duration::from_secs(30))
            .await
            .stdout,
    );

    let personal: Vec<_> = seen.iter().filter(|text| text.contains(PERSONAL)).collect();
    assert_eq!(
        personal,
        [&format!("orphaned_payment.customer_email: {OPEN}")]
    );
    let logged: Vec<_> = seen[with_metadata..]
        .iter()
        .filter(|text| text.contains(METADATA))
        .collect();
    assert!(logged.is_empty(), "{logged:#?}");
    assert!(
        seen.iter()
            .any(|text| text.starts_with("log") && text.contains("DEBUG")),
        "the logs are at level debug"
    );
}

/// Sends deliveries that ingress refuses, each for another reason that it logs.
async fn refused(bridge: &Bridge) {
    let body = session(&Purchase::new(now()), 0, json!(null), OPEN).body();
    let stale = (time::OffsetDateTime::now_utc() - Duration::hours(1)).unix_timestamp();
    let not_json = format!("{PERSONAL} is no JSON");
    for (delivery, status) in [
        (Delivery::new(body.clone(), "whsec_another"), 400),
        (
            Delivery::new(body.clone(), SECRET).with_signature(Some("t=PERSONAL,v1=PERSONAL")),
            400,
        ),
        (Delivery::signed_at(body, SECRET, stale), 400),
        (Delivery::new(not_json, SECRET), 400),
        (
            Delivery::new(format!("{{\"id\":\"{PERSONAL} \",\"type\":\"x\"}}"), SECRET),
            400,
        ),
        (
            Delivery::new(
                format!("{{\"id\":\"evt_1\",\"type\":\"x.{PERSONAL}\"}}"),
                SECRET,
            ),
            400,
        ),
    ] {
        let answer = bridge.post(&delivery).await;
        assert_eq!(answer.status(), status);
        let text = answer.text().await.expect("it has a body");
        assert!(!text.contains(PERSONAL), "{text}");
    }
}

/// Sends events that become dead letters, each for another reason that the worker logs.
async fn poisoned(bridge: &Bridge) {
    let mut bad_created = subscription(&Purchase::new(now()), UPDATED, 0);
    bad_created.value["created"] = json!("PERSONAL-birthday");
    let mut bad_reference = session(&Purchase::new(now()), 0, json!(null), OPEN);
    bad_reference.value["data"]["object"]["client_reference_id"] =
        json!({ "PERSONAL": "PERSONAL" });
    bridge.deliver_all(&[bad_created, bad_reference]).await;
}

fn session(purchase: &Purchase, second: i64, reference: Value, email: &str) -> Event {
    let person = person();
    let changes = json!({
        "client_reference_id": reference,
        "customer_email": "PERSONAL-given@example.com",
        "customer_details": {
            "address": person["address"],
            "email": email,
            "individual_name": "PERSONAL Name",
            "name": "PERSONAL Name",
            "phone": "PERSONAL-0049",
            "tax_exempt": "none",
            "tax_ids": [{ "type": "eu_vat", "value": "PERSONAL-DE1" }],
        },
        "collected_information": { "individual_name": "PERSONAL Name", "shipping_details": { "name": "PERSONAL" } },
        "custom_fields": [{ "key": "name", "type": "text", "text": { "value": "PERSONAL" } }],
        "metadata": { "note": METADATA },
    });
    purchase.checkout_session_event(COMPLETED, purchase.created + second, changes)
}

fn subscription(purchase: &Purchase, event_type: &str, second: i64) -> Event {
    let mut customer = person();
    customer["id"] = purchase.customer.as_str().into();
    let changes = json!({
        "customer": customer,
        "description": "PERSONAL remark",
        "cancellation_details": { "comment": "PERSONAL comment", "feedback": "other", "reason": null },
        "default_payment_method": { "id": "pm_1", "object": "payment_method", "billing_details": person() },
        "metadata": { "note": METADATA },
    });
    purchase
        .subscription_event(event_type, purchase.created + second, changes)
        .with_previous_attributes(json!({ "description": "PERSONAL before" }))
}

fn person() -> Value {
    json!({
        "id": "cus_person",
        "object": "customer",
        "name": "PERSONAL Name",
        "email": "PERSONAL-customer@example.com",
        "phone": "PERSONAL-0049",
        "address": { "city": "PERSONAL", "country": "DE", "line1": "PERSONAL 1", "postal_code": "PERSONAL" },
    })
}
