//! Commands that apply events do it by the workers' rules, not by those of the operator's shell.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::json;

use crate::orphans::{CREATED, apply, now};

on_both_databases!(
    commands_that_apply_events_refuse_other_rules_than_the_workers,
    worker_with_other_rules_than_a_running_one_warns
);

const COMMAND: Duration = Duration::from_secs(60);
const KEYS: &str = "LITESTRIPE_METADATA_KEYS";
const LOOKUP: &str = "LITESTRIPE_USER_LOOKUP";

async fn commands_that_apply_events_refuse_other_rules_than_the_workers(database: DatabaseKind) {
    let api = Api::start().await;
    let options = Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker(KEYS, "plan,seats")
        .worker("LITESTRIPE_ORPHAN_GRACE", "1d");
    let mut bridge = Bridge::start(options).await;
    let user = Purchase::new(now() - 60);
    let metadata = json!({ "metadata": { "plan": "A", "note": "PERSONAL" } });
    let created = user.subscription_event(CREATED, user.created, metadata);
    apply(&bridge, &created).await;
    let rows = bridge.rows().await;

    let commands = [
        &["reconcile", "--repair"][..],
        &["replay"],
        &["dead-letters", "retry", "--all"],
    ];
    let secret = "sql:SELECT 1 FROM hunter2 WHERE id = $1";
    // The rules stand after the workers have stopped.
    for are_running in [true, false] {
        if !are_running {
            for worker in bridge.workers.drain(..) {
                worker.stop().await;
            }
        }
        for command in commands {
            let refused = bridge
                .worker()
                .env(KEYS, "*")
                .env(LOOKUP, secret)
                .args(command)
                .run(COMMAND)
                .await;
            assert_eq!(refused.status.code(), Some(2), "{command:?}: {refused:?}");
            let differences = [
                "LITESTRIPE_METADATA_KEYS is * here and plan,seats there",
                "LITESTRIPE_USER_LOOKUP is sql: (hash ",
            ];
            for difference in differences {
                assert!(refused.stderr.contains(difference), "{}", refused.stderr);
            }
            for absent in ["LITESTRIPE_ORPHAN_GRACE", "hunter2"] {
                assert!(!refused.stderr.contains(absent), "{}", refused.stderr);
            }
        }
        assert_eq!(bridge.rows().await, rows);
    }
    let agreed = |finished: &Finished| assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    api.put_subscription(created.value["data"]["object"].clone());
    for command in commands {
        agreed(&bridge.worker().args(command).run(COMMAND).await);
    }
    // What changes nothing, or applies nothing, may differ.
    let other = bridge.worker().env(KEYS, "*");
    agreed(&other.args(["resend", "--all"]).run(COMMAND).await);
}

async fn worker_with_other_rules_than_a_running_one_warns(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    bridge.start_worker().wait_until_ready().await;
    bridge.set_worker(KEYS, "none");
    bridge.start_worker().wait_until_ready().await;
    let warnings = |index: usize| {
        let worker: &litestripe_harness::bridge::Node = &bridge.workers[index];
        worker.count_in_log("another worker applies events by other settings")
    };
    assert_eq!((warnings(0), warnings(1), warnings(2)), (0, 0, 1));
    let log = bridge.workers[2].log();
    assert!(log.contains("is none here and * there"), "{log}");
}
