//! The bridge, end to end: a signed delivery over HTTP leads to a row in the database and a signal
//! to a subscriber. The same tests run on both databases.

use litestripe_harness::bridge::{
    Bridge, DatabaseKind, Options, Signal, filter_by_subscription, signal_fields,
};
use litestripe_harness::stripe::{self, Delivery, Event, MONTH, Purchase, TRIAL};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Makes two tests of each function: `sqlite::…` and `postgres::…`.
macro_rules! on_both_databases {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test(litestripe_harness::bridge::DatabaseKind::Sqlite).await;
            })+
        }

        mod postgres {
            $(#[tokio::test]
            async fn $test() {
                super::$test(litestripe_harness::bridge::DatabaseKind::Postgres).await;
            })+
        }
    };
}

mod batches;
mod orphans;
mod personal;
mod poison;

on_both_databases!(
    story_leads_to_the_row_and_a_chain_of_signals,
    session_before_or_after_the_subscription_events_leads_to_the_same_row,
    row_without_a_subscription_event_is_revoked_and_signalled,
    every_kind_of_subscription_event_changes_the_row,
    metadata_is_kept_by_event_type,
    only_configured_metadata_keys_are_kept,
    newest_client_reference_id_wins_and_an_empty_one_does_not_erase_it,
    repeated_events_change_and_signal_nothing,
    events_of_unhandled_types_are_ignored,
    trace_context_travels_from_the_delivery_to_the_signal,
);

const CREATED: &str = "customer.subscription.created";
const UPDATED: &str = "customer.subscription.updated";
const DELETED: &str = "customer.subscription.deleted";
const COMPLETED: &str = "checkout.session.completed";

async fn story_leads_to_the_row_and_a_chain_of_signals(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let now = OffsetDateTime::now_utc();
    let story = stripe::story(now);
    for event in &story {
        bridge.deliver(event).await;
        // One by one: two of them carry the same second, and one batch would order them by id.
        bridge.wait_until_applied().await;
    }

    let signals = bridge.check().await;
    let id = subject(&story[1]);
    let sent: Vec<_> = filter_by_subscription(&signals, &id)
        .into_iter()
        .map(Shown::from_signal)
        .collect();
    let period = ["current_period_start", "current_period_end"];
    let expected = [
        (
            COMPLETED,
            vec!["stripe_customer_id", "client_reference_id", "metadata"],
            json!(null),
            "revoked",
        ),
        (
            CREATED,
            [
                vec![
                    "status",
                    "created",
                    "start_date",
                    "trial_start",
                    "trial_end",
                ],
                period.to_vec(),
                vec![
                    "collection_method",
                    "items",
                    "metadata",
                    "subscription_metadata",
                ],
            ]
            .concat(),
            json!("trialing"),
            "granted",
        ),
        (
            "customer.subscription.trial_will_end",
            vec!["metadata"],
            json!("trialing"),
            "granted",
        ),
        (
            UPDATED,
            [vec!["status"], period.to_vec(), vec!["metadata"]].concat(),
            json!("active"),
            "granted",
        ),
        (UPDATED, period.to_vec(), json!("active"), "granted"),
        (
            UPDATED,
            vec![
                "cancel_at",
                "canceled_at",
                "cancellation_reason",
                "cancel_at_period_end",
            ],
            json!("active"),
            "granted",
        ),
        (
            DELETED,
            vec!["status", "ended_at", "metadata"],
            json!("canceled"),
            "revoked",
        ),
    ];
    assert_eq!(
        sent,
        expected
            .map(|(event, changed, status, access)| Shown::new(event, &changed, status, access))
    );

    let row = bridge.row(&id).await;
    let started = story[0].created();
    let ended = started + TRIAL + 2 * MONTH;
    let expected = json!({
        "stripe_subscription_id": id,
        "stripe_customer_id": story[1].value["data"]["object"]["customer"],
        "client_reference_id": "user_4711",
        "status": "canceled",
        "created": at(started),
        "start_date": at(started),
        "cancel_at": at(ended),
        "canceled_at": at(ended - 10 * 86_400),
        "cancellation_reason": "cancellation_requested",
        "ended_at": at(ended),
        "trial_start": at(started),
        "trial_end": at(started + TRIAL),
        "current_period_start": at(ended - MONTH),
        "current_period_end": at(ended),
        "cancel_at_period_end": true,
        "collection_method": "charge_automatically",
        "pause_collection": null,
        "items": [{
            "price": "price_1QyTpwLkdIwHu7ixT3aM0nth",
            "product": "prod_RsAIwXl5kSTEam",
            "quantity": 1,
            "lookup_key": "team_monthly",
        }],
        "metadata": {
            "checkout.session.completed.plan": "team",
            "checkout.session.completed.source": "pricing-page",
            "customer.subscription.created.workspace": "acme",
            "customer.subscription.trial_will_end.workspace": "acme",
            "customer.subscription.updated.workspace": "acme",
            "customer.subscription.deleted.workspace": "acme",
        },
        "subscription_metadata": { "workspace": "acme" },
        "livemode": false,
        "stripe_account_id": null,
        "uncertain": false,
        "revision": row.revision,
    });
    assert_eq!(signal_fields(&row), expected);
    assert_eq!(row.checkout_session_id, Some(subject(&story[0])));
    assert_eq!(row.last_event_id.as_deref(), Some(story[6].id()));
    assert_eq!(
        row.last_event_created.map(OffsetDateTime::unix_timestamp),
        Some(ended)
    );
    assert_eq!(row.version, 7);
    assert!(
        row.revision >= now.unix_timestamp() * 1000,
        "{} is a time in milliseconds",
        row.revision
    );
}

async fn session_before_or_after_the_subscription_events_leads_to_the_same_row(
    database: DatabaseKind,
) {
    let bridge = Bridge::start(Options::new(database)).await;
    let created = now() - MONTH;
    let (first, second) = (Purchase::new(created), Purchase::new(created));
    let events = |purchase: &Purchase| {
        let session = json!({ "client_reference_id": "user_1", "metadata": { "plan": "team" } });
        [
            purchase.checkout_session_event(COMPLETED, purchase.created, session),
            purchase.subscription_event(
                CREATED,
                purchase.created,
                json!({ "status": "incomplete" }),
            ),
            purchase.subscription_event(UPDATED, purchase.created + 2, json!({})),
        ]
    };
    for event in &events(&first) {
        bridge.deliver(event).await;
        bridge.wait_until_applied().await;
    }
    for event in events(&second).iter().rev() {
        bridge.deliver(event).await;
        bridge.wait_until_applied().await;
    }

    bridge.check().await;
    let row = async |purchase: &Purchase| {
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(
            row.checkout_session_id.as_ref(),
            Some(&purchase.checkout_session)
        );
        assert_eq!(row.stripe_customer_id.as_ref(), Some(&purchase.customer));
        let mut shown = signal_fields(&row);
        for own in ["stripe_subscription_id", "stripe_customer_id", "revision"] {
            shown[own].take();
        }
        shown
    };
    let (before, after) = (row(&first).await, row(&second).await);
    assert_eq!(before, after);
    assert_eq!(before["status"], "active");
    assert_eq!(before["client_reference_id"], "user_1");
    assert_eq!(
        before["metadata"],
        json!({ "checkout.session.completed.plan": "team" })
    );
}

async fn row_without_a_subscription_event_is_revoked_and_signalled(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now());
    let session = json!({ "client_reference_id": "user_1" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created, session))
        .await;
    let without_subscription =
        json!({ "subscription": null, "status": "expired", "payment_status": "unpaid" });
    let abandoned = Purchase::new(now()).checkout_session_event(
        "checkout.session.expired",
        now(),
        without_subscription,
    );
    bridge.deliver(&abandoned).await;

    let signals = bridge.check().await;
    let [signal] = signals.as_slice() else {
        panic!("one signal, not {signals:?}")
    };
    assert_eq!(signal.body["status"], Value::Null);
    assert_eq!(signal.body["access"], "revoked");
    assert_eq!(signal.body["previous_revision"], Value::Null);
    assert_eq!(
        signal.changed(),
        ["stripe_customer_id", "client_reference_id"]
    );
    let rows = bridge.rows().await;
    assert_eq!(rows.len(), 1, "the abandoned session is no row");
    assert_eq!(rows[0].stripe_subscription_id, purchase.subscription);
    assert_eq!((rows[0].created, rows[0].status.as_deref()), (None, None));
    assert_eq!(bridge.orphans().await, []);
}

async fn every_kind_of_subscription_event_changes_the_row(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - MONTH);
    let mut more = purchase.items(purchase.created, purchase.created + MONTH);
    more["data"][0]["quantity"] = json!(5);
    let ended = json!({ "status": "canceled", "ended_at": purchase.created + 8, "items": more });
    let steps = [
        (CREATED, purchase.on_trial(), Some(("trialing", "granted"))),
        (
            "customer.subscription.paused",
            json!({ "status": "paused" }),
            Some(("paused", "revoked")),
        ),
        (
            "customer.subscription.resumed",
            json!({}),
            Some(("active", "granted")),
        ),
        (
            "customer.subscription.pending_update_applied",
            json!({ "items": more }),
            Some(("active", "granted")),
        ),
        // No field that we keep changes.
        (
            "customer.subscription.pending_update_expired",
            json!({ "items": more }),
            None,
        ),
        (
            UPDATED,
            json!({ "status": "past_due", "items": more }),
            Some(("past_due", "grace")),
        ),
        (
            UPDATED,
            json!({ "status": "unpaid", "items": more }),
            Some(("unpaid", "revoked")),
        ),
        (
            UPDATED,
            json!({ "status": "a_status_of_tomorrow", "items": more }),
            Some(("a_status_of_tomorrow", "revoked")),
        ),
        (DELETED, ended.clone(), Some(("canceled", "revoked"))),
        // Canceled is final, whatever Stripe may send later.
        (UPDATED, json!({}), None),
    ];
    let events = steps.iter().zip(purchase.created..);
    let events: Vec<_> = events
        .map(|((event, changes, _), at)| purchase.subscription_event(event, at, changes.clone()))
        .collect();
    bridge.deliver_all(&events).await;

    let signals = bridge.check().await;
    let sent: Vec<_> = signals
        .iter()
        .map(|signal| (&signal.body["status"], &signal.body["access"]))
        .collect();
    let expected: Vec<_> = steps
        .iter()
        .filter_map(|(_, _, expected)| *expected)
        .collect();
    assert_eq!(sent.len(), expected.len(), "{sent:?}");
    assert!(
        sent.iter()
            .zip(expected)
            .all(|(sent, expected)| (sent.0, sent.1) == (&json!(expected.0), &json!(expected.1)))
    );
    let applied = signals
        .iter()
        .find(|signal| signal.body["event"]["id"] == events[3].id())
        .expect("it is signalled");
    assert!(
        applied.changed().contains(&"items"),
        "{:?}",
        applied.changed()
    );
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.items[0]["quantity"], 5);
    assert_eq!(
        row.ended_at.map(OffsetDateTime::unix_timestamp),
        Some(purchase.created + 8)
    );
    assert_eq!(row.last_event_id.as_deref(), Some(events[8].id()));
}

async fn metadata_is_kept_by_event_type(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - MONTH);
    let at = purchase.created;
    let subscription = |event_type, at, metadata: Value| {
        purchase.subscription_event(event_type, at, json!({ "metadata": metadata }))
    };
    // The session of a payment link carries the link's metadata.
    let of_link = json!({
        "client_reference_id": "user_1",
        "payment_link": "plink_1QyTqFLkdIwHu7ix0JQkzF3c",
        "metadata": { "campaign": "spring", "näme with blanks": "grün ✓" },
    });
    bridge
        .deliver_all(&[
            purchase.checkout_session_event(COMPLETED, at, of_link),
            subscription(CREATED, at, json!({ "seats": "5", "region": "eu" })),
            subscription(UPDATED, at + 1, json!({ "seats": "6", "region": "eu" })),
            subscription(UPDATED, at + 3, json!({ "seats": "7" })),
            // Older than the newest event of its type: ignored.
            subscription(UPDATED, at + 2, json!({ "seats": "8", "region": "us" })),
            purchase.checkout_session_event(
                "checkout.session.async_payment_succeeded",
                at + 4,
                json!({ "client_reference_id": "user_1", "metadata": { "campaign": "summer" } }),
            ),
        ])
        .await;

    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(
        row.metadata,
        json!({
            "checkout.session.completed.campaign": "spring",
            "checkout.session.completed.näme with blanks": "grün ✓",
            "checkout.session.async_payment_succeeded.campaign": "summer",
            "customer.subscription.created.seats": "5",
            "customer.subscription.created.region": "eu",
            "customer.subscription.updated.seats": "7",
        })
    );
    assert_eq!(row.subscription_metadata, json!({ "seats": "7" }));
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
}

async fn only_configured_metadata_keys_are_kept(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_METADATA_KEYS", "plan, seats"))
            .await;
    let purchase = Purchase::new(now());
    let metadata = json!({ "metadata": { "plan": "team", "note": "call Jo Doe" }, "client_reference_id": "user_1" });
    bridge
        .deliver_all(&[
            purchase.checkout_session_event(COMPLETED, purchase.created, metadata.clone()),
            purchase.subscription_event(CREATED, purchase.created, metadata),
        ])
        .await;

    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.subscription_metadata, json!({ "plan": "team" }));
    let expected = json!({ "checkout.session.completed.plan": "team", "customer.subscription.created.plan": "team" });
    assert_eq!(row.metadata, expected);
    let kept = bridge.database.dump().await.expect("the database answers");
    assert!(
        kept.iter().all(|line| !line.contains("Jo Doe")),
        "{kept:#?}"
    );
}

async fn newest_client_reference_id_wins_and_an_empty_one_does_not_erase_it(
    database: DatabaseKind,
) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let steps = [
        (0, json!("user_1"), "user_1"),
        (1, json!(null), "user_1"),
        (2, json!(""), "user_1"),
        (9, json!("user_2"), "user_2"),
        (5, json!("user_3"), "user_2"),
    ];
    for (second, reference, expected) in steps {
        let session = json!({ "client_reference_id": reference });
        bridge
            .deliver(&purchase.checkout_session_event(
                COMPLETED,
                purchase.created + second,
                session,
            ))
            .await;
        bridge.wait_until_applied().await;
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(
            row.client_reference_id.as_deref(),
            Some(expected),
            "after {reference}"
        );
    }
    let signals = bridge.check().await;
    assert_eq!(
        signals.last().map(|signal| signal.body["previous"].clone()),
        Some(json!({ "client_reference_id": "user_1" }))
    );
    assert_eq!(
        bridge.orphans().await,
        [],
        "its user was known from the start"
    );
}

async fn repeated_events_change_and_signal_nothing(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let story = stripe::story(OffsetDateTime::now_utc());
    bridge.deliver_all(&story).await;
    let signals = bridge.check().await;
    let rows = bridge.rows().await;
    let (stored, orphans) = (bridge.stored_events().await, bridge.orphans().await);

    // Within the duplicate window JetStream drops them.
    bridge.deliver_all(&story).await;
    assert_eq!(bridge.stored_events().await, stored);
    // Outside of the window, or from another source, they are stored again, here in two renderings.
    let again = |event: &Event, body, how: &str| {
        (
            event.event_type().to_owned(),
            body,
            format!("{}:{how}", event.id()),
        )
    };
    let backwards = story
        .iter()
        .rev()
        .map(|event| again(event, event.body(), "backwards"));
    let compact = story
        .iter()
        .map(|event| again(event, event.compact_body(), "compact"));
    bridge.publish_all(backwards.chain(compact).collect()).await;
    assert_eq!(bridge.stored_events().await, 3 * stored);

    assert_eq!(bridge.check().await.len(), signals.len());
    assert_eq!(bridge.rows().await, rows, "not even the version grew");
    assert_eq!(bridge.orphans().await, orphans);
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

async fn events_of_unhandled_types_are_ignored(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).ingress("LITESTRIPE_EVENT_TYPES", "*")).await;
    let invoice =
        json!({ "id": "in_1", "object": "invoice", "subscription": "sub_1", "customer": "cus_1" });
    let purchase = Purchase::new(now());
    bridge
        .deliver_all(&[
            Event::new("invoice.paid", now(), invoice),
            purchase.subscription_event(
                "customer.subscription.a_type_of_tomorrow",
                now(),
                json!({}),
            ),
            purchase.subscription_event(CREATED, now(), json!({})),
        ])
        .await;

    assert_eq!(bridge.stored_events().await, 3);
    assert_eq!(bridge.check().await.len(), 1);
    assert_eq!(bridge.row(&purchase.subscription).await.version, 1);
    assert_eq!(bridge.dead_letters().await.len(), 0);
    let (_, metrics) = bridge.workers[0]
        .page("/metrics")
        .await
        .expect("the worker answers");
    assert!(
        metrics.contains("\nlitestripe_worker_events_ignored_total 2\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("\nlitestripe_worker_events_applied_total 1\n"),
        "{metrics}"
    );
}

async fn trace_context_travels_from_the_delivery_to_the_signal(database: DatabaseKind) {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now());
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    let delivery = Delivery::new(event.body(), litestripe_harness::bridge::SECRET);
    let request = stripe::client()
        .post(bridge.hook())
        .header(
            "Stripe-Signature",
            delivery.signature().expect("it is signed"),
        )
        .header("traceparent", TRACE)
        .header("tracestate", "vendor=opaque")
        .body(delivery.body().clone());
    assert_eq!(request.send().await.expect("ingress answers").status(), 200);

    let signals = bridge.check().await;
    assert_eq!(signals[0].headers["traceparent"], TRACE);
    assert_eq!(signals[0].headers["tracestate"], "vendor=opaque");
}

/// The parts of a signal that a test compares.
#[derive(Debug, PartialEq)]
struct Shown {
    event: String,
    changed: Vec<String>,
    status: Value,
    access: String,
}

impl Shown {
    fn new(event: &str, changed: &[&str], status: Value, access: &str) -> Self {
        let changed = changed.iter().map(|&field| field.to_owned()).collect();
        Self {
            event: event.to_owned(),
            changed,
            status,
            access: access.to_owned(),
        }
    }

    fn from_signal(signal: &Signal) -> Self {
        let text = |value: &Value| value.as_str().expect("the schema requires it").to_owned();
        let (event, access) = (
            text(&signal.body["event"]["type"]),
            text(&signal.body["access"]),
        );
        Self::new(
            &event,
            &signal.changed(),
            signal.body["status"].clone(),
            &access,
        )
    }
}

/// The id of the object that an event is about.
fn subject(event: &Event) -> String {
    event.value["data"]["object"]["id"]
        .as_str()
        .expect("Stripe's objects have ids")
        .to_owned()
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// A time as signals write it.
fn at(unix_s: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(unix_s).expect("the times of tests are valid");
    at.format(&Rfc3339).expect("RFC 3339 can write it")
}
