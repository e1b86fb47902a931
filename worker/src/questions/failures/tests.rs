use std::time::Duration;

use litestripe_domain::question::Kind;

use super::{Failures, MANY_PAUSE_MAX, PAUSE_FIRST, PAUSE_MAX, SHARE, pause};
use crate::settings::BudgetSettings;

const BUDGET: BudgetSettings = BudgetSettings {
    requests: 75,
    window: Duration::from_secs(60),
    key: String::new(),
};

#[test]
fn pauses_grow_with_each_attempt_up_to_the_longest() {
    for (attempts, most) in [
        (i32::MIN, 3),
        (0, 3),
        (1, 3),
        (2, 6),
        (3, 12),
        (7, 192),
        (8, 300),
        (i32::MAX, 300),
    ] {
        let most = Duration::from_secs(most);
        for _ in 0..100 {
            let pause = pause(PAUSE_FIRST, PAUSE_MAX, attempts);
            assert!(most / 2 <= pause && pause <= most, "{attempts}: {pause:?}");
        }
    }
}

#[test]
fn failing_questions_take_a_share_of_the_calls_however_many_they_are() {
    let failures = Failures::new(Some(&BUDGET));
    for count in [1, 10, 100, 1_000, 5_000] {
        failures.record_counts([(Kind::Fetch, count), (Kind::Notification, count)]);
        let pauses = (0..1_000).map(|_| failures.pause(Kind::Grace, i32::MAX));
        let shortest = pauses.min().expect("there are some");
        // In one window each of them is asked that often.
        let asked = 2.0 * count as f64 * BUDGET.window.as_secs_f64() / shortest.as_secs_f64();
        let share = f64::from(BUDGET.requests) / f64::from(SHARE);
        assert!(asked <= share * 1.01, "{count}: {asked} calls");
        assert!(shortest <= MANY_PAUSE_MAX);
    }
}

#[test]
fn failing_questions_delay_only_those_that_ask_the_same() {
    let failures = Failures::new(Some(&BUDGET));
    failures.record_counts([(Kind::Fetch, 100_000)]);
    for kind in [Kind::Lookup, Kind::Erase] {
        assert!(failures.pause(kind, 1) <= PAUSE_FIRST);
    }
    failures.record_counts([(Kind::Lookup, 1_000)]);
    assert!(failures.pause(Kind::Notification, 1) <= PAUSE_FIRST);
    assert!(failures.pause(Kind::Lookup, 1) > PAUSE_MAX);
    assert!(Failures::new(None).pause(Kind::Grace, 1) <= PAUSE_FIRST);
}
