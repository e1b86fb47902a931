//! The law holds with erasures: at whatever point of a history a state's metadata is erased, the
//! row is the same as without the erasure except for metadata, and none of the erased metadata is
//! left.

use std::collections::BTreeMap;

use super::law::{decode, with_repetitions};
use super::{history, random::Random};
use crate::event::Event;
use crate::merge::State;

const HISTORIES: u64 = 200;
const ORDERS: usize = 20;

#[test]
fn erasure_removes_only_metadata_at_any_point_of_a_history() {
    for seed in 0..HISTORIES {
        let random = &mut Random::new(seed);
        let length = random.pick(&[1, 2, 3, 4, 6, 8, 12]);
        let events = decode(&history::simulate(random, length));
        let at = events[random.below(events.len())].created;
        for _ in 0..ORDERS {
            check(seed, &events, at, random);
        }
    }
}

/// Checks an erasure that covers the events up to `at`. Some of these are merged before the
/// erasure, unchanged; the others are merged after it, as are all later events.
fn check(seed: u64, events: &[Event], at: i64, random: &mut Random) {
    let mut plain = State::default();
    let mut expected = State::default();
    for event in events {
        plain.merge(event);
        expected.merge(&redacted(event, at));
    }
    let (covered, later): (Vec<_>, Vec<_>) =
        (0..events.len()).partition(|index| events[*index].created <= at);
    let mut state = State::default();
    for index in with_repetitions(covered.len(), random)
        .into_iter()
        .take(random.below(covered.len() + 1))
    {
        state.merge(&events[covered[index]]);
    }
    state.erase_metadata();
    assert!(
        !state.erase_metadata(),
        "seed {seed}: a second erasure finds nothing"
    );
    assert_eq!(metadata_of(&state), BTreeMap::new(), "seed {seed}");
    let stored = serde_json::to_string(&state).expect("a state is JSON");
    let mut state: State = serde_json::from_str(&stored).expect("and reads back");

    let rest = with_repetitions(covered.len() + later.len(), random);
    for index in rest.into_iter().map(|index| {
        *covered
            .iter()
            .chain(&later)
            .nth(index)
            .expect("it is one of them")
    }) {
        let before = state.clone();
        let changed = state.merge(&redacted(&events[index], at));
        assert_eq!(
            changed,
            state != before,
            "seed {seed}: merge says whether it changed the state"
        );
    }
    assert_eq!(state, expected, "seed {seed}, erased at {at}");

    // Except for metadata, the row equals the row without the erasure.
    let (mut row, mut plain) = (state.visible(), plain.visible());
    for row in [&mut row, &mut plain] {
        row.subscription.metadata.clear();
        row.subscription.subscription_metadata.clear();
    }
    assert_eq!(row, plain, "seed {seed}, erased at {at}");
}

fn redacted(event: &Event, at: i64) -> Event {
    let mut event = event.clone();
    if event.created <= at {
        event.redact();
    }
    event
}

fn metadata_of(state: &State) -> BTreeMap<String, String> {
    let row = state.visible().subscription;
    row.metadata
        .into_iter()
        .chain(row.subscription_metadata)
        .collect()
}
