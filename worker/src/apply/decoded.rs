//! A decoded batch.
//!
//! Owns decoding a batch's messages, and the ids that its events are about. May not know the
//! database.

use std::collections::HashSet;

use litestripe_contract::subject;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event::{self, Event, MetadataKeys};
use litestripe_domain::plan;

use crate::metrics;
use crate::stream::consumer::Batch;

/// A batch with its decoded events.
pub struct Decoded {
    pub(super) batch: Batch,
    pub(super) arrivals: Vec<Arrival>,
    /// The messages that can never be applied, by their index, each with the reason.
    pub(super) poisoned: Vec<(usize, String)>,
    /// The messages of types that are not handled, by their index.
    pub(super) ignored: Vec<usize>,
    entity_ids: HashSet<String>,
}

impl Decoded {
    /// Decodes the events of `batch`.
    pub fn new(batch: Batch, keys: &MetadataKeys) -> Self {
        let Contents {
            arrivals,
            poisoned,
            ignored,
        } = decode(&batch, keys);
        let entity_ids = plan::entity_ids(&arrivals);
        Self {
            batch,
            arrivals,
            poisoned,
            ignored,
            entity_ids,
        }
    }

    /// Appends a later batch.
    pub fn append(&mut self, later: Self) {
        let before = self.batch.count();
        self.batch.append(later.batch);
        let arrivals = later.arrivals.into_iter();
        self.arrivals.extend(arrivals.map(|arrival| Arrival {
            index: before + arrival.index,
            ..arrival
        }));
        self.poisoned.extend(
            later
                .poisoned
                .into_iter()
                .map(|(index, why)| (before + index, why)),
        );
        let ignored = later.ignored.into_iter();
        self.ignored.extend(ignored.map(|index| before + index));
        self.entity_ids.extend(later.entity_ids);
    }

    /// The number of messages, decoded or not.
    pub fn count(&self) -> usize {
        self.batch.count()
    }

    /// The ids of the subscriptions and payments that its events are about. Batches that share an
    /// id are applied one after the other, or subscribers would miss the states in between.
    pub fn entity_ids(&self) -> &HashSet<String> {
        &self.entity_ids
    }

    /// The highest stream sequence of its messages.
    pub fn last_sequence(&self) -> u64 {
        self.batch.last_sequence()
    }

    /// Returns the messages to the server, which delivers them to any worker.
    pub async fn hand_back(self) {
        self.batch.hand_back().await;
    }
}

/// Counts the poisoned messages that are `wanted`.
pub fn count_wanted_poisoned(
    batch: &Batch,
    poisoned: &[(usize, String)],
    wanted: impl Fn(u64, Option<&Arrival>) -> bool,
) -> u64 {
    let messages = batch.messages().enumerate();
    let poisoned =
        messages.filter(|(index, _)| poisoned.iter().any(|(poisoned, _)| poisoned == index));
    poisoned
        .filter(|(_, message)| wanted(message.stream_sequence(), None))
        .count() as u64
}

/// What a batch's messages are, each by its index.
#[derive(Default)]
pub struct Contents {
    pub arrivals: Vec<Arrival>,
    /// Messages that can never be applied, each with the reason.
    pub poisoned: Vec<(usize, String)>,
    /// Messages of types that are not handled.
    pub ignored: Vec<usize>,
}

/// Decodes the events of a batch.
pub fn decode(batch: &Batch, keys: &MetadataKeys) -> Contents {
    let mut contents = Contents::default();
    for (index, message) in batch.messages().enumerate() {
        match decode_one(message.subject(), message.payload, keys) {
            Ok(Some(event)) => contents.arrivals.push(Arrival {
                index,
                event,
                trace: message.trace(),
                received: message.received(),
                stream: batch.stream(),
                stream_sequence: message.stream_sequence(),
            }),
            Ok(None) => {
                metrics::ignored();
                contents.ignored.push(index);
            }
            Err(reason) => contents.poisoned.push((index, reason)),
        }
    }
    contents
}

/// Decodes the event of a message of `STRIPE_EVENTS` or `STRIPE_DEAD_LETTERS`. `None` if its type is
/// not handled.
///
/// # Errors
/// Why it can never be applied. Also if its type is not the one that its subject names: the broker
/// knows only subjects when it decides who may store which events, such as a resolution.
pub fn decode_one(
    subject: &str,
    body: &[u8],
    keys: &MetadataKeys,
) -> Result<Option<Event>, String> {
    let event = event::decode(body, keys).map_err(|error| error.to_string())?;
    match event {
        Some(event) if !subject::is_for_event_type(subject, &event.event_type) => Err(format!(
            "its type is {}, but its subject is {subject}",
            event.event_type
        )),
        event => Ok(event),
    }
}
