//! A database that answers and refuses: one event at fault does not hold up the others, and one
//! fault of the database does not turn events into dead letters.

use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt as _;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::{Event, Purchase};
use sea_orm::ConnectionTrait as _;
use serde_json::json;

use crate::orphans::{CREATED, now};

on_both_databases!(
    two_refused_events_hold_up_no_other_and_become_dead_letters_at_last,
    a_trigger_that_refuses_everything_makes_no_dead_letters,
    a_lost_table_is_told_by_readiness,
    a_replay_waits_while_the_database_refuses_everything,
);

/// Readiness names a problem after 30 s; the longest pause before the next attempt is 30 s.
const DEADLINE: Duration = Duration::from_secs(180);

/// As many deliveries as make a refused event a dead letter.
const DELIVERIES: i64 = 16;

async fn two_refused_events_hold_up_no_other_and_become_dead_letters_at_last(kind: DatabaseKind) {
    const OTHERS: usize = 60;
    let mut bridge = Bridge::start(Options::new(kind)).await;
    refuse(&bridge, "NEW.status = 'past_due'", "P0001").await;
    let mut events = vec![created("past_due"), created("past_due")];
    events.extend((0..OTHERS).map(|_| created("active")));
    bridge.publish_all(messages(&events)).await;

    until_rows(&bridge, OTHERS).await;
    bridge.wait_until_unacknowledged(2).await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
    let (status, why) = bridge.workers[0].page("/readyz").await.expect("it answers");
    assert_eq!(status, 200, "it does its work: {why}");

    // The tries are counted over all workers and survive a restart.
    bridge.workers.remove(0).stop().await;
    use_up_deliveries(&bridge, 2).await;
    bridge.start_worker();
    // It proves that the database accepts events.
    bridge.deliver(&created("active")).await;
    eventually("two dead letters", DEADLINE, async || {
        match bridge.workers[0].count_in_log("is now a dead letter") {
            2 => Ok(()),
            count => Err(format!("{count}:\n{}", bridge.workers[0].log())),
        }
    })
    .await;
    for letter in bridge.dead_letters().await {
        let reason = &letter.headers["Litestripe-Reason"];
        assert!(reason.contains("no such customer"), "{reason}");
    }
    assert_eq!(bridge.check().await.len(), OTHERS + 1);

    accept(&bridge).await;
    let retried = bridge
        .worker()
        .args(["dead-letters", "retry", "--all"])
        .run(DEADLINE)
        .await;
    assert!(retried.status.success(), "{retried:?}");
    assert_eq!(bridge.check().await.len(), OTHERS + 3);
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

/// The code is one that says that the event's values are impossible.
async fn a_trigger_that_refuses_everything_makes_no_dead_letters(kind: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(kind).worker("LITESTRIPE_BATCH", "20")).await;
    bridge.workers.remove(0).stop().await;
    let events: Vec<_> = (0..60).map(|_| created("active")).collect();
    bridge.publish_all(messages(&events)).await;
    use_up_deliveries(&bridge, 1).await;
    refuse(&bridge, "1 = 1", "22023").await;

    bridge.start_worker();
    let worker = &bridge.workers[0];
    worker
        .wait_for_log("the database refuses all events of a batch", DEADLINE)
        .await;
    until_not_ready(&bridge, "no such customer").await;
    assert_eq!(
        worker.count_in_log("the database refuses"),
        1,
        "{}",
        worker.log()
    );

    accept(&bridge).await;
    assert_eq!(bridge.check().await.len(), events.len());
    assert_eq!(bridge.dead_letters().await.len(), 0);
    worker.wait_until_ready().await;
    assert_eq!(
        worker.count_in_log("the database accepts events again"),
        1,
        "{}",
        worker.log()
    );
}

async fn a_lost_table_is_told_by_readiness(kind: DatabaseKind) {
    let bridge = Bridge::start(Options::new(kind)).await;
    execute(&bridge, "ALTER TABLE stripe_subscription RENAME TO lost").await;
    bridge.deliver(&created("active")).await;
    until_not_ready(&bridge, "stripe_subscription").await;
    let (alive, _) = bridge.workers[0]
        .page("/healthz")
        .await
        .expect("it answers");
    assert_eq!(alive, 200);

    execute(&bridge, "ALTER TABLE lost RENAME TO stripe_subscription").await;
    assert_eq!(bridge.check().await.len(), 1);
    bridge.workers[0].wait_until_ready().await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

async fn a_replay_waits_while_the_database_refuses_everything(kind: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(kind)).await;
    let events: Vec<_> = (0..5).map(|_| created("active")).collect();
    bridge.deliver_all(&events).await;
    bridge.check().await;
    bridge.workers.remove(0).stop().await;
    let lost = bridge.rows().await.remove(0);
    execute(
        &bridge,
        &format!(
            "DELETE FROM stripe_subscription WHERE stripe_subscription_id = '{}'",
            lost.stripe_subscription_id
        ),
    )
    .await;
    refuse(&bridge, "1 = 1", "23514").await;

    let replay = bridge.worker().args(["replay", "--json"]).start();
    replay.wait_for_log("no such customer", DEADLINE).await;
    assert!(replay.is_running(), "{}", replay.log());
    accept(&bridge).await;
    let status = replay.wait(DEADLINE).await;
    assert!(status.success(), "{}", replay.log());
    let row = bridge.row(&lost.stripe_subscription_id).await;
    assert_eq!(row.status, lost.status);
}

fn created(status: &str) -> Event {
    let purchase = Purchase::new(now() - 60);
    purchase.subscription_event(CREATED, now() - 50, json!({ "status": status }))
}

fn messages(events: &[Event]) -> Vec<(String, bytes::Bytes, String)> {
    let message = |event: &Event| {
        (
            event.event_type().to_owned(),
            event.body(),
            event.id().to_owned(),
        )
    };
    events.iter().map(message).collect()
}

/// Makes a trigger that refuses the rows for which `condition` holds. SQLite has no codes of one's
/// own.
async fn refuse(bridge: &Bridge, condition: &str, code: &str) {
    let statements = match bridge.database.process() {
        Some(_) => vec![
            format!(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {condition} THEN \
                 RAISE EXCEPTION 'no such customer' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$"
            ),
            "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON stripe_subscription \
             FOR EACH ROW EXECUTE FUNCTION refuse()"
                .to_owned(),
        ],
        None => vec![format!(
            "CREATE TRIGGER refuse BEFORE INSERT ON stripe_subscription WHEN {condition} \
             BEGIN SELECT RAISE(ABORT, 'no such customer'); END"
        )],
    };
    for statement in statements {
        execute(bridge, &statement).await;
    }
}

async fn accept(bridge: &Bridge) {
    let on = if bridge.database.process().is_some() {
        " ON stripe_subscription"
    } else {
        ""
    };
    execute(bridge, &format!("DROP TRIGGER refuse{on}")).await;
}

async fn execute(bridge: &Bridge, statement: &str) {
    let db = bridge
        .database
        .connection()
        .await
        .expect("the database answers");
    db.execute_unprepared(statement)
        .await
        .expect("it is executed");
}

/// Takes the events as workers would until each of `count` events has been delivered often enough,
/// and hands all of them back.
async fn use_up_deliveries(bridge: &Bridge, count: usize) {
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer: PullConsumer = stream
        .get_consumer(WORKER_CONSUMER)
        .await
        .expect("it exists");
    let mut used_up = std::collections::BTreeSet::new();
    let mut messages = consumer.messages().await.expect("messages can be pulled");
    while used_up.len() < count {
        let message = messages
            .next()
            .await
            .expect("a message comes")
            .expect("it is read");
        let info = message.info().expect("it is of a stream");
        if info.delivered >= DELIVERIES {
            used_up.insert(info.stream_sequence);
        }
        message
            .ack_with(AckKind::Nak(None))
            .await
            .expect("it is sent");
    }
    bridge
        .broker
        .connect()
        .await
        .flush()
        .await
        .expect("the broker answers");
}

async fn until_rows(bridge: &Bridge, count: usize) {
    eventually(
        "the others to be applied",
        DEADLINE,
        async || match bridge.rows().await.len() {
            rows if rows == count => Ok(()),
            rows => Err(format!("{rows} rows")),
        },
    )
    .await;
}

async fn until_not_ready(bridge: &Bridge, reason: &str) {
    eventually("readiness to say why", DEADLINE, async || {
        match bridge.workers[0].page("/readyz").await? {
            (503, why) if why.contains(reason) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}
