//! The check that runs after the faults, when everything works again.
//!
//! Compares the rows with the pure merge of the events, the signals with each other and with the
//! rows, and the stream with the ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream as JetStream};
use bytes::Bytes;
use futures_util::StreamExt as _;
use litestripe_contract::header;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::event::{self, MetadataKeys};
use litestripe_domain::merge::State;
use litestripe_entity::stripe_subscription;
use litestripe_harness::bridge::{Signal, signal_fields};
use litestripe_harness::eventually;
use serde_json::Value;
use time::OffsetDateTime;

use crate::rig::{DEADLINE, Rig};

/// The broker stores repeated deliveries of one event within this time only once.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(300);

/// The header of a stored message that was a member of an atomic batch.
pub(crate) const BATCH_ID: &str = "Nats-Batch-Id";

/// The figures of a check.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Events in the stream.
    pub(crate) events: usize,
    pub(crate) rows: usize,
    /// Signals, without repetitions.
    pub(crate) signals: usize,
    /// Signals whose `Nats-Msg-Id` occurred before.
    pub(crate) repeated_signals: usize,
    /// Signals that were stored in an atomic batch.
    pub(crate) signals_in_batches: usize,
    pub(crate) dead_letters: usize,
}

/// Whether the stream must contain every accepted event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// No message was removed from the streams: every accepted event is stored.
    Whole,
    /// Applied events were purged.
    Purged,
    /// The stream of events was made anew with what it held, so that its sequences changed.
    Renewed,
}

/// Waits until every event is applied, and checks that no event or signal was lost, doubled or
/// reordered.
pub(crate) async fn check(rig: &Rig, stream: Stream) -> Found {
    rig.bridge.wait_until_applied().await;
    let stored = stored(rig).await;
    let accepted = rig.ledger.accepted();
    check_stream(&stored, &accepted, stream);

    let bodies = stored
        .iter()
        .map(|stored| stored.body.clone())
        .chain(accepted.into_values());
    let rows = rig.bridge.rows().await;
    check_rows(&rows, &merged(bodies));
    let signals = rig.bridge.signals().await;
    let found = Found {
        events: stored.len(),
        rows: rows.len(),
        ..check_signals(&signals, &rows)
    };
    check_orphans(rig, &signals).await;
    Found {
        dead_letters: check_dead_letters(rig, &stored, stream).await,
        ..found
    }
}

/// Checks that the rows are the merge of the accepted events. Needs no stream.
pub(crate) async fn check_rows_are_merged(rig: &Rig) {
    check_rows(
        &rig.bridge.rows().await,
        &merged(rig.ledger.accepted().into_values()),
    );
}

/// An event in the stream.
pub(crate) struct Stored {
    sequence: u64,
    pub(crate) subject: Subject,
    pub(crate) message_id: String,
    at: OffsetDateTime,
    pub(crate) body: Bytes,
}

/// How many messages are requested at a time. A consumer would have more large messages in flight
/// than the broker buffers for a connection, and the broker would close the connection.
const REQUESTS_AT_A_TIME: usize = 16;

/// Reads the stream of events.
pub(crate) async fn stored(rig: &Rig) -> Vec<Stored> {
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    let state = &stream.cached_info().state;
    // A stream that never held a message says 0 and 0.
    let sequences = state.first_sequence.max(1)..=state.last_sequence;
    let messages = futures_util::stream::iter(sequences).map(|sequence| at(&stream, sequence));
    messages
        .buffered(REQUESTS_AT_A_TIME)
        .filter_map(async |message| message.map(read))
        .collect()
        .await
}

/// Reads the message at `sequence`; `None` if it was removed. Any replica may answer a direct get,
/// also one that lags behind and lacks the message, so in that case the leader is asked.
async fn at(stream: &JetStream, sequence: u64) -> Option<StreamMessage> {
    if let Ok(message) = stream.direct_get(sequence).await {
        return Some(message);
    }
    eventually(
        "the leader to show a message",
        DEADLINE,
        async || match stream.get_raw_message(sequence).await {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(format!("message {sequence}: {error}")),
        },
    )
    .await
}

fn read(message: StreamMessage) -> Stored {
    let id = message.headers.get(header::MESSAGE_ID);
    Stored {
        sequence: message.sequence,
        subject: message.subject,
        message_id: id
            .map(|id| id.as_str().to_owned())
            .expect("every published event has an id"),
        at: message.time,
        body: message.payload,
    }
}

fn check_stream(stored: &[Stored], accepted: &BTreeMap<String, Bytes>, stream: Stream) {
    let mut by_id: BTreeMap<&str, Vec<&Stored>> = BTreeMap::new();
    for stored in stored {
        by_id.entry(&stored.message_id).or_default().push(stored);
    }
    let lost: Vec<_> = accepted
        .keys()
        .filter(|id| !by_id.contains_key(id.as_str()))
        .collect();
    assert!(
        stream == Stream::Purged || lost.is_empty(),
        "{} accepted events are not stored: {lost:?}",
        lost.len()
    );
    for (id, copies) in by_id {
        for pair in copies.windows(2) {
            let between = pair[1].at - pair[0].at;
            assert!(
                between >= DUPLICATE_WINDOW,
                "{id} is stored twice within {between}"
            );
        }
        if let Some(body) = accepted.get(id) {
            assert!(
                copies.iter().all(|copy| copy.body == body),
                "{id} is stored with another body"
            );
        }
    }
}

/// Merges the events; returns the expected merge state of each row.
fn merged(bodies: impl Iterator<Item = Bytes>) -> BTreeMap<String, State> {
    let mut states: BTreeMap<String, State> = BTreeMap::new();
    for body in bodies {
        let Ok(Some(event)) = event::decode(&body, &MetadataKeys::All) else {
            continue;
        };
        let Some(id) = event.stripe_subscription_id() else {
            continue;
        };
        states.entry(id.to_owned()).or_default().merge(&event);
    }
    states
}

fn check_rows(rows: &[stripe_subscription::Model], states: &BTreeMap<String, State>) {
    let ids: BTreeSet<_> = rows.iter().map(|row| &row.stripe_subscription_id).collect();
    assert_eq!(
        ids,
        states.keys().collect(),
        "there is a row for every subscription with events, and no other"
    );
    for row in rows {
        let id = &row.stripe_subscription_id;
        let state = &states[id];
        let stored: State = serde_json::from_str(&row.merge_state).expect("a merge state is JSON");
        assert_eq!(
            &stored.merged(),
            state,
            "the merge state of {id} is not the merge of its events"
        );
        let visible = state.visible();
        let expected = serde_json::to_value(&visible.subscription).expect("a row is JSON");
        let shown = signal_fields(row);
        for (field, value) in expected.as_object().expect("a row is an object") {
            assert_eq!(
                &shown[field], value,
                "`{field}` of {id} differs from the merge of its events"
            );
        }
        assert_eq!(
            row.checkout_session_id, visible.checkout_session_id,
            "`checkout_session_id` of {id}"
        );
        assert_eq!(
            row.last_event_id,
            visible.last_event.map(|(id, _)| String::from(id)),
            "`last_event_id` of {id}"
        );
    }
}

/// Checks that the signals of each subscription follow from one another without a gap, and that the
/// last one agrees with the row.
fn check_signals(signals: &[Signal], rows: &[stripe_subscription::Model]) -> Found {
    let mut first: BTreeMap<&str, &Signal> = BTreeMap::new();
    let mut last: BTreeMap<&str, &Signal> = BTreeMap::new();
    let mut found = Found::default();
    for signal in signals {
        let message_id = signal.headers["Nats-Msg-Id"].as_str();
        if let Some(earlier) = first.get(message_id) {
            assert_eq!(
                earlier.body, signal.body,
                "{message_id} was sent with two bodies"
            );
            found.repeated_signals += 1;
            continue;
        }
        first.insert(message_id, signal);
        found.signals += 1;
        found.signals_in_batches += usize::from(signal.headers.contains_key(BATCH_ID));
        let Some(id) = changed(signal) else { continue };
        let (revision, previous) = (&signal.body["revision"], &signal.body["previous_revision"]);
        let before = last
            .get(id)
            .map_or(&Value::Null, |before| &before.body["revision"]);
        assert_eq!(
            previous, before,
            "the revision before {revision} of {id}: one was lost, doubled or overtaken"
        );
        assert!(
            revision.as_i64() > before.as_i64(),
            "the revision of {id} grows: {before}, {revision}"
        );
        last.insert(id, signal);
    }
    for row in rows {
        let id = row.stripe_subscription_id.as_str();
        let signal = last
            .remove(id)
            .unwrap_or_else(|| panic!("{id} has a row but no signal"));
        let row = signal_fields(row);
        for field in row.as_object().expect("it is an object").keys() {
            assert_eq!(
                row[field], signal.body[field],
                "`{field}` of the row {id} and its last signal"
            );
        }
    }
    assert!(last.is_empty(), "signals without a row: {:?}", last.keys());
    found
}

/// The subscription of a `subscription.changed` signal; `None` for other signals.
fn changed(signal: &Signal) -> Option<&str> {
    if signal.subject == "subscription.changed" {
        signal.body["stripe_subscription_id"].as_str()
    } else {
        None
    }
}

/// Checks that every orphan was signalled once, and that no other `orphan.created` exists.
async fn check_orphans(rig: &Rig, signals: &[Signal]) {
    let created: BTreeMap<_, _> = signals
        .iter()
        .filter(|signal| signal.subject == "orphan.created")
        .map(|signal| {
            (
                signal.headers["Nats-Msg-Id"].clone(),
                signal.body["orphan_id"].clone(),
            )
        })
        .collect();
    let mut signalled: Vec<_> = created.values().filter_map(Value::as_str).collect();
    signalled.sort_unstable();
    let orphans = rig.bridge.orphans().await;
    let orphans: Vec<_> = orphans.iter().map(|orphan| orphan.id.as_str()).collect();
    assert_eq!(signalled, orphans, "signalled orphans and stored orphans");
}

/// Checks that the dead letters are exactly the events that cannot be decoded. Waits, because a
/// letter that the broker refused is published later.
async fn check_dead_letters(rig: &Rig, stored: &[Stored], stream: Stream) -> usize {
    let poison: Vec<_> = stored
        .iter()
        .filter(|stored| event::decode(&stored.body, &MetadataKeys::All).is_err())
        .collect();
    eventually(
        "a dead letter for each poisoned event",
        DEADLINE,
        async || {
            let letters = rig.bridge.dead_letters().await;
            let (found, expected): (BTreeSet<String>, BTreeSet<String>) = match stream {
                Stream::Whole => (
                    letters
                        .iter()
                        .map(|letter| letter.headers[header::STREAM_SEQUENCE].clone())
                        .collect(),
                    poison
                        .iter()
                        .map(|stored| stored.sequence.to_string())
                        .collect(),
                ),
                Stream::Renewed => (
                    letters
                        .iter()
                        .map(|letter| event_id(&letter.body))
                        .collect(),
                    poison.iter().map(|stored| event_id(&stored.body)).collect(),
                ),
                Stream::Purged => return Ok(letters.len()),
            };
            if found == expected {
                return Ok(found.len());
            }
            Err(format!(
                "dead letters {found:?}, poisoned events {expected:?}"
            ))
        },
    )
    .await
}

fn event_id(body: &Bytes) -> String {
    let event: Value = serde_json::from_slice(body).expect("every event of a test is JSON");
    event["id"].as_str().expect("it has an id").to_owned()
}
