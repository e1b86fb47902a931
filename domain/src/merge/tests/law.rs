//! The law of the merge: whatever the order, the repetitions and the batches, a set of events leads
//! to one row. That row shows the true last state or is marked uncertain.

use std::collections::BTreeMap;
use std::time::Instant;

use litestripe_contract::event::SNAPSHOT_TYPE;
use litestripe_contract::signal::Subscription;
use serde_json::Value;

use super::history::{self, History, SimulatedEvent};
use super::random::Random;
use crate::event::{self, Event, MetadataKeys};
use crate::merge::{State, Visible};

/// How many histories are tested. `LITESTRIPE_LONG` sets another number.
const HISTORIES: u64 = 300;
/// The most events of which every permutation is tried.
const EXHAUSTIVE_EVENTS_MAX: usize = 6;
/// With more events, this many random orders are tried, with repetitions.
const RANDOM_ORDERS: usize = 40;

/// Counts of what was tried and found.
#[derive(Debug, Default)]
struct Tally {
    histories: u64,
    events: usize,
    orders: u64,
    tied: u64,
    certain: u64,
    uncertain: u64,
    /// How many would be uncertain if events had no marks, and how many are so only because they
    /// have: they show a field that had no column then.
    uncertain_by_digest: u64,
    uncertain_by_marks: u64,
    dropped_right: u64,
    dropped_uncertain: u64,
    dropped_wrong: u64,
    state_bytes_max: usize,
}

#[test]
fn every_order_leads_to_one_row_that_is_true_or_uncertain() {
    let (histories, seed) = histories_and_seed();
    let started = Instant::now();
    let mut tally = Tally::default();
    for number in 0..histories {
        // Each history has its own seed. To repeat a failure alone, set LITESTRIPE_SEED=<its seed>
        // LITESTRIPE_LONG=1.
        let seed = seed.wrapping_add(number);
        check(seed, &mut tally);
    }
    let seconds = started.elapsed().as_secs();
    eprintln!("seed {seed}, {seconds} s: {tally:#?}");
}

/// Returns how many histories are tested, and the seed of the first.
pub(super) fn histories_and_seed() -> (u64, u64) {
    #[expect(clippy::disallowed_methods, reason = "says how long a test runs")]
    let setting = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u64>().ok())
    };
    let histories = setting("LITESTRIPE_LONG").unwrap_or(HISTORIES);
    let seed = setting("LITESTRIPE_SEED").unwrap_or(histories);
    (histories, seed)
}

fn check(seed: u64, tally: &mut Tally) {
    let random = &mut Random::new(seed);
    let length = random.pick(&[1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 8, 12, 20]);
    let history = history::simulate(random, length);
    let events = decode(&history);
    let (state, row) = merge_all(&events);

    let mut orders = 0;
    let mut compare = |order: &[usize], random: &mut Random| {
        orders += 1;
        let merged = merge_in_batches(&events, order, random);
        assert_eq!(merged, state, "seed {seed}, order {order:?}");
        assert_eq!(merged.visible(), row, "seed {seed}, order {order:?}");
    };
    if events.len() <= EXHAUSTIVE_EVENTS_MAX {
        permutations(events.len(), &mut |order| compare(order, random));
    } else {
        for _ in 0..RANDOM_ORDERS {
            compare(&with_repetitions(events.len(), random), random);
        }
    }

    check_row(seed, &history, &events, &row);
    check_no_needless_uncertainty(seed, &history, &row);
    check_replay(seed, &events, &state);
    check_upgrade(seed, &events, &state, random);
    tally.drop_one(&history, &events, random);
    tally.count(&events, &row, orders, &state);
}

/// Decodes all events of a history, including twins.
pub(super) fn decode(history: &History) -> Vec<Event> {
    let bodies = history
        .events
        .iter()
        .flat_map(|simulated| [Some(&simulated.body), simulated.twin.as_ref()])
        .flatten();
    decode_bodies(bodies)
}

pub(super) fn decode_bodies<'a>(bodies: impl IntoIterator<Item = &'a Value>) -> Vec<Event> {
    bodies
        .into_iter()
        .map(|body| {
            let event = event::decode(body.to_string().as_bytes(), &MetadataKeys::All);
            event.expect("it decodes").expect("it is handled")
        })
        .collect()
}

pub(super) fn merge_all(events: &[Event]) -> (State, Visible) {
    let mut state = State::default();
    for event in events {
        state.merge(event);
    }
    let row = state.visible();
    (state, row)
}

/// Merges in `order`, storing and loading the state between batches of random sizes.
pub(super) fn merge_in_batches(events: &[Event], order: &[usize], random: &mut Random) -> State {
    let mut state = State::default();
    let stored_at = random.below(order.len());
    for (place, index) in order.iter().enumerate() {
        let before = state.clone();
        let changed = state.merge(&events[*index]);
        assert_eq!(
            changed,
            state != before,
            "merge says whether it changed the state"
        );
        if place == stored_at || random.percent(10) {
            let json = serde_json::to_string(&state).expect("a state is JSON");
            state = serde_json::from_str(&json).expect("and reads back");
        }
    }
    state
}

/// Visits every permutation of `0..n`, by Heap's algorithm.
pub(super) fn permutations(n: usize, visit: &mut impl FnMut(&[usize])) {
    fn heap(k: usize, order: &mut Vec<usize>, visit: &mut impl FnMut(&[usize])) {
        if k <= 1 {
            return visit(order);
        }
        for i in 0..k {
            heap(k - 1, order, visit);
            order.swap(if k.is_multiple_of(2) { i } else { 0 }, k - 1);
        }
    }
    heap(n, &mut (0..n).collect(), visit);
}

pub(super) fn with_repetitions(n: usize, random: &mut Random) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.extend((0..random.below(n + 1)).map(|_| random.below(n)));
    random.shuffle(&mut order);
    order
}

/// Checks that the columns are true or marked uncertain, and that the columns which are always
/// certain are true.
fn check_row(seed: u64, history: &History, events: &[Event], row: &Visible) {
    if let Some(truth) = &history.truth
        && !row.subscription.uncertain
    {
        assert_eq!(
            snapshot_columns(&row.subscription),
            truth.shown(history.shape),
            "seed {seed}"
        );
    }
    assert_eq!(
        row.subscription.status.is_some(),
        history.truth.is_some(),
        "seed {seed}"
    );
    let stamp = |event: &Event| (event.created, event.id.clone());
    let simulated = history
        .events
        .iter()
        .flat_map(|simulated| vec![simulated; 1 + usize::from(simulated.twin.is_some())]);
    let simulated: Vec<_> = simulated.zip(events).collect();
    let sessions = simulated
        .iter()
        .filter_map(|(simulated, event)| Some((stamp(event), simulated.session.clone()?)));
    let newest = sessions.clone().max().map(|(_, (id, _))| id);
    assert_eq!(row.checkout_session_id, newest, "seed {seed}");
    let reference = sessions
        .filter_map(|(stamp, (_, reference))| Some((stamp, reference?)))
        .max();
    let reference = reference.map(|(_, reference)| reference.to_owned());
    assert_eq!(
        row.subscription.client_reference_id, reference,
        "seed {seed}"
    );
    let mut by_type = BTreeMap::new();
    for (simulated, event) in &simulated {
        let newest = by_type
            .entry(event.event_type.clone())
            .or_insert((stamp(event), &simulated.metadata));
        *newest = (*newest).clone().max((stamp(event), &simulated.metadata));
    }
    let entries = by_type.iter().flat_map(|(event_type, (_, map))| {
        map.iter()
            .map(move |(key, value)| (format!("{event_type}.{key}"), value.clone()))
    });
    assert_eq!(row.subscription.metadata, entries.collect(), "seed {seed}");
}

/// Checks that the row is certain if the last second never returned to a state that it had left.
fn check_no_needless_uncertainty(seed: u64, history: &History, row: &Visible) {
    let Some(truth) = &history.truth else {
        return;
    };
    let phase = |status: Option<&str>| match status {
        Some("incomplete") => 0,
        Some("canceled" | "incomplete_expired") => 2,
        _ => 1,
    };
    let mut path = vec![None];
    let mut straight = true;
    // A fetch is not a step, and is stamped before the change that it follows.
    let is_step = |simulated: &&SimulatedEvent| {
        simulated.after.is_some() && simulated.body["type"] != SNAPSHOT_TYPE
    };
    for simulated in history.events.iter().filter(is_step) {
        let after = simulated.after.as_ref();
        let last_second = simulated.body["created"].as_i64() == row.head_created
            && phase(after.and_then(|after| after.status.as_deref())) == phase(Some(truth.status));
        if !last_second {
            path = vec![after];
            continue;
        }
        straight &= !simulated.repeats && (path.last() == Some(&after) || !path.contains(&after));
        path.push(after);
    }
    // A rendering without nulls does not say whether collection was paused before it was, so that
    // pauses cannot be compared. Stripe's renderings have their nulls.
    let pause =
        |after: &Option<&Subscription>| after.and_then(|after| after.pause_collection.clone());
    let is_one_pause = path.windows(2).all(|two| pause(&two[0]) == pause(&two[1]));
    straight &= is_one_pause || !history.shape.nulls_absent;
    assert!(
        !(straight && row.subscription.uncertain),
        "seed {seed}: {path:?}"
    );
}

/// Returns only the columns that a snapshot sets.
pub(super) fn snapshot_columns(row: &Subscription) -> Subscription {
    Subscription {
        client_reference_id: None,
        metadata: BTreeMap::new(),
        ..row.clone()
    }
}

fn check_replay(seed: u64, events: &[Event], state: &State) {
    let mut replayed = state.clone();
    for event in events {
        assert!(
            !replayed.merge(event),
            "seed {seed}: a replay of {} changes the state",
            event.id
        );
    }
    assert_eq!(replayed, *state, "seed {seed}");
}

/// Checks that a replay completes a row that an earlier version wrote, at whatever event the
/// upgrade came.
fn check_upgrade(seed: u64, events: &[Event], state: &State, random: &mut Random) {
    let order = with_repetitions(events.len(), random);
    let upgraded_at = random.below(order.len() + 1);
    let mut upgraded = State::default();
    for index in order.iter().take(upgraded_at) {
        upgraded.merge(&events[*index]);
    }
    let mut upgraded = as_an_earlier_version_stored(&upgraded);
    for index in order.iter().skip(upgraded_at) {
        upgraded.merge(&events[*index]);
    }
    for event in events {
        upgraded.merge(event);
    }
    assert_eq!(
        upgraded, *state,
        "seed {seed}, upgraded after {upgraded_at} of {order:?}"
    );
}

/// Returns the state as a version without marks had stored it.
pub(super) fn as_an_earlier_version_stored(state: &State) -> State {
    let mut json = serde_json::to_value(state).expect("a state is JSON");
    let edges = json
        .pointer_mut("/subscription/events")
        .and_then(Value::as_object_mut);
    for edge in edges
        .into_iter()
        .flatten()
        .filter_map(|(_, edge)| edge.as_object_mut())
    {
        for added in ["marks", "were", "details"] {
            edge.remove(added);
        }
    }
    serde_json::from_value(json).expect("it reads back")
}

impl Tally {
    /// Counts what happens to the row if one event never arrives. For information only: nothing is
    /// guaranteed.
    fn drop_one(&mut self, history: &History, events: &[Event], random: &mut Random) {
        let Some(truth) = history.truth.as_ref().filter(|_| events.len() > 1) else {
            return;
        };
        let dropped = random.below(events.len());
        let left: Vec<Event> = events
            .iter()
            .filter(|event| event.id != events[dropped].id)
            .cloned()
            .collect();
        let (_, row) = merge_all(&left);
        if row.subscription.uncertain {
            self.dropped_uncertain += 1;
        } else if snapshot_columns(&row.subscription) == truth.shown(history.shape) {
            self.dropped_right += 1;
        } else {
            self.dropped_wrong += 1;
        }
    }

    fn count(&mut self, events: &[Event], row: &Visible, orders: u64, state: &State) {
        self.histories += 1;
        self.events += events.len();
        self.orders += orders;
        let mut ids: Vec<_> = events
            .iter()
            .filter(|event| Some(event.created) == row.head_created)
            .collect();
        ids.dedup_by(|a, b| a.id == b.id);
        self.tied += u64::from(ids.len() > 1);
        self.uncertain += u64::from(row.subscription.uncertain);
        self.certain += u64::from(!row.subscription.uncertain);
        let by_digest = as_an_earlier_version_stored(state).visible();
        let (by_digest, is_uncertain) =
            (by_digest.subscription.uncertain, row.subscription.uncertain);
        self.uncertain_by_digest += u64::from(by_digest);
        self.uncertain_by_marks += u64::from(is_uncertain && !by_digest);
        let bytes = serde_json::to_string(state).map_or(0, |json| json.len());
        self.state_bytes_max = self.state_bytes_max.max(bytes);
    }
}
