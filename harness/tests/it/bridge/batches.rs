//! Many events at a time: how they are cut into batches and bound to statements.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, lock_row_sql};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use sea_orm::{ConnectionTrait as _, DbBackend, Statement};
use serde_json::json;
use time::OffsetDateTime;

use super::{COMPLETED, CREATED, UPDATED, now};

on_both_databases!(
    waiting_events_are_applied_in_large_batches,
    every_intermediate_state_is_signalled_across_batches,
    texts_with_special_characters_are_stored_unchanged,
    batches_of_every_size_are_written,
);

/// Tokio's cooperative budget makes a task that receives messages pause after some sixty of them;
/// batches must be larger than that.
async fn waiting_events_are_applied_in_large_batches(database: DatabaseKind) {
    const EVENTS: usize = 600;
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let events = (0..EVENTS)
        .map(|_| Purchase::new(now() - 60).subscription_event(CREATED, now() - 50, json!({})));
    let events = events.map(|event| {
        (
            event.event_type().to_owned(),
            event.body(),
            event.id().to_owned(),
        )
    });
    bridge.publish_all(events.collect()).await;
    bridge.start_worker();
    bridge.wait_until_applied().await;

    let rows = bridge.rows().await;
    assert_eq!(rows.len(), EVENTS);
    // Rows of one batch are written at one time.
    let mut together: BTreeMap<OffsetDateTime, usize> = BTreeMap::new();
    rows.iter()
        .for_each(|row| *together.entry(row.dt_created).or_default() += 1);
    assert!(together.values().any(|rows| *rows > 128), "{together:?}");
    assert!(together.values().all(|rows| *rows <= 250), "{together:?}");
}

/// A worker prepares one batch while the database is busy with another.
async fn every_intermediate_state_is_signalled_across_batches(database: DatabaseKind) {
    const CHANGES: i64 = 40;
    let bridge = Bridge::start(Options::new(database).worker("LITESTRIPE_BATCH", "1")).await;
    let purchase = Purchase::new(now() - 3_600);
    let mut events = vec![purchase.subscription_event(CREATED, purchase.created, json!({}))];
    for change in 1..=CHANGES {
        let changed = json!({ "metadata": { "change": change.to_string() } });
        events.push(purchase.subscription_event(UPDATED, purchase.created + change, changed));
    }
    bridge.deliver_all(&events).await;

    let signals = bridge.check().await;
    let sent: Vec<_> = signals
        .iter()
        .map(|signal| signal.body["subscription_metadata"]["change"].as_str())
        .collect();
    let expected: Vec<_> = (1..=CHANGES).map(|change| change.to_string()).collect();
    assert_eq!(sent.len(), expected.len() + 1, "{sent:?}");
    assert!(
        sent.iter()
            .skip(1)
            .copied()
            .eq(expected.iter().map(|change| Some(change.as_str()))),
        "{sent:?}"
    );
}

/// While one batch waits for a row lock, events that arrive later are gathered and applied,
/// poisoned ones among them.
#[tokio::test]
async fn a_blocked_batch_does_not_block_other_events() {
    const OTHERS: usize = 40;
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let held = Purchase::new(now() - 3_600);
    bridge
        .deliver(&held.subscription_event(CREATED, held.created, json!({})))
        .await;
    bridge.check().await;
    let lock = bridge
        .database
        .hold_lock(&lock_row_sql(&held.subscription))
        .await;
    bridge
        .deliver(&held.subscription_event(
            UPDATED,
            held.created + 1,
            json!({ "status": "past_due" }),
        ))
        .await;
    // Events that come sooner could be in the same batch and be blocked with it.
    bridge.database.until_a_worker_waits().await;

    let mut poison = Vec::new();
    for number in 0..OTHERS {
        let mut event =
            Purchase::new(now() - 60).subscription_event(CREATED, now() - 50, json!({}));
        if number % 4 == 1 {
            event.value["created"] = json!("poison");
            poison.push(event.body());
        }
        bridge.deliver(&event).await;
    }
    let applied = 1 + OTHERS - poison.len();
    eventually(
        "the others to be applied",
        Duration::from_secs(30),
        async || match bridge.rows().await {
            rows if rows.len() == applied => Ok(()),
            rows => Err(format!("{} rows", rows.len())),
        },
    )
    .await;
    assert_eq!(
        bridge.row(&held.subscription).await.status.as_deref(),
        Some("active"),
        "the lock is still held"
    );

    lock.rollback().await.expect("the lock is released");
    assert_eq!(bridge.check().await.len(), applied + 1);
    let letters = bridge.dead_letters().await;
    let of: BTreeSet<_> = letters.iter().map(|letter| letter.body.clone()).collect();
    assert_eq!(
        (letters.len(), of),
        (poison.len(), poison.into_iter().collect())
    );
}

/// A worker with a blocked batch, and a next one that has to wait for it, leaves later events to
/// other workers.
#[tokio::test]
async fn events_do_not_pile_up_behind_a_blocked_batch() {
    const FETCHED_AHEAD: usize = 250;
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let held = Purchase::new(now() - 3_600);
    bridge
        .deliver(&held.subscription_event(CREATED, held.created, json!({})))
        .await;
    bridge.check().await;
    let lock = bridge
        .database
        .hold_lock(&lock_row_sql(&held.subscription))
        .await;
    for step in 1..=2 {
        let changed = json!({ "metadata": { "step": step.to_string() } });
        bridge
            .deliver(&held.subscription_event(UPDATED, held.created + step, changed))
            .await;
        // It is the first batch that waits for the lock.
        bridge.database.until_a_worker_waits().await;
    }
    bridge.wait_until_unacknowledged(2).await;
    // Long enough for the second batch to be complete.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let others = (0..3 * FETCHED_AHEAD).map(|_| Purchase::new(now() - 60));
    let others = others.map(|purchase| purchase.subscription_event(CREATED, now() - 50, json!({})));
    let others: Vec<_> = others
        .map(|event| {
            (
                event.event_type().to_owned(),
                event.body(),
                event.id().to_owned(),
            )
        })
        .collect();
    bridge.publish_all(others).await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let unacknowledged = bridge.unacknowledged().await;
        assert!(
            unacknowledged <= 2 + FETCHED_AHEAD,
            "{unacknowledged} were taken"
        );
    }
    lock.rollback().await.expect("the lock is released");
    assert_eq!(bridge.check().await.len(), 3 + 3 * FETCHED_AHEAD);
}

/// SQLite writes the index entries of every assigned column, even if the value stays the same.
#[tokio::test]
async fn sqlite_assigns_indexed_columns_only_when_they_change() {
    const WATCH: &str = "CREATE TABLE assigned (id TEXT); \
        CREATE TRIGGER watch AFTER UPDATE OF stripe_customer_id, client_reference_id ON stripe_subscription \
        BEGIN INSERT INTO assigned VALUES (NEW.stripe_subscription_id); END";
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let db = bridge
        .database
        .connection()
        .await
        .expect("the database answers");
    db.execute_unprepared(WATCH)
        .await
        .expect("a trigger can be made");
    let assigned = async || {
        let rows = db
            .query_all_raw(Statement::from_string(
                DbBackend::Sqlite,
                "SELECT id FROM assigned",
            ))
            .await;
        rows.expect("the database answers").len()
    };
    let purchase = Purchase::new(now() - 3_600);
    bridge
        .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
        .await;
    bridge.wait_until_applied().await;
    let changed = json!({ "metadata": { "seats": "3" } });
    bridge
        .deliver(&purchase.subscription_event(UPDATED, purchase.created + 1, changed))
        .await;
    bridge.wait_until_applied().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(
        (row.version, assigned().await),
        (2, 0),
        "neither of them changed"
    );

    let session = json!({ "client_reference_id": "user_1" });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created + 2, session))
        .await;
    bridge.wait_until_applied().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(
        (row.client_reference_id.as_deref(), assigned().await),
        (Some("user_1"), 1)
    );
}

/// PostgreSQL gets texts as arrays, in which some characters and the word NULL have a meaning.
async fn texts_with_special_characters_are_stored_unchanged(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let texts = [
        r#"a "quoted" one"#,
        r"back\slash",
        "{braces},comma",
        "NULL",
        "null",
        " spaced ",
        "Grüße ☺",
        "'; --",
    ];
    for text in texts {
        let purchase = Purchase::new(now() - 60);
        let session = json!({ "client_reference_id": text, "metadata": { "text": text } });
        let subscription = json!({ "status": text, "metadata": { text: text } });
        bridge
            .deliver_all(&[
                purchase.checkout_session_event(COMPLETED, purchase.created, session),
                purchase.subscription_event(CREATED, purchase.created, subscription),
            ])
            .await;
        bridge.wait_until_applied().await;
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(
            (row.client_reference_id.as_deref(), row.status.as_deref()),
            (Some(text), Some(text))
        );
        assert_eq!(row.subscription_metadata, json!({ text: text }));
        assert_eq!(row.cancel_at, None);
    }
    bridge.check().await;
}

/// SQLite gets rows in statements of a few fixed lengths.
async fn batches_of_every_size_are_written(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let mut expected = 0;
    for count in [1, 7, 9, 63, 65, 137] {
        let purchases = (0..count).map(|_| Purchase::new(now() - 60));
        let events =
            purchases.map(|purchase| purchase.subscription_event(CREATED, now() - 50, json!({})));
        bridge.deliver_all(&events.collect::<Vec<_>>()).await;
        // All events are stored before the worker starts.
        bridge.start_worker();
        bridge.wait_until_applied().await;
        bridge.workers.pop().expect("it was started").stop().await;
        expected += count;
        assert_eq!(bridge.rows().await.len(), expected);
    }
    assert_eq!(bridge.check().await.len(), expected);
}
