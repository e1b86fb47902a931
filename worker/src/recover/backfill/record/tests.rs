use std::time::Duration;

use time::OffsetDateTime;

use super::{leaves_no_gap, next_since, plausible};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time")
}

#[test]
fn next_backfill_overlaps_the_last_one() {
    let now = now();
    assert_eq!(next_since(None, now), now - 72 * HOUR);
    assert_eq!(next_since(Some(now - HOUR), now), now - 3 * HOUR);
    assert_eq!(next_since(Some(now - 100 * HOUR), now), now - 102 * HOUR);
    assert_eq!(
        next_since(Some(now - 1000 * HOUR), now),
        now - 30 * 24 * HOUR,
        "Stripe keeps no older events"
    );
    assert_eq!(
        next_since(Some(now + HOUR), now),
        now - 2 * HOUR,
        "another host's clock is ahead"
    );
}

#[test]
fn only_a_backfill_that_leaves_no_gap_is_recorded() {
    let began = now();
    assert!(leaves_no_gap(None, began - 72 * HOUR, began));
    assert!(!leaves_no_gap(None, began - HOUR, began));
    assert!(leaves_no_gap(Some(began - HOUR), began - 3 * HOUR, began));
    assert!(
        !leaves_no_gap(Some(began - 5 * HOUR), began - 3 * HOUR, began),
        "it leaves a gap of two hours"
    );
    assert!(
        !leaves_no_gap(Some(began + HOUR), began - 72 * HOUR, began),
        "a later backfill was complete"
    );
    assert!(
        leaves_no_gap(Some(began - 1000 * HOUR), began - 30 * 24 * HOUR, began),
        "Stripe keeps no older events"
    );
}

#[test]
fn time_that_is_far_ahead_is_not_plausible() {
    let now = now();
    assert_eq!(plausible(Some(now + HOUR), now), Some(now + HOUR));
    assert_eq!(plausible(Some(now + 3 * HOUR), now), None);
}
