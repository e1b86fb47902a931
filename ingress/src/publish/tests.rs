use std::time::Duration;

use time::macros::datetime;

use super::message::received_at;
use super::{RETRY_AFTER_MAX, RETRY_AFTER_MIN, Report, Trouble, backoff};

#[test]
fn the_time_of_receipt_is_utc_with_milliseconds() {
    assert_eq!(received_at(datetime!(2026-11-23 16:47:05.0609 UTC)), "2026-11-23T16:47:05.060Z");
    assert_eq!(received_at(datetime!(2026-01-01 01:00 +02:00)), "2025-12-31T23:00:00.000Z");
}

#[test]
fn retries_wait_longer_and_never_too_long() {
    let delays: Vec<_> = backoff(RETRY_AFTER_MIN, RETRY_AFTER_MAX).take(50).collect();
    assert_eq!(delays.len(), 50, "it never gives up by itself");
    // Jitter adds up to one minimum.
    assert!(delays.iter().all(|delay| *delay <= RETRY_AFTER_MAX * 2), "{delays:?}");
    assert!(delays[0] < Duration::from_millis(150) && delays[49] >= RETRY_AFTER_MAX, "{delays:?}");
}

#[test]
fn trouble_is_announced_when_it_begins_and_not_per_request() {
    let report = Report::new();
    let announced = || report.last.lock().expect("nobody panics").clone();
    report.failed(&Trouble::NoAck);
    assert_eq!(announced(), Some(Trouble::NoAck));
    report.stored();
    assert_eq!(announced(), None);
    // Again at once: not announced yet, so that what comes and goes does not fill the log.
    report.failed(&Trouble::NoAck);
    assert_eq!(announced(), None);
}
