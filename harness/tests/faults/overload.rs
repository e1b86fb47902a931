//! More than there is room for: memory stays bounded, and Stripe is told to come again.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream;
use futures_util::future::join_all;
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

/// A little below the largest body there is.
const BODY_BYTES: usize = 900_000;
const BODIES: usize = 80;
/// 270 MB of it.
const POISON: usize = 300;
/// Ingress keeps 32 MiB of bodies; what it needs beside them is far from this in a debug build.
const INGRESS_MIB_MAX: u64 = 128;
/// The worker fetches 8 MiB ahead, has a batch of as much in hand, and 16 MiB of dead letters on their way.
const WORKER_MIB_MAX: u64 = 192;

#[tokio::test]
async fn bodies_beyond_the_bound_are_refused_and_memory_stays_bounded() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let events: Vec<Event> = (0..BODIES).map(|_| large(json!({}))).collect();
    let hook = rig.hook();
    let broker = rig.bridge.broker.process().expect("it runs");
    broker.signal(Signal::Stop);
    let begun = Instant::now();
    let deliveries = events.iter().map(|event| async {
        let answer = rig.ledger.deliver(&rig.client, &hook, event).await;
        (answer, begun.elapsed())
    });
    let answers = join_all(deliveries).await;
    // That a 503 says when to come again is checked by whoever delivers.
    assert!(
        answers
            .iter()
            .all(|(answer, _)| *answer == Answer::Refused(503)),
        "{answers:?}"
    );
    let at_once = answers
        .iter()
        .filter(|(_, took)| *took < Duration::from_secs(6))
        .count();
    assert!(
        at_once >= BODIES - 38,
        "32 MiB fit, the others are refused at once: {answers:?}"
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
    // Twice, since the consumer that is made again delivers all of it again.
    check(&rig, Stream::Whole).await;
    let stream = rig
        .bridge
        .jetstream()
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .expect("ingress made it");
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
    // Nobody hears whether a dead letter is stored: each is on its way for as long as it may.
    let deaf = stream::Config {
        no_ack: true,
        ..litestripe_contract::stream::dead_letters(1, Duration::ZERO)
    };
    rig.bridge
        .jetstream()
        .await
        .create_stream(deaf)
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
        "the worker to give up on more than it may have in hand",
        DEADLINE,
        async || match count_in_log(
            rig.running(0),
            "cannot be put aside and will be tried again",
        ) {
            count if count >= 30 => Ok(()),
            count => Err(format!("{count} times")),
        },
    )
    .await;
    let peak = peak_mib(rig.running(0));
    assert!(peak < WORKER_MIB_MAX, "the worker took {peak} MiB");
}

/// The most memory that a program ever had, in MiB.
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
