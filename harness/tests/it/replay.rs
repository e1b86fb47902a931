//! `replay`: events of the stream reapplied to an empty or a current table, during live traffic,
//! and after an interruption.

use std::collections::BTreeMap;
use std::time::Duration;

use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_entity::orphaned_payment;
use litestripe_harness::bridge::{
    Bridge, Database, DatabaseKind, Options, Signal, filter_by_subscription,
};
use litestripe_harness::process::Signal as ProcessSignal;
use litestripe_harness::program::{Finished, Program};
use litestripe_harness::stripe::{Event, Purchase};
use litestripe_harness::{eventually, nats};
use serde_json::{Value, json};

use crate::any_order::history::{self, History};
use crate::any_order::message;
use crate::any_order::random::Random;
use crate::orphans::rebuild::rebuildable;
use crate::orphans::{COMPLETED, CREATED, UPDATED, apply, count_signals, now, orphan};

mod batches;
mod cut_off;
mod lost_rows;
mod selection;
mod upgrade;
mod withheld;

on_both_databases!(
    empty_database_is_rebuilt_and_each_row_is_signalled_once,
    replay_over_a_current_table_changes_and_signals_nothing,
    live_traffic_continues_during_a_replay,
    orphans_are_signalled_in_their_final_state,
    questions_wait_for_the_end_of_a_replay,
    half_built_row_of_a_live_event_is_signalled_at_the_end_of_a_replay,
    replay_without_signals_sends_none,
    replay_without_signals_leaves_unapplied_events_to_the_workers,
    dry_run_reports_changes_and_makes_none,
);

const DEADLINE: Duration = Duration::from_secs(180);

/// The number of subscriptions to rebuild. Each has 20 events, which an unoptimised build applies
/// slowly.
const REBUILT: usize = 1_000;

async fn empty_database_is_rebuilt_and_each_row_is_signalled_once(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let events = publish_many(&bridge, REBUILT).await;
    bridge.wait_until_applied().await;
    let (rows, position) = (bridge.rows().await, position(&bridge).await);
    let revisions: BTreeMap<_, _> = rows
        .iter()
        .map(|row| (row.stripe_subscription_id.clone(), row.revision))
        .collect();
    let last_signal = last_signal(&bridge).await;

    forget_rows(&mut bridge, database).await;
    let replayed = replay(&bridge, &["--json"]).await;
    let summary = json_of(&replayed);
    assert_eq!(
        (&summary["finished"], &summary["poisoned"]),
        (&json!(true), &json!(0)),
        "{summary}"
    );
    assert_eq!(summary["events"].as_u64(), Some(events));

    assert!(
        rebuildable(bridge.rows().await) == rebuildable(rows.clone()),
        "the rows differ from before"
    );
    assert_eq!(
        self::position(&bridge).await,
        position,
        "the workers' consumer was touched"
    );
    let signals = signals_after(&bridge, last_signal).await;
    let changed: Vec<_> = signals
        .iter()
        .filter(|signal| signal.subject == "subscription.changed")
        .collect();
    assert_eq!(changed.len(), rows.len(), "one signal for each row");
    for row in bridge.rows().await {
        let [signal] = filter_by_subscription(&signals, &row.stripe_subscription_id)[..] else {
            panic!("not one signal")
        };
        assert_eq!(signal.body["status"], json!(row.status), "the final state");
        assert_eq!(signal.body["revision"], row.revision);
        assert_eq!(
            (&signal.body["replayed"], &signal.body["previous_revision"]),
            (&json!(true), &Value::Null)
        );
        assert!(
            row.revision > revisions[&row.stripe_subscription_id],
            "subscribers would ignore it"
        );
        assert_eq!(
            signal.body["event"]["id"],
            json!(row.last_event_id),
            "{:#}",
            signal.body
        );
    }
    assert_eq!(count_unsent(&bridge).await, 0);
}

#[tokio::test]
async fn replay_whose_acks_are_dropped_ends_with_the_reason() {
    const ACKS: &str = "$JS.ACK.STRIPE_EVENTS";
    let config = "no_auth_user: all\nauthorization { users: [ { user: all, password: secret }, { user: operator, \
        password: secret, permissions: { publish: { deny: \"$JS.ACK.STRIPE_EVENTS.litestripe-replay.>\" } } } ] }";
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker = nats::Server::prepare(nats::Options {
        config: config.to_owned(),
        ..nats::Options::default()
    })
    .expect("it can be prepared");
    bridge.broker.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    publish(&bridge, &histories(3)).await;
    bridge.wait_until_applied().await;

    let replay = bridge.worker().arg("replay");
    let operator = replay
        .clone()
        .env("NATS_USER", "operator")
        .env("NATS_PASSWORD", "secret");
    let refused = operator.run(DEADLINE).await;
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains(ACKS), "{}", refused.stderr);
    let resumed = replay.run(DEADLINE).await;
    assert_eq!(resumed.status.code(), Some(0), "{}", resumed.stderr);
}

async fn replay_over_a_current_table_changes_and_signals_nothing(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(50)).await;
    let signals = bridge.check().await.len();
    let (rows, orphans) = (bridge.rows().await, bridge.orphans().await);
    for arguments in [&[][..], &["--signals", "none"]] {
        let replayed = replay(&bridge, arguments).await;
        assert_eq!(replayed.status.code(), Some(0), "{}", replayed.stderr);
        assert!(
            replayed.stdout.contains("replayed events 1 to 1000"),
            "{}",
            replayed.stdout
        );
        assert!(
            bridge.rows().await == rows,
            "{arguments:?}: not even a version grew"
        );
        assert!(bridge.orphans().await == orphans);
        assert_eq!(bridge.check().await.len(), signals, "{arguments:?}");
    }
}

async fn live_traffic_continues_during_a_replay(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database).workers(2)).await;
    let mut random = Random::start();
    let (mut past, mut live): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
    for history in histories(200) {
        let mut events = history.events;
        random.shuffle(&mut events);
        live.extend(events.split_off(10));
        past.extend(events);
    }
    bridge.publish_all(past.iter().map(message).collect()).await;
    bridge.wait_until_applied().await;
    forget_rows(&mut bridge, database).await;
    let last_signal = last_signal(&bridge).await;
    // A worker of a new database first sees for two seconds that nobody else consumes.
    for _ in 0..2 {
        bridge.start_worker().wait_until_ready().await;
    }

    // In small batches, while the other half of the events arrives.
    let replay = bridge
        .worker()
        .env("LITESTRIPE_BATCH", "20")
        .args(["replay", "--json"])
        .start();
    for some in live.chunks(100) {
        bridge.publish_all(some.iter().map(message).collect()).await;
    }
    assert_eq!(
        replay.wait(DEADLINE).await.code(),
        Some(0),
        "{}",
        replay.stderr()
    );
    let summary: Value = serde_json::from_str(&replay.stdout()).expect("it prints JSON");
    assert!(
        summary["events"].as_u64() >= Some(past.len() as u64),
        "{summary}"
    );
    bridge.wait_until_applied().await;
    until_all_signals_are_sent(&bridge).await;
    bridge.wait_until_applied().await;

    // The expected rows: one worker applies each event once.
    let once = Bridge::start(Options::new(database)).await;
    once.publish_all(past.iter().chain(&live).map(message).collect())
        .await;
    once.check().await;
    assert!(
        rebuildable(bridge.rows().await) == rebuildable(once.rows().await),
        "the rows differ"
    );
    let signals = signals_after(&bridge, last_signal).await;
    let rows = bridge.rows().await;
    for row in &rows {
        let sent = filter_by_subscription(&signals, &row.stripe_subscription_id);
        let mut before = Value::Null;
        for signal in &sent {
            assert_eq!(
                signal.body["previous_revision"], before,
                "a signal is missing or repeated"
            );
            before = signal.body["revision"].clone();
        }
        let last = sent.last().expect("every row is signalled");
        assert_eq!(last.body["revision"], row.revision);
        assert_eq!(last.body["status"], json!(row.status));
        assert_eq!(
            last.body["client_reference_id"],
            json!(row.client_reference_id)
        );
    }
}

async fn orphans_are_signalled_in_their_final_state(database: DatabaseKind) {
    let mut bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1h")).await;
    let (open, resolved) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    for purchase in [&open, &resolved] {
        apply(
            &bridge,
            &purchase.checkout_session_event(COMPLETED, purchase.created, json!({})),
        )
        .await;
    }
    let late = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &resolved.checkout_session_event(COMPLETED, now(), late),
    )
    .await;
    bridge.check().await;
    let last_signal = last_signal(&bridge).await;

    forget_rows(&mut bridge, database).await;
    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    let signals = signals_after(&bridge, last_signal).await;
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (0, 0),
        "dropped as repeats"
    );
    // Within the duplicate window JetStream drops repeated signals, so only the tables
    // can be checked.
    assert!(
        orphan(&bridge, &open.subscription)
            .await
            .resolved_at
            .is_none()
    );
    let is_open = |orphan: &orphaned_payment::Model| {
        orphan.id == resolved.subscription && orphan.resolved_at.is_none()
    };
    assert!(!bridge.orphans().await.iter().any(is_open));
    assert_eq!(count_unsent(&bridge).await, 0);

    // A new stream knows no message ids, and so shows that exactly one signal is sent.
    forget_rows(&mut bridge, database).await;
    bridge
        .jetstream()
        .await
        .delete_stream("LITESTRIPE_SIGNALS")
        .await
        .expect("it can be deleted");
    bridge.start_worker().wait_until_ready().await;
    eventually(
        "the stream of signals to be created again",
        DEADLINE,
        async || {
            bridge
                .jetstream()
                .await
                .get_stream("LITESTRIPE_SIGNALS")
                .await
                .map(|_| ())
                .map_err(|error| error.to_string())
        },
    )
    .await;
    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    bridge.wait_until_applied().await;
    let signals = bridge.signals().await;
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 0)
    );
    let created = signals
        .iter()
        .find(|signal| signal.subject == "orphan.created")
        .expect("it was counted");
    assert_eq!(created.body["orphan_id"], open.subscription.as_str());
}

async fn questions_wait_for_the_end_of_a_replay(database: DatabaseKind) {
    let options = Options::new(database)
        .workers(0)
        .worker("LITESTRIPE_ORPHAN_GRACE", "1s");
    let mut bridge = Bridge::start(options).await;
    bridge.start_worker().wait_until_ready().await;
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    let session = json!({ "client_reference_id": "user_1" });
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, session);
    bridge.deliver_all(&[created, session]).await;
    bridge.check().await;

    // A replay that applied the creation and died before the session. By the database alone the
    // grace period is over.
    forget_rows(&mut bridge, database).await;
    assert_eq!(
        replay(&bridge, &["--until", "1"]).await.status.code(),
        Some(0)
    );
    let unfinished = "UPDATE litestripe_replay SET dt_finished = NULL, last_sequence = 2";
    bridge
        .database
        .query(unfinished)
        .await
        .expect("it can be written");
    cut_off::set_last_heartbeat(&bridge, 60).await;
    bridge.start_worker().wait_until_ready().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(
        bridge.orphans().await,
        [],
        "a payment with a session in the stream became an orphan"
    );

    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    bridge.wait_until_applied().await;
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("user_1")
    );
    crate::orphans::until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
}

async fn half_built_row_of_a_live_event_is_signalled_at_the_end_of_a_replay(
    database: DatabaseKind,
) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (first, known) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    let user = |paid: &str| json!({ "client_reference_id": "user_1", "payment_status": paid });
    for purchase in [&first, &known] {
        apply(
            &bridge,
            &purchase.subscription_event(CREATED, purchase.created, json!({})),
        )
        .await;
    }
    apply(
        &bridge,
        &known.checkout_session_event(COMPLETED, known.created, user("unpaid")),
    )
    .await;
    bridge.check().await;
    let last_signal = last_signal(&bridge).await;

    // The database as after a replay that has applied the first of three events.
    forget_rows(&mut bridge, database).await;
    assert_eq!(
        replay(&bridge, &["--until", "1"]).await.status.code(),
        Some(0)
    );
    let unfinished = "UPDATE litestripe_replay SET dt_finished = NULL, last_sequence = 3";
    bridge
        .database
        .query(unfinished)
        .await
        .expect("it can be written");
    bridge.start_worker().wait_until_ready().await;
    let paid = known.checkout_session_event(
        "checkout.session.async_payment_succeeded",
        now(),
        user("paid"),
    );
    apply(&bridge, &paid).await;
    apply(
        &bridge,
        &known.checkout_session_event(COMPLETED, now(), user("paid")),
    )
    .await;
    let bought = Purchase::new(now() + 5);
    apply(
        &bridge,
        &bought.subscription_event(CREATED, bought.created, json!({})),
    )
    .await;
    let of_known = async || {
        filter_by_subscription(
            &signals_after(&bridge, last_signal).await,
            &known.subscription,
        )
        .len()
    };
    assert_eq!(bridge.row(&known.subscription).await.status, None);
    assert_eq!(of_known().await, 0, "a paying customer would lose access");
    // Another row: two live events, and a late duplicate of the first, bring its status, but not
    // its user.
    let unclaimed = Purchase::new(now() - 600);
    for (at, status) in [(-60, "active"), (-50, "past_due"), (-60, "active")] {
        let change = json!({ "status": status });
        let event = unclaimed.subscription_event(UPDATED, now() + at, change);
        apply(&bridge, &event).await;
        let signals = signals_after(&bridge, last_signal).await;
        let sent = filter_by_subscription(&signals, &unclaimed.subscription);
        assert_eq!(sent.len(), 0, "{status}: its user is unknown");
    }
    let signals = signals_after(&bridge, last_signal).await;
    assert_eq!(
        filter_by_subscription(&signals, &bought.subscription).len(),
        1,
        "a row of new events is signalled at once"
    );

    cut_off::set_last_heartbeat(&bridge, 60).await;
    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last_signal).await;
    let [signal] = filter_by_subscription(&signals, &known.subscription)[..] else {
        panic!("not one: {signals:#?}")
    };
    assert_eq!(
        (&signal.body["access"], &signal.body["replayed"]),
        (&json!("granted"), &json!(true))
    );
    assert_eq!(signal.body["client_reference_id"], "user_1");
    assert_eq!(count_unsent(&bridge).await, 0);
    assert_eq!(
        filter_by_subscription(&signals, &unclaimed.subscription).len(),
        0,
        "the stream does not hold its creation"
    );
}

async fn replay_without_signals_sends_none(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(30)).await;
    bridge.check().await;
    let (rows, last_signal) = (bridge.rows().await, last_signal(&bridge).await);
    forget_rows(&mut bridge, database).await;
    assert_eq!(
        replay(&bridge, &["--signals", "none"]).await.status.code(),
        Some(0)
    );
    assert!(rebuildable(bridge.rows().await) == rebuildable(rows));
    assert_eq!(signals_after(&bridge, last_signal).await.len(), 0);
}

async fn replay_without_signals_leaves_unapplied_events_to_the_workers(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 600);
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    bridge.workers.pop().expect("there is one").stop().await;
    let backup = "CREATE TABLE backup AS SELECT * FROM stripe_subscription";
    bridge.database.query(backup).await.expect("it can be made");
    let canceled =
        purchase.subscription_event(UPDATED, now() - 60, json!({ "status": "canceled" }));
    bridge
        .publish(UPDATED, canceled.body(), canceled.id())
        .await;

    let silent = ["--signals", "none"];
    let summary = json_of(&replay(&bridge, &[&silent[..], &["--json"]].concat()).await);
    assert_eq!(
        (&summary["last_sequence"], &summary["events"]),
        (&json!(1), &json!(1)),
        "{summary}"
    );
    let nothing = replay(&bridge, &[&silent[..], &["--from-sequence", "2"]].concat()).await;
    assert!(
        nothing
            .stdout
            .contains("no such event that is already applied"),
        "{}",
        nothing.stdout
    );
    bridge.start_worker().wait_until_ready().await;
    let sent = bridge.check().await;
    assert_eq!(
        sent.last().expect("there is one").body["status"],
        "canceled"
    );

    // A row that was restored from an older backup changes silently, and can still be sent again.
    bridge.workers.pop().expect("there is one").stop().await;
    for restore in [
        "DELETE FROM stripe_subscription",
        "INSERT INTO stripe_subscription SELECT * FROM backup",
    ] {
        bridge
            .database
            .query(restore)
            .await
            .expect("it can be restored");
    }
    assert_eq!(replay(&bridge, &silent).await.status.code(), Some(0));
    let row = bridge.row(&purchase.subscription).await;
    let highest = sent
        .iter()
        .filter_map(|signal| signal.body["revision"].as_i64())
        .max();
    assert_eq!(row.status.as_deref(), Some("canceled"));
    assert!(Some(row.revision) > highest, "subscribers would ignore it");
    assert_eq!(bridge.signals().await.len(), sent.len());
    let resent = bridge
        .worker()
        .args(["resend", "--all"])
        .run(DEADLINE)
        .await;
    assert_eq!(resent.status.code(), Some(0), "{}", resent.stderr);
    let last = bridge.signals().await.pop().expect("there is one");
    assert_eq!(
        (&last.body["status"], &last.body["revision"]),
        (&json!("canceled"), &json!(row.revision))
    );
}

async fn dry_run_reports_changes_and_makes_none(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (known, lost) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    for purchase in [&known, &lost] {
        bridge
            .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
            .await;
    }
    let orphan = Purchase::new(now() - 60);
    bridge
        .deliver(&orphan.checkout_session_event(COMPLETED, orphan.created, json!({})))
        .await;
    bridge.check().await;
    let dry = json_of(&replay(&bridge, &["--dry-run", "--json"]).await);
    assert_eq!(
        (&dry["rows"], &dry["orphans"]),
        (&json!([]), &json!([])),
        "no changes"
    );

    let last_signal = last_signal(&bridge).await;
    forget_rows(&mut bridge, database).await;
    assert_eq!(
        replay(&bridge, &["--until", "1"]).await.status.code(),
        Some(0),
        "one row exists"
    );
    let sent = signals_after(&bridge, last_signal).await.len();
    let change =
        known.subscription_event(UPDATED, known.created + 5, json!({ "status": "past_due" }));
    bridge.publish(UPDATED, change.body(), change.id()).await;
    let dump = bridge.database.dump().await.expect("the database answers");
    let dry = json_of(&replay(&bridge, &["--dry-run", "--json"]).await);
    let rows = dry["rows"].as_array().expect("it lists rows");
    assert_eq!(rows.len(), 3, "{dry:#}");
    for row in rows {
        let is_known = row["stripe_subscription_id"] == known.subscription.as_str();
        assert_eq!(row["new"], !is_known, "{row}");
        if is_known {
            let changed: Vec<_> = row["changed"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            assert!(changed.contains(&"status"), "{row}");
        }
    }
    assert_eq!(dry["orphans"], json!([orphan.subscription]));
    let table = replay(&bridge, &["--dry-run"]).await;
    assert!(
        table
            .stdout
            .contains("would create 2 rows, change 1, and create 1 orphans"),
        "{}",
        table.stdout
    );
    assert_eq!(
        bridge.database.dump().await.expect("the database answers"),
        dump,
        "nothing is written"
    );
    assert_eq!(signals_after(&bridge, last_signal).await.len(), sent);
    let consumers = bridge.stream(EVENTS_STREAM).await;
    assert_eq!(
        consumers.cached_info().state.consumer_count,
        1,
        "only the workers' consumer is left"
    );
}

fn histories(subscriptions: usize) -> Vec<History> {
    let mut random = Random::start();
    (0..subscriptions)
        .map(|_| history::generate(&mut random, now() - 600 * 86_400, 20))
        .collect()
}

/// Publishes the events of `subscriptions` histories in the order of their times, and returns their
/// count. Keeps only bodies: as values they would take gigabytes.
async fn publish_many(bridge: &Bridge, subscriptions: usize) -> u64 {
    let mut random = Random::start();
    let mut events = Vec::new();
    for _ in 0..subscriptions {
        let history = history::generate(&mut random, now() - 600 * 86_400, 20);
        events.extend(
            history
                .events
                .iter()
                .map(|event| (event.created(), message(event))),
        );
    }
    events.sort_by_key(|(created, _)| *created);
    let count = events.len() as u64;
    bridge
        .publish_all(events.into_iter().map(|(_, message)| message).collect())
        .await;
    count
}

async fn publish(bridge: &Bridge, histories: &[History]) {
    // In the order of their times, so that a rebuild passes through every earlier state.
    let mut events: Vec<&Event> = histories
        .iter()
        .flat_map(|history| &history.events)
        .collect();
    events.sort_by_key(|event| event.created());
    bridge
        .publish_all(events.into_iter().map(message).collect())
        .await;
}

/// Stops the workers and replaces their database by an empty one. The stream stays.
async fn forget_rows(bridge: &mut Bridge, database: DatabaseKind) {
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge.database = Database::prepare(database);
    bridge.database.resume().await;
}

async fn replay(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("replay")
        .args(arguments)
        .run(DEADLINE)
        .await
}

fn json_of(finished: &Finished) -> Value {
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    serde_json::from_str(&finished.stdout).expect("it prints JSON")
}

/// The position of the workers' consumer: delivered and ack floor.
async fn position(bridge: &Bridge) -> (u64, u64) {
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer = stream
        .consumer_info(WORKER_CONSUMER)
        .await
        .expect("the consumer exists");
    (
        consumer.delivered.stream_sequence,
        consumer.ack_floor.stream_sequence,
    )
}

async fn last_signal(bridge: &Bridge) -> u64 {
    bridge
        .signals()
        .await
        .last()
        .map_or(0, |signal| signal.sequence)
}

async fn signals_after(bridge: &Bridge, sequence: u64) -> Vec<Signal> {
    bridge
        .signals()
        .await
        .into_iter()
        .filter(|signal| signal.sequence > sequence)
        .collect()
}

const UNSENT: &str = "SELECT stripe_subscription_id AS id FROM stripe_subscription \
    WHERE last_sent NOT IN ('\"withheld\"', '\"silent\"') UNION ALL \
    SELECT id FROM orphaned_payment WHERE unsent_event IS NOT NULL";

/// Counts the unsent signals that wait for the end of a replay.
async fn count_unsent(bridge: &Bridge) -> usize {
    bridge
        .database
        .query(UNSENT)
        .await
        .expect("the database answers")
        .len()
}

async fn until_all_signals_are_sent(bridge: &Bridge) {
    eventually(
        "all unsent signals to be sent",
        DEADLINE,
        async || match count_unsent(bridge).await {
            0 => Ok(()),
            unsent => Err(format!("{unsent} signals are unsent")),
        },
    )
    .await;
}

/// Starts a replay and kills it once ten signals are unsent.
async fn cut_off(bridge: &Bridge, arguments: &[&str]) {
    let launch = bridge
        .worker()
        .env("LITESTRIPE_BATCH", "1")
        .arg("replay")
        .args(arguments);
    let replay: Program = launch.start();
    eventually(
        "a replay to have unsent signals",
        DEADLINE,
        async || match count_unsent_if_migrated(bridge).await {
            0..10 => Err("too few".to_owned()),
            _ => Ok(()),
        },
    )
    .await;
    replay.signal(ProcessSignal::Kill);
    replay.wait(DEADLINE).await;
    bridge.database.until_workers_are_idle().await;
}

async fn count_unsent_if_migrated(bridge: &Bridge) -> usize {
    bridge
        .database
        .query(UNSENT)
        .await
        .map_or(0, |rows| rows.len())
}
