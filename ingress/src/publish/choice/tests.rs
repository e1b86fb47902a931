use std::time::Duration;

use tokio::time::Instant;

use super::{Choice, HOLD, Mode, TURN_MAX};

/// Runs a trial to its end with 16 events in flight at any time, each of which takes `took` of its
/// mode. Returns the chosen mode.
fn trial(choice: &mut Choice, now: Instant, took: impl Fn(Mode) -> Duration) -> Mode {
    for _ in 0..10_000 {
        let (mode, turn) = choice.assign_mode(15, now);
        choice.record_ack(turn, took(mode), 15, now);
    }
    choice.assign_mode(15, now).0
}

fn took(single_us: u64, grouped_us: u64) -> impl Fn(Mode) -> Duration {
    move |mode| {
        Duration::from_micros(match mode {
            Mode::Single => single_us,
            Mode::Grouped => grouped_us,
        })
    }
}

#[test]
fn the_faster_mode_is_chosen() {
    let now = Instant::now();
    assert_eq!(
        trial(&mut Choice::new(now), now, took(18_000, 4_500)),
        Mode::Grouped
    );
    assert_eq!(
        trial(&mut Choice::new(now), now, took(3_500, 6_000)),
        Mode::Single
    );
    assert_eq!(
        trial(&mut Choice::new(now), now, took(3_500, 4_000)),
        Mode::Grouped,
        "nearly equal: grouping leaves more to the others"
    );
}

#[test]
fn one_turn_in_which_the_disk_stalls_does_not_decide() {
    let now = Instant::now();
    for stalled in 0..6 {
        for (single, grouped, faster) in [(18, 7, Mode::Grouped), (8, 16, Mode::Single)] {
            let mut choice = Choice::new(now);
            let (mut turns, mut last) = (0, None);
            for _ in 0..10_000 {
                let (mode, turn) = choice.assign_mode(15, now);
                if last.replace(turn) != Some(turn) {
                    turns += 1;
                }
                let took = if mode == Mode::Single {
                    single
                } else {
                    grouped
                };
                let stall = if turns == stalled + 1 { 1_000 } else { 0 };
                choice.record_ack(turn, Duration::from_millis(took + stall), 15, now);
            }
            assert_eq!(
                choice.assign_mode(15, now).0,
                faster,
                "stalled in turn {stalled}"
            );
        }
    }
}

#[test]
fn a_lull_restarts_the_trial() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    let before = choice.assign_mode(60, now);
    assert_eq!(choice.assign_mode(8, now + TURN_MAX), before);
    let after = choice.assign_mode(8, now + TURN_MAX * 2);
    assert_ne!(after, before);
    assert_eq!(
        trial(&mut choice, now + TURN_MAX * 2, took(2, 1)),
        Mode::Grouped,
        "the trial comes to an end"
    );
}

#[test]
fn the_next_trial_begins_when_the_choice_expires() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    assert_eq!(trial(&mut choice, now, took(1, 2)), Mode::Single);
    assert_eq!(
        trial(&mut choice, now + HOLD / 2, took(2, 1)),
        Mode::Single,
        "not yet"
    );
    assert_eq!(trial(&mut choice, now + HOLD, took(2, 1)), Mode::Grouped);
    assert_eq!(trial(&mut choice, now + HOLD * 2, took(1, 2)), Mode::Single);
}

#[test]
fn low_load_starts_no_trial_and_is_not_measured() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    for in_flight in [0, 1, 7, 0] {
        let (mode, turn) = choice.assign_mode(in_flight, now);
        assert_eq!(mode, Mode::Single);
        choice.record_ack(turn, Duration::from_secs(1), in_flight, now);
    }
    // Nor is it measured during a trial.
    let _ = choice.assign_mode(15, now);
    for _ in 0..1_000 {
        let (mode, turn) = choice.assign_mode(0, now);
        assert_eq!(mode, Mode::Single);
        choice.record_ack(turn, Duration::from_secs(1), 0, now);
    }
    assert_eq!(trial(&mut choice, now, took(3, 1)), Mode::Grouped);
}

#[test]
fn events_of_a_few_connections_are_not_grouped() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    assert_eq!(trial(&mut choice, now, took(18, 4)), Mode::Grouped);
    let modes = |choice: &mut Choice, connections: usize| {
        (0..320)
            .map(|number| choice.assign_mode(number % connections, now).0)
            .last()
    };
    assert_eq!(modes(&mut choice, 4), Some(Mode::Single));
    // Just after a batch the first events find few others, and are grouped nevertheless.
    assert_eq!(modes(&mut choice, 16), Some(Mode::Grouped));
    assert_eq!(choice.assign_mode(1, now).0, Mode::Grouped);
}

#[test]
fn a_failure_restarts_the_trial() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    let (_, late) = choice.assign_mode(15, now);
    for _ in 0..200 {
        let (_, turn) = choice.assign_mode(15, now);
        choice.record_ack(turn, Duration::from_secs(1), 15, now);
    }
    choice.record_failure();
    choice.record_ack(late, Duration::from_secs(1_000), 15, now);
    assert_eq!(trial(&mut choice, now, took(1, 2)), Mode::Single);
}
