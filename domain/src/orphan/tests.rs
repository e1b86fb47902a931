use proptest::prelude::*;
use time::macros::datetime;

use super::*;

const NOW: OffsetDateTime = datetime!(2026-11-25 12:00 UTC);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[test]
fn grace_period_ends_when_both_clocks_have_reached_its_end() {
    let check = |ours: OffsetDateTime, brokers: OffsetDateTime, expected: Option<Duration>| {
        assert_eq!(
            remaining_grace(NOW, ours, brokers),
            expected,
            "{ours} {brokers}"
        );
    };
    check(NOW, NOW, None);
    check(NOW + HOUR, NOW, None);
    check(NOW, NOW + HOUR, None);
    check(NOW + HOUR, NOW - HOUR, Some(HOUR)); // Ours runs ahead.
    check(NOW - HOUR, NOW + HOUR, Some(HOUR)); // The broker's runs ahead.
    check(NOW - DAY, NOW - HOUR, Some(DAY));
}

#[test]
fn row_needs_a_user_if_it_may_be_paid_and_is_unclaimed() {
    let check = |status: Option<&str>, user: Option<&str>, paid: bool, expected: bool| {
        let mut row = Visible {
            paid,
            checkout_session_id: Some("cs_1".to_owned()),
            ..Visible::default()
        };
        row.subscription.status = status.map(str::to_owned);
        row.subscription.client_reference_id = user.map(str::to_owned);
        assert_eq!(needs_user(&row), expected, "{status:?} {user:?} {paid}");
    };
    for status in [
        "active",
        "trialing",
        "past_due",
        "canceled",
        "not yet known",
    ] {
        check(Some(status), None, false, true);
        check(Some(status), Some("user_1"), false, false);
        check(Some(status), None, true, false); // Its session makes the orphan.
    }
    check(None, None, false, false);
    check(Some("incomplete"), None, false, false);
    check(Some("incomplete_expired"), None, false, false);
}

#[test]
fn stream_covers_sessions_of_subscriptions_that_began_in_its_time() {
    let check = |created: Option<OffsetDateTime>, created_event_seen, expected| {
        let mut row = Visible {
            created_event_seen,
            ..Visible::default()
        };
        row.subscription.created = created.map(Into::into);
        assert_eq!(stream_covers_sessions(&row, NOW), expected, "{created:?}");
    };
    check(Some(NOW), false, true);
    check(Some(NOW - 3 * DAY), false, true); // Stripe still delivers it.
    check(Some(NOW - 4 * DAY), false, false);
    check(Some(NOW - 4 * DAY), true, true);
    check(None, false, false);
}

#[test]
fn subscription_that_ended_before_its_row_is_history() {
    let check = |ended_at: Option<OffsetDateTime>, expected| {
        let mut row = Visible::default();
        row.subscription.ended_at = ended_at.map(Into::into);
        assert_eq!(had_ended_before(&row, NOW), expected, "{ended_at:?}");
    };
    check(None, false);
    check(Some(NOW - HOUR), true);
    check(Some(NOW + HOUR), false);
}

#[test]
fn event_counts_as_received_before_the_end_unless_its_date_is_surely_later() {
    let check = |at, ours, brokers, expected| {
        let found = may_be_received_before(NOW, at, ours, brokers);
        assert_eq!(found, expected, "at {at}, clocks {ours} and {brokers}");
    };
    let later = NOW + 5 * HOUR;
    check(NOW - HOUR, later, later, true);
    check(NOW, later, later, true);
    check(NOW + HOUR, later, later, false);
    // The broker's clock is two hours ahead: what it dates two hours later was received by then.
    check(NOW + 2 * HOUR, later, later + 2 * HOUR, true);
    check(NOW + 3 * HOUR, later, later + 2 * HOUR, false);
    // It is behind: what it dates too early waits, which delays an orphan and makes none.
    check(NOW + HOUR, later + 2 * HOUR, later, false);
    check(NOW - HOUR, later + 2 * HOUR, later, true);
    // It was ahead when it dated the event and is set right.
    check(later + HOUR, later, later, true);
}

/// Clocks from 1970 to 9999, often at one of the ends.
fn any_clock() -> impl Strategy<Value = OffsetDateTime> {
    const LAST: i64 = 253_402_300_799;
    let second = prop_oneof![0..=LAST, 0..=100_i64, LAST - 100..=LAST];
    second.prop_map(|second| OffsetDateTime::from_unix_timestamp(second).expect("it is a time"))
}

proptest! {
    #[test]
    fn no_clock_panics_or_ends_a_grace_period_early(
        dt_created in any_clock(),
        created in any_clock(),
        ours in any_clock(),
        brokers in any_clock(),
        at in any_clock(),
        grace in prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), Just(Duration::from_secs(600))],
    ) {
        let mut row = Visible::default();
        row.subscription.created = Some(created.into());
        let end = grace_period_end(&row, dt_created, grace);
        prop_assert!(end >= dt_created && end >= created);
        match remaining_grace(end, ours, brokers) {
            Some(remaining) => prop_assert!(later(ours.min(brokers), remaining) == end),
            None => prop_assert!(ours >= end && brokers >= end),
        }
        // Whatever the clocks show: of two equal ones, an event before the end counts.
        prop_assert!(may_be_received_before(end, end.min(ours), ours, ours));
        let _ = (
            may_be_received_before(end, at, ours, brokers),
            stream_covers_sessions(&row, brokers),
            had_ended_before(&row, dt_created),
        );
    }

    /// The clock of the worker, the broker or the database is wrong. The worker's is not behind
    /// when it writes the row: nothing else knows since when a row of an old subscription exists.
    #[test]
    fn one_wrong_clock_ends_no_grace_period_early(
        which in 0..3,
        wrong_before in 0..100_000_i64,
        wrong_now in -100_000..100_000_i64,
        passed in 0..30_000_i64,
    ) {
        let (grace, seconds) = (10_000, time::Duration::seconds);
        let wrong = |clock, by| if which == clock { seconds(by) } else { seconds(0) };
        let now = NOW + seconds(passed);
        let (ours, brokers) = (now + wrong(0, wrong_now), now + wrong(1, wrong_now));
        let (dt_created, opened) = (NOW + wrong(0, wrong_before), NOW + wrong(2, wrong_now));
        let mut row = Visible::default();
        row.subscription.created = Some((NOW - DAY).into());
        let ended = |ours: OffsetDateTime, brokers| {
            let written = first_written(dt_created, Some(opened), ours.min(brokers));
            let end = grace_period_end(&row, written, Duration::from_secs(grace));
            remaining_grace(end, ours, brokers).is_none()
        };
        let is_over = passed >= grace.cast_signed();
        prop_assert!(is_over || !ended(ours, brokers));
        // Once the clock is right again and it is asked from time to time, none waits for long.
        let mut asked = (0..=passed).step_by(600).map(|passed| NOW + seconds(passed));
        prop_assert!(asked.any(|now| ended(now, now)) || passed < 2 * grace.cast_signed());
    }
}
