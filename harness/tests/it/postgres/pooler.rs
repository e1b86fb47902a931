//! PgBouncer stands between the worker and its server.

use litestripe_harness::bridge::Bridge;
use litestripe_harness::pgbouncer::{Mode, PgBouncer};

use super::{DEADLINE, deliver_story, servers, start};

/// Fewer than the connections of two workers, so that these share the server's in transaction mode.
const FEW: (&str, &str) = ("default_pool_size", "3");

async fn behind(mode: Mode, settings: &[(&str, &str)]) -> (Bridge, PgBouncer) {
    let mut bridge = servers().await;
    let pooler = PgBouncer::start(bridge.database.server().port(), mode, settings).await;
    start(&mut bridge, pooler.url("postgres")).await;
    (bridge, pooler)
}

#[tokio::test]
async fn worker_works_behind_a_pooler_with_its_default_settings() {
    let (bridge, mut pooler) = behind(Mode::Session, &[]).await;
    deliver_story(&bridge).await;
    bridge.wait_until_applied().await;

    pooler.restart().await;
    deliver_story(&bridge).await;

    bridge.check().await;
    let worker = &bridge.workers[0];
    assert_eq!(worker.count_in_log("share"), 0, "{}", worker.log());
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

#[tokio::test]
async fn workers_share_sessions_with_each_other() {
    let (mut bridge, mut pooler) = behind(Mode::Transaction, &[FEW]).await;
    bridge.start_worker().wait_until_ready().await;
    for _ in 0..3 {
        deliver_story(&bridge).await;
    }
    bridge.wait_until_applied().await;

    pooler.restart().await;
    deliver_story(&bridge).await;

    bridge.check().await;
    for worker in &bridge.workers {
        let log = worker.log();
        assert!(log.contains("pooler in transaction mode"), "{log}");
        assert!(!log.contains("prepared statement"), "{log}");
    }
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

#[tokio::test]
async fn schema_is_migrated_through_shared_sessions() {
    let (bridge, _pooler) = behind(Mode::Transaction, &[("default_pool_size", "1")]).await;
    for arguments in [&["down"][..], &["up"], &["status"], &["down"], &["up"]] {
        let command = bridge.worker().arg("migrate").args(arguments);
        let finished = command.run(DEADLINE).await;
        assert!(finished.status.success(), "{arguments:?}: {finished:?}");
    }
    deliver_story(&bridge).await;
    bridge.check().await;
}

#[tokio::test]
async fn lock_of_another_session_ends_a_statement_behind_a_pooler() {
    for mode in [Mode::Session, Mode::Transaction] {
        let (bridge, _pooler) = behind(mode, &[]).await;
        let lock = "LOCK TABLE stripe_subscription IN EXCLUSIVE MODE";
        let lock = bridge.database.hold_lock(lock).await;

        deliver_story(&bridge).await;
        bridge.workers[0]
            .wait_for_log("canceling statement due to lock timeout", DEADLINE)
            .await;
        lock.rollback().await.expect("the transaction is open");

        bridge.check().await;
    }
}
