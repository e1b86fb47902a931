//! After the loss of the database, the events that the stream still holds lead to the same orphans.

use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_entity::{orphaned_payment, stripe_subscription};
use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::stripe::Purchase;
use serde_json::json;
use time::OffsetDateTime;

use super::command::resolve;
use super::{
    COMPLETED, CREATED, SUCCEEDED, UPDATED, apply, count_signals, now, orphan, until,
    until_all_questions_are_answered,
};

on_both_databases!(
    lost_database_is_rebuilt_with_the_same_orphans,
    redelivery_of_all_events_changes_and_signals_nothing,
);

async fn lost_database_is_rebuilt_with_the_same_orphans(database: DatabaseKind) {
    let mut bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s")).await;
    let made = make_orphans(&bridge).await;
    bridge.check().await;
    let (rows, orphans) = (bridge.rows().await, bridge.orphans().await);

    // In one batch, then event by event: the size of batches must make no difference.
    for batch in ["500", "1"] {
        for worker in bridge.workers.drain(..) {
            worker.stop().await;
        }
        delete_worker_consumer(&bridge).await;
        bridge.database = Database::prepare(database);
        bridge.database.resume().await;
        // Of two values for one setting the later counts.
        let worker = bridge
            .worker()
            .env("LITESTRIPE_BATCH", batch)
            .env("LITESTRIPE_WORKER_LISTEN", "127.0.0.1:0");
        let worker = worker.start();
        bridge.wait_until_applied().await;
        until_all_questions_are_answered(&bridge).await;

        assert_eq!(
            rebuildable(bridge.rows().await),
            rebuildable(rows.clone()),
            "batches of {batch}"
        );
        let open = |orphans: &[orphaned_payment::Model]| -> Vec<_> {
            let open = orphans
                .iter()
                .filter(|orphan| orphan.resolved_at.is_none())
                .cloned();
            open.map(|orphan| orphaned_payment::Model {
                dt_created: OffsetDateTime::UNIX_EPOCH,
                dt_last_updated: OffsetDateTime::UNIX_EPOCH,
                ..orphan
            })
            .collect()
        };
        let rebuilt = bridge.orphans().await;
        assert_eq!(open(&rebuilt), open(&orphans), "batches of {batch}");
        assert_eq!(open(&rebuilt).len(), made.open, "batches of {batch}");
        for (id, user) in &made.resolved {
            let found = orphan(&bridge, id).await;
            assert_eq!(
                found.resolved_client_reference_id.as_ref(),
                Some(user),
                "{id}, batches of {batch}"
            );
            assert_eq!(found.customer_email, None, "{id}, batches of {batch}");
            let before = orphans
                .iter()
                .find(|orphan| orphan.id == *id)
                .expect("it was one");
            assert_eq!(
                (&found.reason, &found.checkout_session_id),
                (&before.reason, &before.checkout_session_id)
            );
            assert_eq!(found.stripe_customer_id, before.stripe_customer_id);
        }
        let emails = rebuilt
            .iter()
            .filter(|orphan| orphan.customer_email.is_some())
            .count();
        assert_eq!(emails, made.emails, "batches of {batch}: {rebuilt:#?}");
        worker.stop().await;
    }
}

async fn redelivery_of_all_events_changes_and_signals_nothing(database: DatabaseKind) {
    let bridge = Bridge::start(
        Options::new(database)
            .workers(2)
            .worker("LITESTRIPE_ORPHAN_GRACE", "1s"),
    )
    .await;
    make_orphans(&bridge).await;
    let signals = bridge.check().await;
    let (rows, orphans) = (bridge.rows().await, bridge.orphans().await);

    // The running workers create the consumer again, and it delivers all events.
    delete_worker_consumer(&bridge).await;
    assert_eq!(bridge.check().await.len(), signals.len());
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.rows().await, rows, "not even the version grew");
    assert_eq!(bridge.orphans().await, orphans);
    assert_eq!(bridge.check().await.len(), signals.len());
}

/// The state of the orphans that [`make_orphans`] made.
struct Orphans {
    /// The number of open orphans.
    open: usize,
    /// The number of open orphans with an email.
    emails: usize,
    /// The ids of those resolved by hand, and their users.
    resolved: Vec<(String, String)>,
}

/// Makes orphans of each kind and resolves some of them.
async fn make_orphans(bridge: &Bridge) -> Orphans {
    let purchase = || Purchase::new(now() - 3600);
    let created =
        |purchase: &Purchase| purchase.subscription_event(CREATED, purchase.created, json!({}));
    let session = |purchase: &Purchase, changes| {
        purchase.checkout_session_event(COMPLETED, purchase.created, changes)
    };
    let once = json!({ "mode": "payment", "subscription": null });
    let missing = [purchase(), purchase(), purchase()];
    let payments = [purchase(), purchase()];
    let unclaimed = [purchase(), purchase(), purchase()];
    for purchase in &missing {
        apply(bridge, &session(purchase, json!({}))).await;
        apply(bridge, &created(purchase)).await;
    }
    for purchase in &payments {
        apply(bridge, &session(purchase, once.clone())).await;
    }
    for purchase in &unclaimed {
        apply(bridge, &created(purchase)).await;
    }
    for purchase in &unclaimed {
        until(bridge, &purchase.subscription, |_| true).await;
    }
    let late = |purchase: &Purchase| {
        let user = json!({ "client_reference_id": "user_late" });
        purchase.checkout_session_event(SUCCEEDED, purchase.created + 60, user)
    };
    apply(bridge, &late(&missing[1])).await;
    apply(bridge, &late(&unclaimed[1])).await;
    let mut resolved = Vec::new();
    for (id, user) in [
        (&missing[2].subscription, "user_missing"),
        (&payments[1].checkout_session, "user_payment"),
        (&unclaimed[2].subscription, "user_unclaimed"),
    ] {
        let done = resolve(bridge, id, user).await;
        assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
        resolved.push((id.clone(), user.to_owned()));
    }
    for purchase in missing.iter().chain(&unclaimed) {
        let renewed = json!({ "items": purchase.items(now(), now() + 86_400) });
        bridge
            .deliver(&purchase.subscription_event(UPDATED, now(), renewed))
            .await;
    }
    let signals = bridge.check().await;
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (8, 5)
    );
    Orphans {
        open: 3,
        emails: 2,
        resolved,
    }
}

/// Deletes the durable consumer. Once it is created again, it delivers all events that the stream
/// holds.
pub(crate) async fn delete_worker_consumer(bridge: &Bridge) {
    let stream = bridge.stream(EVENTS_STREAM).await;
    stream
        .delete_consumer(WORKER_CONSUMER)
        .await
        .expect("it can be deleted");
}

/// The rows without the columns that a rebuild does not restore.
pub(crate) fn rebuildable(
    rows: Vec<stripe_subscription::Model>,
) -> Vec<stripe_subscription::Model> {
    let without_the_rest = |row| stripe_subscription::Model {
        version: 0,
        revision: 0,
        dt_created: OffsetDateTime::UNIX_EPOCH,
        dt_last_updated: OffsetDateTime::UNIX_EPOCH,
        ..row
    };
    rows.into_iter().map(without_the_rest).collect()
}
