//! The progress of the workers, read at the moment in which an event was stored.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::jetstream::consumer::pull::Config;
use futures_util::StreamExt as _;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_worker::stream::progress;

const BUSY_THREADS: usize = 4;

/// JetStream answers the publisher before it counts the message as pending for consumers, so that
/// for a moment the workers' consumer has "nothing pending".
#[tokio::test]
async fn event_that_was_just_stored_does_not_count_as_applied() {
    const EVENTS: usize = 600;
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
    let jetstream = bridge.jetstream().await;
    let stream = bridge.stream(EVENTS_STREAM).await;
    let durable = Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        ..Config::default()
    };
    let consumer = stream
        .create_consumer(durable)
        .await
        .expect("it can be created");
    let mut messages = consumer.messages().await.expect("they can be asked for");

    // On an idle machine that moment is too short for the test to hit.
    let done = Arc::new(AtomicBool::new(false));
    for _ in 0..BUSY_THREADS {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
    }
    let _done = SetOnDrop(done);

    for _ in 0..EVENTS {
        let stored = jetstream
            .publish("stripe.events.test", "{}".into())
            .await
            .expect("it can be sent")
            .await
            .expect("it is stored");
        let until = progress::applied_until(jetstream)
            .await
            .expect("the broker answers")
            .expect("the consumer exists");
        assert!(until < stored.sequence, "{until}, {}", stored.sequence);
        let message = messages
            .next()
            .await
            .expect("it is delivered")
            .expect("it can be read");
        message.double_ack().await.expect("it can be acked");
        let until = progress::applied_until(jetstream).await;
        assert_eq!(until.expect("the broker answers"), Some(u64::MAX));
    }
}

/// Ends the busy threads, also when the test fails.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
