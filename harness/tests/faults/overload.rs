//! More than there is room for: memory stays bounded, and Stripe is told to come again.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::process::Signal;
use litestripe_harness::program::Program;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;

use crate::check::{Stream, check};
use crate::ledger::Answer;
use crate::rig::Rig;

/// A little below the largest body there is.
const BODY_BYTES: usize = 900_000;
const BODIES: usize = 80;
/// Ingress keeps 32 MiB of bodies; what it needs beside them is far from this in a debug build.
const INGRESS_MIB_MAX: u64 = 128;
/// The worker fetches 8 MiB ahead and has a batch of as much in hand.
const WORKER_MIB_MAX: u64 = 192;

#[tokio::test]
async fn bodies_beyond_the_bound_are_refused_and_memory_stays_bounded() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let events: Vec<Event> = (0..BODIES).map(|_| large()).collect();
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
    assert!(answers.iter().all(|(answer, _)| *answer == Answer::Refused(503)), "{answers:?}");
    let at_once = answers.iter().filter(|(_, took)| *took < Duration::from_secs(6)).count();
    assert!(at_once >= BODIES - 38, "32 MiB fit, the others are refused at once: {answers:?}");
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
    for events in (0..BODIES).map(|_| large()).collect::<Vec<_>>().chunks(8) {
        rig.deliver_all(events).await;
    }
    rig.start_worker(0, &[]);
    // Twice, since the consumer that is made again delivers all of it again.
    check(&rig, Stream::Whole).await;
    let stream = rig.bridge.jetstream().await.get_stream(EVENTS_STREAM).await.expect("ingress made it");
    stream.delete_consumer(WORKER_CONSUMER).await.expect("a consumer can be deleted");
    check(&rig, Stream::Whole).await;
    let peak = peak_mib(rig.running(0));
    assert!(peak < WORKER_MIB_MAX, "the worker took {peak} MiB");
}

/// The most memory that a program ever had, in MiB.
fn peak_mib(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux counts memory");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("it is a number");
    eprintln!("peak {} MiB", kib >> 10);
    kib >> 10
}

fn large() -> Event {
    let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp() - 60);
    let changes = json!({ "description": "x".repeat(BODY_BYTES) });
    purchase.subscription_event("customer.subscription.created", purchase.created, changes)
}
