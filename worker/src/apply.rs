//! One batch of events through the worker.
//!
//! Owns the order of effects: decode → load → merge → save → ack → wake the relay. No other code
//! may order them. May not know SQL (the store's) or how a message is acknowledged (the consumer's).

use std::sync::Arc;

use litestripe_contract::exit;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event::{MetadataKeys, owner};
use litestripe_domain::plan::Policy;
use sea_orm::DatabaseTransaction;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::erasure::{self, Erasures};
use crate::error::{Disposition, StoreError};
use crate::fail_point::fail_point;
use crate::metrics;
use crate::store::{self, Store};
use crate::stream::consumer::Batch;
use crate::stream::dead_letter::DeadLetters;
use crate::wait::{DATABASE, Wait, Waiting, pause};

mod decoded;
pub mod in_flight;
mod save;

pub use decoded::{Decoded, count_wanted_poisoned, decode};
use save::save;

/// Batches that are applied at the same time: one is decoded and merged while the database has another.
pub const IN_FLIGHT: usize = 2;

/// What applying a batch needs.
#[derive(Clone)]
pub struct Applier {
    pub store: Store,
    pub metadata_keys: MetadataKeys,
    pub policy: Arc<Policy>,
    /// Whose personal data is not to come back.
    pub erasures: Erasures,
    /// Whether a customer that is deleted at Stripe is erased here.
    pub erase_on_customer_deleted: bool,
    pub dead_letters: DeadLetters,
    /// Wakes the relay when there may be signals to send.
    pub relay: Arc<Notify>,
    /// Wakes the questions when there may be users to look up.
    pub questions: Arc<Notify>,
    pub waiting: Arc<Waiting>,
}

/// Applies a batch: commit, then ack, then wake the relay.
///
/// A database that is away is waited for, with the batch's messages kept alive. When `shutdown`
/// comes while waiting, the messages are handed back.
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
    let Some(Outcome { refused, late }) =
        save_when_possible(applier, arrivals, &batch, shutdown).await
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
    applier.erasures.remove_late(late);
    applier.dead_letters.put_aside(batch, poisoned).await;
}

/// What became of a batch that was applied again.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reapplied {
    /// Events that were applied.
    pub applied: u64,
    /// Events that can never be applied.
    pub poisoned: u64,
}

/// Applies those events again that are `wanted`: what [`apply`] does, but poison, which is a
/// dead letter already, is only counted. `wanted` hears an event's sequence, and the event if it can be
/// read. None when `shutdown` came while the database was away.
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
    let Some(outcome) = save_when_possible(applier, arrivals, &batch, shutdown).await else {
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

/// Queues the erasure of the customers that were deleted at Stripe: before their
/// messages are acked, however long the database is away. Nothing when `shutdown` came first.
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
        let queue = async move |tx: DatabaseTransaction| {
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

/// What became of the events of a batch that is saved.
#[derive(Default)]
struct Outcome {
    /// Those that the database refuses for good, and why.
    refused: Vec<(usize, String)>,
    /// The sequences of those that count without their personal data.
    late: Vec<u64>,
}

/// Saves what the events lead to, however long the database is away. Nothing when `shutdown` came first.
async fn save_when_possible(
    applier: &Applier,
    arrivals: Vec<Arrival>,
    batch: &Batch,
    shutdown: &CancellationToken,
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    // A refused set is halved until the event that is at fault stands alone.
    let mut sets = vec![Arc::new(arrivals)];
    let mut wait = Wait::with_others(DATABASE, Arc::clone(&applier.waiting));
    while let Some(set) = sets.pop() {
        match save(applier, &set).await {
            Ok(late) => {
                outcome.late.extend(late);
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

/// Applies one event outside any batch, as a batch would. Returns why the database refuses it for
/// good, if it does.
pub async fn apply_one(applier: &Applier, arrival: Arrival) -> Result<Option<String>, StoreError> {
    match save(applier, &Arc::new(vec![arrival])).await {
        Ok(_) => Ok(None),
        Err(error) if error.disposition() == Disposition::Poison => Ok(Some(exit::chain(&error))),
        Err(error) => Err(error),
    }
}
