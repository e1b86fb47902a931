use std::time::Duration;

use tokio::time::Instant;

use super::{HOLD, SignalCosts, Way};

const fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

/// Sends rounds of `count` signals until both ways are measured, and returns the chosen way. One
/// signal takes `single`, and a batch without its members `batch`.
fn chosen(count: usize, single: Duration, batch: Duration) -> Way {
    let (costs, now) = (SignalCosts::default(), Instant::now());
    for _ in 0..4 {
        round(&costs, count, single, batch, now);
    }
    costs.choose(count, now)
}

fn round(
    costs: &SignalCosts,
    count: usize,
    single: Duration,
    batch: Duration,
    now: Instant,
) -> Way {
    let way = costs.choose(count, now);
    let took = match way {
        Way::OneByOne => single * count as u32,
        Way::Batch => batch + micros(10) * count as u32,
    };
    costs.record(way, count, took, now);
    way
}

#[test]
fn large_round_is_a_batch_if_the_broker_syncs_each_message() {
    assert_eq!(chosen(64, micros(200), micros(3_000)), Way::Batch);
}

#[test]
fn round_is_sent_one_by_one_if_the_broker_does_not_sync() {
    assert_eq!(chosen(64, micros(20), micros(3_000)), Way::OneByOne);
}

#[test]
fn small_round_is_a_batch_only_if_syncs_are_slow() {
    let (costs, now) = (SignalCosts::default(), Instant::now());
    for (single, expected) in [(200, Way::OneByOne), (1_000, Way::Batch)] {
        for count in [64, 64, 8, 8, 8, 8, 8, 8, 8, 8] {
            round(&costs, count, micros(single), micros(3_000), now);
        }
        costs.record(Way::OneByOne, 64, micros(single) * 64, now);
        assert_eq!(costs.choose(8, now), expected, "{single} µs a message");
    }
    assert_eq!(costs.choose(3, now), Way::OneByOne, "never");
    assert!(costs.are_synced());
}

#[test]
fn one_stall_changes_no_choice() {
    let (costs, now) = (SignalCosts::default(), Instant::now());
    for _ in 0..10 {
        round(&costs, 64, micros(200), micros(3_000), now);
    }
    costs.record(Way::Batch, 64, Duration::from_secs(2), now);
    assert_eq!(costs.choose(64, now), Way::Batch);
}

#[test]
fn slower_way_is_tried_again_when_its_measurement_is_old() {
    let (costs, now) = (SignalCosts::default(), Instant::now());
    for _ in 0..4 {
        round(&costs, 64, micros(20), micros(3_000), now);
    }
    let later = now + HOLD;
    let rounds = [later; 3].map(|at| round(&costs, 64, micros(200), micros(3_000), at));
    assert!(rounds.contains(&Way::Batch), "{rounds:?}");
    assert_eq!(costs.choose(64, later), Way::Batch, "the disk syncs now");
}

#[test]
fn backlog_is_sent_in_batches_and_not_tried_one_by_one() {
    let (costs, now) = (SignalCosts::default(), Instant::now());
    for at in [now, now, now + HOLD] {
        let way = round(&costs, 1_000, micros(20), micros(3_000), at);
        assert_eq!(way, Way::Batch);
    }
}
