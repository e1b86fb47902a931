//! Overload with large bodies: memory stays bounded, and ingress answers 503 so that Stripe
//! retries.

use std::time::Duration;

use async_nats::jetstream::stream;
use futures_util::future::join_all;
use litestripe_contract::settings::StreamSettings;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::eventually;
use litestripe_harness::process::Signal;
use litestripe_harness::program::Program;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;

use crate::check::{Stream, check};
use crate::ledger::Answer;
use crate::rig::{DEADLINE, Rig, count_in_log};

/// A little below the largest body that ingress accepts.
const BODY_BYTES: usize = 900_000;
const BODIES: usize = 80;
/// The number of poisoned events, 270 MB in all.
const POISON: usize = 300;
/// With the system's allocator: tests build without the release's. Ingress keeps up to 32 MiB of
/// bodies; even a debug build needs far less than the rest for other things.
const INGRESS_MIB_MAX: u64 = 128;
/// The worker holds 8 MiB of prefetched messages, a batch of the same size, and 16 MiB of dead
/// letters in flight.
const WORKER_MIB_MAX: u64 = 192;

/// As long as there is room.
const DEAD_LETTERS: StreamSettings = StreamSettings {
    max_age: Duration::ZERO,
    max_bytes: None,
};

#[tokio::test]
async fn bodies_beyond_the_bound_are_refused_and_memory_stays_bounded() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let events: Vec<Event> = (0..BODIES).map(|_| large(json!({}))).collect();
    let hook = rig.hook();
    let broker = rig.bridge.broker.process().expect("it runs");
    broker.signal(Signal::Stop);
    let deliveries = events
        .iter()
        .map(|event| rig.ledger.deliver(&rig.client, &hook, event));
    let answers = join_all(deliveries).await;
    // The ledger checks that every 503 has `Retry-After`.
    assert!(
        answers.iter().all(|answer| *answer == Answer::Refused(503)),
        "{answers:?}"
    );
    let refused = rig.count_deliveries("no_room").await;
    // The others waited for the broker.
    let waited = rig.count_deliveries("unavailable").await;
    assert!(
        refused >= BODIES - 38 && refused + waited == BODIES,
        "bodies of 32 MiB are kept, the others are refused: {refused}, {waited}"
    );
    let peak = peak_mib(rig.ingress());
    assert!(peak < INGRESS_MIB_MAX, "ingress took {peak} MiB");

    broker.signal(Signal::Cont);
    rig.deliver_all(&events).await;
    check(&rig, Stream::Whole).await;
    let peak = peak_mib(rig.ingress());
    assert!(peak < INGRESS_MIB_MAX, "ingress took {peak} MiB");
}

#[tokio::test]
async fn worker_with_a_backlog_of_large_bodies_takes_bounded_memory() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 0, &[]).await;
    for events in (0..BODIES)
        .map(|_| large(json!({})))
        .collect::<Vec<_>>()
        .chunks(8)
    {
        rig.deliver_all(events).await;
    }
    rig.start_worker(0, &[]);
    // Two passes: the recreated consumer delivers every message again.
    check(&rig, Stream::Whole).await;
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    stream
        .delete_consumer(WORKER_CONSUMER)
        .await
        .expect("a consumer can be deleted");
    check(&rig, Stream::Whole).await;
    let peak = peak_mib(rig.running(0));
    assert!(peak < WORKER_MIB_MAX, "the worker took {peak} MiB");
}

#[tokio::test]
async fn worker_with_a_backlog_of_large_poison_takes_bounded_memory() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    // This stream sends no PubAck, so each dead letter stays in flight until the worker's timeout.
    let without_ack = stream::Config {
        no_ack: true,
        ..litestripe_contract::stream::dead_letters(1, DEAD_LETTERS, 10 << 30)
    };
    rig.bridge
        .jetstream()
        .await
        .create_stream(without_ack)
        .await
        .expect("a stream can be made");
    let poison = (0..POISON).map(|_| large(json!({ "trial_end": i64::MAX })));
    let messages = poison.map(|event| {
        (
            event.event_type().to_owned(),
            event.body(),
            event.id().to_owned(),
        )
    });
    for some in messages.collect::<Vec<_>>().chunks(8) {
        rig.bridge.publish_all(some.to_vec()).await;
    }
    rig.start_worker(0, &[]);
    eventually(
        "the worker to give up on more dead letters than it may have in flight",
        DEADLINE,
        async || match count_in_log(rig.running(0), "its dead letter cannot be stored yet") {
            count if count >= 30 => Ok(()),
            count => Err(format!("{count} times")),
        },
    )
    .await;
    let peak = peak_mib(rig.running(0));
    assert!(peak < WORKER_MIB_MAX, "the worker took {peak} MiB");
}

/// Returns a program's peak memory in MiB.
fn peak_mib(program: &Program) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", program.id())).expect("it runs");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("Linux counts memory");
    let kib: u64 = peak
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("it is a number");
    eprintln!("peak {} MiB", kib >> 10);
    kib >> 10
}

fn large(changes: serde_json::Value) -> Event {
    let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 60);
    let mut changes = changes;
    changes["description"] = json!("x".repeat(BODY_BYTES));
    purchase.subscription_event("customer.subscription.created", purchase.created, changes)
}
