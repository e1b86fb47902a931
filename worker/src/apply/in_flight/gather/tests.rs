use std::time::Duration;

use tokio::time::Instant;

use super::{Gather, WAIT_MAX, WANTED_BESIDE, WANTED_MAX};

const MS: Duration = Duration::from_millis(1);

/// Makes a `Gather` for a worker whose batches take 4 ms.
fn gather(limit: usize) -> (Gather, Instant) {
    let now = Instant::now();
    let mut gather = Gather::new(limit, now);
    for _ in 0..100 {
        gather.record_end(4 * MS);
    }
    (gather, now)
}

/// A batch is applied for 4 ms, and a message comes every `every` from its start on. Returns how
/// long after the first of them the next batch starts, and with how many messages.
fn next_batch(gather: &mut Gather, started: Instant, every: Duration) -> (Duration, usize) {
    gather.record_start(started);
    let first = started + every;
    let (mut now, mut count) = (first, 0);
    loop {
        count += 1;
        gather.record_arrival(1, count == 1, now);
        let is_beside_another = now < started + 4 * MS;
        if !gather.waits(count, is_beside_another, true, now) {
            return (now - first, count);
        }
        now += every;
    }
}

#[test]
fn lone_message_does_not_wait() {
    let (mut gather, now) = gather(250);
    let batch = next_batch(&mut gather, now, Duration::from_secs(5));
    assert_eq!(batch, (Duration::ZERO, 1));
}

#[test]
fn messages_that_come_one_by_one_do_not_wait() {
    let (mut gather, now) = gather(250);
    // As from one connection, whose next delivery is stored a millisecond after the one before.
    let batch = next_batch(&mut gather, now, MS);
    assert_eq!(
        batch,
        (3 * MS, 4),
        "it starts as soon as the one before is applied"
    );
}

#[test]
fn messages_that_come_fast_wait_for_others() {
    let (mut gather, now) = gather(250);
    let (waited, count) = next_batch(&mut gather, now, MS / 2);
    assert!(waited <= WAIT_MAX, "{waited:?}");
    assert!(count > 24, "{count}");
    let (_, count) = next_batch(&mut gather, now, MS / 10);
    assert_eq!(count, WANTED_MAX);
}

#[test]
fn wait_is_short_if_a_batch_takes_little_time() {
    let (mut gather, now) = gather(250);
    for _ in 0..100 {
        gather.record_end(MS / 2);
    }
    let batch = next_batch(&mut gather, now, MS / 2);
    assert_eq!(batch, (4 * MS - MS / 2, 8));
}

#[test]
fn batch_waits_for_no_more_than_its_limit() {
    let (mut gather, now) = gather(10);
    let (_, count) = next_batch(&mut gather, now, MS / 5);
    assert_eq!(count, 10);
}

#[test]
fn wait_ends_when_no_more_messages_come() {
    let (mut gather, now) = gather(250);
    gather.record_start(now);
    let first = now + MS;
    gather.record_arrival(30, true, first);
    assert!(gather.waits(30, false, true, first));
    assert!(!gather.waits(30, false, false, first), "no sync to share");
    let until = gather.until(false);
    assert!(until <= first + WAIT_MAX, "{until:?}");
    assert!(!gather.waits(30, false, true, until));
}

#[test]
fn small_batch_waits_beside_another_one() {
    let (mut gather, now) = gather(250);
    gather.record_start(now);
    let first = now + 1_000 * MS;
    gather.record_arrival(1, true, first);
    assert!(gather.waits(1, true, false, first));
    assert!(!gather.waits(1, true, false, first + WAIT_MAX));
    assert!(!gather.waits(WANTED_BESIDE, true, false, first));
}
