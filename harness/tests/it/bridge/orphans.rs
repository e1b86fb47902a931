//! Payments that belong to no known user.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, Signal};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};

use super::{COMPLETED, CREATED, at, now};

on_both_databases!(
    paid_session_without_a_reference_creates_an_orphan_with_an_email_and_a_signal_without,
    payment_without_a_subscription_is_an_orphan_under_its_sessions_id,
    unpaid_sessions_create_no_orphans,
    late_session_resolves_the_orphan_and_erases_the_email,
    resolved_orphan_is_not_reopened_by_repeated_events,
    session_with_a_reference_in_the_same_batch_leaves_no_email,
);

const DEADLINE: Duration = Duration::from_secs(30);

async fn paid_session_without_a_reference_creates_an_orphan_with_an_email_and_a_signal_without(
    database: DatabaseKind,
) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now());
    let event = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    bridge
        .deliver_all(&[
            event.clone(),
            purchase.subscription_event(CREATED, purchase.created, json!({})),
        ])
        .await;

    let signals = until_signalled(&bridge, "orphan.created", 1).await;
    let orphans = bridge.orphans().await;
    let [orphan] = orphans.as_slice() else {
        panic!("one orphan, not {orphans:?}")
    };
    assert_eq!(orphan.id, purchase.subscription);
    assert_eq!(
        orphan.checkout_session_id.as_ref(),
        Some(&purchase.checkout_session)
    );
    assert_eq!(orphan.stripe_customer_id.as_ref(), Some(&purchase.customer));
    assert_eq!(
        orphan.stripe_subscription_id.as_ref(),
        Some(&purchase.subscription)
    );
    assert_eq!(orphan.customer_email.as_deref(), Some("jo.doe@example.com"));
    assert_eq!(orphan.reason, "missing_client_reference_id");
    assert_eq!(orphan.event_id, event.id());
    assert_eq!((orphan.livemode, orphan.resolved_at), (false, None));
    assert_eq!(orphan.resolved_client_reference_id, None);
    assert_eq!(
        signals[0].body,
        json!({
            "orphan_id": purchase.subscription,
            "reason": "missing_client_reference_id",
            "checkout_session_id": purchase.checkout_session,
            "stripe_customer_id": purchase.customer,
            "stripe_subscription_id": purchase.subscription,
            "livemode": false,
            "event": { "id": event.id(), "type": COMPLETED, "created": at(purchase.created) },
        })
    );
    assert_eq!(
        bridge.row(&purchase.subscription).await.status.as_deref(),
        Some("active"),
        "the row is like any other"
    );
}

async fn payment_without_a_subscription_is_an_orphan_under_its_sessions_id(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now());
    let once = json!({ "mode": "payment", "subscription": null, "customer": null, "client_reference_id": "" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created, once))
        .await;

    let signals = until_signalled(&bridge, "orphan.created", 1).await;
    assert_eq!(
        signals[0].body["orphan_id"],
        json!(purchase.checkout_session)
    );
    assert_eq!(signals[0].body["stripe_subscription_id"], Value::Null);
    assert_eq!(bridge.orphans().await[0].id, purchase.checkout_session);
    assert_eq!(bridge.rows().await, []);
}

async fn unpaid_sessions_create_no_orphans(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let session =
        |changes: Value| Purchase::new(now()).checkout_session_event(COMPLETED, now(), changes);
    let paid = Purchase::new(now());
    bridge
        .deliver_all(&[
            session(json!({ "payment_status": "unpaid" })),
            session(json!({ "mode": "setup", "payment_status": "no_payment_required", "subscription": null })),
            session(json!({ "client_reference_id": "user_1" })),
            // Last, so that the others have been handled when its signal is seen.
            paid.checkout_session_event(COMPLETED, now(), json!({ "payment_status": "no_payment_required" })),
        ])
        .await;

    until_signalled(&bridge, "orphan.created", 1).await;
    let ids: Vec<_> = bridge
        .orphans()
        .await
        .into_iter()
        .map(|orphan| orphan.id)
        .collect();
    assert_eq!(ids, [paid.subscription]);
}

async fn late_session_resolves_the_orphan_and_erases_the_email(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created, json!({})))
        .await;
    until_signalled(&bridge, "orphan.created", 1).await;

    let late = json!({ "client_reference_id": "user_1" });
    let event = purchase.checkout_session_event(COMPLETED, purchase.created + 30, late);
    bridge.deliver(&event).await;

    let signals = until_signalled(&bridge, "orphan.resolved", 1).await;
    assert_eq!(signals[0].body["orphan_id"], json!(purchase.subscription));
    assert_eq!(signals[0].body["event"]["id"], event.id());
    let orphans = bridge.orphans().await;
    let [orphan] = orphans.as_slice() else {
        panic!("one orphan, not {orphans:?}")
    };
    assert_eq!(orphan.customer_email, None);
    assert!(orphan.resolved_at.is_some());
    assert_eq!(
        orphan.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("user_1")
    );
    bridge.check().await;
}

async fn resolved_orphan_is_not_reopened_by_repeated_events(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let first = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    bridge.deliver(&first).await;
    until_signalled(&bridge, "orphan.created", 1).await;
    let late = json!({ "client_reference_id": "user_1" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created + 30, late))
        .await;
    until_signalled(&bridge, "orphan.resolved", 1).await;
    let orphans = bridge.orphans().await;

    bridge.publish(COMPLETED, first.body(), "again").await;
    let once_more = purchase.checkout_session_event(
        "checkout.session.async_payment_succeeded",
        now(),
        json!({}),
    );
    bridge.deliver(&once_more).await;

    let signals = bridge.check().await;
    assert_eq!(of_subject(&signals, "orphan.created").len(), 1);
    assert_eq!(bridge.orphans().await, orphans);
}

async fn session_with_a_reference_in_the_same_batch_leaves_no_email(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let purchase = Purchase::new(now() - 60);
    let named = json!({ "client_reference_id": "user_1" });
    bridge
        .deliver_all(&[
            purchase.checkout_session_event(COMPLETED, purchase.created, json!({})),
            purchase.checkout_session_event(COMPLETED, purchase.created + 30, named),
        ])
        .await;
    bridge.start_worker();

    bridge.check().await;
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("user_1")
    );
    let open: Vec<_> = bridge
        .orphans()
        .await
        .into_iter()
        .filter(|orphan| orphan.customer_email.is_some())
        .collect();
    assert_eq!(open, []);
}

/// Waits until `count` signals of a subject are stored, and returns them.
async fn until_signalled(bridge: &Bridge, subject: &str, count: usize) -> Vec<Signal> {
    bridge.wait_until_applied().await;
    eventually(subject, DEADLINE, async || {
        let signals = of_subject(&bridge.signals().await, subject);
        if signals.len() == count {
            Ok(signals)
        } else {
            Err(format!("{signals:#?}"))
        }
    })
    .await
}

fn of_subject(signals: &[Signal], subject: &str) -> Vec<Signal> {
    signals
        .iter()
        .filter(|signal| signal.subject == subject)
        .cloned()
        .collect()
}
