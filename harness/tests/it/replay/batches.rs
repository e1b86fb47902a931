//! The order of the batches of a replay.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::program::Program;
use litestripe_harness::stripe::{Event, Purchase};
use sea_orm::{ConnectionTrait as _, DatabaseTransaction};
use serde_json::json;

use super::DEADLINE;
use crate::orphans::{CREATED, UPDATED, now};

#[tokio::test]
async fn a_blocked_batch_does_not_block_the_next_one() {
    let [held, other] = purchases();
    let blocked = BlockedReplay::start(&held, &[created(&held), created(&other)]).await;
    eventually("the other to be applied", DEADLINE, async || match blocked
        .bridge
        .rows()
        .await
        .as_slice()
    {
        [row] if row.stripe_subscription_id == other.subscription => Ok(()),
        rows => Err(format!("{rows:?}")),
    })
    .await;
    blocked.release().await;
}

/// At the same time either batch could be first, and the result may depend on it: an orphan keeps
/// the reason of the first.
#[tokio::test]
async fn batches_about_the_same_subscription_are_applied_in_order() {
    let [held, other] = purchases();
    let changed =
        held.subscription_event(UPDATED, held.created + 1, json!({ "status": "past_due" }));
    let blocked = BlockedReplay::start(&held, &[created(&held), changed, created(&other)]).await;
    blocked.bridge.database.until_a_worker_waits().await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(
            blocked
                .bridge
                .database
                .waiting_workers()
                .await
                .expect("the database answers"),
            1
        );
    }
    blocked.release().await;
}

/// A replay whose first event concerns a row that another transaction is about to insert.
struct BlockedReplay {
    bridge: Bridge,
    replay: Program,
    lock: DatabaseTransaction,
}

impl BlockedReplay {
    async fn start(held: &Purchase, events: &[Event]) -> Self {
        let mut bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
        bridge.deliver_all(events).await;
        bridge.check().await;
        bridge.workers.pop().expect("it was started").stop().await;
        let connection = bridge
            .database
            .connection()
            .await
            .expect("the database answers");
        let keep = "CREATE TABLE kept AS SELECT * FROM stripe_subscription; DELETE FROM stripe_subscription";
        connection
            .execute_unprepared(keep)
            .await
            .expect("rows can be deleted");
        let held = &held.subscription;
        let back = format!(
            "INSERT INTO stripe_subscription SELECT * FROM kept WHERE stripe_subscription_id = '{held}'"
        );
        let lock = bridge.database.hold_lock(&back).await;
        let replay = bridge
            .worker()
            .env("LITESTRIPE_BATCH", "1")
            .args(["replay"])
            .start();
        Self {
            bridge,
            replay,
            lock,
        }
    }

    async fn release(self) {
        self.lock.rollback().await.expect("the transaction is open");
        assert_eq!(
            self.replay.wait(DEADLINE).await.code(),
            Some(0),
            "{}",
            self.replay.stderr()
        );
        let kept = self
            .bridge
            .database
            .query("SELECT 1 FROM kept")
            .await
            .expect("the database answers");
        assert_eq!(self.bridge.rows().await.len(), kept.len());
    }
}

fn purchases() -> [Purchase; 2] {
    [0; 2].map(|_| Purchase::new(now() - 3_600))
}

fn created(purchase: &Purchase) -> Event {
    purchase.subscription_event(CREATED, purchase.created, json!({}))
}
