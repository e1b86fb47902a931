//! The table is empty although events have been applied: the worker treats it as an unfinished
//! rebuild, whatever the cause.

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, filter_by_subscription};
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};

use super::{DEADLINE, forget_rows, json_of, last_signal, replay, signals_after};
use crate::metrics::until_shown;
use crate::orphans::{COMPLETED, CREATED, UPDATED, apply, now};

on_both_databases!(
    empty_table_beside_a_used_consumer_is_a_rebuild,
    silent_replay_ends_the_rebuild_and_resend_sends_its_rows,
    database_that_begins_with_the_stream_is_no_rebuild,
);

/// The worker's warning at its start.
const WARNING: &str = "the table stripe_subscription was found empty";

async fn empty_table_beside_a_used_consumer_is_a_rebuild(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (known, other) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    buy(&bridge, &known).await;
    buy(&bridge, &other).await;
    bridge.check().await;
    assert_eq!(bridge.workers[0].count_in_log(WARNING), 0);
    let last = last_signal(&bridge).await;
    lose(&mut bridge, database).await;

    // Workers of the same database warn at every start.
    for _ in 0..2 {
        let worker = bridge.start_worker();
        worker.wait_until_ready().await;
        assert_eq!(worker.count_in_log(WARNING), 1, "{}", worker.log());
        assert!(worker.log().contains("replay --signals none"));
    }
    let status = status(&bridge).await;
    assert_eq!(status["replay"]["rows_lost"], true, "{status:#}");
    assert_eq!(status["replay"]["running"], false, "{status:#}");

    // Two live events and a late duplicate of an old one.
    let changed =
        |at, status: &str| known.subscription_event(UPDATED, at, json!({ "status": status }));
    let created = known.subscription_event(CREATED, known.created, json!({}));
    for event in [
        changed(now() - 60, "past_due"),
        changed(now(), "active"),
        created,
    ] {
        apply(&bridge, &event).await;
        bridge.wait_until_applied().await;
        let sent = signals_after(&bridge, last).await;
        assert_eq!(sent.len(), 0, "{}: {sent:#?}", event.summary());
    }
    let untold = |rows, replays| {
        [
            ("litestripe_worker_withheld_rows", rows),
            ("litestripe_worker_unfinished_replays", replays),
        ]
    };
    until_shown(&bridge.workers[0], &untold(1.0, 1.0)).await;
    // What is newer than the rebuild is signalled as usual.
    let bought = Purchase::new(now() + 1);
    apply(
        &bridge,
        &bought.subscription_event(CREATED, bought.created, json!({})),
    )
    .await;
    bridge.wait_until_applied().await;
    assert_eq!(signals_after(&bridge, last).await.len(), 1);

    let summary = json_of(&replay(&bridge, &["--json"]).await);
    assert_eq!(summary["withheld"], 0, "{summary:#}");
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    for purchase in [&known, &other] {
        let [sent] = filter_by_subscription(&signals, &purchase.subscription)[..] else {
            panic!("{signals:#?}")
        };
        assert_eq!(sent.body["client_reference_id"], "user_1");
        assert_eq!(sent.body["access"], "granted");
    }
    assert_eq!(self::status(&bridge).await["replay"], Value::Null);
    until_shown(&bridge.workers[0], &untold(0.0, 0.0)).await;
    let worker = bridge.start_worker();
    worker.wait_until_ready().await;
    assert_eq!(worker.count_in_log(WARNING), 0, "it is over");
}

async fn silent_replay_ends_the_rebuild_and_resend_sends_its_rows(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 600);
    buy(&bridge, &purchase).await;
    bridge.check().await;
    let last = last_signal(&bridge).await;
    lose(&mut bridge, database).await;
    bridge.start_worker().wait_until_ready().await;

    let silent = json_of(&replay(&bridge, &["--signals", "none", "--json"]).await);
    assert_eq!(
        [&silent["finished"], &silent["events"], &silent["signals"]],
        [&json!(true), &json!(2), &json!(0)]
    );
    assert_eq!(status(&bridge).await["replay"], Value::Null);
    assert_eq!(signals_after(&bridge, last).await.len(), 0);
    let resend = bridge.worker().args(["resend", "--all", "--json"]);
    assert_eq!(json_of(&resend.run(DEADLINE).await)["sent"], 1);
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    assert_eq!(signals.len(), 1);
    assert_eq!(signals[0].body["client_reference_id"], "user_1");
}

async fn database_that_begins_with_the_stream_is_no_rebuild(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    // A shop that has sold no subscription yet: its events make no rows.
    let once = Purchase::new(now() - 600);
    let payment = json!({ "mode": "payment", "subscription": null, "client_reference_id": "u" });
    apply(
        &bridge,
        &once.checkout_session_event(COMPLETED, once.created, payment),
    )
    .await;
    bridge.workers.pop().expect("there is one").stop().await;
    let worker = bridge.start_worker();
    worker.wait_until_ready().await;
    assert_eq!(worker.count_in_log(WARNING), 0, "{}", worker.log());
    assert_eq!(status(&bridge).await["replay"], Value::Null);
    let old = Purchase::new(now() - 600);
    let created = old.subscription_event(CREATED, old.created, json!({}));
    apply(&bridge, &created).await;
    assert_eq!(bridge.check().await.len(), 1, "it is signalled as usual");
}

async fn buy(bridge: &Bridge, purchase: &Purchase) {
    let user = json!({ "client_reference_id": "user_1" });
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, user);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(bridge, &session).await;
    apply(bridge, &created).await;
}

/// Deletes the SQLite file, or sets `DATABASE_URL` to a new PostgreSQL database.
async fn lose(bridge: &mut Bridge, database: DatabaseKind) {
    if bridge.database.folder().is_none() {
        return forget_rows(bridge, database).await;
    }
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    let folder = bridge.database.folder().expect("it is SQLite").to_owned();
    for file in std::fs::read_dir(folder).expect("it can be listed") {
        let file = file.expect("it can be listed").path();
        std::fs::remove_file(file).expect("it can be deleted");
    }
    bridge.database.reopen().await;
}

async fn status(bridge: &Bridge) -> Value {
    let status = bridge.worker().args(["status", "--json"]);
    json_of(&status.run(DEADLINE).await)
}
