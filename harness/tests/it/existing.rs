//! Streams and consumers that existed before: how they are configured, and a stream that was made
//! anew.

use std::fs;
use std::path::Path;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::DiscardPolicy;
use async_nats::jetstream::{AckKind, Message};
use futures_util::StreamExt as _;
use litestripe_contract::settings::StreamSettings;
use litestripe_contract::stream;
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, lock_row_sql};
use litestripe_harness::eventually;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::orphans::{CREATED, DEADLINE, UPDATED, now};

on_both_databases!(
    dead_letter_without_room_is_pending_and_holds_nothing,
    replay_of_an_older_stream_is_finished_by_the_next,
    pending_dead_letter_of_a_lost_event_is_deleted,
);

/// A durable that was made beforehand and loses events is named with its mend, and the mend works.
#[tokio::test]
async fn consumer_that_loses_events_is_named_until_it_is_made_anew() {
    let durable = || pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ..pull::Config::default()
    };
    let once = pull::Config {
        max_deliver: 1,
        ..durable()
    };
    let filtered = pull::Config {
        deliver_policy: DeliverPolicy::New,
        filter_subject: "stripe.events.invoice.>".to_owned(),
        ..durable()
    };
    let no_acks = pull::Config {
        ack_policy: AckPolicy::None,
        ..durable()
    };
    for (config, named) in [
        (once, "max_deliver"),
        (filtered, "filter_subject"),
        (no_acks, "ack_policy"),
    ] {
        let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
        bridge.deliver(&created(&Purchase::new(now()))).await;
        let events = bridge.stream(EVENTS_STREAM).await;
        events
            .create_consumer(config)
            .await
            .expect("a consumer can be made");
        let worker = bridge.start_worker();
        eventually("the consumer to be named", DEADLINE, async || match worker
            .page("/readyz")
            .await?
        {
            (503, body) if body.contains(named) => Ok(()),
            (status, body) => Err(format!("{status} {body}")),
        })
        .await;
        worker
            .wait_for_log("nats consumer rm STRIPE_EVENTS litestripe-worker", DEADLINE)
            .await;
        let status = json(&bridge, &["status"]).await;
        assert!(status["problems"].to_string().contains(named), "{status}");

        let removed = events.delete_consumer(WORKER_CONSUMER).await;
        removed.expect("a consumer can be removed");
        bridge.workers[0].wait_until_ready().await;
        // A consumer that began behind the event looks like a database that lost its rows, and then
        // the row's signal is withheld.
        bridge.wait_until_applied().await;
        assert_eq!(bridge.rows().await.len(), 1, "{named}");
        assert_eq!(json(&bridge, &["status"]).await["problems"], json!([]));
    }
}

#[tokio::test]
async fn paused_consumer_is_named_until_it_is_resumed() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let events = bridge.stream(EVENTS_STREAM).await;
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(24 * 60 * 60);
    let paused = events.pause_consumer(WORKER_CONSUMER, tomorrow).await;
    paused.expect("a consumer can be paused");
    bridge.workers[0]
        .wait_for_log(
            "nats consumer resume STRIPE_EVENTS litestripe-worker",
            DEADLINE,
        )
        .await;
    let (status, text) = bridge.workers[0].page("/readyz").await.expect("it answers");
    assert_eq!((status, text.contains("is paused")), (503, true), "{text}");
    let problems = json(&bridge, &["status"]).await["problems"].to_string();
    assert!(problems.contains("is paused"), "{problems}");

    let resumed = events.resume_consumer(WORKER_CONSUMER).await;
    resumed.expect("a consumer can be resumed");
    bridge.workers[0].wait_until_ready().await;
    assert_eq!(json(&bridge, &["status"]).await["problems"], json!([]));
}

/// A durable that is ahead of its stream would skip the events up to there.
#[tokio::test]
async fn consumer_that_is_ahead_of_its_stream_is_made_anew() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
    bridge.deliver(&created(&Purchase::new(now()))).await;
    let ahead = pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(50),
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: 100,
        },
        ..pull::Config::default()
    };
    let stream = bridge.stream(EVENTS_STREAM).await;
    let made = stream.create_consumer(ahead).await;
    let ack_wait = made
        .expect("a consumer can be made")
        .cached_info()
        .config
        .ack_wait;
    bridge.start_worker().wait_until_ready().await;
    bridge.deliver(&created(&Purchase::new(now()))).await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.rows().await.len(), 2);
    assert!(bridge.workers[0].log().contains("ahead of its stream"));
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer = stream.consumer_info(WORKER_CONSUMER).await;
    let config = consumer.expect("it exists").config;
    assert_eq!(config.ack_wait, ack_wait, "what an operator set is kept");
}

/// A batch of the old stream is committed after the stream was made anew. Its ack must not settle
/// the event that has its sequence now.
#[tokio::test]
async fn ack_of_an_older_stream_settles_no_event_of_the_new_one() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let purchase = Purchase::new(now() - 60);
    let first = purchase.subscription_event(CREATED, now() - 60, json!({}));
    bridge.deliver(&first).await;
    bridge.wait_until_applied().await;
    let lock = lock_row_sql(&purchase.subscription);
    let lock = bridge.database.hold_lock(&lock).await;
    let updated = purchase.subscription_event(UPDATED, now(), json!({ "metadata": { "n": "2" } }));
    bridge.deliver(&updated).await;
    bridge.database.until_a_worker_waits().await;

    let deleted = bridge.jetstream().await.delete_stream(EVENTS_STREAM).await;
    deleted.expect("a stream can be deleted");
    eventually("the stream to be made anew", DEADLINE, async || {
        let stream = bridge.jetstream().await.get_stream(EVENTS_STREAM).await;
        stream.map(drop).map_err(|error| error.to_string())
    })
    .await;
    let others = [(); 3].map(|()| created(&Purchase::new(now())));
    let [first, second, third] = &others;
    bridge.deliver_all(&[first.clone(), second.clone()]).await;
    let held = hold_messages(&bridge, 2).await;

    lock.rollback().await.expect("the transaction is open");
    bridge.deliver(third).await;
    eventually(
        "the batch and the next event to be applied",
        DEADLINE,
        async || {
            let rows = bridge.rows().await;
            let is_committed = rows
                .iter()
                .any(|row| row.last_event_id.as_deref() == Some(updated.id()));
            match rows.len() {
                2 if is_committed => Ok(()),
                count => Err(format!("{count} rows")),
            }
        },
    )
    .await;
    eventually(
        "the next event to be acked",
        DEADLINE,
        async || match bridge.unacknowledged().await {
            2 => Ok(()),
            unacknowledged => Err(format!("{unacknowledged} instead of 2")),
        },
    )
    .await;
    for message in held {
        let nak = message.ack_with(AckKind::Nak(None)).await;
        nak.expect("it is sent");
    }
    bridge.wait_until_applied().await;
    assert_eq!(bridge.rows().await.len(), 4);
}

/// The stream loses its last events. A pending dead letter of one of them would be stored with the
/// body of another event.
async fn pending_dead_letter_of_a_lost_event_is_deleted(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    deliver_new(&bridge, 2).await;
    let messages = bridge.broker.folder().join("store/jetstream/$G/streams");
    let messages = messages.join(EVENTS_STREAM).join("msgs");
    let aside = bridge.broker.folder().join("aside");
    bridge.broker.stop().await;
    copy_files(&messages, &aside);
    bridge.broker.resume().await;
    deliver_new(&bridge, 3).await;
    insert_pending(&bridge).await;
    let end = "SELECT stream_end FROM litestripe_installation WHERE stream_end = 5";
    eventually("the end to be recorded", DEADLINE, async || {
        let rows = bridge.database.query(end).await.expect("it is read");
        let recorded = rows.first().map(drop);
        recorded.ok_or_else(|| "it is not recorded yet".to_owned())
    })
    .await;
    bridge.broker.stop().await;
    fs::remove_dir_all(&messages).expect("the folder is ours");
    copy_files(&aside, &messages);
    bridge.broker.resume().await;

    eventually(
        "the lost dead letter to be deleted",
        DEADLINE,
        async || match json(&bridge, &["status"]).await["pending_dead_letters"].as_u64() {
            Some(1) => Ok(()),
            pending => Err(format!("{pending:?}")),
        },
    )
    .await;
    bridge.workers[0]
        .wait_for_log("dead letters are deleted", DEADLINE)
        .await;
    deliver_new(&bridge, 3).await;
    assert_eq!(bridge.rows().await.len(), 8);
}

/// Inserts pending dead letters of the events 2 and 5.
async fn insert_pending(bridge: &Bridge) {
    let letter = |sequence: u64| {
        format!(
            "INSERT INTO litestripe_dead_letter \
             (stream_created, sequence, event_type, reason, error, attempts, due_at, dt_created) \
             SELECT stream_created, {sequence}, 'invoice.paid', 'unreadable', 'no room', 1, \
             '2100-01-01 00:00:00+00:00', '2026-11-01 00:00:00+00:00' FROM litestripe_installation"
        )
    };
    for sql in [letter(2), letter(5)] {
        let inserted = bridge.database.query(&sql).await;
        inserted.expect("it is written");
    }
}

/// Delivers as many new events, and waits until they are applied and acked.
async fn deliver_new(bridge: &Bridge, count: usize) {
    for _ in 0..count {
        bridge.deliver(&created(&Purchase::new(now()))).await;
    }
    bridge.wait_until_applied().await;
}

fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the folder is ours");
    for entry in fs::read_dir(from).expect("it exists") {
        let entry = entry.expect("it can be read");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("it can be copied");
    }
}

/// Fetches messages like a worker, and does not settle them.
async fn hold_messages(bridge: &Bridge, count: usize) -> Vec<Message> {
    let config = pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(60),
        ..pull::Config::default()
    };
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer = stream.create_consumer(config).await;
    let consumer = consumer.expect("a consumer can be made");
    let messages = consumer.fetch().max_messages(count).messages().await;
    let messages: Vec<_> = messages.expect("messages can be fetched").collect().await;
    assert_eq!(messages.len(), count);
    messages
        .into_iter()
        .map(|message| message.expect("it is a message"))
        .collect()
}

async fn dead_letter_without_room_is_pending_and_holds_nothing(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let settings = StreamSettings {
        max_age: Duration::ZERO,
        max_bytes: None,
    };
    let letters = stream::dead_letters(1, settings, 1 << 30);
    let full = async_nats::jetstream::stream::Config {
        max_messages: 1,
        discard: DiscardPolicy::New,
        ..letters
    };
    let jetstream = bridge.jetstream().await;
    let made = jetstream.create_stream(full.clone()).await;
    made.expect("a stream can be made");
    let poison = || {
        Purchase::new(now()).subscription_event(CREATED, now(), json!({ "trial_end": i64::MAX }))
    };
    let poisoned = [poison(), poison()];
    bridge.deliver_all(&poisoned).await;
    bridge.deliver(&created(&Purchase::new(now()))).await;
    bridge.start_worker().wait_until_ready().await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.rows().await.len(), 1);

    let status = json(&bridge, &["status"]).await;
    assert_eq!(
        (&status["dead_letters"], &status["pending_dead_letters"]),
        (&json!(1), &json!(1)),
        "{status}"
    );
    let listed = json(&bridge, &["dead-letters", "list"]).await;
    let pending: Vec<_> = listed
        .as_array()
        .expect("it is a list")
        .iter()
        .filter(|letter| letter["pending"] == true)
        .collect();
    let [pending] = pending[..] else {
        panic!("{listed}");
    };
    let reason = pending["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("trial_end"), "{pending}");
    let table = bridge.worker().args(["dead-letters", "list"]);
    let table = table.run(DEADLINE).await.stdout;
    assert!(table.contains("cannot be stored yet"), "{table}");

    // Another worker stores it once there is room.
    assert!(bridge.workers.remove(0).stop().await.success());
    let jetstream = bridge.jetstream().await;
    let room = async_nats::jetstream::stream::Config {
        max_messages: -1,
        ..full
    };
    let updated = jetstream.update_stream(room).await;
    updated.expect("a stream can be changed");
    bridge.start_worker().wait_until_ready().await;
    eventually(
        "the dead letter to be stored",
        DEADLINE,
        async || match json(&bridge, &["status"]).await["pending_dead_letters"].as_u64() {
            Some(0) => Ok(()),
            pending => Err(format!("{pending:?}")),
        },
    )
    .await;
    let stored = bridge.dead_letters().await;
    assert_eq!(bridge.bodies(DEAD_LETTERS_STREAM).await.len(), 2);
    for event in &poisoned {
        let letter = stored.iter().find(|letter| letter.body == event.body());
        let letter = letter.unwrap_or_else(|| panic!("{} is missing", event.id()));
        assert!(letter.headers["Litestripe-Reason"].contains("trial_end"));
        assert!(letter.headers.contains_key("Stripe-Signature"));
    }
}

/// The stream that an interrupted replay was about is gone. What holds until its end must not hold
/// for ever.
async fn replay_of_an_older_stream_is_finished_by_the_next(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchases = [(); 3].map(|()| Purchase::new(now()));
    for purchase in &purchases {
        bridge.deliver(&created(purchase)).await;
    }
    bridge.wait_until_applied().await;
    let interrupted = "INSERT INTO litestripe_replay \
        (name, signals, first_sequence, last_sequence, event_types, dt_started, dt_heartbeat, stream_created) \
        VALUES ('', 'changed', 4000, 5000, '', '2026-11-01 00:00:00+00:00', '2026-11-01 00:00:00+00:00', 1)";
    bridge
        .database
        .query("DELETE FROM litestripe_replay")
        .await
        .expect("it is written");
    let recorded = bridge.database.query(interrupted).await;
    recorded.expect("it is written");
    assert!(json(&bridge, &["status"]).await["replay"].is_object());

    let replayed = json(&bridge, &["replay"]).await;
    assert_eq!(
        (&replayed["finished"], &replayed["events"]),
        (&json!(true), &json!(3)),
        "{replayed}"
    );
    assert_eq!(json(&bridge, &["status"]).await["replay"], Value::Null);
}

fn created(purchase: &Purchase) -> Event {
    purchase.subscription_event(CREATED, now(), json!({}))
}

/// Runs a command of the worker, and returns its output as JSON.
async fn json(bridge: &Bridge, arguments: &[&str]) -> Value {
    let launch = bridge.worker().args(arguments.iter().copied());
    let finished = launch.arg("--json").run(DEADLINE).await;
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it is JSON")
}
