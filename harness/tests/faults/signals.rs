//! Signals in atomic batches: a worker that dies before it removes them, and brokers that refuse
//! batches.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;

use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use futures_util::StreamExt as _;
use litestripe_contract::header;
use litestripe_contract::subject::{SIGNALS_STREAM, SUBSCRIPTION_CHANGED};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::nats;

use crate::check::BATCH_ID;
use crate::rig::{DEADLINE, Rig};

/// Signals that wait in the outbox before the worker starts, of a third as many subscriptions.
const SIGNALS: usize = 300;

/// Starts everything, and stops the worker again. Then signals wait in the outbox.
async fn prepare(database: DatabaseKind, broker: nats::Options) -> Rig {
    let mut rig = Rig::servers(database, broker).await;
    rig.start_programs(1, &[]).await;
    assert!(rig.running(0).stop().await.success());
    let insert = format!(
        "WITH RECURSIVE n(k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM n WHERE k + 1 < {SIGNALS}) \
         INSERT INTO litestripe_signal_outbox \
         (shard, entity_id, subject, message_id, event_created, body, dt_created) SELECT k % {subscriptions} % 16, \
         'sub_' || (k % {subscriptions}), '{SUBSCRIPTION_CHANGED}', 'signal_' || k, 1700000000, CAST(k AS text), \
         '2026-01-01 00:00:00+00:00' FROM n",
        subscriptions = SIGNALS / 3,
    );
    let inserted = rig.bridge.database.query(&insert).await;
    inserted.expect("the table exists");
    rig
}

/// Returns the messages in the stream of signals.
async fn sent(rig: &Rig) -> Vec<Message> {
    let stream = rig.bridge.stream(SIGNALS_STREAM).await;
    let count = stream.cached_info().state.messages;
    let consumer = stream.create_consumer(pull::OrderedConfig::default());
    let consumer = consumer.await.expect("it can be made");
    let messages = consumer.messages().await.expect("messages can be pulled");
    messages
        .take(usize::try_from(count).expect("a test's messages fit into memory"))
        .map(|message| message.expect("a message comes"))
        .collect()
        .await
}

/// Checks that each signal is in the stream once, and those of one subscription in their order.
/// Returns how many were members of a batch.
async fn check_sent(rig: &Rig) -> usize {
    rig.bridge.wait_until_applied().await;
    let messages = sent(rig).await;
    assert_eq!(messages.len(), SIGNALS);
    let mut last: BTreeMap<String, usize> = BTreeMap::new();
    for message in &messages {
        let number: usize = std::str::from_utf8(&message.payload)
            .ok()
            .and_then(|body| body.parse().ok())
            .expect("the test's signals are numbers");
        let subscription = format!("sub_{}", number % (SIGNALS / 3));
        let before = last.insert(subscription, number);
        assert!(before < Some(number), "{number} comes after {before:?}");
    }
    count_in_batches(&messages)
}

fn count_in_batches(messages: &[Message]) -> usize {
    let is_member = |message: &&Message| {
        let headers = message.headers.as_ref();
        headers.is_some_and(|headers| headers.get(BATCH_ID).is_some())
    };
    messages.iter().filter(is_member).count()
}

/// Whether the broker supports batches. One before 2.12 does not, and the relay works without them.
async fn accepts_batches(rig: &Rig) -> bool {
    let stream = rig.bridge.stream(SIGNALS_STREAM).await;
    stream.cached_info().config.allow_atomic_publish
}

#[tokio::test]
async fn sqlite_signals_of_a_worker_that_dies_before_it_removes_them_are_sent_once() {
    dies_before_the_removal(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_signals_of_a_worker_that_dies_before_it_removes_them_are_sent_once() {
    dies_before_the_removal(DatabaseKind::Postgres).await;
}

async fn dies_before_the_removal(database: DatabaseKind) {
    let mut rig = prepare(database, nats::Options::default()).await;
    rig.start_worker(0, &[("FAILPOINTS", "worker::after_signal=1*return")]);
    let status = rig.running(0).wait(DEADLINE).await;
    assert!(status.signal().is_some(), "{status}");
    let messages = sent(&rig).await;
    assert_eq!(messages.len(), SIGNALS);
    let in_batches = count_in_batches(&messages);
    let expected = usize::from(accepts_batches(&rig).await) * SIGNALS;
    assert_eq!(in_batches, expected);

    // The next worker sends the same batch, of which the broker has all members already.
    rig.start_worker(0, &[]);
    check_sent(&rig).await;
}

#[tokio::test]
async fn a_batch_with_a_signal_that_is_stored_already_is_sent_one_by_one() {
    let mut rig = prepare(DatabaseKind::Postgres, nats::Options::default()).await;
    for number in [7, 42] {
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, format!("signal_{number}").as_str());
        let jetstream = rig.bridge.jetstream().await;
        let body = number.to_string().into();
        let publishing = jetstream.publish_with_headers(SUBSCRIPTION_CHANGED, headers, body);
        let ack = publishing.await.expect("it is sent").await;
        ack.expect("it is stored");
    }
    rig.start_worker(0, &[]);
    assert_eq!(check_sent(&rig).await, 0);
}

#[tokio::test]
async fn a_broker_that_accepts_only_small_batches_gets_signals_one_by_one() {
    let broker = nats::Options {
        jetstream: "limits { batch { max_msgs: 20 } }".to_owned(),
        ..nats::Options::default()
    };
    let mut rig = prepare(DatabaseKind::Postgres, broker).await;
    rig.start_worker(0, &[]);
    assert_eq!(check_sent(&rig).await, 0);
}

#[tokio::test]
async fn a_stream_that_does_not_allow_batches_gets_signals_one_by_one_and_is_not_changed() {
    let mut rig = prepare(DatabaseKind::Sqlite, nats::Options::default()).await;
    let jetstream = rig.bridge.jetstream().await;
    let stream = rig.bridge.stream(SIGNALS_STREAM).await;
    let config = Config {
        allow_atomic_publish: false,
        ..stream.cached_info().config.clone()
    };
    let updated = jetstream.update_stream(config).await;
    updated.expect("the server allows to forbid batches");
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("does not allow atomic batches", DEADLINE)
        .await;
    assert_eq!(check_sent(&rig).await, 0);
    assert!(!accepts_batches(&rig).await);
}
