//! `resend`: current rows are sent again, for a subscriber that is new or was offline for long.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, Signal, filter_by_subscription};
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use serde_json::json;

use crate::orphans::{COMPLETED, CREATED, UPDATED, apply, now};

const COMMAND: Duration = Duration::from_secs(60);

on_both_databases!(
    rows_are_sent_again_with_their_revision,
    rows_never_signalled_get_their_first_revision,
    open_orphans_are_sent_again
);

async fn rows_are_sent_again_with_their_revision(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchases: Vec<_> = (0..1200).map(|_| Purchase::new(now() - 600)).collect();
    let events = purchases
        .iter()
        .map(|purchase| purchase.subscription_event(CREATED, purchase.created, json!({})));
    bridge
        .publish_all(
            events
                .map(|event| crate::any_order::message(&event))
                .collect(),
        )
        .await;
    let before = bridge.check().await.len();
    let rows = bridge.rows().await;
    // The command needs no running worker.
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }

    let one = purchases[0].subscription.as_str();
    let sent = resend(&bridge, &["--subscription", one]).await;
    assert_eq!(
        (sent.status.code(), sent.stdout.trim()),
        (Some(0), "1 rows signalled again"),
        "{}",
        sent.stderr
    );
    // The bridge checks that it is the same row with the same revision.
    let signals = bridge.check().await;
    assert_eq!(signals.len(), before + 1);
    let [first, again] = filter_by_subscription(&signals, one)[..] else {
        panic!("not two signals")
    };
    assert_ne!(
        first.headers["Nats-Msg-Id"], again.headers["Nats-Msg-Id"],
        "JetStream would drop it as a repeat"
    );
    assert_eq!(again.body["event"], first.body["event"]);

    let sent = resend(&bridge, &["--all"]).await;
    assert_eq!(sent.status.code(), Some(0), "{}", sent.stderr);
    assert_eq!(bridge.check().await.len(), before + 1 + purchases.len());
    assert!(bridge.rows().await == rows, "not even a version grew");

    // The next change refers to the revision that was sent again.
    bridge.start_worker().wait_until_ready().await;
    apply(
        &bridge,
        &purchases[0].subscription_event(UPDATED, now(), json!({ "status": "past_due" })),
    )
    .await;
    bridge.check().await;
}

async fn rows_never_signalled_get_their_first_revision(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 600);
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge
        .database
        .query("DELETE FROM stripe_subscription")
        .await
        .expect("it can be emptied");
    let silent = bridge
        .worker()
        .args(["replay", "--signals", "none"])
        .run(Duration::from_secs(60))
        .await;
    assert_eq!(silent.status.code(), Some(0), "{}", silent.stderr);
    assert_eq!(bridge.row(&purchase.subscription).await.revision, 0);
    assert_eq!(resend(&bridge, &["--all"]).await.status.code(), Some(0));
    let signals = bridge.signals().await;
    let revision = bridge.row(&purchase.subscription).await.revision;
    assert!(revision > 0);
    assert_eq!(
        signals.last().expect("there is one").body["revision"],
        revision
    );
}

async fn open_orphans_are_sent_again(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchases: Vec<_> = (0..3).map(|_| Purchase::new(now() - 60)).collect();
    for purchase in &purchases {
        let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
        apply(&bridge, &session).await;
    }
    let [resolved, open @ ..] = &purchases[..] else {
        panic!("there are three")
    };
    let resolve = ["orphans", "resolve", &resolved.subscription];
    let user = ["--client-reference-id", "user_1"];
    let done = bridge.worker().args(resolve).args(user);
    assert_eq!(done.run(COMMAND).await.status.code(), Some(0));
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    let about = |signals: &[Signal], id: &str| {
        let created = signals.iter().filter(|signal| {
            signal.subject == "orphan.created" && signal.body["orphan_id"] == json!(id)
        });
        created
            .map(|signal| signal.body.clone())
            .collect::<Vec<_>>()
    };
    let sent = resend(&bridge, &["--orphans"]).await;
    assert_eq!(
        (sent.status.code(), sent.stdout.trim()),
        (Some(0), "2 orphans signalled again"),
        "{}",
        sent.stderr
    );
    let signals = bridge.signals().await;
    assert_eq!(about(&signals, &resolved.subscription).len(), 1);
    for purchase in open {
        let [first, again] = &about(&signals, &purchase.subscription)[..] else {
            panic!("not two signals")
        };
        for field in ["reason", "stripe_customer_id", "checkout_session_id"] {
            assert_eq!(first[field], again[field]);
        }
        assert_eq!(first["event"]["id"], again["event"]["id"]);
    }
}

#[tokio::test]
async fn unknown_rows_and_invalid_arguments_are_refused() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let unknown = resend(&bridge, &["--subscription", "sub_unknown"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        unknown.stderr.contains("cannot resend sub_unknown"),
        "{}",
        unknown.stderr
    );
    for arguments in [&[][..], &["--all", "--subscription", "sub_1"]] {
        assert_eq!(
            resend(&bridge, arguments).await.status.code(),
            Some(2),
            "{arguments:?}"
        );
    }
    assert_eq!(
        resend(&bridge, &["--all"]).await.stdout.trim(),
        "0 rows signalled again"
    );
}

async fn resend(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("resend")
        .args(arguments)
        .run(Duration::from_secs(60))
        .await
}
