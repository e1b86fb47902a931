use std::time::Duration;

use tokio::time::Instant;

use super::{Choice, HOLD, TURN_MAX, Way};

/// Sixteen events on their way at any time, each taking what its way takes, until the choice holds;
/// returns what was chosen.
fn trial(choice: &mut Choice, now: Instant, took: impl Fn(Way) -> Duration) -> Way {
    for _ in 0..10_000 {
        let (way, turn) = choice.way(15, now);
        choice.acknowledged(turn, took(way), 15, now);
    }
    choice.way(15, now).0
}

fn took(single_us: u64, grouped_us: u64) -> impl Fn(Way) -> Duration {
    move |way| {
        Duration::from_micros(match way {
            Way::Single => single_us,
            Way::Grouped => grouped_us,
        })
    }
}

#[test]
fn the_faster_way_is_kept() {
    let now = Instant::now();
    assert_eq!(
        trial(&mut Choice::new(now), now, took(18_000, 4_500)),
        Way::Grouped
    );
    assert_eq!(
        trial(&mut Choice::new(now), now, took(3_500, 6_000)),
        Way::Single
    );
    assert_eq!(
        trial(&mut Choice::new(now), now, took(3_500, 3_400)),
        Way::Single,
        "as good as equal"
    );
}

#[test]
fn a_turn_in_which_the_disk_was_held_up_does_not_decide() {
    let now = Instant::now();
    for held_up in 0..6 {
        for (single, grouped, faster) in [(18, 7, Way::Grouped), (8, 16, Way::Single)] {
            let mut choice = Choice::new(now);
            let (mut turns, mut last) = (0, None);
            for _ in 0..10_000 {
                let (way, turn) = choice.way(15, now);
                if last.replace(turn) != Some(turn) {
                    turns += 1;
                }
                let took = if way == Way::Single { single } else { grouped };
                let stall = if turns == held_up + 1 { 1_000 } else { 0 };
                choice.acknowledged(turn, Duration::from_millis(took + stall), 15, now);
            }
            assert_eq!(choice.way(15, now).0, faster, "held up in turn {held_up}");
        }
    }
}

#[test]
fn a_turn_does_not_go_on_after_a_lull() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    let before = choice.way(60, now);
    assert_eq!(choice.way(4, now + TURN_MAX), before);
    let after = choice.way(4, now + TURN_MAX * 2);
    assert_ne!(after, before);
    assert_eq!(
        trial(&mut choice, now + TURN_MAX * 2, took(2, 1)),
        Way::Grouped,
        "it comes to an end"
    );
}

#[test]
fn it_is_tried_again_after_a_while() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    assert_eq!(trial(&mut choice, now, took(1, 2)), Way::Single);
    assert_eq!(
        trial(&mut choice, now + HOLD / 2, took(2, 1)),
        Way::Single,
        "not yet"
    );
    assert_eq!(trial(&mut choice, now + HOLD, took(2, 1)), Way::Grouped);
    assert_eq!(trial(&mut choice, now + HOLD * 2, took(1, 2)), Way::Single);
}

#[test]
fn events_that_find_few_others_go_alone_and_try_nothing() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    for in_flight in [0, 1, 3, 0] {
        let (way, turn) = choice.way(in_flight, now);
        assert_eq!(way, Way::Single);
        choice.acknowledged(turn, Duration::from_secs(1), in_flight, now);
    }
    // Nor do they count once there is a trial.
    let _ = choice.way(15, now);
    for _ in 0..1_000 {
        let (way, turn) = choice.way(0, now);
        assert_eq!(way, Way::Single);
        choice.acknowledged(turn, Duration::from_secs(1), 0, now);
    }
    assert_eq!(trial(&mut choice, now, took(3, 1)), Way::Grouped);
}

#[test]
fn a_failure_begins_the_trial_again() {
    let now = Instant::now();
    let mut choice = Choice::new(now);
    let (_, late) = choice.way(15, now);
    for _ in 0..200 {
        let (_, turn) = choice.way(15, now);
        choice.acknowledged(turn, Duration::from_secs(1), 15, now);
    }
    choice.failed();
    choice.acknowledged(late, Duration::from_secs(1_000), 15, now);
    assert_eq!(trial(&mut choice, now, took(1, 2)), Way::Single);
}
