use std::time::{Duration, Instant};

use proptest::prelude::*;
use time::OffsetDateTime;

use super::{Plan, Reservation, later};

const MINUTE: Duration = Duration::from_secs(60);

/// One step of a process that shares the key with others.
#[derive(Debug, Clone)]
enum Step {
    Reserve {
        idle: Duration,
        count: u32,
        /// From the write to its storing.
        way: Duration,
        /// From the storing to the answer.
        back: Duration,
        /// The part of `back` after which the entry that is read was stored: other processes write
        /// as well.
        read_at: f64,
        /// When each request is sent, and how long it takes to Stripe, both from 0 to 1.
        used: Vec<(f64, f64)>,
    },
    /// An operator writes the key by hand or deletes it.
    Overwrite(Option<&'static str>),
}

/// Any time from 1970 to 9999, often at one of the ends.
fn any_clock() -> impl Strategy<Value = OffsetDateTime> {
    const LAST: i64 = 253_402_300_799;
    let second = prop_oneof![
        0..=LAST,
        0..=100_i64,
        LAST - 100..=LAST,
        1_790_000_000..=1_800_000_000_i64
    ];
    second.prop_map(|second| {
        OffsetDateTime::from_unix_timestamp(second).expect("it is within the calendar")
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ms = |most: u64| prop_oneof![Just(0), 0..=most].prop_map(Duration::from_millis);
    let part = || prop_oneof![2 => Just(0.0), 2 => Just(1.0), 1 => 0.0..=1.0];
    let used = prop::collection::vec((part(), part()), 12);
    let idle = prop_oneof![9 => Just(Duration::ZERO), 1 => ms(3_000)];
    let reserve = (idle, 1_u32..=12, ms(300), ms(300), part(), used).prop_map(
        |(idle, count, way, back, read_at, used)| Step::Reserve {
            idle,
            count,
            way,
            back,
            read_at,
            used,
        },
    );
    const VALUES: &[Option<&str>] = &[
        None,
        Some("soon"),
        Some(""),
        Some("9000000000000000 5"),
        Some("1 2 3"),
        Some("99999999999999999999"),
    ];
    prop::collection::vec(
        prop_oneof![150 => reserve, 1 => prop::sample::select(VALUES).prop_map(Step::Overwrite)],
        1..300,
    )
}

proptest! {
    /// Compare-and-set makes processes reserve one after another. Each uses its requests at any
    /// time within the limits of its reservation.
    #[test]
    fn no_window_holds_more_than_the_budget(
        requests in prop_oneof![1_u32..10, 1_u32..1_500, 200_u32..400],
        window_ms in 1_000_u64..100_000,
        steps in steps(),
    ) {
        let window = Duration::from_millis(window_ms);
        let plan = Plan::new(requests, window);
        let (epoch, start) = (OffsetDateTime::UNIX_EPOCH + MINUTE * 1_000_000, Instant::now());
        let mut arrivals: Vec<Duration> = Vec::new();
        let mut now = Duration::ZERO;
        // The key's value, and when it was written.
        let mut key = (None, Duration::ZERO);
        for step in steps {
            match step {
                Step::Overwrite(value) => key = (value.map(str::to_owned), now),
                Step::Reserve { idle, count, way, back, read_at, used } => {
                    let length = plan.interval * count.min(plan.size_max);
                    let next = plan.next(key.0.as_deref().map(str::as_bytes), epoch + key.1, length);
                    let sent = (now + idle).max(key.1 + plan.wait(next, epoch + key.1));
                    let stored = sent + way;
                    let received = stored + back;
                    let read = epoch + stored + back.mul_f64(read_at);
                    let (from, until) = plan.permitted(next, read, start + sent, start + received);
                    for (use_at, travel) in used.into_iter().take(count.min(plan.size_max) as usize) {
                        if let Some(usable) = until.checked_duration_since(from) {
                            let used = from - start + usable.mul_f64(use_at);
                            arrivals.push(used + (plan.usable / 2).mul_f64(travel));
                        }
                    }
                    key = (Some(next.to_value()), stored);
                    now = stored;
                }
            }
        }
        arrivals.sort();
        let requests = usize::try_from(requests).expect("it is small");
        for (first, after) in arrivals.iter().zip(arrivals.iter().skip(requests)) {
            prop_assert!(*after - *first >= window, "{requests} and one more within {:?}", *after - *first);
        }
    }

    #[test]
    fn no_value_of_the_key_and_no_clock_panics_or_blocks_for_more_than_two_spans(value in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..30),
        (any::<i64>(), any::<u64>()).prop_map(|(free, length)| format!("{free} {length}").into_bytes()),
        any::<i64>().prop_map(|free| free.to_string().into_bytes()),
    ], stored in any_clock(), broken in any_clock()) {
        let plan = Plan::new(75, MINUTE);
        let next = plan.next(Some(&value), stored, plan.interval);
        prop_assert!(next.free >= stored && next.free <= later(stored, plan.span * 2), "{next:?}");
        let wait = plan.wait(next, stored);
        prop_assert!(wait <= plan.span * 2, "{wait:?}");
        if stored.year() < 9999 {
            prop_assert!(plan.start(next, stored + wait) == next.free);
        }
        // The broker's clock jumps before the reservation is stored.
        let (from, until) = plan.permitted(next, broken, Instant::now(), Instant::now());
        prop_assert!(from <= Instant::now() + plan.span && until > Instant::now(), "{from:?}");
    }
}

/// While calls wait, each reservation begins where the last one ends.
#[test]
fn nine_tenths_of_every_budget_are_usable_by_one_process_and_by_several() {
    for (requests, window) in [
        (1, MINUTE),
        (2, MINUTE),
        (75, MINUTE),
        (199, MINUTE),
        (6000, MINUTE),
        (100_000, MINUTE),
        (50, MINUTE / 60),
    ] {
        for processes in [1, 4] {
            let plan = Plan::new(requests, window);
            let length = plan.interval * plan.size_max;
            let round_trip = Duration::from_millis(5).min(plan.interval / 2);
            let began = OffsetDateTime::UNIX_EPOCH + MINUTE * 30_000_000;
            let (mut value, mut stored, mut starts) =
                (None, OffsetDateTime::UNIX_EPOCH, vec![began; processes]);
            let mut granted = 0;
            for turn in 0..1000 {
                // A process reserves again once it has used its reservation, evenly spread.
                let used = window / requests
                    * if turn < processes {
                        0
                    } else {
                        plan.size_max - 1
                    };
                let next = plan.next(value.as_deref().map(str::as_bytes), stored, length);
                let own = &mut starts[turn % processes];
                stored = (*own + used + round_trip).max(stored + plan.wait(next, stored));
                *own = plan.start(next, stored);
                value = Some(next.to_value());
                granted += plan.size_max;
            }
            let took = starts.into_iter().max().expect("there is one") + length - began;
            let share = f64::from(granted) / f64::from(requests) * window.as_secs_f64()
                / took.as_seconds_f64();
            assert!(
                (0.93..1.0).contains(&share),
                "{share} of {requests} in {window:?} by {processes}"
            );
        }
    }
}

/// The worst case: many reservations of one request, the first of which is used late, and then a
/// largest one.
#[test]
fn largest_reservation_fits_into_a_full_window() {
    for requests in [1, 75, 199, 200, 299, 6000] {
        let plan = Plan::new(requests, MINUTE);
        let before = (MINUTE + plan.usable * 3 / 2)
            .as_nanos()
            .div_ceil(plan.interval.as_nanos())
            - 1;
        assert!(
            before + u128::from(plan.size_max) <= u128::from(requests),
            "{before} before it of {requests}"
        );
    }
}

#[test]
fn reservation_is_small_and_never_empty() {
    for (requests, size) in [(1, 1), (75, 1), (199, 1), (200, 2), (6000, 60)] {
        assert_eq!(Plan::new(requests, MINUTE).size_max, size, "of {requests}");
    }
}

#[test]
fn unreadable_or_impossible_reservation_ends_after_a_span() {
    let plan = Plan::new(60, MINUTE);
    let stored = OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time");
    let free = |value: Option<&str>| {
        plan.next(value.map(str::as_bytes), stored, plan.interval)
            .free
            - stored
    };
    let value = |free, length| Some(Reservation { free, length }.to_value());
    let second = Duration::from_secs(1);
    assert_eq!(
        free(value(stored - MINUTE, second).as_deref()),
        second,
        "it started when it was stored"
    );
    assert_eq!(
        free(value(stored + second * 9, second).as_deref()),
        second * 10,
        "it waits for others"
    );
    assert_eq!(
        free(Some("1795000009000000")),
        second * 9,
        "as earlier versions wrote it"
    );
    assert_eq!(free(Some("soon")), plan.span);
    assert_eq!(free(None), plan.span, "deleted");
    assert_eq!(
        free(Some("1795009999000000")),
        plan.span,
        "far ahead, as an earlier version wrote it"
    );
    // If a process owns it, that process waits for a span.
    assert_eq!(
        free(value(stored + MINUTE * 9, second).as_deref()),
        plan.span + second
    );
}

#[test]
fn changed_broker_clock_delays_calls_by_at_most_a_span() {
    let plan = Plan::new(60, MINUTE);
    let before = OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time");
    let last = Reservation {
        free: before,
        length: plan.interval,
    }
    .to_value();
    let next = plan.next(Some(last.as_bytes()), before, plan.interval);
    assert_eq!(next.free, before + plan.interval);
    for back in [
        MINUTE / 60,
        MINUTE / 2,
        MINUTE,
        MINUTE * 60,
        MINUTE * 1_000_000,
    ] {
        let after = before - back;
        let start = plan.start(next, after);
        assert!(
            start - after <= plan.span,
            "{} after {back:?} back",
            start - after
        );
        let others = plan.next(Some(next.to_value().as_bytes()), after, plan.interval);
        assert_eq!(
            others.free,
            start + plan.interval,
            "every process computes the same start"
        );
    }
    assert_eq!(
        plan.start(next, before + MINUTE * 60),
        before + MINUTE * 60,
        "the clock was set forward"
    );
}

#[test]
fn permit_is_valid_wherever_in_the_round_trip_the_broker_stored_it() {
    let plan = Plan::new(60, MINUTE);
    let (sent, second) = (Instant::now(), Duration::from_secs(1));
    let received = sent + second;
    let stored = OffsetDateTime::UNIX_EPOCH + MINUTE * 30_000_000;
    let permitted = |free| {
        plan.permitted(
            Reservation {
                free,
                length: second,
            },
            stored,
            sent,
            received,
        )
    };
    assert_eq!(
        permitted(stored - second),
        (received, sent + plan.usable),
        "stored right after the write or right before the answer"
    );
    assert_eq!(
        permitted(stored + second * 9),
        (received + second * 9, sent + second * 9 + plan.usable)
    );
}

#[test]
fn parsed_reservation_never_starts_earlier_than_the_written_one() {
    let free =
        OffsetDateTime::from_unix_timestamp_nanos(1_795_000_000_123_456_789).expect("a time");
    let written = Reservation {
        free,
        length: Duration::from_micros(840_000),
    };
    let read = Reservation::parse(written.to_value().as_bytes()).expect("it is readable");
    assert_eq!(read.length, written.length);
    assert!(
        read.free >= free && read.free - free < Duration::from_micros(1),
        "{}",
        read.free
    );
}
