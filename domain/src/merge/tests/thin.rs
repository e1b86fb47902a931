//! The law of the merge with thin events: what they lead to is the same whether an account sends
//! snapshot events, thin events or both.
//!
//! Owns the simulation of deliveries, fetches and Stripe's answers: an answer is the state at the
//! time of the fetch, however slowly it comes, and one fetch answers all thin events about the
//! object that were stored before it began.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use litestripe_contract::event::{HANDLED_TYPES, SNAPSHOT_TYPE};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::history::{self, History, SimulatedEvent};
use super::law::{
    decode, decode_bodies, histories_and_seed, merge_all, merge_in_batches, permutations,
    snapshot_columns, with_repetitions,
};
use super::model::{ACCOUNT, SUBSCRIPTION};
use super::random::Random;
use crate::event::{self, Before, Body, Event, Snapshot, SubscriptionEvent};
use crate::merge::digest::Digest;
use crate::merge::{State, Visible};

/// The most events of which every permutation is tried.
const EXHAUSTIVE_EVENTS_MAX: usize = 5;
/// With more events, this many random orders are tried, with repetitions.
const RANDOM_ORDERS: usize = 12;

/// Types of thin events that have no snapshot event. One of them may come with any change.
const FINER: [&str; 3] = [
    "v1.customer.subscription.active",
    "v1.customer.subscription.item_price_changed",
    "v1.customer.subscription.named_in_2027",
];

/// Counts of what was tried and found.
#[derive(Debug, Default)]
struct Tally {
    histories: u64,
    thin_events: usize,
    fetches: usize,
    orders: u64,
    snapshot_uncertain: u64,
    mixed_uncertain: u64,
    thin_uncertain: u64,
    partial_uncertain: u64,
    partial_wrong: u64,
    /// Histories in which metadata by type differs between thin and snapshot events, because it
    /// changed between an event and the fetch.
    metadata_differs: u64,
    state_bytes_max: usize,
}

#[test]
fn thin_snapshot_and_mixed_events_lead_to_the_same_columns() {
    let (histories, seed) = histories_and_seed();
    let started = Instant::now();
    let mut tally = Tally::default();
    for number in 0..histories {
        check(seed.wrapping_add(number), &mut tally);
    }
    let seconds = started.elapsed().as_secs();
    eprintln!("seed {seed}, {seconds} s: {tally:#?}");
    assert_eq!(tally.thin_uncertain, 0);
}

fn check(seed: u64, tally: &mut Tally) {
    let random = &mut Random::new(seed);
    let length = random.pick(&[1, 2, 2, 3, 3, 4, 5, 6, 8, 12, 20]);
    let mut history = history::simulate(random, length);
    // Those fetches know nothing of thin events; `deliver` simulates its own.
    history.events.retain(|simulated| !is_fetch(simulated));
    let thin = deliver(&history, random);

    let snapshot_events = decode(&history);
    let thin_events = decode_bodies(thin.notifications.iter().chain(thin.bodies()));
    let mixed_events = [snapshot_events.clone(), thin_events.clone()].concat();
    let snapshot = merge_all(&snapshot_events).1;
    let only_thin = check_orders(seed, &thin_events, random, tally);
    let mixed = check_orders(seed, &mixed_events, random, tally);

    check_only_thin(seed, &history, &thin, &only_thin);
    check_mixed(seed, &history, &mixed, &snapshot);
    tally.drop_snapshots(seed, &history, &snapshot_events, &thin_events, random);
    if !has_ambiguous_sessions(&history) {
        for row in [&only_thin, &mixed] {
            assert_eq!(
                row.checkout_session_id, snapshot.checkout_session_id,
                "seed {seed}"
            );
            assert_eq!(
                row.subscription.client_reference_id, snapshot.subscription.client_reference_id,
                "seed {seed}"
            );
        }
    }

    let count = |is: bool| u64::from(is);
    tally.histories += 1;
    tally.thin_events += thin.notifications.len();
    tally.fetches += thin.fetches.len();
    tally.snapshot_uncertain += count(snapshot.subscription.uncertain);
    tally.mixed_uncertain += count(mixed.subscription.uncertain);
    tally.thin_uncertain += count(only_thin.subscription.uncertain);
    tally.metadata_differs +=
        count(only_thin.subscription.metadata != snapshot.subscription.metadata);
}

impl Tally {
    /// Some snapshot events never come, because the destination is filtered, was switched off or
    /// lost them; thin events came for all changes. The row is true or uncertain, with one
    /// exception: the true state is one that the events of the last second left, and the event that
    /// returned to it never came.
    fn drop_snapshots(
        &mut self,
        seed: u64,
        history: &History,
        snapshot_events: &[Event],
        thin_events: &[Event],
        random: &mut Random,
    ) {
        let Some(truth) = &history.truth else {
            return;
        };
        let some = snapshot_events.iter().filter(|_| random.percent(50));
        let some: Vec<_> = some.cloned().collect();
        let events = [&some, thin_events].concat();
        let row = check_orders(seed, &events, random, self);
        self.partial_uncertain += u64::from(row.subscription.uncertain);
        let is_right = snapshot_columns(&row.subscription) == truth.shown(history.shape);
        if is_right || row.subscription.uncertain {
            return;
        }
        self.partial_wrong += 1;
        let newest = thin_events
            .iter()
            .filter_map(fetched_subscription)
            .max_by_key(|(fetch, _)| fetch.stamp);
        let (_, newest) = newest.expect("it was fetched at the end");
        let last_second = some
            .iter()
            .filter(|event| Some(event.created) == row.head_created);
        let was_left = last_second.filter_map(subscription).any(|body| {
            let is_it = |snapshot: &Snapshot| {
                Digest::from_snapshot(snapshot) == Digest::from_snapshot(&newest.snapshot)
            };
            is_it(&body.snapshot)
                || matches!(&body.before, Before::Snapshot(before) if is_it(before))
        });
        assert!(was_left, "seed {seed}");
    }
}

fn subscription(event: &Event) -> Option<&SubscriptionEvent> {
    match &event.body {
        Body::Subscription(body) => Some(body),
        _ => None,
    }
}

fn fetched_subscription(event: &Event) -> Option<(&event::Fetch, &SubscriptionEvent)> {
    Some((event.fetch.as_ref()?, subscription(event)?))
}

/// Checks that order, repetitions and batches do not matter. Returns the row.
fn check_orders(seed: u64, events: &[Event], random: &mut Random, tally: &mut Tally) -> Visible {
    let (state, row) = merge_all(events);
    let mut compare = |order: &[usize], random: &mut Random| {
        tally.orders += 1;
        let merged = merge_in_batches(events, order, random);
        assert_eq!(merged, state, "seed {seed}, order {order:?}");
    };
    if events.len() <= EXHAUSTIVE_EVENTS_MAX {
        permutations(events.len(), &mut |order| compare(order, random));
    } else {
        for _ in 0..RANDOM_ORDERS {
            compare(&with_repetitions(events.len(), random), random);
        }
    }
    let bytes = serde_json::to_string(&state).map_or(0, |json| json.len());
    tally.state_bytes_max = tally.state_bytes_max.max(bytes);
    row
}

/// Thin events alone always lead to the true columns, with certainty. Metadata by type is that of
/// the fetch, which may be newer than that of the event.
fn check_only_thin(seed: u64, history: &History, thin: &Thin, row: &Visible) {
    assert!(!row.subscription.uncertain, "seed {seed}");
    let truth = history.truth.as_ref();
    assert_eq!(
        row.subscription.status.is_some(),
        truth.is_some(),
        "seed {seed}"
    );
    if let Some(truth) = truth {
        assert_eq!(
            snapshot_columns(&row.subscription),
            truth.shown(history.shape),
            "seed {seed}"
        );
        assert!(row.created_event_seen, "seed {seed}");
    }
    let mut by_type = BTreeMap::new();
    for fetch in &thin.fetches {
        for thin_type in &fetch.types {
            let name = thin_type.strip_prefix("v1.").expect("they have a prefix");
            if HANDLED_TYPES.contains(&name) {
                by_type.insert(name, &fetch.metadata);
            }
        }
    }
    assert_eq!(row.subscription.metadata, entries(&by_type), "seed {seed}");
}

/// Snapshot and thin events together lead to the row of the snapshot events alone. It is uncertain
/// only where theirs is.
fn check_mixed(seed: u64, history: &History, mixed: &Visible, snapshot: &Visible) {
    if mixed.subscription.uncertain {
        assert!(snapshot.subscription.uncertain, "seed {seed}");
    } else if let Some(truth) = &history.truth {
        assert_eq!(
            snapshot_columns(&mixed.subscription),
            truth.shown(history.shape),
            "seed {seed}"
        );
    }
    assert_eq!(
        mixed.subscription.metadata, snapshot.subscription.metadata,
        "seed {seed}"
    );
    assert_eq!(
        mixed.created_event_seen, snapshot.created_event_seen,
        "seed {seed}"
    );
}

fn entries(by_type: &BTreeMap<&str, &BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let entries = by_type.iter().flat_map(|(name, map)| {
        map.iter()
            .map(move |(key, value)| (format!("{name}.{key}"), value.clone()))
    });
    entries.collect()
}

/// Whether the Checkout Sessions have values that depend on the order within a second, which thin
/// events cannot know, or a client reference id that changed, which Stripe does not do.
fn has_ambiguous_sessions(history: &History) -> bool {
    let (mut references, mut seconds) = (BTreeSet::new(), BTreeSet::new());
    let mut ids = BTreeSet::new();
    for simulated in &history.events {
        if let Some((id, reference)) = &simulated.session {
            ids.insert(id);
            references.insert((id, reference));
            seconds.insert((created(simulated), id));
        }
    }
    let distinct_seconds: BTreeSet<_> = seconds.iter().map(|(second, _)| second).collect();
    references.len() > ids.len() || seconds.len() > distinct_seconds.len()
}

fn is_fetch(simulated: &SimulatedEvent) -> bool {
    simulated.body["type"] == SNAPSHOT_TYPE
}

fn created(simulated: &SimulatedEvent) -> i64 {
    simulated.body["created"].as_i64().expect("it has a time")
}

/// What a thin destination receives, and what the worker fetches because of it.
struct Thin {
    notifications: Vec<Value>,
    /// In the order in which they were made.
    fetches: Vec<Fetch>,
}

struct Fetch {
    body: Value,
    /// The types of the thin events that it answers.
    types: BTreeSet<String>,
    metadata: BTreeMap<String, String>,
}

impl Thin {
    fn bodies(&self) -> impl Iterator<Item = &Value> {
        self.fetches.iter().map(|fetch| &fetch.body)
    }
}

/// Delivers a thin event for each event of the history, and fetches at random times, at the latest
/// after the last of them.
fn deliver(history: &History, random: &mut Random) -> Thin {
    let mut delivery = Delivery {
        random,
        now: 0,
        stored: 0,
        objects: BTreeMap::new(),
        in_transit: Vec::new(),
        thin: Thin {
            notifications: Vec::new(),
            fetches: Vec::new(),
        },
    };
    for simulated in &history.events {
        delivery.happen(simulated);
    }
    delivery.finish();
    delivery.thin
}

struct Delivery<'a, 'h> {
    random: &'a mut Random,
    now: i64,
    /// How many messages the stream holds.
    stored: u64,
    /// The objects at Stripe by id, with what the worker knows of them.
    objects: BTreeMap<String, Object<'h>>,
    /// Thin events that have not arrived yet, each with the object's id.
    in_transit: Vec<(String, Value)>,
    thin: Thin,
}

struct Object<'h> {
    /// The newest event about it, which has its state.
    state: &'h SimulatedEvent,
    /// Thin events that wait for a fetch, of each type the one that was stored last.
    waiting: BTreeMap<String, Value>,
    /// When the last answer arrived. The next fetch does not begin earlier.
    answered: i64,
}

impl<'h> Delivery<'_, 'h> {
    fn happen(&mut self, simulated: &'h SimulatedEvent) {
        self.now = created(simulated);
        // The snapshot event, if there is a destination for it.
        self.stored += 1;
        let id = match &simulated.session {
            Some((id, _)) => id.clone(),
            None => SUBSCRIPTION.to_owned(),
        };
        let object = self.objects.entry(id.clone()).or_insert_with(|| Object {
            state: simulated,
            waiting: BTreeMap::new(),
            answered: 0,
        });
        object.state = simulated;
        let name = simulated.body["type"].as_str().expect("it has a type");
        let mut names = vec![format!("v1.{name}")];
        if simulated.session.is_none() && self.random.percent(40) {
            names.push(self.random.pick(&FINER).to_owned());
        }
        for name in names {
            let notification = self.notification(&name, &id);
            self.in_transit.push((id.clone(), notification));
        }
        self.arrive(70);
        if self.random.percent(50) {
            self.fetch_all(5);
        }
    }

    /// Lets each thin event in transit arrive with this probability, in any order.
    fn arrive(&mut self, percent: usize) {
        self.random.shuffle(&mut self.in_transit);
        for (id, notification) in std::mem::take(&mut self.in_transit) {
            if !self.random.percent(percent) {
                self.in_transit.push((id, notification));
                continue;
            }
            self.stored += 1;
            let name = notification["type"].as_str().expect("it has a type");
            let object = self.objects.get_mut(&id).expect("it has happened");
            object.waiting.insert(name.to_owned(), notification.clone());
            self.thin.notifications.push(notification);
        }
    }

    /// Fetches each object with waiting thin events, and others with this probability: a reconcile.
    fn fetch_all(&mut self, percent: usize) {
        let ids: Vec<_> = self.objects.keys().cloned().collect();
        for id in ids {
            let reconciled = self.random.percent(percent) && id == SUBSCRIPTION;
            let object = &self.objects[&id];
            let is_asked = reconciled || !object.waiting.is_empty();
            if is_asked && object.answered <= self.now {
                self.fetch(&id);
            }
        }
    }

    /// After the last event: everything arrives and is answered.
    fn finish(&mut self) {
        self.arrive(100);
        self.now += self.random.pick(&[0, 0, 1, 3]);
        let answered = self.objects.values().map(|object| object.answered);
        self.now = answered.fold(self.now, i64::max);
        self.fetch_all(0);
    }

    fn fetch(&mut self, id: &str) {
        let is_session = id != SUBSCRIPTION;
        // A slow answer has the state of the moment when the request arrived.
        let slow = if is_session {
            0
        } else {
            self.random.pick(&[0, 0, 0, 1, 4])
        };
        let date = self.now + slow;
        // Rounded up.
        let took = (slow + self.random.pick(&[0, 1])).max(1);
        let mark = self.stored;
        self.stored += 1;
        let object = self.objects.get_mut(id).expect("it has happened");
        object.answered = date;
        let waiting = std::mem::take(&mut object.waiting);
        let seconds = waiting.values().map(second_of);
        let created = match seconds.max() {
            Some(newest) if is_session => newest,
            _ => date - took - 1,
        };
        let references: Vec<_> = waiting
            .values()
            .map(|event| json!({ "id": event["id"], "type": event["type"], "created": rfc3339(second_of(event)) }))
            .collect();
        let body = json!({
            "id": format!("litestripe.snapshot.{id}.{date}.{mark}"), "object": "event", "created": created,
            "type": SNAPSHOT_TYPE, "livemode": true, "account": ACCOUNT,
            "data": { "object": object.state.body["data"]["object"] },
            "fetched": { "date": date, "mark": mark }, "notifications": references,
        });
        self.thin.fetches.push(Fetch {
            body,
            types: waiting.into_keys().collect(),
            metadata: object.state.metadata.clone(),
        });
    }

    fn notification(&mut self, name: &str, id: &str) -> Value {
        let kind = if id == SUBSCRIPTION {
            "subscription"
        } else {
            "checkout.session"
        };
        let millisecond = self.random.below(1000);
        let second = rfc3339(self.now);
        let second = second.trim_end_matches('Z');
        json!({ "id": format!("evt_test_{:016x}", self.random.next()), "object": "v2.core.event", "type": name,
            "created": format!("{second}.{millisecond:03}Z"), "livemode": true, "context": ACCOUNT, "reason": null,
            "related_object": { "id": id, "type": kind, "url": format!("/v1/{kind}s/{id}") } })
    }
}

/// The second of a thin event's `created`.
fn second_of(notification: &Value) -> i64 {
    let text = notification["created"].as_str().expect("it is text");
    let at = OffsetDateTime::parse(text, &Rfc3339).expect("it is a time");
    at.unix_timestamp()
}

fn rfc3339(second: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(second).expect("it is a time");
    at.format(&Rfc3339).expect("it can be written")
}

/// A thin event says nothing about the row.
#[test]
fn thin_event_alone_changes_no_state() {
    let random = &mut Random::new(1);
    let mut history = history::simulate(random, 8);
    history.events.retain(|simulated| !is_fetch(simulated));
    let thin = deliver(&history, random);
    let mut state = State::default();
    for event in decode_bodies(&thin.notifications) {
        assert!(!state.merge(&event));
    }
    assert_eq!(state, State::default());
}
