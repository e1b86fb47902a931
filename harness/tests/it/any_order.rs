//! Events in any order, repeated, applied by any number of workers, lead to the same correct table.

use bytes::Bytes;
use litestripe_entity::stripe_subscription;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::stripe::{Event, MONTH, Purchase};
use serde_json::json;

use crate::orphans::rebuild::{delete_worker_consumer, rebuildable};
use crate::orphans::{COMPLETED, CREATED, UPDATED, now};
use history::History;
use random::Random;

pub(crate) mod history;
pub(crate) mod random;

on_both_databases!(similar_subscriptions_are_kept_apart);

const SUBSCRIPTIONS: usize = 500;
const EVENTS: usize = 20;

#[tokio::test]
async fn eight_workers_on_one_postgres_lead_to_the_same_rows_as_one() {
    any_order_leads_to_the_same_table(DatabaseKind::Postgres, 8).await;
}

#[tokio::test]
async fn two_workers_on_one_sqlite_lead_to_the_same_rows_as_one() {
    any_order_leads_to_the_same_table(DatabaseKind::Sqlite, 2).await;
}

async fn any_order_leads_to_the_same_table(database: DatabaseKind, workers: usize) {
    let mut random = Random::start();
    let start = now() - 600 * 86_400;
    let histories: Vec<_> = (0..SUBSCRIPTIONS)
        .map(|_| history::generate(&mut random, start, EVENTS))
        .collect();
    let once = in_order(database, &histories).await;

    // Small batches, so that many workers have events of one subscription at the same time.
    let options = Options::new(database)
        .workers(workers)
        .worker("LITESTRIPE_BATCH", "20");
    let bridge = Bridge::start(options).await;
    let mut messages: Vec<_> = histories
        .iter()
        .flat_map(|history| &history.events)
        .map(message)
        .collect();
    for repetition in 0..messages.len() / 4 {
        let (event_type, body, id) = random.pick(&messages[..SUBSCRIPTIONS * EVENTS]);
        messages.push((event_type, body, format!("{id}:{repetition}")));
    }
    random.shuffle(&mut messages);
    bridge.publish_all(messages).await;
    let signals = bridge.check().await;
    let (rows, orphans) = (bridge.rows().await, bridge.orphans().await);
    check_same(&rows, &once.rows);
    check_true(&rows, &histories);
    assert_eq!(open_orphans(&bridge).await, once.open_orphans);
    assert_eq!(bridge.dead_letters().await.len(), 0);

    // All events again, over the current table.
    delete_worker_consumer(&bridge).await;
    assert_eq!(
        bridge.check().await.len(),
        signals.len(),
        "nothing is signalled"
    );
    assert!(bridge.rows().await == rows, "not even a version grew");
    assert!(bridge.orphans().await == orphans);
}

/// The result of one worker that got each event once and in order.
struct Once {
    rows: Vec<stripe_subscription::Model>,
    open_orphans: Vec<(String, String)>,
}

async fn in_order(database: DatabaseKind, histories: &[History]) -> Once {
    let bridge = Bridge::start(Options::new(database)).await;
    // Second by second over all subscriptions, as the events happened.
    let mut events: Vec<_> = histories
        .iter()
        .flat_map(|history| &history.events)
        .collect();
    events.sort_by_key(|event| event.created());
    bridge
        .publish_all(events.into_iter().map(message).collect())
        .await;
    bridge.check().await;
    Once {
        rows: bridge.rows().await,
        open_orphans: open_orphans(&bridge).await,
    }
}

pub(crate) fn message(event: &Event) -> (String, Bytes, String) {
    (
        event.event_type().to_owned(),
        event.compact_body(),
        event.id().to_owned(),
    )
}

/// Compares row by row, so that a failure shows one row and not the whole table.
fn check_same(rows: &[stripe_subscription::Model], once: &[stripe_subscription::Model]) {
    assert_eq!((rows.len(), once.len()), (SUBSCRIPTIONS, SUBSCRIPTIONS));
    let pairs = rebuildable(rows.to_vec())
        .into_iter()
        .zip(rebuildable(once.to_vec()));
    for (row, once) in pairs {
        assert_eq!(row, once);
    }
}

/// Checks that every row that is not uncertain equals the subscription at Stripe.
fn check_true(rows: &[stripe_subscription::Model], histories: &[History]) {
    let mut uncertain = 0;
    for history in histories {
        let row = rows
            .iter()
            .find(|row| row.stripe_subscription_id == history.subscription);
        let row = row.expect("every subscription has a row");
        if row.uncertain {
            uncertain += 1;
            continue;
        }
        let truth = &history.truth;
        let item = &truth["items"]["data"][0];
        let shown = json!({
            "status": row.status, "quantity": row.items[0]["quantity"], "metadata": row.subscription_metadata,
            "cancel_at": row.cancel_at.map(|at| at.unix_timestamp()), "cancels": row.cancel_at_period_end,
            "end": row.current_period_end.map(|at| at.unix_timestamp()),
        });
        let expected = json!({
            "status": truth["status"], "quantity": item["quantity"], "metadata": truth["metadata"],
            "cancel_at": truth["cancel_at"], "cancels": truth["cancel_at_period_end"],
            "end": item["current_period_end"],
        });
        assert_eq!(shown, expected, "{}", history.subscription);
    }
    assert!(
        uncertain < SUBSCRIPTIONS / 4,
        "{uncertain} rows are uncertain"
    );
}

/// Returns the open orphans only: which orphans are resolved, and whether an orphan existed before
/// its user was known, depends on the order.
async fn open_orphans(bridge: &Bridge) -> Vec<(String, String)> {
    let orphans = bridge.orphans().await.into_iter();
    let open = orphans.filter(|orphan| orphan.resolved_at.is_none());
    open.map(|orphan| (orphan.id, orphan.reason)).collect()
}

async fn similar_subscriptions_are_kept_apart(database: DatabaseKind) {
    let mut random = Random::start();
    let created = now() - 6 * MONTH;
    // Two subscriptions of one customer and user, one that they bought after another had ended, and
    // one of the same user in live mode.
    let mut purchases: Vec<_> = (0..4).map(|_| Purchase::new(created)).collect();
    for again in 1..4 {
        purchases[again].customer = purchases[0].customer.clone();
    }
    purchases[2].created = created + 3 * MONTH;
    purchases[3].customer = Purchase::new(created).customer;
    let mut events = Vec::new();
    for (index, purchase) in purchases.iter().enumerate() {
        let user =
            json!({ "client_reference_id": "user_1", "metadata": { "number": index.to_string() } });
        let metadata = json!({ "metadata": { "number": index.to_string() } });
        let before = json!({ "metadata": { "number": null } });
        let mut own = vec![
            purchase.subscription_event(CREATED, purchase.created, json!({ "metadata": {} })),
            purchase.checkout_session_event(COMPLETED, purchase.created, user),
            purchase
                .subscription_event(UPDATED, purchase.created, metadata)
                .with_previous_attributes(before),
        ];
        if index == 0 {
            let ended = json!({ "status": "canceled", "ended_at": created + MONTH, "metadata": { "number": "0" } });
            own.push(purchase.subscription_event(
                "customer.subscription.deleted",
                created + MONTH,
                ended,
            ));
        }
        for event in &mut own {
            event.value["livemode"] = (index == 3).into();
        }
        events.extend(own);
    }
    random.shuffle(&mut events);
    let bridge = Bridge::start(
        Options::new(database)
            .workers(2)
            .worker("LITESTRIPE_BATCH", "2"),
    )
    .await;
    bridge
        .publish_all(events.iter().map(message).collect())
        .await;

    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 4);
    assert_eq!(bridge.orphans().await, []);
    for (index, purchase) in purchases.iter().enumerate() {
        let row = bridge.row(&purchase.subscription).await;
        let status = if index == 0 { "canceled" } else { "active" };
        assert_eq!(
            (row.status.as_deref(), row.uncertain, row.livemode),
            (Some(status), false, index == 3)
        );
        assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
        assert_eq!(row.stripe_customer_id.as_ref(), Some(&purchase.customer));
        assert_eq!(
            row.checkout_session_id.as_ref(),
            Some(&purchase.checkout_session)
        );
        assert_eq!(
            row.subscription_metadata,
            json!({ "number": index.to_string() })
        );
        assert_eq!(
            row.metadata["checkout.session.completed.number"],
            index.to_string()
        );
        assert_eq!(
            row.created.map(|at| at.unix_timestamp()),
            Some(purchase.created)
        );
    }
}
