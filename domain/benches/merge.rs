//! Measures the work of a change between the two database statements: the row's state is parsed,
//! merged, turned into columns and serialised.
//!
//!     cargo bench -p litestripe-domain --bench merge

use divan::{Bencher, black_box};
use litestripe_domain::event::{Event, MetadataKeys, decode};
use litestripe_domain::merge::State;

mod events;

const UPDATED: &str = "customer.subscription.updated";
const CREATED: i64 = 1_795_430_000;

fn main() {
    divan::main();
}

fn event(id: &str, created: i64) -> Event {
    let body = events::subscription(UPDATED, id, created);
    decode(&body, &MetadataKeys::All)
        .expect("it is an event")
        .expect("it is of a type that is handled")
}

fn state(events: &[Event]) -> State {
    let mut state = State::default();
    for event in events {
        state.merge(event);
    }
    state
}

#[divan::bench]
fn a_later_event(bencher: Bencher<'_, '_>) {
    let (before, later) = (
        state(&[event("evt_1", CREATED)]),
        event("evt_2", CREATED + 1),
    );
    bencher
        .with_inputs(|| before.clone())
        .bench_local_values(|mut state| {
            state.merge(black_box(&later));
            state
        });
}

/// Includes the walk over the events of a second.
#[divan::bench(args = [1, 4, 16])]
fn another_event_of_the_same_second(bencher: Bencher<'_, '_>, others: usize) {
    let others: Vec<Event> = (0..others)
        .map(|number| event(&format!("evt_{number}"), CREATED))
        .collect();
    let (before, another) = (state(&others), event("evt_x", CREATED));
    bencher
        .with_inputs(|| before.clone())
        .bench_local_values(|mut state| {
            state.merge(black_box(&another));
            state.visible()
        });
}

#[divan::bench]
fn the_visible_columns(bencher: Bencher<'_, '_>) {
    let state = state(&[event("evt_1", CREATED)]);
    bencher.bench_local(|| black_box(&state).visible());
}

#[divan::bench]
fn to_the_column_and_back(bencher: Bencher<'_, '_>) {
    let state = state(&[event("evt_1", CREATED)]);
    bencher.bench_local(|| {
        let column = serde_json::to_string(black_box(&state)).expect("a state is JSON");
        serde_json::from_str::<State>(&column)
    });
}
