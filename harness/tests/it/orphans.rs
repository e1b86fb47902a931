//! Payments that belong to no known user: every way in which an orphan is created and resolved. The
//! modules below cover the command, the grace period, the user lookup and the rebuild.

use std::time::Duration;

use litestripe_entity::orphaned_payment;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, Signal};
use litestripe_harness::eventually;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

mod command;
mod grace;
mod kept;
pub(crate) mod lookup;
pub(crate) mod rebuild;
mod state;

on_both_databases!(
    only_paid_sessions_without_a_user_create_orphans_in_either_order,
    unpaid_session_creates_an_orphan_when_its_payment_succeeds,
    email_is_erased_by_age_and_not_written_again,
    changes_of_metadata_that_is_not_kept_are_ignored,
);

pub(crate) const CREATED: &str = "customer.subscription.created";
pub(crate) const UPDATED: &str = "customer.subscription.updated";
pub(crate) const COMPLETED: &str = "checkout.session.completed";
pub(crate) const SUCCEEDED: &str = "checkout.session.async_payment_succeeded";
pub(crate) const FAILED: &str = "checkout.session.async_payment_failed";

/// The email in every Checkout Session of these tests.
pub(crate) const EMAIL: &str = "jo.doe@example.com";

/// The worker asks due questions every second, and retries one without an answer after 2, 4 and 8
/// s.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

async fn only_paid_sessions_without_a_user_create_orphans_in_either_order(database: DatabaseKind) {
    let once = |changes: Value| with(json!({ "mode": "payment", "subscription": null }), changes);
    let setup =
        json!({ "mode": "setup", "payment_status": "no_payment_required", "subscription": null });
    let unpaid = json!({ "payment_status": "unpaid" });
    let free = json!({ "payment_status": "no_payment_required" });
    let named = json!({ "client_reference_id": "user_1" });
    let empty = json!({ "client_reference_id": "" });
    let cases = [
        ("paid", vec![(COMPLETED, json!({}))], true),
        (
            "paid, empty reference",
            vec![(COMPLETED, empty.clone())],
            true,
        ),
        ("paid, of a user", vec![(COMPLETED, named.clone())], false),
        ("nothing to pay", vec![(COMPLETED, free.clone())], true),
        ("unpaid", vec![(COMPLETED, unpaid.clone())], false),
        (
            "unpaid, then paid",
            vec![(COMPLETED, unpaid.clone()), (SUCCEEDED, json!({}))],
            true,
        ),
        (
            "unpaid, then failed",
            vec![(COMPLETED, unpaid.clone()), (FAILED, unpaid.clone())],
            false,
        ),
        (
            "expired",
            vec![(
                "checkout.session.expired",
                with(unpaid.clone(), json!({ "status": "expired" })),
            )],
            false,
        ),
        (
            "expired, nothing to pay",
            vec![(
                "checkout.session.expired",
                with(free.clone(), json!({ "status": "expired" })),
            )],
            false,
        ),
        ("once, paid", vec![(COMPLETED, once(json!({})))], true),
        (
            "once, paid, empty reference",
            vec![(COMPLETED, once(empty))],
            true,
        ),
        (
            "once, paid, of a user",
            vec![(COMPLETED, once(named))],
            false,
        ),
        ("once, nothing to pay", vec![(COMPLETED, once(free))], true),
        (
            "once, unpaid",
            vec![(COMPLETED, once(unpaid.clone()))],
            false,
        ),
        (
            "once, unpaid, then paid",
            vec![
                (COMPLETED, once(unpaid.clone())),
                (SUCCEEDED, once(json!({}))),
            ],
            true,
        ),
        (
            "once, unpaid, then failed",
            vec![(COMPLETED, once(unpaid.clone())), (FAILED, once(unpaid))],
            false,
        ),
        ("setup", vec![(COMPLETED, setup)], false),
    ];
    let bridge = Bridge::start(Options::new(database)).await;
    let mut expected = Vec::new();
    for (case, sessions, is_orphan) in cases {
        for backwards in [false, true] {
            let purchase = Purchase::new(now() - 60);
            let sessions = (0..).zip(&sessions);
            let mut events: Vec<_> = sessions
                .map(|(second, (event_type, changes))| {
                    purchase.checkout_session_event(
                        event_type,
                        purchase.created + second,
                        changes.clone(),
                    )
                })
                .collect();
            let is_once = events[0].value["data"]["object"]["subscription"].is_null();
            if !is_once {
                events.push(purchase.subscription_event(CREATED, purchase.created, json!({})));
            }
            if backwards {
                events.reverse();
            }
            bridge.deliver_all(&events).await;
            let id = if is_once {
                purchase.checkout_session.clone()
            } else {
                purchase.subscription.clone()
            };
            expected.push((case, purchase, id, is_orphan));
        }
    }

    let signals = bridge.check().await;
    let orphans = bridge.orphans().await;
    for (case, purchase, id, is_orphan) in &expected {
        let Some(orphan) = orphans.iter().find(|orphan| orphan.id == *id) else {
            assert!(!is_orphan, "{case}: {id} is no orphan");
            continue;
        };
        assert!(is_orphan, "{case}: {orphan:?}");
        assert_eq!(orphan.reason, "missing_client_reference_id", "{case}");
        assert_eq!(
            orphan.checkout_session_id.as_ref(),
            Some(&purchase.checkout_session),
            "{case}"
        );
        assert_eq!(
            orphan.stripe_customer_id.as_ref(),
            Some(&purchase.customer),
            "{case}"
        );
        assert_eq!(orphan.customer_email.as_deref(), Some(EMAIL), "{case}");
        assert_eq!(
            signals_about(&signals, "orphan.created", id).len(),
            1,
            "{case}"
        );
    }
    assert_eq!(
        orphans.len(),
        expected.iter().filter(|(.., is_orphan)| *is_orphan).count()
    );
    assert_eq!(count_signals(&signals, "orphan.created"), orphans.len());
    assert_eq!(count_signals(&signals, "orphan.resolved"), 0);
    assert!(
        signals
            .iter()
            .all(|signal| !signal.body.to_string().contains(EMAIL))
    );
}

async fn unpaid_session_creates_an_orphan_when_its_payment_succeeds(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let unpaid = json!({ "payment_status": "unpaid" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created, unpaid))
        .await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.orphans().await, []);

    let succeeded = purchase.checkout_session_event(SUCCEEDED, purchase.created + 30, json!({}));
    bridge.deliver(&succeeded).await;
    let signals = bridge.check().await;
    let orphan = orphan(&bridge, &purchase.subscription).await;
    assert_eq!(orphan.event_id, succeeded.id(), "the event of the payment");
    assert_eq!(
        signals_about(&signals, "orphan.created", &orphan.id)[0].body["event"]["type"],
        SUCCEEDED
    );
}

async fn email_is_erased_by_age_and_not_written_again(database: DatabaseKind) {
    let options = Options::new(database).worker("LITESTRIPE_ORPHAN_EMAIL_MAX_AGE", "1s");
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now() - 60);
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    bridge.deliver(&session).await;
    bridge.wait_until_applied().await;
    let first = orphan(&bridge, &purchase.subscription).await;

    let erased = until(&bridge, &first.id, |orphan| orphan.customer_email.is_none()).await;
    assert_eq!(
        (erased.resolved_at, erased.reason.as_str()),
        (None, "missing_client_reference_id"),
        "still open"
    );

    bridge.publish(COMPLETED, session.body(), "again").await;
    bridge
        .deliver(&purchase.checkout_session_event(SUCCEEDED, now(), json!({})))
        .await;
    bridge.wait_until_applied().await;
    assert_eq!(orphan(&bridge, &first.id).await.customer_email, None);

    let late = json!({ "client_reference_id": "user_1" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, now(), late))
        .await;
    let signals = bridge.check().await;
    let resolved = orphan(&bridge, &first.id).await;
    assert_eq!(
        resolved.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn changes_of_metadata_that_is_not_kept_are_ignored(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_METADATA_KEYS", "plan")).await;
    let purchase = Purchase::new(now() - 60);
    let with_note = |note: &str| json!({ "metadata": { "plan": "team", "note": note } });
    let second = purchase.created + 5;
    let previously = |note: &str| json!({ "metadata": { "note": note } });
    bridge
        .deliver_all(&[
            purchase.subscription_event(CREATED, purchase.created, with_note("a")),
            purchase.subscription_event(UPDATED, purchase.created + 1, with_note("b")),
            // Changed and changed back within a second, which would make a row uncertain.
            purchase
                .subscription_event(UPDATED, second, with_note("c"))
                .with_previous_attributes(previously("b")),
            purchase
                .subscription_event(UPDATED, second, with_note("b"))
                .with_previous_attributes(previously("c")),
            purchase.checkout_session_event(COMPLETED, purchase.created, with_note(EMAIL)),
        ])
        .await;

    let signals = bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.subscription_metadata, json!({ "plan": "team" }));
    assert!(!row.uncertain);
    let metadata = signals
        .iter()
        .filter(|signal| signal.subject == "subscription.changed");
    let changed: Vec<_> = metadata.map(|signal| signal.changed()).collect();
    let types = [CREATED, UPDATED, COMPLETED].map(|event_type| format!("{event_type}.plan"));
    let kept: Vec<_> = row
        .metadata
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect();
    assert!(
        kept.len() == 3 && types.iter().all(|key| kept.contains(&key.as_str())),
        "{kept:?}"
    );
    let filter_by_subscription = changed
        .iter()
        .filter(|changed| changed.contains(&"subscription_metadata"))
        .count();
    assert_eq!(filter_by_subscription, 1, "{changed:?}");
}

pub(crate) async fn orphan(bridge: &Bridge, id: &str) -> orphaned_payment::Model {
    let orphans = bridge.orphans().await;
    let found = orphans.iter().find(|orphan| orphan.id == id).cloned();
    found.unwrap_or_else(|| panic!("{id} is not among {orphans:#?}"))
}

/// Waits until the orphan exists and satisfies `wanted`.
#[track_caller]
pub(crate) fn until(
    bridge: &Bridge,
    id: &str,
    wanted: impl Fn(&orphaned_payment::Model) -> bool,
) -> impl Future<Output = orphaned_payment::Model> {
    eventually("an orphan", DEADLINE, async move || {
        let orphans = bridge.orphans().await;
        let found = orphans
            .iter()
            .find(|orphan| orphan.id == id && wanted(orphan))
            .cloned();
        found.ok_or_else(|| format!("{orphans:#?}"))
    })
}

/// The open questions, as (id, kind).
pub(crate) async fn questions(bridge: &Bridge) -> Vec<(String, String)> {
    let rows = bridge
        .database
        .query("SELECT entity_id, kind FROM litestripe_question ORDER BY 1, 2")
        .await;
    let text = |row: &sea_orm::QueryResult, column| row.try_get("", column).expect("it is a text");
    rows.expect("the database answers")
        .iter()
        .map(|row| (text(row, "entity_id"), text(row, "kind")))
        .collect()
}

/// Waits until no questions are open: from then on no more orphans are created.
#[track_caller]
pub(crate) fn until_all_questions_are_answered(bridge: &Bridge) -> impl Future<Output = ()> {
    eventually("every question to be answered", DEADLINE, async || {
        let questions = questions(bridge).await;
        if questions.is_empty() {
            Ok(())
        } else {
            Err(format!("{questions:?}"))
        }
    })
}

/// Makes every question due, whatever its time.
pub(crate) async fn make_due(bridge: &Bridge) {
    let due = "UPDATE litestripe_question SET due_at = '2000-01-01 00:00:00+00:00'";
    let due = bridge.database.query(due).await;
    due.expect("the database answers");
}

/// Waits until every open question was asked and got no answer.
#[track_caller]
pub(crate) fn until_retried(bridge: &Bridge) -> impl Future<Output = ()> {
    eventually("the question to be retried", DEADLINE, async || {
        let rows = bridge
            .database
            .query("SELECT 1 FROM litestripe_question WHERE attempts = 0")
            .await
            .expect("the database answers");
        let open = questions(bridge).await;
        if rows.is_empty() && !open.is_empty() {
            Ok(())
        } else {
            Err(format!("{open:?}, orphans {:?}", bridge.orphans().await))
        }
    })
}

/// The signals of a subject about one orphan.
pub(crate) fn signals_about<'a>(signals: &'a [Signal], subject: &str, id: &str) -> Vec<&'a Signal> {
    signals
        .iter()
        .filter(|signal| signal.subject == subject && signal.body["orphan_id"] == id)
        .collect()
}

pub(crate) fn count_signals(signals: &[Signal], subject: &str) -> usize {
    signals
        .iter()
        .filter(|signal| signal.subject == subject)
        .count()
}

/// Delivers `event` and waits until it is applied.
pub(crate) async fn apply(bridge: &Bridge, event: &Event) {
    bridge.deliver(event).await;
    bridge.wait_until_applied().await;
}

/// Returns `object` with the members of `changes` added or replaced.
pub(crate) fn with(mut object: Value, changes: Value) -> Value {
    if let (Some(object), Value::Object(changes)) = (object.as_object_mut(), changes) {
        object.extend(changes);
    }
    object
}

pub(crate) fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}
