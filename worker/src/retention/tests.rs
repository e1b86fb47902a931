use std::time::Duration;

use super::{FLOORS_MAX_AGE, Fill, Floors, keep_from};

/// A stream of 100 events of 10 bytes from sequence 1,001 on.
fn check(bytes_max: u64, applied_until: u64, expected: Option<u64>) {
    let fill = Fill {
        bytes: 1000,
        bytes_max,
        messages: 100,
        first_sequence: 1001,
        last_sequence: 1100,
        applied_until,
    };
    assert_eq!(keep_from(fill), expected, "{fill:?}");
}

#[test]
fn only_applied_events_over_the_limit_are_purged() {
    check(10_000, 1100, None);
    check(1250, 1100, None); // Exactly 80 % is not above it.
    check(1000, 1100, Some(1031)); // Down to 70 %.
    check(1000, 1010, Some(1011)); // Only what is applied.
    check(1000, 1000, None); // Nothing is applied.
    check(1000, 0, None);
}

#[test]
fn an_empty_stream_is_left_alone() {
    let fill = Fill {
        bytes: 0,
        bytes_max: 0,
        messages: 0,
        first_sequence: 1,
        last_sequence: 0,
        applied_until: 0,
    };
    assert_eq!(keep_from(fill), None);
}

#[test]
fn floors_that_the_database_has_not_confirmed_hold_for_a_while() {
    let until = |replayed, age, is_nearly_full| {
        let floors = Floors {
            replayed,
            stored: 50,
        };
        floors.removable_until(100, age, is_nearly_full)
    };
    let (fresh, late) = (FLOORS_MAX_AGE, FLOORS_MAX_AGE + Duration::from_secs(1));
    assert_eq!(until(u64::MAX, fresh, false), 50);
    assert_eq!(until(u64::MAX, fresh, true), 100);
    assert_eq!(until(30, fresh, false), 30);
    assert_eq!(until(u64::MAX, late, false), 0);
    assert_eq!(until(u64::MAX, late, true), 100);
    assert_eq!(until(30, late, true), 30);
}
