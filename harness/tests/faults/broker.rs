//! Failures of the broker: full or deleted streams, lost data, refused connections, vanished hosts.

use std::time::Duration;

use async_nats::jetstream::stream::State;
use litestripe_contract::subject::{
    DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM, WORKER_CONSUMER,
};
use litestripe_harness::bridge::{DatabaseKind, filter_by_subscription, lock_row_sql};
use litestripe_harness::process::Signal;
use litestripe_harness::program::Program;
use litestripe_harness::proxy::Mode;
use litestripe_harness::stripe::{Event, Purchase};
use litestripe_harness::{eventually, nats};
use sea_orm::DatabaseTransaction;
use serde_json::json;
use time::OffsetDateTime;

use crate::check::{Stream, check, check_rows_are_merged};
use crate::ledger::Answer;
use crate::load::Load;
use crate::rig::{DEADLINE, Rig, count_in_log};

#[tokio::test]
async fn full_stream_refuses_events_until_applied_ones_are_purged() {
    let settings = [
        ("LITESTRIPE_EVENTS_MAX_BYTES", "1MiB"),
        ("LITESTRIPE_BATCH", "20"),
    ];
    let mut rig = Rig::start(DatabaseKind::Postgres, 0, &settings).await;
    let accepted = fill(&rig).await;
    assert!(accepted > 100, "{accepted}");
    let full = events(&rig).await;
    assert_eq!(
        (full.first_sequence, full.messages),
        (1, accepted),
        "no event was removed to make room"
    );

    rig.start_worker(0, &[]);
    accepts_again(&rig).await;
    let made = events(&rig).await;
    assert!(made.first_sequence > 1, "{made:?}");
    rig.running(0)
        .wait_for_log("purged the oldest", DEADLINE)
        .await;

    // Without the database no event can be applied, so none may be purged.
    rig.bridge.wait_until_applied().await;
    let applied = events(&rig).await.last_sequence;
    rig.bridge.database.kill().await;
    fill(&rig).await;
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    let kept = events(&rig).await;
    assert!(
        kept.first_sequence <= applied + 1,
        "{kept:?}: only applied events (up to {applied}) may be purged"
    );
    rig.bridge.database.resume().await;
    accepts_again(&rig).await;
    // The rows are compared with the merge of all events that were ever accepted.
    check(&rig, Stream::Purged).await;
}

#[tokio::test]
async fn full_stream_keeps_events_that_a_replay_still_has_to_reapply() {
    let settings = [
        ("LITESTRIPE_EVENTS_MAX_BYTES", "1MiB"),
        ("RUST_LOG", "info,litestripe_worker::retention=debug"),
    ];
    let rig = Rig::start(DatabaseKind::Postgres, 1, &settings).await;
    let purchase = purchase();
    rig.deliver_all(&[created(&purchase)]).await;
    rig.bridge.wait_until_applied().await;
    let (lock, replay) = start_blocked_replay(&rig, &purchase).await;
    fill(&rig).await;
    rig.bridge.wait_until_applied().await;
    // The first check may have begun before the stream was full.
    let checks = || {
        rig.running(0)
            .log()
            .matches("checked how full STRIPE_EVENTS is")
            .count()
    };
    let checked = checks();
    eventually("two checks of the stream's size", DEADLINE, async || {
        let more = checks() - checked;
        (more >= 2).then_some(()).ok_or(format!("{more} more"))
    })
    .await;
    assert_eq!(
        events(&rig).await.first_sequence,
        1,
        "the replay still needs the first event"
    );

    lock.rollback().await.expect("the transaction is open");
    assert!(replay.wait(DEADLINE).await.success(), "{}", replay.log());
    accepts_again(&rig).await;
    rig.bridge.wait_until_applied().await;
    check_rows_are_merged(&rig).await;
}

/// Delivers events until the stream is full; returns how many were accepted.
async fn fill(rig: &Rig) -> u64 {
    let mut accepted = 0;
    loop {
        match rig
            .ledger
            .deliver(&rig.client, &rig.hook(), &bought())
            .await
        {
            Answer::Accepted => accepted += 1,
            Answer::Refused(503) => return accepted,
            answer => panic!("{answer:?}"),
        }
    }
}

async fn accepts_again(rig: &Rig) {
    rig.ledger
        .deliver_until_accepted(&rig.client, &rig.hook(), &bought())
        .await;
}

async fn events(rig: &Rig) -> State {
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    stream.cached_info().state.clone()
}

#[tokio::test]
async fn deleted_consumer_is_recreated_and_redelivers_every_event() {
    let rig = Rig::start(DatabaseKind::Postgres, 2, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 7);
    until_accepted(&rig, 200).await;

    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    stream
        .delete_consumer(WORKER_CONSUMER)
        .await
        .expect("a consumer can be deleted");

    // One worker recreates it. The other finds it, or recreates it too.
    eventually("a worker to consume again", DEADLINE, async || {
        let logs = [rig.running(0).log(), rig.running(1).log()];
        let consumes_again = logs
            .iter()
            .any(|log| log.matches("consuming STRIPE_EVENTS").count() == 2);
        if consumes_again {
            Ok(())
        } else {
            Err(logs.concat())
        }
    })
    .await;
    // Three times, because a worker may still apply messages that it fetched before the deletion.
    for _ in 0..3 {
        let before = [applied(&rig, 0).await, applied(&rig, 1).await];
        eventually("both workers to apply events", DEADLINE, async || {
            let now = [applied(&rig, 0).await, applied(&rig, 1).await];
            if now[0] > before[0] && now[1] > before[1] {
                Ok(())
            } else {
                Err(format!("{before:?} to {now:?}"))
            }
        })
        .await;
    }
    load.stop().await;
    let found = check(&rig, Stream::Whole).await;
    assert_eq!(found.repeated_signals, 0);
}

/// Returns how many events a worker has applied since it started.
async fn applied(rig: &Rig, index: usize) -> u64 {
    let metrics = rig.worker_metrics(index).await;
    let count = metrics
        .lines()
        .find_map(|line| line.strip_prefix("litestripe_worker_events_applied_total "));
    count
        .and_then(|count| count.parse().ok())
        .unwrap_or_else(|| panic!("no count of events:\n{metrics}"))
}

#[tokio::test]
async fn consumer_deleted_while_the_workers_are_disconnected_is_recreated() {
    let rig = Rig::start(DatabaseKind::Sqlite, 2, &[]).await;
    rig.deliver_all(&[bought()]).await;
    rig.bridge.wait_until_applied().await;
    delete_consumer_during_disconnection(&rig, WORKER_CONSUMER).await;
    rig.deliver_all(&[bought()]).await;
    check(&rig, Stream::Whole).await;
    assert_eq!(
        count_in_log(rig.running(0), "connection to NATS lost"),
        1,
        "{}",
        rig.running(0).log()
    );
}

#[tokio::test]
async fn streams_and_consumer_are_recreated_on_a_broker_that_lost_its_store() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.deliver_all(&[bought()]).await;
    rig.bridge.wait_until_applied().await;
    rig.bridge.broker.kill().await;
    std::fs::remove_dir_all(rig.bridge.broker.folder().join("store")).expect("the folder is ours");
    rig.bridge.broker.resume().await;
    rig.deliver_all(&[bought()]).await;
    rig.bridge.wait_until_applied().await;
    check_rows_are_merged(&rig).await;
    assert_eq!(
        rig.bridge.signals().await.len(),
        1,
        "the first signal was lost with the store"
    );
}

#[tokio::test]
async fn recreated_consumer_has_the_replicas_of_the_stream_and_not_of_the_setting() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.running(0).stop().await;
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    stream
        .delete_consumer(WORKER_CONSUMER)
        .await
        .expect("a consumer can be deleted");
    // A single server refuses a consumer with three replicas.
    rig.start_worker(0, &[("LITESTRIPE_STREAM_REPLICAS", "3")]);
    rig.until_worker_is_ready(0).await;
}

#[tokio::test]
async fn replay_whose_consumer_was_deleted_reapplies_all_events_and_ends() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchase = purchase();
    rig.deliver_all(&[created(&purchase), bought(), bought()])
        .await;
    rig.bridge.wait_until_applied().await;
    let (lock, replay) = start_blocked_replay(&rig, &purchase).await;
    delete_consumer_during_disconnection(&rig, "litestripe-replay").await;
    lock.rollback().await.expect("the transaction is open");
    let status = replay.wait(DEADLINE).await;
    assert!(status.success(), "{status}: {}", replay.log());
    assert!(
        replay.stdout().contains("replayed events 1 to 3"),
        "{}",
        replay.log()
    );
}

/// Starts a replay that waits for another session's lock on the row that its first event changes.
async fn start_blocked_replay(rig: &Rig, purchase: &Purchase) -> (DatabaseTransaction, Program) {
    // Empties the row's merge state, so that the replay has something to write.
    let id = &purchase.subscription;
    let empty = format!(
        "UPDATE stripe_subscription SET merge_state = '{{}}' WHERE stripe_subscription_id = '{id}'"
    );
    rig.bridge
        .database
        .query(&empty)
        .await
        .expect("the row can be written");
    let lock = rig.bridge.database.hold_lock(&lock_row_sql(id)).await;
    let replay = rig.worker().args(["replay"]).start();
    rig.bridge.database.until_a_worker_waits().await;
    (lock, replay)
}

/// Deletes a consumer while the workers have no connection to the broker.
async fn delete_consumer_during_disconnection(rig: &Rig, consumer: &str) {
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    rig.worker_to_nats.set(Mode::Cut);
    rig.running(0)
        .wait_for_log("connection to NATS lost", DEADLINE)
        .await;
    stream
        .delete_consumer(consumer)
        .await
        .expect("a consumer can be deleted");
    rig.worker_to_nats.set(Mode::Pass);
}

async fn until_accepted(rig: &Rig, count: usize) {
    eventually("deliveries", DEADLINE, async || {
        match rig.ledger.figures() {
            figures if figures.accepted >= count => Ok(()),
            figures => Err(format!("{figures:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn deleted_streams_are_recreated_and_later_events_are_applied() {
    streams_deleted(&[EVENTS_STREAM, SIGNALS_STREAM, DEAD_LETTERS_STREAM]).await;
}

#[tokio::test]
async fn deleted_signals_stream_is_recreated_and_later_signals_are_sent() {
    streams_deleted(&[SIGNALS_STREAM]).await;
}

/// The messages of the deleted streams are lost; later events and signals must not be.
async fn streams_deleted(names: &[&str]) {
    let rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.deliver_all(&[bought(), bought()]).await;
    check(&rig, Stream::Whole).await;
    for name in names {
        rig.bridge
            .jetstream()
            .await
            .delete_stream(name)
            .await
            .expect("a stream can be deleted");
    }

    let purchase = purchase();
    let updated = json!({ "metadata": { "step": "2" } });
    let updated = purchase.subscription_event(
        "customer.subscription.updated",
        purchase.created + 2,
        updated,
    );
    rig.deliver_all(&[created(&purchase), updated]).await;

    rig.bridge.wait_until_applied().await;
    check_rows_are_merged(&rig).await;
    let signals = rig.bridge.signals().await;
    let signals = filter_by_subscription(&signals, &purchase.subscription);
    let last = signals
        .last()
        .unwrap_or_else(|| panic!("no signal:\n{}", rig.running(0).log()));
    assert_eq!(last.body["subscription_metadata"], json!({ "step": "2" }));
    assert_eq!(signals[0].body["previous_revision"], json!(null));
}

#[tokio::test]
async fn after_a_lowered_max_payload_larger_events_are_refused_and_others_stored() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    let large = || {
        let mut event = bought();
        event.value["data"]["object"]["description"] = json!("x".repeat(100_000));
        event
    };
    let hook = rig.hook();
    rig.deliver_all(&[bought(), large()]).await;
    rig.bridge.wait_until_applied().await;

    // Two events are stored but not applied when the server restarts with a smaller limit.
    rig.running(0).signal(Signal::Stop);
    rig.deliver_all(&[bought(), large()]).await;
    configure(&rig, |config| config + "\nmax_payload: 64KB\n");
    rig.bridge.broker.restart().await;
    rig.running(0).signal(Signal::Cont);
    rig.deliver_all(&[bought()]).await;
    assert_eq!(
        rig.ledger.deliver(&rig.client, &hook, &large()).await,
        Answer::Refused(413)
    );
    check(&rig, Stream::Whole).await;

    configure(&rig, |config| config.replace("\nmax_payload: 64KB\n", ""));
    rig.bridge.broker.restart().await;
    rig.deliver_all(&[large()]).await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn max_payload_raised_by_a_reload_is_noticed_after_a_message_was_too_large() {
    let broker = nats::Options {
        config: "max_payload: 64KB".to_owned(),
        ..nats::Options::default()
    };
    let mut rig = Rig::servers(DatabaseKind::Sqlite, broker).await;
    rig.start_ingress(&[]);
    rig.start_worker(0, &[]);
    rig.until_ingress_is_ready().await;
    rig.until_worker_is_ready(0).await;
    let mut large = bought();
    large.value["data"]["object"]["description"] = json!("x".repeat(100_000));
    assert_eq!(
        rig.ledger.deliver(&rig.client, &rig.hook(), &large).await,
        Answer::Refused(413)
    );
    let insert = signals_to_insert(1, &"x".repeat(100_000), "large");
    rig.bridge
        .database
        .query(&insert)
        .await
        .expect("the table exists");
    rig.running(0)
        .wait_for_log("larger than the NATS server's max_payload", DEADLINE)
        .await;

    configure(&rig, |config| {
        config.replace("max_payload: 64KB", "max_payload: 1MB")
    });
    rig.bridge
        .broker
        .process()
        .expect("it runs")
        .signal(Signal::Hup);
    rig.deliver_all(&[large]).await;
    rig.bridge.wait_until_applied().await;
    for program in [rig.ingress(), rig.running(0)] {
        assert_eq!(
            count_in_log(program, "connection to NATS lost"),
            1,
            "{}",
            program.log()
        );
    }
}

#[tokio::test]
async fn sqlite_oversized_signals_block_only_their_own_subscriptions() {
    signals_too_large(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_oversized_signals_block_only_their_own_subscriptions() {
    signals_too_large(DatabaseKind::Postgres).await;
}

async fn signals_too_large(database: DatabaseKind) {
    const WAITING: &str = "litestripe_worker_waiting{for=\"signals\"} 1";
    let broker = nats::Options {
        config: "max_payload: 40KB".to_owned(),
        ..nats::Options::default()
    };
    let mut rig = Rig::servers(database, broker).await;
    rig.start_ingress(&[]);
    rig.start_worker(0, &[]);
    rig.until_worker_is_ready(0).await;
    // More large signals than the relay reads in one round. They belong to 200 subscriptions, each
    // of which also has a later small signal.
    let body = "x".repeat(50_000);
    for (count, body, prefix) in [(1200, body.as_str(), "large"), (200, "small", "small")] {
        let insert = signals_to_insert(count, body, prefix);
        rig.bridge
            .database
            .query(&insert)
            .await
            .expect("the table exists");
    }
    rig.running(0)
        .wait_for_log("larger than the NATS server's max_payload", DEADLINE)
        .await;
    rig.deliver_all(&[bought()]).await;
    let sent = async || {
        let stream = rig.bridge.stream(SIGNALS_STREAM).await;
        stream.cached_info().state.messages
    };
    eventually(
        "the signal of another subscription",
        DEADLINE,
        async || match sent().await {
            1 => Ok(()),
            sent => Err(format!("{sent} sent")),
        },
    )
    .await;
    assert!(rig.worker_metrics(0).await.contains(WAITING));
    assert_eq!(sent().await, 1, "signals after a large one wait too");

    configure(&rig, |config| {
        config.replace("max_payload: 40KB", "max_payload: 1MB")
    });
    rig.bridge.broker.restart().await;
    rig.bridge.wait_until_applied().await;
    eventually("the metric to show no waiting", DEADLINE, async || {
        let page = rig.worker_metrics(0).await;
        if page.contains(WAITING) {
            Err(page)
        } else {
            Ok(())
        }
    })
    .await;
}

/// Returns a statement that inserts `count` signals with that body, spread over up to 200
/// subscriptions.
fn signals_to_insert(count: usize, body: &str, prefix: &str) -> String {
    format!(
        "WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n WHERE k < {count}) INSERT INTO litestripe_signal_outbox \
         (shard, entity_id, subject, message_id, event_created, body, dt_created) SELECT k % 4, 'sub_' || (k % 200), \
         'subscription.changed', '{prefix}' || k, 1700000000, '{body}', '2026-01-01 00:00:00+00:00' FROM n"
    )
}

#[tokio::test]
async fn wrong_password_at_startup_is_logged_and_retried() {
    let broker = nats::Options {
        config: users("another-secret"),
        ..nats::Options::default()
    };
    let mut rig = Rig::servers(DatabaseKind::Sqlite, broker).await;
    let wrong = "secret-of-the-tests";
    rig.settings = [("NATS_USER", "litestripe"), ("NATS_PASSWORD", wrong)]
        .map(|(a, b)| (a.into(), b.into()))
        .to_vec();
    rig.start_ingress(&[]);
    rig.start_worker(0, &[]);
    for program in [rig.ingress(), rig.running(0)] {
        program.wait_for_log("waiting for NATS", DEADLINE).await;
        assert_eq!(
            count_in_log(program, "authorization violation"),
            1,
            "{}",
            program.log()
        );
        assert_eq!(count_in_log(program, wrong), 0);
    }
    configure(&rig, |config| config.replace("another-secret", wrong));
    rig.bridge
        .broker
        .process()
        .expect("it runs")
        .signal(Signal::Hup);
    rig.until_ingress_is_ready().await;
    rig.until_worker_is_ready(0).await;
}

/// Configures two users: the tests need no password, the programs need this one.
fn users(password: &str) -> String {
    format!(
        "authorization {{ users = [\n  {{ user: tests, password: tests }}\n  \
         {{ user: litestripe, password: {password:?} }}\n] }}\nno_auth_user: tests\n"
    )
}

#[tokio::test]
async fn revoked_authorization_is_logged_and_retried() {
    let (good, other) = ("secret-of-the-tests", "another-secret");
    let broker = nats::Options {
        config: users(good),
        ..nats::Options::default()
    };
    let mut rig = Rig::servers(DatabaseKind::Sqlite, broker).await;
    for (name, value) in [("NATS_USER", "litestripe"), ("NATS_PASSWORD", good)] {
        rig.settings.push((name.to_owned(), value.to_owned()));
    }
    rig.start_ingress(&[]);
    rig.start_worker(0, &[]);
    rig.until_ingress_is_ready().await;
    rig.until_worker_is_ready(0).await;
    rig.deliver_all(&[bought()]).await;
    rig.bridge.wait_until_applied().await;

    configure(&rig, |config| config.replace(good, other));
    rig.bridge
        .broker
        .process()
        .expect("it runs")
        .signal(Signal::Hup);
    for program in [rig.ingress(), rig.running(0)] {
        program
            .wait_for_log("connection to NATS lost", DEADLINE)
            .await;
    }
    assert_eq!(
        rig.ledger
            .deliver(&rig.client, &rig.hook(), &bought())
            .await,
        Answer::Refused(503)
    );
    // The log names the reason, but not the password.
    for program in [rig.ingress(), rig.running(0)] {
        eventually("the reason in the log", DEADLINE, async || {
            let log = program.log();
            let log_lower = log.to_lowercase();
            if log_lower.contains("authorization") || log_lower.contains("authentication") {
                Ok(())
            } else {
                Err(log)
            }
        })
        .await;
        assert_eq!(count_in_log(program, good), 0);
        assert!(program.is_running(), "{}", program.log());
    }

    configure(&rig, |config| config.replace(other, good));
    rig.bridge
        .broker
        .process()
        .expect("it runs")
        .signal(Signal::Hup);
    rig.deliver_all(&[bought()]).await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn broker_host_that_vanishes_silently_is_noticed() {
    let rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.deliver_all(&[bought()]).await;
    rig.bridge.wait_until_applied().await;
    for link in [&rig.ingress_to_nats, &rig.worker_to_nats] {
        link.set(Mode::Strand);
    }
    rig.deliver_all(&[bought(), bought()]).await;
    check(&rig, Stream::Whole).await;
    assert_eq!(
        count_in_log(rig.running(0), "connection to NATS lost"),
        1,
        "{}",
        rig.running(0).log()
    );
}

/// Changes the broker's configuration file, which it reads at its start and on `SIGHUP`.
fn configure(rig: &Rig, change: impl FnOnce(String) -> String) {
    let path = rig.bridge.broker.folder().join("nats.conf");
    let config = std::fs::read_to_string(&path).expect("the harness wrote it");
    std::fs::write(&path, change(config)).expect("the folder is ours");
}

fn purchase() -> Purchase {
    let minute = Duration::from_secs(60);
    Purchase::new((OffsetDateTime::now_utc() - minute).unix_timestamp())
}

fn created(purchase: &Purchase) -> Event {
    purchase.subscription_event("customer.subscription.created", purchase.created, json!({}))
}

/// The event of the creation of a new subscription.
fn bought() -> Event {
    created(&purchase())
}
