//! Rows whose user a rebuild does not find: they are not signalled until the user is known.

use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, Signal, filter_by_subscription};
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::{Value, json};

use super::{DEADLINE, forget_rows, json_of, last_signal, replay, signals_after};
use crate::orphans::{
    COMPLETED, CREATED, UPDATED, apply, make_due, now, questions, until_retried, with,
};

on_both_databases!(
    rebuild_that_lost_the_session_sends_no_signal_without_the_user,
    live_events_and_late_duplicates_do_not_release_a_withheld_row,
    late_session_releases_a_withheld_row_with_its_user,
    operator_releases_a_withheld_row_as_it_is,
    withheld_row_makes_no_orphan_without_a_key,
    row_without_a_session_is_sent_if_the_stream_holds_its_creation,
    reconcile_releases_a_withheld_row_with_the_user_that_it_finds,
    reconcile_that_finds_no_user_releases_a_withheld_row_for_good,
    silent_rebuild_is_sent_after_reconcile,
    reconcile_releases_a_row_during_an_interrupted_replay,
);

/// A bridge whose database was lost, after the session and the creation of a subscription had left
/// the stream: only a later event is left.
struct Rebuilt {
    bridge: Bridge,
    purchase: Purchase,
    /// The last signal before the loss.
    last: u64,
}

impl Rebuilt {
    async fn start(database: DatabaseKind) -> Self {
        let mut bridge = Bridge::start(Options::new(database)).await;
        let purchase = Purchase::new(now() - 600);
        let session = json!({ "client_reference_id": "user_1" });
        let session = purchase.checkout_session_event(COMPLETED, purchase.created, session);
        let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
        apply(&bridge, &session).await;
        apply(&bridge, &created).await;
        purge(&bridge).await;
        let update = json!({ "metadata": { "seats": "2" } });
        let update = purchase.subscription_event(UPDATED, now() - 300, update);
        apply(&bridge, &update).await;
        bridge.check().await;
        let last = last_signal(&bridge).await;
        forget_rows(&mut bridge, database).await;
        Self {
            bridge,
            purchase,
            last,
        }
    }

    /// The signals after the loss. All are about the subscription.
    async fn signals(&self) -> Vec<Signal> {
        self.bridge.wait_until_applied().await;
        let signals = signals_after(&self.bridge, self.last).await;
        let ours = filter_by_subscription(&signals, &self.purchase.subscription);
        assert_eq!(ours.len(), signals.len(), "{signals:#?}");
        signals
    }

    async fn replay(&self) -> Value {
        json_of(&replay(&self.bridge, &["--json"]).await)
    }

    async fn status(&self) -> Value {
        let status = self.bridge.worker().args(["status", "--json"]);
        json_of(&status.run(DEADLINE).await)
    }

    /// Reconciles with a Stripe that has the subscription, and its session if `is_claimed`.
    async fn reconcile(&self, is_claimed: bool, arguments: &[&str]) -> Finished {
        let api = Api::start().await;
        let seats = json!({ "metadata": { "seats": "2" } });
        api.put_subscription(with(self.purchase.subscription(), seats));
        if is_claimed {
            let user = json!({ "client_reference_id": "user_1" });
            api.put_checkout_session(with(self.purchase.checkout_session(), user));
        }
        let command = self.bridge.worker().args(["reconcile"]);
        let command = command.args(arguments.iter().copied());
        let command = command.env("STRIPE_SECRET_KEY", API_KEY);
        command
            .env("STRIPE_API_BASE", api.url())
            .run(DEADLINE)
            .await
    }

    /// Checks that exactly one signal was sent after the loss, of an active row of this user.
    async fn check_is_sent_once(&self, user: &Value) {
        let signals = self.signals().await;
        let [signal] = &signals[..] else {
            panic!("{signals:#?}")
        };
        assert_eq!(signal.body["client_reference_id"], *user);
        assert_eq!(signal.body["access"], "granted");
        assert_eq!(self.status().await["withheld"], 0);
    }

    async fn resend(&self, arguments: &[&str]) -> Value {
        let resend = self.bridge.worker().args(["resend", "--json"]);
        json_of(&resend.args(arguments.iter().copied()).run(DEADLINE).await)
    }
}

async fn rebuild_that_lost_the_session_sends_no_signal_without_the_user(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    let named = json!([rebuilt.purchase.subscription]);
    let summary = rebuilt.replay().await;
    assert_eq!(
        [
            &summary["signals"],
            &summary["withheld"],
            &summary["withheld_first"]
        ],
        [&json!(0), &json!(1), &named]
    );
    let again = replay(&rebuilt.bridge, &[]).await;
    let id = &rebuilt.purchase.subscription;
    let said = format!("1 rows are withheld, because their user is unknown ({id})");
    assert!(again.stdout.contains(&said), "{}", again.stdout);
    assert_eq!(rebuilt.signals().await.len(), 0);
    let row = rebuilt.bridge.row(id).await;
    assert_eq!((row.status.as_deref(), row.revision), (Some("active"), 0));

    let status = rebuilt.status().await;
    assert_eq!(
        [
            &status["withheld"],
            &status["withheld_first"],
            &status["unsent_signals"]
        ],
        [&json!(1), &named, &json!(0)]
    );
    let status = rebuilt.bridge.worker().arg("status").run(DEADLINE).await;
    assert!(status.stdout.contains(&said), "{}", status.stdout);

    let resent = rebuilt.resend(&["--all"]).await;
    assert_eq!(
        [&resent["sent"], &resent["withheld"]],
        [&json!(0), &json!(1)]
    );
    assert_eq!(rebuilt.signals().await.len(), 0);
}

async fn live_events_and_late_duplicates_do_not_release_a_withheld_row(database: DatabaseKind) {
    let mut rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    rebuilt.bridge.start_worker().wait_until_ready().await;
    let purchase = rebuilt.purchase.clone();
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    let changed =
        |at, status: &str| purchase.subscription_event(UPDATED, at, json!({ "status": status }));
    for event in [
        created,
        changed(now() - 60, "past_due"),
        changed(now() - 50, "active"),
        changed(now() - 60, "past_due"),
    ] {
        apply(&rebuilt.bridge, &event).await;
        assert_eq!(rebuilt.signals().await.len(), 0, "{}", event.summary());
    }
    let row = rebuilt.bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("active"), "they change the row");
    // What is newer than the rebuild is signalled as usual.
    let bought = Purchase::new(now());
    apply(
        &rebuilt.bridge,
        &bought.subscription_event(CREATED, bought.created, json!({})),
    )
    .await;
    rebuilt.bridge.wait_until_applied().await;
    let signals = signals_after(&rebuilt.bridge, rebuilt.last).await;
    assert_eq!(signals.len(), 1);
    assert_eq!(
        signals[0].body["stripe_subscription_id"],
        bought.subscription
    );
}

async fn late_session_releases_a_withheld_row_with_its_user(database: DatabaseKind) {
    let mut rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    rebuilt.bridge.start_worker().wait_until_ready().await;
    let session = json!({ "client_reference_id": "user_1" });
    let session = rebuilt
        .purchase
        .checkout_session_event(COMPLETED, now(), session);
    apply(&rebuilt.bridge, &session).await;
    let signals = rebuilt.signals().await;
    let [signal] = &signals[..] else {
        panic!("{signals:#?}")
    };
    assert_eq!(signal.body["client_reference_id"], "user_1");
    assert_eq!(signal.body["access"], "granted");
    assert_eq!(signal.body["previous_revision"], Value::Null);
    assert_eq!(rebuilt.status().await["withheld"], 0);
}

async fn operator_releases_a_withheld_row_as_it_is(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    let id = rebuilt.purchase.subscription.as_str();
    let resent = rebuilt.resend(&["--subscription", id]).await;
    assert_eq!(resent["sent"], 1, "{resent:#}");
    let signals = rebuilt.signals().await;
    assert_eq!(signals.len(), 1);
    assert_eq!(signals[0].body["client_reference_id"], Value::Null);
    assert_eq!(
        signals[0].body["revision"],
        rebuilt.bridge.row(id).await.revision
    );
    assert_eq!(rebuilt.status().await["withheld"], 0);
}

async fn row_without_a_session_is_sent_if_the_stream_holds_its_creation(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 600);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;
    bridge.check().await;
    let last = last_signal(&bridge).await;
    forget_rows(&mut bridge, database).await;
    // Not everything that the stream holds: the session may be among the rest.
    let part = json_of(&replay(&bridge, &["--type", CREATED, "--json"]).await);
    assert_eq!(
        [&part["signals"], &part["withheld"]],
        [&json!(0), &json!(1)]
    );
    let whole = json_of(&replay(&bridge, &["--json"]).await);
    assert_eq!(
        [&whole["signals"], &whole["withheld"]],
        [&json!(1), &json!(0)]
    );
    let signals = signals_after(&bridge, last).await;
    assert_eq!(signals.len(), 1);
    assert_eq!(signals[0].body["client_reference_id"], Value::Null);
}

async fn reconcile_releases_a_withheld_row_with_the_user_that_it_finds(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    let found = rebuilt.reconcile(true, &[]).await;
    assert_eq!(found.status.code(), Some(3), "{found:?}");
    assert!(found.stdout.contains("withheld"), "{found:?}");
    assert_eq!(rebuilt.signals().await.len(), 0);

    let repaired = rebuilt.reconcile(true, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    rebuilt.check_is_sent_once(&json!("user_1")).await;
}

async fn reconcile_that_finds_no_user_releases_a_withheld_row_for_good(database: DatabaseKind) {
    let mut rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    let repaired = rebuilt.reconcile(false, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    rebuilt.check_is_sent_once(&Value::Null).await;
    let again = rebuilt.reconcile(false, &[]).await;
    assert_eq!(again.status.code(), Some(0), "{again:?}");

    // The stream holds that Stripe was searched, so the next rebuild knows it.
    forget_rows(&mut rebuilt.bridge, database).await;
    let summary = rebuilt.replay().await;
    assert_eq!(
        [&summary["signals"], &summary["withheld"]],
        [&json!(1), &json!(0)]
    );
}

async fn silent_rebuild_is_sent_after_reconcile(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    let silent = json_of(&replay(&rebuilt.bridge, &["--signals", "none", "--json"]).await);
    assert_eq!(
        [&silent["signals"], &silent["withheld"]],
        [&json!(0), &json!(1)]
    );
    let repaired = rebuilt.reconcile(true, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    rebuilt.check_is_sent_once(&json!("user_1")).await;
    let resent = rebuilt.resend(&["--all"]).await;
    assert_eq!(
        [&resent["sent"], &resent["withheld"]],
        [&json!(1), &json!(0)]
    );
}

async fn reconcile_releases_a_row_during_an_interrupted_replay(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    // Like a replay that was killed before it decided what to withhold.
    for killed in [
        "UPDATE litestripe_replay SET dt_finished = NULL",
        "UPDATE stripe_subscription SET last_sent = 'null'",
    ] {
        let done = rebuilt.bridge.database.query(killed).await;
        done.expect("it can be written");
    }
    let repaired = rebuilt.reconcile(true, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    rebuilt.check_is_sent_once(&json!("user_1")).await;
}

/// Removes all events from the stream.
async fn purge(bridge: &Bridge) {
    let stream = bridge.stream(EVENTS_STREAM).await;
    stream.purge().await.expect("it can be emptied");
}

async fn withheld_row_makes_no_orphan_without_a_key(database: DatabaseKind) {
    let rebuilt = Rebuilt::start(database).await;
    rebuilt.replay().await;
    let (bridge, purchase) = (&rebuilt.bridge, &rebuilt.purchase);
    let open = [(purchase.subscription.clone(), "grace".to_owned())];
    assert_eq!(questions(bridge).await, open);

    // Its grace period is over.
    make_due(bridge).await;
    let worker = bridge.worker().env("LITESTRIPE_ORPHAN_GRACE", "0s");
    let worker = worker
        .env("LITESTRIPE_WORKER_LISTEN", "127.0.0.1:0")
        .start();
    until_retried(bridge).await;
    assert_eq!(bridge.orphans().await, []);
    assert_eq!(questions(bridge).await, open);

    let user = json!({ "client_reference_id": "user_1" });
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, user);
    bridge.publish(COMPLETED, session.body(), "again").await;
    bridge.wait_until_applied().await;
    assert_eq!(questions(bridge).await, []);
    assert_eq!(bridge.orphans().await, []);
    worker.stop().await;
}
