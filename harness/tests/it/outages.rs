//! Broker, database or worker is down: nothing is lost, nothing becomes a dead letter, and one log
//! line says so.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream;
use bytes::Bytes;
use futures_util::StreamExt as _;
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, lock_row_sql};
use litestripe_harness::process::Signal;
use litestripe_harness::stripe::{self, Event, Purchase};
use litestripe_harness::{eventually, nats};
use serde_json::json;
use time::OffsetDateTime;

use crate::metrics::until_shown;

const DEADLINE: Duration = Duration::from_secs(60);
const CREATED: &str = "customer.subscription.created";
const UPDATED: &str = "customer.subscription.updated";

#[tokio::test]
async fn command_ends_with_the_reason_if_nats_refuses() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.database.resume().await;
    let broker = nats::Server::start_with(nats::Options {
        config: "authorization: { user: app, password: secret }".to_owned(),
        user: Some(("app".to_owned(), "secret".to_owned())),
        ..nats::Options::default()
    })
    .await;
    let other_protocol = format!("nats://127.0.0.1:{}", bridge.database.server().port());
    for (url, reason) in [
        (broker.url(), "authorization violation"),
        (other_protocol, "no answer"),
    ] {
        let command = bridge.worker().env("NATS_URL", &url);
        let finished = command.args(["dead-letters", "list"]).run(DEADLINE).await;
        let text = &finished.stderr;
        assert_eq!(finished.status.code(), Some(1), "{url}: {text}");
        assert!(text.contains(&format!("within 5 s ({reason}")), "{text}");
    }
}

#[tokio::test]
async fn worker_waits_for_an_unavailable_broker_and_logs_it_once() {
    // The library logs each attempt to connect, so that the test sees several fail.
    let options = Options::new(DatabaseKind::Sqlite).worker("RUST_LOG", "info,async_nats=debug");
    let mut bridge = Bridge::prepare(options);
    bridge.start_worker();
    let worker = &bridge.workers[0];
    eventually(
        "several attempts to connect",
        DEADLINE,
        async || match worker.count_in_log("connecting to server") {
            attempts if attempts >= 6 => Ok(()),
            attempts => Err(format!("{attempts} of them:\n{}", worker.log())),
        },
    )
    .await;
    worker.wait_for_log("waiting for NATS", DEADLINE).await;
    let alive = worker.page("/healthz").await.expect("it answers");
    assert_eq!(alive.0, 200);
    let (status, why) = worker.page("/readyz").await.expect("it answers");
    assert_eq!((status, why.contains("NATS")), (503, true), "{why}");

    bridge.broker.resume().await;

    worker.wait_until_ready().await;
    assert_eq!(
        worker.count_in_log("waiting for NATS"),
        1,
        "{}",
        worker.log()
    );
    assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
    bridge.start_ingress().wait_until_ready().await;
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    bridge.check().await;
}

#[tokio::test]
async fn worker_waits_for_an_unavailable_postgres_and_logs_it_once() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.broker.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker();
    bridge.workers[0]
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    let (status, why) = bridge.workers[0].page("/readyz").await.expect("it answers");
    assert_eq!((status, why.contains("database")), (503, true), "{why}");
    // The figures of the tables are unknown, those of the streams are not.
    let figures = [
        ("litestripe_worker_outbox_signals", f64::NAN),
        (
            "litestripe_worker_stream_bytes{stream=\"STRIPE_EVENTS\"}",
            0.0,
        ),
    ];
    until_shown(&bridge.workers[0], &figures).await;
    // Ingress accepts deliveries as usual.
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;

    bridge.database.resume().await;

    bridge.workers[0].wait_until_ready().await;
    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 2);
    let worker = &bridge.workers[0];
    assert_eq!(
        worker.count_in_log("waiting for the database"),
        1,
        "{}",
        worker.log()
    );
    assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
}

#[tokio::test]
async fn killing_postgres_during_traffic_loses_no_event() {
    let options = Options::new(DatabaseKind::Postgres).worker("LITESTRIPE_BATCH", "20");
    let mut bridge = Bridge::start(options).await;
    let (events, ids) = traffic(40, 10);
    let (before, after) = events.split_at(200);
    bridge.publish_all(messages(before)).await;
    until_rows(&bridge, 5).await;

    bridge.database.kill().await;
    bridge.publish_all(messages(after)).await;
    bridge.workers[0]
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    bridge.database.resume().await;

    bridge.check().await;
    check_last_quantities(&bridge, &ids, 10).await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
    let worker = &bridge.workers[0];
    assert_eq!(
        worker.count_in_log("waiting for the database"),
        1,
        "{}",
        worker.log()
    );
    assert_eq!(
        worker.count_in_log("the database is back"),
        1,
        "{}",
        worker.log()
    );
    assert!(
        worker.count_in_log("signals wait in the outbox") <= 1,
        "{}",
        worker.log()
    );
    assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
}

#[tokio::test]
async fn killing_the_broker_during_traffic_loses_no_event() {
    let mut bridge = Bridge::start(
        Options::new(DatabaseKind::Sqlite)
            .workers(0)
            .worker("LITESTRIPE_BATCH", "20"),
    )
    .await;
    create_consumer_with_short_ack_wait(&bridge).await;
    bridge.start_worker();
    let (events, ids) = traffic(40, 10);
    let (before, after) = events.split_at(200);
    bridge.publish_all(messages(before)).await;
    until_rows(&bridge, 5).await;

    bridge.broker.kill().await;
    bridge.workers[0]
        .wait_for_log("connection to NATS lost", DEADLINE)
        .await;
    bridge.broker.resume().await;
    bridge.ingress().wait_until_ready().await;
    bridge.deliver_all(after).await;

    bridge.check().await;
    check_last_quantities(&bridge, &ids, 10).await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
    let worker = &bridge.workers[0];
    assert_eq!(
        worker.count_in_log("connection to NATS lost"),
        1,
        "{}",
        worker.log()
    );
    assert!(
        worker.count_in_log("signals wait in the outbox") <= 1,
        "{}",
        worker.log()
    );
    assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
}

#[tokio::test]
async fn next_worker_on_sqlite_continues_after_a_killed_one() {
    next_worker_continues_after_a_killed_one(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn next_worker_on_postgres_continues_after_a_killed_one() {
    next_worker_continues_after_a_killed_one(DatabaseKind::Postgres).await;
}

async fn next_worker_continues_after_a_killed_one(database: DatabaseKind) {
    let mut bridge = Bridge::start(
        Options::new(database)
            .workers(0)
            .worker("LITESTRIPE_BATCH", "50"),
    )
    .await;
    create_consumer_with_short_ack_wait(&bridge).await;
    let (events, ids) = traffic(100, 20);
    // The worker is killed before it has seen all events, however fast it is.
    let (most, last) = events.split_at(1900);
    bridge.publish_all(messages(most)).await;
    bridge.start_worker();
    until_rows(&bridge, 10).await;
    bridge.workers[0].kill().await;
    bridge.publish_all(messages(last)).await;

    bridge.start_worker();

    bridge.check().await;
    check_last_quantities(&bridge, &ids, 20).await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

#[tokio::test]
async fn second_worker_finishes_the_work_of_a_killed_one() {
    let options = Options::new(DatabaseKind::Postgres)
        .workers(0)
        .worker("LITESTRIPE_BATCH", "50");
    let mut bridge = Bridge::start(options).await;
    create_consumer_with_short_ack_wait(&bridge).await;
    bridge.start_worker();
    bridge.start_worker();
    for worker in &bridge.workers {
        worker.wait_until_ready().await;
    }
    let (events, ids) = traffic(100, 20);
    let (most, last) = events.split_at(1900);
    bridge.publish_all(messages(most)).await;
    until_rows(&bridge, 10).await;
    bridge.workers[0].kill().await;
    bridge.publish_all(messages(last)).await;

    bridge.check().await;
    check_last_quantities(&bridge, &ids, 20).await;
    let survivor = &bridge.workers[1];
    assert_eq!(survivor.count_in_log("ERROR"), 0, "{}", survivor.log());
}

#[tokio::test]
async fn stopped_worker_hands_back_messages_it_could_not_apply() {
    // The consumer is as in production: messages that are not handed back are redelivered after a
    // minute.
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    bridge.database.kill().await;
    let (events, ids) = traffic(10, 10);
    bridge.publish_all(messages(&events)).await;
    bridge.workers[0]
        .wait_for_log("waiting for the database", DEADLINE)
        .await;

    let stopped = bridge.workers.remove(0);
    stopped.signal(Signal::Term);
    let status = stopped.wait(DEADLINE).await;
    assert!(status.success(), "{status}: {}", stopped.log());
    bridge.database.resume().await;
    bridge.start_worker().wait_until_ready().await;

    eventually(
        "messages that were handed back to be applied",
        Duration::from_secs(30),
        async || match bridge
            .rows()
            .await
            .iter()
            .filter(|row| row.items[0]["quantity"] == 10)
            .count()
        {
            10 => Ok(()),
            count => Err(format!(
                "{count} of 10 subscriptions are at their last event"
            )),
        },
    )
    .await;
    bridge.check().await;
    check_last_quantities(&bridge, &ids, 10).await;
}

#[tokio::test]
async fn worker_stopped_during_traffic_hands_back_fetched_messages_and_the_next_continues() {
    let mut bridge = Bridge::start(
        Options::new(DatabaseKind::Sqlite)
            .workers(0)
            .worker("LITESTRIPE_BATCH", "20"),
    )
    .await;
    let (events, ids) = traffic(100, 20);
    let (most, last) = events.split_at(1900);
    bridge.publish_all(messages(most)).await;
    bridge.start_worker();
    until_rows(&bridge, 10).await;
    let status = bridge.workers[0].stop().await;
    let log = bridge.workers[0].log();
    let handed_back = log
        .split_once("handed back ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    // Only the messages that were requested, not all that wait in the stream.
    assert!(
        status.success() && handed_back.is_some_and(|count: u32| (1..=40).contains(&count)),
        "{status}: {log}"
    );
    bridge.publish_all(messages(last)).await;
    bridge.start_worker();

    check_that_all_was_handed_back(&bridge, &log).await;
    bridge.check().await;
    check_last_quantities(&bridge, &ids, 20).await;
}

#[tokio::test]
async fn stopped_worker_hands_back_messages_in_flight_to_it() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let (events, ids) = traffic(50, 10);
    for events in events.chunks(50) {
        bridge.publish_all(messages(events)).await;
        let stopped = bridge.workers.remove(0);
        let status = stopped.stop().await;
        assert!(status.success(), "{status}: {}", stopped.log());
        bridge.start_worker().wait_until_ready().await;
        check_that_all_was_handed_back(&bridge, &stopped.log()).await;
    }
    bridge.check().await;
    check_last_quantities(&bridge, &ids, 10).await;
}

/// A message behind a blocked batch is handed back without waiting for the batch.
#[tokio::test]
async fn stopped_worker_hands_back_unstarted_messages_at_once() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let (events, ids) = traffic(1, 3);
    bridge.publish_all(messages(&events[..1])).await;
    bridge.check().await;
    let lock = bridge
        .database
        .hold_lock(&lock_row_sql(ids.first().expect("there is one")))
        .await;
    bridge.publish_all(messages(&events[1..2])).await;
    bridge.database.until_a_worker_waits().await;
    bridge.publish_all(messages(&events[2..])).await;
    bridge.wait_until_unacknowledged(2).await;
    let nats = bridge.broker.connect().await;
    let mut acks = nats
        .subscribe(format!("$JS.ACK.{EVENTS_STREAM}.{WORKER_CONSUMER}.>"))
        .await
        .expect("it can be read");
    let mut next = async |kind: &str| {
        let mut acks = acks
            .by_ref()
            .filter(|ack| std::future::ready(ack.payload.starts_with(kind.as_bytes())));
        tokio::time::timeout(DEADLINE, acks.next())
            .await
            .expect("in time")
            .expect("it is read")
    };
    // The worker waits for a lock for four seconds. A keep-alive and a wait show that these have
    // begun only now, however slow the machine has been.
    next("+WPI").await;
    bridge.database.until_a_worker_waits().await;

    let stopped = bridge.workers.remove(0);
    stopped.signal(Signal::Term);
    let first = next("-NAK").await;

    // The message's stream sequence.
    assert_eq!(
        first.subject.split('.').nth(5),
        Some("3"),
        "{}",
        first.subject
    );
    lock.rollback().await.expect("the lock is released");
    let status = stopped.wait(DEADLINE).await;
    assert!(status.success(), "{status}: {}", stopped.log());
    bridge.start_worker().wait_until_ready().await;
    bridge.check().await;
    check_last_quantities(&bridge, &ids, 3).await;
}

/// Checks that all is applied within 30 s: a message that was not handed back is redelivered after
/// a minute.
async fn check_that_all_was_handed_back(bridge: &Bridge, stopped_log: &str) {
    let applied = tokio::time::timeout(Duration::from_secs(30), bridge.wait_until_applied()).await;
    assert!(
        applied.is_ok(),
        "not all of it was handed back: {stopped_log}"
    );
}

/// Creates the worker's consumer with an ack wait of two seconds instead of a minute, so that
/// messages of a killed worker are redelivered soon. Workers leave an existing consumer as it is.
async fn create_consumer_with_short_ack_wait(bridge: &Bridge) {
    let stream: stream::Stream = bridge.stream(EVENTS_STREAM).await;
    let config = pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(2),
        max_ack_pending: 20_000,
        filter_subject: format!("{EVENTS_PREFIX}>"),
        ..pull::Config::default()
    };
    stream
        .create_consumer(config)
        .await
        .expect("a consumer can be made");
}

/// Interleaved events of `subscriptions` subscriptions, each created and then updated to a quantity
/// of 2, 3, … up to `length`.
fn traffic(subscriptions: usize, length: i64) -> (Vec<Event>, BTreeSet<String>) {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let purchases: Vec<_> = (0..subscriptions)
        .map(|_| Purchase::new(now - 86_400))
        .collect();
    let event = |purchase: &Purchase, quantity: i64| {
        let mut items = purchase.items(purchase.created, now);
        items["data"][0]["quantity"] = json!(quantity);
        let event_type = if quantity == 1 { CREATED } else { UPDATED };
        purchase.subscription_event(
            event_type,
            purchase.created + quantity,
            json!({ "items": items }),
        )
    };
    let events = (1..=length).flat_map(|quantity| {
        purchases
            .iter()
            .map(move |purchase| event(purchase, quantity))
    });
    (
        events.collect(),
        purchases
            .iter()
            .map(|purchase| purchase.subscription.clone())
            .collect(),
    )
}

fn messages(events: &[Event]) -> Vec<(String, Bytes, String)> {
    events
        .iter()
        .map(|event| {
            (
                event.event_type().to_owned(),
                event.body(),
                event.id().to_owned(),
            )
        })
        .collect()
}

/// Waits until the worker has written `count` rows.
async fn until_rows(bridge: &Bridge, count: usize) {
    eventually("the first rows", DEADLINE, async || {
        let rows = bridge
            .database
            .query("SELECT stripe_subscription_id FROM stripe_subscription")
            .await;
        match rows.map_err(|error| error.to_string())?.len() {
            rows if rows >= count => Ok(()),
            rows => Err(format!("{rows} rows")),
        }
    })
    .await;
}

async fn check_last_quantities(bridge: &Bridge, ids: &BTreeSet<String>, quantity: i64) {
    let rows = bridge.rows().await;
    let ours: Vec<_> = rows
        .iter()
        .filter(|row| ids.contains(&row.stripe_subscription_id))
        .collect();
    assert_eq!(ours.len(), ids.len());
    for row in ours {
        assert_eq!(
            row.items[0]["quantity"], quantity,
            "{}",
            row.stripe_subscription_id
        );
        assert!(!row.uncertain, "{}", row.stripe_subscription_id);
    }
}

/// While one relay waits for its PubAck, the other one finds the outbox busy.
#[tokio::test]
async fn workers_that_may_not_send_signals_log_it_once() {
    const WAITING: &str = "litestripe_worker_waiting{for=\"signals\"}";
    let options = nats::Options {
        config: "authorization { users = [\n  { user: tests, password: tests }\n  { user: worker, password: secret, \
                 permissions: { publish: { deny: \"subscription.changed\" } } }\n] }\nno_auth_user: tests\n"
            .to_owned(),
        ..nats::Options::default()
    };
    let broker = nats::Server::prepare(options).expect("a folder for nats-server can be made");
    let url = format!("nats://worker:secret@127.0.0.1:{}", broker.port());
    let options = Options::new(DatabaseKind::Postgres)
        .worker("NATS_URL", url)
        .worker("RUST_LOG", "info,litestripe_worker=debug");
    let mut bridge = Bridge::prepare(options);
    bridge.broker = broker;
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    for _ in 0..2 {
        bridge.start_worker().wait_until_ready().await;
    }
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    for worker in &bridge.workers {
        eventually(
            "some attempts to send signals",
            DEADLINE,
            async || match worker.count_in_log("cannot publish signals") {
                attempts if attempts >= 3 => Ok(()),
                attempts => Err(format!("{attempts} of them:\n{}", worker.log())),
            },
        )
        .await;
        until_shown(worker, &[(WAITING, 1.0)]).await;
    }

    bridge
        .broker
        .reconfigure(|config| config.replace("subscription.changed", "nothing"));

    bridge.check().await;
    for worker in &bridge.workers {
        until_shown(worker, &[(WAITING, 0.0)]).await;
        for line in [
            "signals wait in the outbox",
            "the relay is sending signals again",
        ] {
            assert_eq!(worker.count_in_log(line), 1, "{}", worker.log());
        }
    }
}

/// A relay locks the rows of the shards; without its row, a shard would wait for ever.
#[tokio::test]
async fn deleted_shards_of_the_outbox_are_restored() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    bridge.workers.pop().expect("there is one").stop().await;
    let deleted = bridge
        .database
        .query("DELETE FROM litestripe_signal_shard WHERE shard > 0 RETURNING shard")
        .await
        .expect("they can be deleted");
    assert_eq!(deleted.len(), 15);
    bridge.start_worker().wait_until_ready().await;
    for _ in 0..20 {
        let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 60);
        let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
        bridge.deliver(&event).await;
    }
    bridge.check().await;
    let worker = bridge.workers.last().expect("it was started");
    assert_eq!(worker.count_in_log("15 rows of litestripe_signal_shard"), 1);
}
