//! How the batches of a replay follow each other.

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
async fn a_batch_that_is_held_up_does_not_hold_up_the_next_one() {
    let [held, other] = purchases();
    let held_up = HeldUp::start(&held, &[created(&held), created(&other)]).await;
    eventually("the other to be applied", DEADLINE, async || match held_up
        .bridge
        .rows()
        .await
        .as_slice()
    {
        [row] if row.stripe_subscription_id == other.subscription => Ok(()),
        rows => Err(format!("{rows:?}")),
    })
    .await;
    held_up.let_go().await;
}

/// At the same time, either could be first: an orphan's reason, for one, is that of the first.
#[tokio::test]
async fn batches_about_the_same_follow_each_other() {
    let [held, other] = purchases();
    let changed =
        held.subscription_event(UPDATED, held.created + 1, json!({ "status": "past_due" }));
    let held_up = HeldUp::start(&held, &[created(&held), changed, created(&other)]).await;
    held_up.bridge.database.until_a_worker_waits().await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(
            held_up
                .bridge
                .database
                .waiting_workers()
                .await
                .expect("the database answers"),
            1
        );
    }
    held_up.let_go().await;
}

/// A replay whose first event concerns a row that somebody else is about to insert.
struct HeldUp {
    bridge: Bridge,
    replay: Program,
    somebody: DatabaseTransaction,
}

impl HeldUp {
    async fn start(held: &Purchase, events: &[Event]) -> Self {
        let mut bridge = Bridge::start(Options::on(DatabaseKind::Postgres)).await;
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
        let somebody = bridge.database.locked(&back).await;
        let replay = bridge
            .worker()
            .env("LITESTRIPE_BATCH", "1")
            .args(["replay"])
            .start();
        Self {
            bridge,
            replay,
            somebody,
        }
    }

    async fn let_go(self) {
        self.somebody
            .rollback()
            .await
            .expect("the transaction is open");
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
