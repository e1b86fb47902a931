use std::time::{Duration, Instant};

use time::OffsetDateTime;

use super::Clock;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn shown(ms_since_epoch: u64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + ms(ms_since_epoch)
}

#[test]
fn span_is_certain_whatever_the_round_trip_was() {
    let start = Instant::now();
    let mut clock = Clock::default();
    assert_eq!(clock.shows(start, ms(1000)), None);
    clock.learn(start, start + ms(20), shown(5_000));
    assert_eq!(clock.shows(start + ms(10), ms(10)), Some(shown(5_000)));
    assert_eq!(clock.shows(start + ms(10), ms(9)), None, "not known that well");
    let (from, until) = clock.span(shown(6_000), ms(100)).expect("it is known");
    // Stored at once, or just before the answer came: 20 ms apart.
    assert!(from >= start + ms(1_020) && from < start + ms(1_022), "{:?}", from - start);
    assert!(until <= start + ms(1_100) && until > start + ms(1_098), "{:?}", until - start);
}

#[test]
fn better_reading_is_kept_until_it_is_refuted() {
    let start = Instant::now();
    let mut clock = Clock::default();
    clock.learn(start, start + ms(2), shown(5_000));
    clock.learn(start + ms(1_000), start + ms(1_200), shown(6_050));
    assert_eq!(clock.shows(start + ms(2_001), ms(5)), Some(shown(7_000)), "the first one was better, and agrees");
    clock.learn(start + ms(3_000), start + ms(3_200), shown(3_100));
    assert_eq!(clock.shows(start + ms(3_100), ms(100)), Some(shown(3_100)), "set back");
}

#[test]
fn reading_ages() {
    let start = Instant::now();
    let mut clock = Clock::default();
    clock.learn(start, start + ms(2), shown(5_000));
    assert!(clock.shows(start + ms(29_000), ms(10)).is_some());
    assert_eq!(clock.shows(start + ms(31_000), ms(1_000)), None);
}

#[test]
fn time_from_the_future_refutes() {
    let start = Instant::now();
    let mut clock = Clock::default();
    clock.learn(start, start + ms(2), shown(5_000));
    clock.check(shown(5_500), start + ms(600));
    assert!(clock.shows(start + ms(600), ms(10)).is_some());
    clock.check(shown(9_000), start + ms(600));
    assert_eq!(clock.shows(start + ms(600), ms(10)), None);
}
