use std::time::Duration;

use proptest::prelude::*;
use time::OffsetDateTime;

use super::{Plan, Stored};

const MINUTE: Duration = Duration::from_secs(60);

proptest! {
    /// Processes take blocks one after another, as compare-and-set has it; each request arrives as
    /// late as the slack allows, or not at all.
    #[test]
    fn no_window_holds_more_than_the_budget(
        requests in 1_u32..200,
        window_ms in 1_000_u64..100_000,
        blocks in prop::collection::vec((0_u64..3_000, 1_usize..12, prop::collection::vec(0.0_f64..=1.0, 12)), 1..200),
    ) {
        let window = Duration::from_millis(window_ms);
        let plan = Plan::new(requests, window);
        let mut now = OffsetDateTime::UNIX_EPOCH;
        let mut stored = Stored::Nothing;
        let mut arrivals = Vec::new();
        for (idle_ms, waiting, late) in blocks {
            now += Duration::from_millis(idle_ms);
            let block = plan.take(stored, now, waiting.min(plan.block()));
            stored = Stored::read(Some(Stored::write(block.next).as_bytes()));
            for (slot, late) in plan.slots(block).zip(late) {
                // Half of the slack on the way to its use, half on the way to Stripe.
                arrivals.push(slot + (plan.lateness() * 2).mul_f64(late));
            }
        }
        arrivals.sort();
        let requests = usize::try_from(requests).expect("it is small");
        for (first, after) in arrivals.iter().zip(arrivals.iter().skip(requests)) {
            prop_assert!(*after - *first >= window, "{requests} and one more within {}", *after - *first);
        }
    }
}

#[test]
fn nine_tenths_of_every_budget_are_usable() {
    for (requests, window) in
        [(1, MINUTE), (2, MINUTE), (75, MINUTE), (6000, MINUTE), (100_000, Duration::from_secs(1))]
    {
        let plan = Plan::new(requests, window);
        let share = window.as_secs_f64() / (plan.interval().as_secs_f64() * f64::from(requests));
        assert!((0.9..1.0).contains(&share), "{share} of {requests} in {window:?}");
    }
}

#[test]
fn block_is_small_and_never_empty() {
    assert_eq!(Plan::new(1, MINUTE).block(), 1);
    assert_eq!(Plan::new(75, MINUTE).block(), 3);
    assert_eq!(Plan::new(6000, MINUTE).block(), 300);
}

#[test]
fn block_grows_while_slots_are_used_in_time() {
    let plan = Plan::new(6000, MINUTE);
    let (punctual, late) = (Duration::ZERO, plan.lateness() / 2);
    let sizes = std::iter::successors(Some(1), |size| Some(plan.next_size(*size, punctual)));
    assert_eq!(sizes.take(11).collect::<Vec<_>>(), [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    assert_eq!((plan.next_size(300, late), plan.next_size(1, late)), (150, 1));
}

#[test]
fn value_that_nobody_planned_is_waited_out() {
    let plan = Plan::new(60, MINUTE);
    let now = OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time");
    let first = |stored| plan.take(stored, now, 1).first;
    assert_eq!(first(Stored::Nothing), now);
    assert_eq!(first(Stored::Next(now - MINUTE)), now, "slots that passed are lost");
    assert_eq!(first(Stored::Next(now + MINUTE)), now + MINUTE);
    assert_eq!(first(Stored::Next(now + MINUTE * 1001)), now + MINUTE, "a clock was set back");
    assert_eq!(first(Stored::read(Some(b"soon"))), now + MINUTE);
}

#[test]
fn next_slot_is_read_as_it_was_written() {
    let next = OffsetDateTime::from_unix_timestamp_nanos(1_795_000_000_123_456_789).expect("a time");
    let Stored::Next(read) = Stored::read(Some(Stored::write(next).as_bytes())) else { panic!("it is readable") };
    assert!(read >= next && read - next < Duration::from_micros(1), "{read}");
}
