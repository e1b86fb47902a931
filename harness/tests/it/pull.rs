//! The pull requests with which a worker fetches messages, and their ends.

use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;

/// A request expires after half a minute.
const EXPIRED: Duration = Duration::from_secs(90);

/// Part of the line that the worker logs when it sends a new request because the old one may be
/// lost.
const DOUBT: &str = "the server has stopped sending heartbeats";

#[tokio::test]
async fn idle_worker_sends_a_new_request_when_the_old_one_has_expired() {
    let bridge = Bridge::start(verbose()).await;
    let worker = &bridge.workers[0];
    worker
        .wait_for_log("the server ended a pull request early: 408", EXPIRED)
        .await;

    let purchase = purchase();
    bridge.deliver(&created(&purchase, "")).await;

    bridge.check().await;
    bridge.row(&purchase.subscription).await;
    assert_eq!(worker.count_in_log(DOUBT), 0, "{}", worker.log());
}

/// A request ends once it has brought 8 MiB.
#[tokio::test]
async fn events_larger_than_one_request_may_bring_are_all_applied() {
    const EVENTS: usize = 240;
    let bridge = Bridge::start(verbose()).await;
    let padding = "p".repeat(200 << 10);
    let events: Vec<_> = (0..EVENTS)
        .map(|_| created(&purchase(), &padding))
        .collect();
    let message = |event: &Event| -> (String, Bytes, String) {
        (
            event.event_type().to_owned(),
            event.body(),
            event.id().to_owned(),
        )
    };
    bridge
        .publish_all(events.iter().map(message).collect())
        .await;

    assert_eq!(bridge.check().await.len(), EVENTS);
    let worker = &bridge.workers[0];
    assert_ne!(
        worker.count_in_log("the server ended a pull request early: 409"),
        0,
        "{}",
        worker.log()
    );
    assert_eq!(worker.count_in_log(DOUBT), 0, "{}", worker.log());
}

/// The worker does not change the limits of an existing consumer.
#[tokio::test]
async fn worker_names_the_consumer_limit_that_keeps_it_from_consuming() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
    let stream: Stream = bridge.stream(EVENTS_STREAM).await;
    let limited = pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        max_batch: 10,
        ..pull::Config::default()
    };
    stream
        .create_consumer(limited.clone())
        .await
        .expect("a consumer can be made");
    bridge.deliver(&created(&purchase(), "")).await;
    bridge.start_worker();
    let worker = &bridge.workers[0];
    let said = "Exceeded MaxRequestBatch of 10): raise that limit of the consumer, or if it is MaxRequestBatch, lower LITESTRIPE_BATCH";
    worker.wait_for_log(said, EXPIRED).await;

    stream
        .update_consumer(pull::Config {
            max_batch: 0,
            ..limited
        })
        .await
        .expect("its limits can be changed");

    bridge.check().await;
    assert_eq!(
        (bridge.rows().await.len(), worker.count_in_log(said)),
        (1, 1),
        "{}",
        worker.log()
    );
}

fn verbose() -> Options {
    Options::new(DatabaseKind::Sqlite).worker("RUST_LOG", "info,litestripe_worker=debug")
}

fn purchase() -> Purchase {
    Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 60)
}

fn created(purchase: &Purchase, padding: &str) -> Event {
    let mut event =
        purchase.subscription_event("customer.subscription.created", purchase.created, json!({}));
    event.value["padding"] = json!(padding);
    event
}
