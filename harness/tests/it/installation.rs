//! The installation: database and broker that belong together, and what happens if they do not.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{AckKind, kv};
use futures_util::StreamExt as _;
use litestripe_contract::subject::{EVENTS_STREAM, KV_BUCKET, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::{Value, json};

use crate::orphans::{CREATED, DEADLINE, now};

on_both_databases!(
    database_and_broker_hold_one_id,
    worker_refuses_the_broker_of_another_installation_until_it_joins_on_purpose,
    running_worker_stops_without_acks_when_the_broker_is_another_installations,
    running_worker_stops_without_acks_when_the_database_is_another_installations,
    broker_that_lost_its_data_gets_the_id_of_the_database,
    what_is_no_id_stops_no_worker,
    rebuilt_database_replaces_the_one_before,
    workers_of_a_rebuilt_database_start_together,
    commands_on_a_wrong_database_take_nothing_from_the_broker,
);

const KEY: &str = "installation";

/// The id of another installation.
const ANOTHER: &str = "anotherInstallation000";

async fn database_and_broker_hold_one_id(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).workers(2)).await;
    let ids = (database_id(&bridge).await, broker_id(&bridge).await);
    assert!(ids.0.is_some(), "{ids:?}");
    assert_eq!(ids.0, ids.1);
    assert_eq!(status(&bridge).await["installation"], json!(ids.0));
}

async fn worker_refuses_the_broker_of_another_installation_until_it_joins_on_purpose(
    database: DatabaseKind,
) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let ours = database_id(&bridge).await.expect("it has an id");
    assert!(bridge.workers.remove(0).stop().await.success());
    set_broker_id(&bridge, ANOTHER).await;
    bridge.deliver(&event()).await;

    let refused = bridge.start_worker().wait(DEADLINE).await;
    let log = bridge.workers.remove(0).log();
    assert_eq!(refused.code(), Some(1), "{log}");
    for named in [&ours, ANOTHER, "litestripe-worker join"] {
        assert!(log.contains(named), "{named} is not in {log}");
    }
    let replay = bridge.worker().arg("replay").run(DEADLINE).await;
    assert_eq!(replay.status.code(), Some(1), "{replay:?}");
    assert_eq!(bridge.rows().await.len(), 0);
    let problems = status(&bridge).await["problems"].to_string();
    assert!(problems.contains(ANOTHER), "{problems}");

    let joined = bridge.worker().args(["join", "--json"]).run(DEADLINE).await;
    let joined: Value = serde_json::from_str(&joined.stdout).expect("it is JSON");
    assert_eq!(
        joined,
        json!({ "installation": ours, "broker_before": ANOTHER })
    );
    bridge.start_worker().wait_until_ready().await;
    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 1);
}

async fn running_worker_stops_without_acks_when_the_broker_is_another_installations(
    database: DatabaseKind,
) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    set_broker_id(&bridge, ANOTHER).await;
    let worker = bridge.workers.remove(0);
    let ended = worker.wait(DEADLINE).await;
    assert_eq!(ended.code(), Some(1), "{}", worker.log());
    assert!(worker.log().contains(ANOTHER), "{}", worker.log());
    bridge.deliver(&event()).await;
    assert_eq!(ack_floor(&bridge).await, 0);
}

async fn running_worker_stops_without_acks_when_the_database_is_another_installations(
    database: DatabaseKind,
) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    bridge.deliver(&event()).await;
    bridge.wait_until_applied().await;
    assert_eq!(ack_floor(&bridge).await, 1);
    let other = "UPDATE litestripe_installation SET id = 'another'";
    bridge.database.query(other).await.expect("it is written");
    bridge.deliver(&event()).await;
    let worker = bridge.workers.remove(0);
    let ended = worker.wait(DEADLINE).await;
    assert_eq!(ended.code(), Some(1), "{}", worker.log());
    assert!(worker.log().contains("DATABASE_URL"), "{}", worker.log());
    assert_eq!(bridge.rows().await.len(), 1, "nothing was written to it");
    assert_eq!(ack_floor(&bridge).await, 1);
}

async fn broker_that_lost_its_data_gets_the_id_of_the_database(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let ours = database_id(&bridge).await;
    bridge.broker.kill().await;
    fs::remove_dir_all(bridge.broker.folder().join("store")).expect("the folder is ours");
    bridge.broker.resume().await;
    eventually(
        "the broker to get the id",
        DEADLINE,
        async || match broker_id(&bridge).await {
            id if id == ours => Ok(()),
            id => Err(format!("{id:?}")),
        },
    )
    .await;
    bridge.deliver(&event()).await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.rows().await.len(), 1);
    bridge.workers[0]
        .wait_for_log("was created anew", DEADLINE)
        .await;
}

/// Whoever may publish requests can name the key's subject for the reply.
async fn what_is_no_id_stops_no_worker(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let ours = database_id(&bridge).await;
    let nats = bridge.broker.connect().await;
    let spoil = async || {
        let reply = format!("$KV.{KV_BUCKET}.{KEY}");
        nats.publish_with_reply("$JS.API.INFO", reply, "".into())
            .await
            .expect("it is sent");
    };
    let mended = async |bridge: &Bridge| {
        eventually(
            "the broker to get the id again",
            DEADLINE,
            async || match broker_id(bridge).await {
                id if id == ours => Ok(()),
                id => Err(format!("{id:?}")),
            },
        )
        .await;
    };
    spoil().await;
    bridge.workers[0].wait_for_log("held no id", DEADLINE).await;
    mended(&bridge).await;
    assert!(bridge.workers.remove(0).stop().await.success());

    spoil().await;
    eventually(
        "the key to hold no id",
        DEADLINE,
        async || match broker_id(&bridge).await {
            id if id == ours => Err(format!("{id:?}")),
            _ => Ok(()),
        },
    )
    .await;
    let problems = status(&bridge).await["problems"].to_string();
    assert!(!problems.contains("installation"), "{problems}");
    bridge.start_worker().wait_until_ready().await;
    mended(&bridge).await;
}

/// A rebuild looks like a wrong `DATABASE_URL`: while workers apply the events to another database
/// it is refused, and afterwards that other database is.
async fn rebuilt_database_replaces_the_one_before(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    bridge.deliver(&event()).await;
    bridge.wait_until_applied().await;
    let first = database_id(&bridge).await;
    let mut new = Database::prepare(database);
    new.resume().await;
    let old = std::mem::replace(&mut bridge.database, new);

    let refused = bridge.start_worker().wait(DEADLINE).await;
    let log = bridge.workers.pop().expect("it was started").log();
    assert_eq!(refused.code(), Some(1), "{log}");
    assert!(log.contains("DATABASE_URL"), "{log}");

    assert!(bridge.workers.remove(0).stop().await.success());
    bridge.start_worker().wait_until_ready().await;
    assert_eq!(database_id(&bridge).await, broker_id(&bridge).await);
    assert_ne!(database_id(&bridge).await, first);
    // The broker is restored from a backup that was made before the rebuild.
    set_broker_id(&bridge, first.expect("it had an id")).await;
    let rebuilt = database_id(&bridge).await;
    eventually("the broker to get the new id", DEADLINE, async || {
        assert!(
            bridge.workers[0].is_running(),
            "{}",
            bridge.workers[0].log()
        );
        match broker_id(&bridge).await {
            id if id == rebuilt => Ok(()),
            id => Err(format!("{id:?}")),
        }
    })
    .await;
    assert!(bridge.workers.remove(0).stop().await.success());

    bridge.database = old;
    let refused = bridge.start_worker().wait(DEADLINE).await;
    let log = bridge.workers.remove(0).log();
    assert_eq!(refused.code(), Some(1), "{log}");
    assert!(log.contains("litestripe-worker join"), "{log}");
}

/// The one that is ready first consumes while the others still wait for nobody to do so.
async fn workers_of_a_rebuilt_database_start_together(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    assert!(bridge.workers.remove(0).stop().await.success());
    let mut new = Database::prepare(database);
    new.resume().await;
    let _old = std::mem::replace(&mut bridge.database, new);
    let migrated = bridge.worker().args(["migrate", "up"]).run(DEADLINE).await;
    assert!(migrated.status.success(), "{migrated:?}");

    for _ in 0..3 {
        bridge.start_worker();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    for worker in &bridge.workers {
        worker.wait_until_ready().await;
    }
    assert_eq!(database_id(&bridge).await, broker_id(&bridge).await);
}

async fn commands_on_a_wrong_database_take_nothing_from_the_broker(database: DatabaseKind) {
    let api = Api::start().await;
    let options = Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off");
    let mut bridge = Bridge::start(options).await;
    let with_nul = json!({ "metadata": { "plan": "team", "note": "\u{0}" } });
    let poison = Purchase::new(now()).subscription_event(CREATED, now(), with_nul);
    bridge.deliver(&poison).await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.dead_letters().await.len(), 1);
    let ours = broker_id(&bridge).await;
    let mut wrong = Database::prepare(database);
    wrong.resume().await;
    let _right = std::mem::replace(&mut bridge.database, wrong);

    let repair: &[&str] = &["reconcile", "--repair"];
    for arguments in [repair, &["dead-letters", "retry", "--all"]] {
        // The poison could be applied with this setting.
        let command = bridge.worker().env("LITESTRIPE_METADATA_KEYS", "plan");
        let refused = command.args(arguments.iter().copied()).run(DEADLINE).await;
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {refused:?}");
        let named = ours.as_deref().expect("the broker has an id");
        assert!(refused.stderr.contains(named), "{arguments:?}: {refused:?}");
        assert_eq!(database_id(&bridge).await, None, "{arguments:?}");
    }
    assert_eq!(broker_id(&bridge).await, ours);
    assert_eq!(bridge.dead_letters().await.len(), 1);
}

/// Under a backlog no request of a worker waits: the server answers each at once.
#[tokio::test]
async fn new_database_replaces_none_while_busy_workers_use_it() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    assert!(bridge.workers.remove(0).stop().await.success());
    bridge.deliver(&event()).await;
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer: PullConsumer = stream
        .get_consumer(WORKER_CONSUMER)
        .await
        .expect("it exists");
    let mut new = Database::prepare(DatabaseKind::Sqlite);
    new.resume().await;
    let _old = std::mem::replace(&mut bridge.database, new);
    let busy = async {
        loop {
            let messages = consumer.fetch().max_messages(1).messages().await;
            let mut messages = messages.expect("they can be requested");
            if let Some(message) = messages.next().await {
                let message = message.expect("it is read");
                message
                    .ack_with(AckKind::Nak(None))
                    .await
                    .expect("it is sent");
            }
        }
    };
    let worker = bridge.start_worker();
    let refused = tokio::select! {
        () = busy => unreachable!("it has no end"),
        refused = worker.wait(DEADLINE) => refused,
    };
    assert_eq!(refused.code(), Some(1), "{}", worker.log());
    assert!(worker.log().contains("DATABASE_URL"), "{}", worker.log());
}

#[tokio::test]
async fn file_that_is_replaced_while_open_gets_no_acks() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    bridge.deliver(&event()).await;
    bridge.wait_until_applied().await;
    bridge.database.reopen().await;
    let folder = bridge.database.folder().expect("SQLite has one").to_owned();
    let (file, aside) = (folder.join("litestripe.db"), folder.join("aside.db"));
    fs::rename(&file, &aside).expect("it can be renamed");
    bridge.deliver(&event()).await;
    let worker = bridge.workers.remove(0);
    let ended = worker.wait(DEADLINE).await;
    assert_eq!(ended.code(), Some(1), "{}", worker.log());
    assert_eq!(ack_floor(&bridge).await, 1);

    fs::rename(&aside, &file).expect("it can be renamed");
    bridge.start_worker().wait_until_ready().await;
    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 2);
}

#[tokio::test]
async fn file_that_cannot_be_found_for_a_moment_does_not_stop_the_worker() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    bridge.deliver(&event()).await;
    bridge.wait_until_applied().await;
    bridge.database.reopen().await;
    let folder = bridge.database.folder().expect("SQLite has one").to_owned();
    let (file, aside, circle) = (
        folder.join("litestripe.db"),
        folder.join("aside.db"),
        folder.join("circle.db"),
    );
    fs::hard_link(&file, &aside).expect("it can be linked");
    // The path leads in a circle, without a moment at which it leads nowhere.
    symlink(&file, &circle).expect("it can be linked");
    fs::rename(&circle, &file).expect("it can be renamed");
    bridge.workers[0]
        .wait_for_log("cannot find the database's file", DEADLINE)
        .await;
    fs::rename(&aside, &file).expect("it can be renamed");
    bridge.deliver(&event()).await;
    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 2);
    assert!(bridge.workers.remove(0).stop().await.success());
}

fn event() -> litestripe_harness::stripe::Event {
    Purchase::new(now()).subscription_event(CREATED, now(), json!({}))
}

async fn database_id(bridge: &Bridge) -> Option<String> {
    let sql = "SELECT id FROM litestripe_installation";
    let rows = bridge.database.query(sql).await;
    let rows = rows.expect("the database answers");
    rows.first()
        .map(|row| row.try_get("", "id").expect("it is text"))
}

async fn bucket(bridge: &Bridge) -> Option<kv::Store> {
    let jetstream = bridge.jetstream().await;
    jetstream.get_key_value(KV_BUCKET).await.ok()
}

async fn broker_id(bridge: &Bridge) -> Option<String> {
    let value = bucket(bridge).await?.get(KEY).await.ok()??;
    Some(String::from_utf8_lossy(&value).into_owned())
}

async fn set_broker_id(bridge: &Bridge, id: impl Into<String>) {
    let bucket = bucket(bridge).await.expect("the bucket exists");
    let id = id.into().into();
    bucket.put(KEY, id).await.expect("it is written");
}

async fn ack_floor(bridge: &Bridge) -> u64 {
    let stream = bridge.stream(EVENTS_STREAM).await;
    let consumer = stream.consumer_info(WORKER_CONSUMER).await;
    let consumer = consumer.expect("the consumer exists");
    consumer.ack_floor.stream_sequence
}

async fn status(bridge: &Bridge) -> Value {
    let finished = bridge
        .worker()
        .args(["status", "--json"])
        .run(DEADLINE)
        .await;
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it is JSON")
}
