//! Group commit: events that wait for each other are stored in one atomic batch, with no difference
//! to Stripe or to a reader of the stream.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use futures_util::StreamExt as _;
use litestripe_contract::header;
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET};
use litestripe_harness::stripe::{self, Delivery};
use litestripe_harness::{eventually, nats};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::JoinSet;

const TYPE: &str = "customer.subscription.updated";
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const DEADLINE: Duration = Duration::from_secs(60);

/// The header of a stored message that was a member of a batch.
const BATCH_ID: &str = "Nats-Batch-Id";

/// Starts a broker that syncs its disk for every message, and an ingress with `group_commit`.
async fn bridge(group_commit: &str) -> Bridge {
    let mut bridge = prepare(group_commit, "sync_interval: always").await;
    bridge.start_ingress().wait_until_ready().await;
    bridge
}

async fn prepare(group_commit: &str, jetstream: &str) -> Bridge {
    let options = Options::new(DatabaseKind::Sqlite)
        .workers(0)
        .ingress("LITESTRIPE_GROUP_COMMIT", group_commit);
    let mut bridge = Bridge::prepare(options);
    let broker = nats::Options {
        jetstream: jetstream.to_owned(),
        ..nats::Options::default()
    };
    bridge.broker = nats::Server::prepare(broker).expect("a folder for nats-server can be made");
    bridge.broker.resume().await;
    bridge
}

/// Makes a signed event with this id and a body of about `bytes` bytes.
fn delivery(id: &str, bytes: usize) -> Delivery {
    let body = json!({ "id": id, "object": "event", "type": TYPE, "filling": "x".repeat(bytes) });
    Delivery::new(body.to_string(), SECRET)
}

/// Posts all deliveries at once, each with a trace context, and returns the statuses.
async fn post_all(bridge: &Bridge, deliveries: Vec<Delivery>) -> Vec<u16> {
    let (client, hook) = (stripe::client(), bridge.hook());
    let mut posts = JoinSet::new();
    for delivery in deliveries {
        let request = client
            .post(&hook)
            .body(delivery.body().clone())
            .header("traceparent", TRACEPARENT);
        let request = request.header(
            "Stripe-Signature",
            delivery.signature().expect("it is signed"),
        );
        posts.spawn(async move {
            request
                .send()
                .await
                .expect("ingress answers")
                .status()
                .as_u16()
        });
    }
    posts.join_all().await
}

/// Returns all messages in the stream.
async fn stored(bridge: &Bridge) -> Vec<Message> {
    let stream = bridge.stream(EVENTS_STREAM).await;
    let count = usize::try_from(stream.cached_info().state.messages)
        .expect("a test's messages fit into memory");
    let consumer = stream
        .create_consumer(pull::OrderedConfig::default())
        .await
        .expect("it can be made");
    let messages = consumer.messages().await.expect("messages can be pulled");
    messages
        .take(count)
        .map(|message| message.expect("a message comes"))
        .collect()
        .await
}

fn value<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    message
        .headers
        .as_ref()?
        .get(name)
        .map(|value| value.as_str())
}

fn ids(messages: &[Message]) -> BTreeSet<&str> {
    messages
        .iter()
        .filter_map(|message| value(message, header::MESSAGE_ID))
        .collect()
}

/// Counts the messages that were stored in a batch.
fn count_in_batches(messages: &[Message]) -> usize {
    messages
        .iter()
        .filter(|message| value(message, BATCH_ID).is_some())
        .count()
}

/// Whether the broker supports batches. One before 2.12 does not, and ingress works without them.
async fn accepts_batches(bridge: &Bridge) -> bool {
    let stream = bridge.stream(EVENTS_STREAM).await;
    stream.cached_info().config.allow_atomic_publish
}

#[tokio::test]
async fn events_in_batches_are_stored_once_and_as_they_were_signed() {
    let bridge = bridge("on").await;
    // From a few bytes to more than a batch accepts. Together they are 19 MB, so that none is
    // refused for the limit of 32 MiB of waiting bodies.
    let sizes = [10, 2_000, 4_000, 20_000, 60_000, 300_000];
    let deliveries: BTreeMap<_, _> = (0..300)
        .map(|n| format!("evt_{n}"))
        .zip(sizes.iter().cycle())
        .map(|(id, bytes)| (id.clone(), delivery(&id, *bytes)))
        .collect();
    let statuses = post_all(&bridge, deliveries.values().cloned().collect()).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");

    let messages = stored(&bridge).await;
    assert_eq!(messages.len(), deliveries.len());
    for message in &messages {
        let id = value(message, header::MESSAGE_ID).expect("it has a message id");
        let sent = &deliveries[id];
        assert_eq!(message.subject.as_str(), format!("{EVENTS_PREFIX}{TYPE}"));
        assert_eq!(&message.payload, sent.body(), "{id}");
        assert_eq!(
            value(message, header::STRIPE_SIGNATURE),
            sent.signature(),
            "{id}"
        );
        assert_eq!(
            value(message, header::TRACEPARENT),
            Some(TRACEPARENT),
            "{id}"
        );
        let received = value(message, header::RECEIVED_AT).expect("the time of receipt is stored");
        OffsetDateTime::parse(received, &Rfc3339).expect("it is RFC 3339");
        let is_large = message.payload.len() > 200_000;
        assert!(
            !is_large || value(message, BATCH_ID).is_none(),
            "{id} is too large for a batch"
        );
    }
    assert_eq!(ids(&messages).len(), deliveries.len());
    assert_eq!(
        count_in_batches(&messages) > 0,
        accepts_batches(&bridge).await,
        "no event was in a batch"
    );
}

#[tokio::test]
async fn repeated_events_in_a_batch_are_stored_once() {
    let bridge = bridge("on").await;
    let known: Vec<_> = (0..20)
        .map(|n| delivery(&format!("evt_{n}"), 1_000))
        .collect();
    assert_eq!(post_all(&bridge, known).await, [200; 20]);
    // Each of them again, mixed with new events, and each of those several times.
    let repeated: Vec<_> = (0..400)
        .map(|n| delivery(&format!("evt_{}", n % 100), 1_000))
        .collect();
    let statuses = post_all(&bridge, repeated).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    let messages = stored(&bridge).await;
    assert_eq!((messages.len(), ids(&messages).len()), (100, 100));

    let (_, page) = bridge
        .ingress()
        .page("/metrics")
        .await
        .expect("ingress answers");
    for counted in [
        r#"{outcome="stored"} 100"#,
        r#"{outcome="duplicate"} 320"#,
        r#"litestripe_ingress_group_commit{state="grouped"} 1"#,
    ] {
        assert!(page.contains(counted), "no {counted} in {page}");
    }
}

#[tokio::test]
async fn a_stream_that_does_not_allow_batches_gets_none_and_is_not_changed() {
    let mut bridge = prepare("on", "sync_interval: always").await;
    let config = Config {
        name: EVENTS_STREAM.to_owned(),
        subjects: vec![format!("{EVENTS_PREFIX}>")],
        duplicate_window: Duration::from_secs(60),
        ..Config::default()
    };
    bridge
        .jetstream()
        .await
        .create_stream(config)
        .await
        .expect("a stream can be made");
    bridge.start_ingress().wait_until_ready().await;
    let statuses = post_all(
        &bridge,
        (0..200)
            .map(|n| delivery(&format!("evt_{n}"), 1_000))
            .collect(),
    )
    .await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");

    let messages = stored(&bridge).await;
    assert_eq!((messages.len(), count_in_batches(&messages)), (200, 0));
    let stream = bridge.stream(EVENTS_STREAM).await;
    assert!(!stream.cached_info().config.allow_atomic_publish);
    bridge
        .ingress()
        .wait_for_log("does not allow atomic batches", DEADLINE)
        .await;
}

#[tokio::test]
async fn no_batch_is_sent_when_group_commit_is_off() {
    let bridge = bridge("off").await;
    let statuses = post_all(
        &bridge,
        (0..200)
            .map(|n| delivery(&format!("evt_{n}"), 1_000))
            .collect(),
    )
    .await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    let messages = stored(&bridge).await;
    assert_eq!((messages.len(), count_in_batches(&messages)), (200, 0));
}

/// With `auto`, ingress tries both modes during this test.
#[tokio::test]
async fn every_event_is_stored_once_while_both_modes_are_tried() {
    for jetstream in ["", "sync_interval: always"] {
        let mut bridge = prepare("auto", jetstream).await;
        bridge.start_ingress().wait_until_ready().await;
        for round in 0..10 {
            let deliveries = (0..200)
                .map(|n| delivery(&format!("evt_{round}_{n}"), 1_000))
                .collect();
            let statuses = post_all(&bridge, deliveries).await;
            assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
        }
        let messages = stored(&bridge).await;
        assert_eq!((messages.len(), ids(&messages).len()), (2_000, 2_000));
        assert_eq!(
            count_in_batches(&messages) > 0,
            accepts_batches(&bridge).await,
            "batches were not tried"
        );
    }
}

/// A stream accepts 50 unfinished batches from all its clients together.
#[tokio::test]
async fn unfinished_batches_of_other_clients_do_not_stop_ingress() {
    let bridge = bridge("on").await;
    let client = bridge.broker.connect().await;
    for n in 0..60 {
        let mut headers = HeaderMap::new();
        headers.insert(BATCH_ID, format!("unfinished_{n}"));
        headers.insert("Nats-Batch-Sequence", "1");
        let subject = format!("{EVENTS_PREFIX}{TYPE}");
        client
            .publish_with_headers(subject, headers, "{}".into())
            .await
            .expect("it is sent");
    }
    client.flush().await.expect("the broker takes it");
    let statuses = post_all(
        &bridge,
        (0..200)
            .map(|n| delivery(&format!("evt_{n}"), 1_000))
            .collect(),
    )
    .await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    assert_eq!(ids(&stored(&bridge).await).len(), 200);
}

#[tokio::test]
async fn no_accepted_event_is_lost_when_the_broker_is_killed_during_batches() {
    let mut bridge = bridge("on").await;
    let accepted = Arc::new(Mutex::new(BTreeSet::new()));
    let (client, hook) = (stripe::client(), bridge.hook());
    let mut senders = JoinSet::new();
    for sender in 0..64 {
        let (client, hook, accepted) = (client.clone(), hook.clone(), Arc::clone(&accepted));
        senders.spawn(async move {
            for n in 0..40 {
                let id = format!("evt_{sender}_{n}");
                let answer = delivery(&id, 2_000)
                    .post(&client, &hook)
                    .await
                    .expect("ingress answers");
                match answer.status().as_u16() {
                    200 => drop(accepted.lock().expect("no thread panics").insert(id)),
                    status => assert_eq!(status, 503),
                }
            }
        });
    }
    for wanted in [200, 600, 1_000] {
        eventually("events to be accepted", DEADLINE, async || {
            match accepted.lock().expect("no thread panics").len() {
                count if count >= wanted => Ok(()),
                count => Err(format!("{count} of {wanted}")),
            }
        })
        .await;
        bridge.broker.kill().await;
        bridge.broker.resume().await;
    }
    senders.join_all().await;
    bridge.ingress().wait_until_ready().await;

    let messages = stored(&bridge).await;
    let stored = ids(&messages);
    assert_eq!(messages.len(), stored.len(), "an event is stored twice");
    let accepted = accepted.lock().expect("no thread panics").clone();
    let lost: Vec<_> = accepted
        .iter()
        .filter(|id| !stored.contains(id.as_str()))
        .collect();
    assert!(lost.is_empty(), "lost {lost:?}");
    assert_eq!(
        count_in_batches(&messages) > 0,
        accepts_batches(&bridge).await,
        "no event was in a batch"
    );
}
