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
