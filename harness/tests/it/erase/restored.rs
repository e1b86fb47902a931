//! What was erased stays erased when the database is replaced: by a backup, or by an empty one.

use litestripe_harness::bridge::{
    Bridge, DatabaseKind, Options, filter_by_subscription, signal_fields,
};
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::Api;
use serde_json::json;

use super::{
    ERASED, KEPT, check_last, command, erase, erased, places, recorded, session, subscription,
    with_key,
};
use crate::orphans::{CREATED, now};

on_both_databases!(backup_from_before_an_erasure_is_erased_again);

/// The tables with personal data.
const TABLES: [&str; 2] = ["stripe_subscription", "orphaned_payment"];

async fn backup_from_before_an_erasure_is_erased_again(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    for (purchase, whom) in [(&user, ERASED), (&other, KEPT)] {
        bridge.deliver(&session(purchase, whom, json!({}))).await;
        bridge
            .deliver(&subscription(purchase, CREATED, whom, 0))
            .await;
    }
    bridge.check().await;
    let kept = places(&bridge, KEPT).await;
    sql(&bridge, |table| {
        format!("CREATE TABLE backup_{table} AS SELECT * FROM {table}")
    })
    .await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    sql(&bridge, |table| format!("DELETE FROM {table}")).await;
    sql(&bridge, |table| {
        format!("INSERT INTO {table} SELECT * FROM backup_{table}")
    })
    .await;
    sql(&bridge, |table| format!("DROP TABLE backup_{table}")).await;
    bridge
        .database
        .query("DELETE FROM litestripe_erasure")
        .await
        .expect("it can be emptied");
    assert!(!places(&bridge, ERASED).await.is_empty());

    bridge.start_worker().wait_until_ready().await;
    bridge.wait_until_applied().await;
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
    assert_eq!(places(&bridge, KEPT).await, kept);
    for id in [&user.customer, &user.subscription, &user.checkout_session] {
        assert!(recorded(&bridge, id).await.is_some(), "{id}");
    }
    assert_eq!(bridge.workers[0].count_in_log("restored from a backup"), 1);
    // The row is signalled as it is now. Its revision is known to the backup, not to the stream.
    let signals = bridge.signals().await;
    let sent = filter_by_subscription(&signals, &user.subscription);
    let row = bridge.row(&user.subscription).await;
    check_last(&sent, &signal_fields(&row));
}

#[tokio::test]
async fn import_into_an_empty_database_knows_what_was_erased() {
    let api = Api::start().await;
    let mut bridge = Bridge::start(with_key(&api)).await;
    let user = Purchase::new(now() - 60);
    let created = subscription(&user, CREATED, ERASED, 0);
    bridge.deliver(&created).await;
    bridge.check().await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    for table in ["litestripe_erasure", "stripe_subscription"] {
        let empty = format!("DELETE FROM {table}");
        bridge
            .database
            .query(&empty)
            .await
            .expect("it can be emptied");
    }
    api.put_event(created.value.clone(), true);
    api.put_subscription(created.value["data"]["object"].clone());

    let summary = erased(&command(&bridge, &["backfill", "--since", "1h", "--json"]).await);
    assert_eq!(summary["published"], 0, "{summary:#}");
    let report = erased(&command(&bridge, &["reconcile", "--repair", "--json"]).await);
    assert_eq!(report["repaired"], 1, "{report:#}");
    let row = bridge.row(&user.subscription).await;
    assert_eq!(
        (row.status.as_deref(), row.subscription_metadata),
        (Some("active"), json!({}))
    );
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
}

#[tokio::test]
async fn erasures_are_copied_again_when_the_stream_lost_them() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    erased(&erase(&bridge, "cus_1", &["--json"]).await);
    assert_eq!(bridge.stored_events().await, 1);
    let purged = bridge.stream("STRIPE_EVENTS").await.purge().await;
    assert_eq!(purged.expect("it can be purged").purged, 1);
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge.start_worker().wait_until_ready().await;
    let worker = bridge.workers.last().expect("it was started");
    worker
        .wait_for_log(
            "stored the erasures of 1 ids again",
            crate::orphans::DEADLINE,
        )
        .await;
    assert_eq!(bridge.stored_events().await, 1);
}

async fn sql(bridge: &Bridge, statement: impl Fn(&str) -> String) {
    for table in TABLES {
        let statement = statement(table);
        let done = bridge.database.query(&statement).await;
        done.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}
