//! One batch of events through the worker.
//!
//! Owns the order of effects: decode → load → merge → save → ack → wake the relay. No other code
//! may order them. May not know SQL (only the store does) or how a message is acked (only the
//! consumer does).

use std::sync::Arc;

use litestripe_contract::exit;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event::{MetadataKeys, owner};
use litestripe_domain::plan::Policy;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::erasure::{self, Erasures};
use crate::error::{Disposition, StoreError};
use crate::fail_point::fail_point;
use crate::health::Problems;
use crate::metrics;
use crate::store::Transaction;
use crate::store::{self, Store};
use crate::stream::consumer::Batch;
use crate::stream::dead_letter::DeadLetters;
use crate::wait::{DATABASE, Wait, Waiting, pause};

mod decoded;
pub mod in_flight;
mod save;

pub use decoded::{Decoded, count_wanted_poisoned, decode};
use save::save;

/// Batches that are applied at the same time: one is decoded and merged while the database works on
/// another.
pub const IN_FLIGHT: usize = 2;

/// What applying a batch needs.
#[derive(Clone)]
pub struct Applier {
    pub store: Store,
    pub metadata_keys: MetadataKeys,
    pub policy: Arc<Policy>,
    /// The ids whose personal data was erased and must not come back.
    pub erasures: Erasures,
    /// Whether a customer that is deleted at Stripe is erased here.
    pub erase_on_customer_deleted: bool,
    pub dead_letters: DeadLetters,
    /// Wakes up the relay when there may be signals to send.
    pub relay: Arc<Notify>,
    /// Wakes up the questions task when there may be users to look up.
    pub questions: Arc<Notify>,
    pub waiting: Arc<Waiting>,
    /// Where it is reported that batches cannot be applied.
    pub problems: Problems,
}

/// Applies a batch: commit, then ack, then wake the relay.
///
/// While the database is unavailable it waits, and keeps the batch's messages in progress. If
/// `shutdown` is cancelled meanwhile, it hands the messages back.
pub async fn apply(applier: &Applier, decoded: Decoded, shutdown: &CancellationToken) {
    let Decoded {
        batch,
        arrivals,
        mut poisoned,
        ..
    } = decoded;
    let events = arrivals.len();
    if applier.erase_on_customer_deleted
        && queue_erasures(applier, &batch, shutdown).await.is_none()
    {
        batch.hand_back().await;
        return;
    }
    let Some(Outcome { refused, redacted }) =
        save_with_retries(applier, arrivals, &batch, shutdown).await
    else {
        batch.hand_back().await;
        return;
    };
    poisoned.extend(refused);
    batch
        .ack_except(poisoned.iter().map(|(index, _)| *index))
        .await;
    fail_point!("worker::after_ack");
    applier.relay.notify_one();
    if applier.policy.rules.lookup {
        applier.questions.notify_one();
    }
    metrics::applied(events);
    applier.erasures.remove_late(redacted);
    applier.dead_letters.store(batch, poisoned).await;
}

/// The events of a reapplied batch, counted.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reapplied {
    pub applied: u64,
    /// Events that can never be applied.
    pub poisoned: u64,
}

/// Reapplies the `wanted` events of a batch. Unlike [`apply`] it only counts poisoned events, which
/// are dead letters already.
///
/// `wanted` gets an event's sequence, and the event if it can be decoded. Returns `None` if
/// `shutdown` was cancelled while the database was unavailable.
pub async fn reapply(
    applier: &Applier,
    decoded: Decoded,
    wanted: impl Fn(u64, Option<&Arrival>) -> bool,
    shutdown: &CancellationToken,
) -> Option<Reapplied> {
    let Decoded {
        batch,
        mut arrivals,
        poisoned,
        ..
    } = decoded;
    let poisoned = count_wanted_poisoned(&batch, &poisoned, &wanted);
    arrivals.retain(|arrival| wanted(arrival.stream_sequence, Some(arrival)));
    let events = arrivals.len() as u64;
    let Some(outcome) = save_with_retries(applier, arrivals, &batch, shutdown).await else {
        batch.hand_back().await;
        return None;
    };
    batch.ack_except([]).await;
    let refused = outcome.refused.len() as u64;
    Some(Reapplied {
        applied: events - refused,
        poisoned: refused + poisoned,
    })
}

/// Queues the erasure of the customers that were deleted at Stripe, before their messages are
/// acked. Retries for as long as the database is unavailable. Returns `None` if `shutdown` was
/// cancelled before it succeeded.
async fn queue_erasures(
    applier: &Applier,
    batch: &Batch,
    shutdown: &CancellationToken,
) -> Option<()> {
    let now = OffsetDateTime::now_utc();
    let deleted = batch.messages().filter_map(|message| {
        let customer = owner::deleted_customer(message.payload)?;
        Some(erasure::question(customer, message.stream_sequence(), now))
    });
    let questions: Vec<_> = deleted.collect();
    let mut wait = Wait::with_others(DATABASE, Arc::clone(&applier.waiting));
    while !questions.is_empty() {
        let questions = questions.clone();
        let queue = async move |tx: Transaction| {
            store::question::save(&tx, questions).await?;
            tx.commit()
                .await
                .map_err(StoreError::doing("commit erasures"))
        };
        match applier.store.uncancelled(queue).await {
            Ok(()) => {
                wait.succeeded();
                break;
            }
            Err(error) => {
                batch.keep_alive().await;
                pause(wait.failed(&error), shutdown).await?;
            }
        }
    }
    Some(())
}

/// The result of saving a batch.
#[derive(Default)]
struct Outcome {
    /// The events that the database refuses permanently, by their index, each with the reason.
    refused: Vec<(usize, String)>,
    /// The sequences of the events that were saved without their personal data, because that was
    /// erased.
    redacted: Vec<u64>,
}

/// Saves the changes that the events cause. Retries for as long as the database is unavailable.
/// Returns `None` if `shutdown` was cancelled before it succeeded.
async fn save_with_retries(
    applier: &Applier,
    arrivals: Vec<Arrival>,
    batch: &Batch,
    shutdown: &CancellationToken,
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    // A refused set is halved until the event at fault is alone in its set.
    let mut sets = vec![Arc::new(arrivals)];
    let mut wait = Wait::with_others(DATABASE, Arc::clone(&applier.waiting));
    while let Some(set) = sets.pop() {
        match save(applier, &set).await {
            Ok(redacted) => {
                outcome.redacted.extend(redacted);
                wait.succeeded();
            }
            Err(error) if error.disposition() == Disposition::Wait => {
                sets.push(set);
                batch.keep_alive().await;
                pause(wait.failed(&error), shutdown).await?;
            }
            Err(error) => match Arc::try_unwrap(set).ok()? {
                single if single.len() == 1 => {
                    outcome.refused.push((single[0].index, exit::chain(&error)))
                }
                mut half => {
                    let rest = half.split_off(half.len() / 2);
                    sets.extend([Arc::new(rest), Arc::new(half)]);
                }
            },
        }
    }
    Some(outcome)
}

/// Applies one event outside of any batch, as a batch would. Returns the reason if the database
/// refuses the event permanently.
pub async fn apply_one(applier: &Applier, arrival: Arrival) -> Result<Option<String>, StoreError> {
    match save(applier, &Arc::new(vec![arrival])).await {
        Ok(_) => Ok(None),
        Err(error) if error.disposition() == Disposition::Poison => Ok(Some(exit::chain(&error))),
        Err(error) => Err(error),
    }
}
