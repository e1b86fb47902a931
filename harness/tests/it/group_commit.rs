//! Group commit: events that wait for each other are stored in one atomic batch, and nobody can
//! tell from outside, neither Stripe nor whoever reads the stream.

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

/// What marks a stored message as a member of a batch.
const BATCH_ID: &str = "Nats-Batch-Id";

/// A broker that syncs its disk for every message, and an ingress with that setting.
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

/// A signed event of that id with a body of about that many bytes.
fn delivery(id: &str, bytes: usize) -> Delivery {
    let body = json!({ "id": id, "object": "event", "type": TYPE, "filling": "x".repeat(bytes) });
    Delivery::new(body.to_string(), SECRET)
}

/// Posts all at once, each with a trace, and returns the statuses.
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

/// Everything in the stream.
async fn stored(bridge: &Bridge) -> Vec<Message> {
    let stream = bridge
        .jetstream()
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .expect("ingress made it");
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

fn in_batches(messages: &[Message]) -> usize {
    messages
        .iter()
        .filter(|message| value(message, BATCH_ID).is_some())
        .count()
}

/// Whether the broker knows batches at all: one before 2.12 does not, and works without.
async fn takes_batches(bridge: &Bridge) -> bool {
    let stream = bridge
        .jetstream()
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .expect("ingress made it");
    stream.cached_info().config.allow_atomic_publish
}

#[tokio::test]
async fn events_in_batches_are_stored_once_and_as_they_were_signed() {
    let bridge = bridge("on").await;
    // From a few bytes to more than a batch takes; 19 MB together, so that none is refused for the
    // 32 MiB of bodies that may wait.
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
        in_batches(&messages) > 0,
        takes_batches(&bridge).await,
        "no event was in a batch"
    );
}

#[tokio::test]
async fn a_repeated_event_spoils_no_batch() {
    let bridge = bridge("on").await;
    let known: Vec<_> = (0..20)
        .map(|n| delivery(&format!("evt_{n}"), 1_000))
        .collect();
    assert_eq!(post_all(&bridge, known).await, [200; 20]);
    // Each of them again, in one batch with events that are new, and those several times too.
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
    for counted in [r#"{outcome="stored"} 100"#, r#"{outcome="duplicate"} 320"#] {
        assert!(page.contains(counted), "no {counted} in {page}");
    }
}

#[tokio::test]
async fn a_stream_that_takes_no_batches_gets_none_and_is_left_as_it_is() {
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
    assert_eq!((messages.len(), in_batches(&messages)), (200, 0));
    let stream = bridge
        .jetstream()
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .expect("it is there");
    assert!(!stream.cached_info().config.allow_atomic_publish);
    bridge
        .ingress()
        .wait_for_log("does not allow atomic batches", DEADLINE)
        .await;
}

#[tokio::test]
async fn group_commit_that_is_off_sends_no_batch() {
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
    assert_eq!((messages.len(), in_batches(&messages)), (200, 0));
}

/// Left to itself, ingress tries both ways while this goes on.
#[tokio::test]
async fn every_event_is_stored_once_whichever_way_is_tried() {
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
            in_batches(&messages) > 0,
            takes_batches(&bridge).await,
            "nothing was tried"
        );
    }
}

/// A stream takes 50 unfinished batches of all its clients together.
#[tokio::test]
async fn batches_that_others_leave_unfinished_hinder_nobody() {
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
async fn a_broker_killed_amid_batches_loses_no_accepted_event() {
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
                    200 => drop(accepted.lock().expect("nobody panics").insert(id)),
                    status => assert_eq!(status, 503),
                }
            }
        });
    }
    for wanted in [200, 600, 1_000] {
        eventually("events to be accepted", DEADLINE, async || {
            match accepted.lock().expect("nobody panics").len() {
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
    assert_eq!(messages.len(), stored.len(), "an event is there twice");
    let accepted = accepted.lock().expect("nobody panics").clone();
    let lost: Vec<_> = accepted
        .iter()
        .filter(|id| !stored.contains(id.as_str()))
        .collect();
    assert!(lost.is_empty(), "lost {lost:?}");
    assert_eq!(
        in_batches(&messages) > 0,
        takes_batches(&bridge).await,
        "no event was in a batch"
    );
}
