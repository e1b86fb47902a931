//! One batch of events through the worker.
//!
//! Owns the order of effects: decode → load → merge → save → ack → wake the relay. No other code
//! may order them. May not know SQL (only the store does) or how a message is acked (only the
//! consumer does).

use std::sync::Arc;
use std::time::Instant;

use litestripe_contract::exit;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event::{MetadataKeys, owner};
use litestripe_domain::plan::Policy;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::erasure::{self, Erasures};
use crate::error::{Disposition, StoreError};
use crate::fail_point::fail_point;
use crate::installation::Installation;
use crate::metrics;
use crate::relay::SignalCosts;
use crate::store::Transaction;
use crate::store::{self, Store};
use crate::stream::consumer::Batch;
use crate::stream::dead_letter::DeadLetters;
use crate::trace::{self, HANDED_BACK, POISON, REFUSED};
use crate::wait::{DATABASE, Wait, Waiting, pause};

mod decoded;
pub mod in_flight;
mod refusals;
mod save;

pub use decoded::{Contents, Decoded, count_wanted_poisoned, decode, decode_one};
pub use refusals::Refusals;
use refusals::redelivery_delay;
use save::{Saved, save};

/// Batches that are applied at the same time: one is decoded and merged while the database works on
/// another.
pub const IN_FLIGHT: usize = 2;

/// How many events of a refused batch are tried alone before the others: if all are refused, the
/// database refuses everything, and the others are not tried.
const PROBES: usize = 3;

/// How many events may be refused before the others are not tried, if events without a change were
/// accepted and no row was written.
const REFUSED_MAX: usize = 10 * PROBES;

/// How often a reapplied batch is tried again if it changes nothing but refused events, about five
/// minutes. These may be at fault themselves.
const REAPPLY_TRIES: u32 = 60;

/// How often it is tried before the command ends, if nothing shows that the database accepts other
/// events: about ten minutes.
const REAPPLY_TRIES_MAX: u32 = 120;

/// What applying a batch needs.
#[derive(Clone)]
pub struct Applier {
    pub store: Store,
    pub metadata_keys: MetadataKeys,
    pub policy: Arc<Policy>,
    /// The ids whose personal data was erased and must not come back.
    pub erasures: Erasures,
    /// The installation that the process has joined. A command that acks nothing joins none.
    pub installation: Option<Installation>,
    /// Whether a customer that is deleted at Stripe is erased here.
    pub erase_on_customer_deleted: bool,
    pub dead_letters: DeadLetters,
    /// Wakes up the relay when there may be signals to send.
    pub relay: Arc<Notify>,
    /// Wakes up the questions task when there may be users to look up.
    pub questions: Arc<Notify>,
    pub waiting: Arc<Waiting>,
    pub refusals: Arc<Refusals>,
    /// What sending a signal costs now.
    pub signal_costs: Arc<SignalCosts>,
}

/// Applies a batch: commit, then ack, then wake the relay.
///
/// While the database is unavailable it waits, and keeps the batch's messages in progress. Events
/// that the database refuses are delivered again later. If `shutdown` is cancelled meanwhile, it
/// hands the messages back.
pub async fn apply(applier: &Applier, mut decoded: Decoded, shutdown: &CancellationToken) {
    let deliveries = decoded.batch.messages();
    let spans = trace::Applying::begin(
        decoded.batch.count(),
        deliveries.filter_map(|message| message.trace()),
        &mut decoded.arrivals,
    );
    let applying = apply_within(&spans, applier, decoded, shutdown);
    let applied = applying.instrument(spans.batch().clone()).await;
    if let Err(why) = applied {
        spans.record_failure_of_all(why);
    }
}

/// # Errors
/// Why nothing of the batch is acked, as its spans name it.
async fn apply_within(
    spans: &trace::Applying,
    applier: &Applier,
    decoded: Decoded,
    shutdown: &CancellationToken,
) -> Result<(), &'static str> {
    let Decoded {
        batch,
        arrivals,
        mut poisoned,
        ignored,
        ..
    } = decoded;
    let events = arrivals.len();
    let received = |arrival: &Arrival| Some((arrival.index, arrival.received?));
    let received: Vec<_> = arrivals.iter().filter_map(received).collect();
    let began = Instant::now();
    let saved = save_with_retries(applier, Arc::new(arrivals), &batch, shutdown).await;
    let Some(mut outcome) = saved else {
        batch.hand_back().await;
        return Err(HANDED_BACK);
    };
    let saved = received
        .iter()
        .filter(|(index, _)| outcome.is_saved(*index));
    metrics::committed(saved.map(|(_, received)| *received));
    if applier
        .installation
        .as_ref()
        .is_some_and(|installation| !installation.may_ack())
    {
        batch.hand_back().await;
        return Err(HANDED_BACK);
    }
    if let Some(error) = outcome.refuses_all() {
        let reason = exit::chain(error);
        let count = outcome.refused.len();
        let pause_for = (applier.refusals).all_refused(count, began, &reason, Instant::now());
        batch.keep_alive().await;
        if pause(pause_for, shutdown).await.is_none() {
            batch.hand_back().await;
            return Err(HANDED_BACK);
        }
    }
    let postponed = outcome.take_postponed(applier);
    let hopeless = outcome.refused.iter();
    poisoned.extend(hopeless.map(|refused| (refused.index(), exit::chain(&refused.error))));
    let late = late_messages(applier, &batch, &ignored, &mut poisoned);
    let removals = std::mem::take(&mut outcome.redacted)
        .into_iter()
        .chain(late);
    match queue(applier, &batch, removals, shutdown).await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            // The events are merged, so that their repetition changes nothing.
            let reason = exit::chain(&error);
            (applier.refusals).some_refused(batch.count(), &reason, Instant::now());
            postpone(&batch, 0..batch.count()).await;
            applier.relay.notify_one();
            return Err(REFUSED);
        }
        None => {
            batch.hand_back().await;
            return Err(HANDED_BACK);
        }
    }
    (postponed.iter()).for_each(|index| spans.record_failure(*index, REFUSED));
    (outcome.refused.iter()).for_each(|refused| spans.record_failure(refused.index(), POISON));
    let unapplied = poisoned.iter().map(|(index, _)| *index);
    batch
        .ack_except(unapplied.chain(postponed.iter().copied()))
        .await;
    postpone(&batch, postponed.iter().copied()).await;
    fail_point!("worker::after_ack");
    applier.relay.notify_one();
    if applier.policy.rules.lookup {
        applier.questions.notify_one();
    }
    metrics::applied(events - postponed.len() - outcome.refused.len());
    applier.dead_letters.store(batch, poisoned).await;
    Ok(())
}

/// Hands messages back, to be delivered again later.
async fn postpone(batch: &Batch, indexes: impl IntoIterator<Item = usize>) {
    for index in indexes {
        let delay = redelivery_delay(batch.deliveries(index));
        batch.postpone(index, delay).await;
    }
}

/// The events of a reapplied batch, counted.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reapplied {
    pub applied: u64,
    /// Events that can never be applied, or that the database refused to the end.
    pub poisoned: u64,
}

/// Reapplies the `wanted` events of a batch. Unlike [`apply`] it only counts poisoned events, which
/// are dead letters already.
///
/// `wanted` gets an event's sequence, and the event if it can be decoded. Returns `None` if
/// `shutdown` was cancelled while the database was unavailable or refused everything.
///
/// # Errors
/// The database has refused every change for some ten minutes, and nothing shows that it accepts
/// others.
pub async fn reapply(
    applier: &Applier,
    decoded: Decoded,
    wanted: impl Fn(u64, Option<&Arrival>) -> bool,
    shutdown: &CancellationToken,
) -> Result<Option<Reapplied>, StoreError> {
    let Decoded {
        batch,
        mut arrivals,
        poisoned,
        ..
    } = decoded;
    let poisoned = count_wanted_poisoned(&batch, &poisoned, &wanted);
    arrivals.retain(|arrival| wanted(arrival.stream_sequence, Some(arrival)));
    let events = arrivals.len() as u64;
    let arrivals = Arc::new(arrivals);
    let mut wait = Wait::new(DATABASE);
    let mut tries = 0;
    let outcome = loop {
        let saved = save_with_retries(applier, Arc::clone(&arrivals), &batch, shutdown).await;
        let paused = match saved {
            None => None,
            Some(mut outcome) => match outcome.refuses_all() {
                None => break outcome,
                Some(error) if outcome.is_at_fault_alone(error, applier, tries) => break outcome,
                Some(error) if tries < REAPPLY_TRIES_MAX => {
                    tries += 1;
                    batch.keep_alive().await;
                    pause(wait.failed(error), shutdown).await
                }
                Some(_) => {
                    batch.hand_back().await;
                    return match outcome.refused.pop() {
                        Some(refused) => Err(refused.error),
                        None => Ok(None),
                    };
                }
            },
        };
        if paused.is_none() {
            batch.hand_back().await;
            return Ok(None);
        }
    };
    batch.ack_except([]).await;
    let refused = outcome.refused.len() as u64;
    Ok(Some(Reapplied {
        applied: events - refused,
        poisoned: refused + poisoned,
    }))
}

/// Returns the sequences of the late messages of erased persons that were not saved, and takes
/// those that can never be applied out of `poisoned`: as dead letters they would stay.
///
/// Call it after the batch was saved, which has read the new erasures.
fn late_messages(
    applier: &Applier,
    batch: &Batch,
    ignored: &[usize],
    poisoned: &mut Vec<(usize, String)>,
) -> Vec<u64> {
    let (mut late, mut indexes) = (Vec::new(), Vec::new());
    for (index, message) in batch.messages().enumerate() {
        let is_not_saved = ignored.binary_search(&index).is_ok()
            || poisoned.iter().any(|(poisoned, _)| *poisoned == index);
        if is_not_saved && applier.erasures.covers_message(message.payload) {
            late.push(message.stream_sequence());
            indexes.push(index);
        }
    }
    poisoned.retain(|(index, _)| !indexes.contains(index));
    late
}

/// Queues what erasures leave to do, before the messages are acked: the removal of the late
/// messages `removals`, and the erasure of the customers that were deleted at Stripe. Retries for
/// as long as the database is unavailable. Returns `None` if `shutdown` was cancelled before it
/// succeeded.
///
/// # Errors
/// The database refuses.
async fn queue(
    applier: &Applier,
    batch: &Batch,
    removals: impl Iterator<Item = u64>,
    shutdown: &CancellationToken,
) -> Option<Result<(), StoreError>> {
    let now = OffsetDateTime::now_utc();
    let removals = removals.map(|sequence| erasure::removal(EVENTS_STREAM, sequence, now));
    let messages = batch
        .messages()
        .filter(|_| applier.erase_on_customer_deleted);
    let deleted = messages.filter_map(|message| {
        let customer = owner::deleted_customer(message.payload)?;
        let is_late = applier.erasures.covers_message(message.payload);
        (!is_late).then(|| erasure::question(customer, message.position(), now))
    });
    let questions: Vec<_> = removals.chain(deleted).collect();
    let mut wait = Wait::with_others(DATABASE, Arc::clone(&applier.waiting));
    while !questions.is_empty() {
        let began = Instant::now();
        let questions = questions.clone();
        let queue = async move |tx: Transaction| {
            store::question::save(&tx, questions, now).await?;
            tx.commit()
                .await
                .map_err(StoreError::doing("commit erasures"))
        };
        match applier.store.uncancelled(queue).await {
            Ok(()) => {
                wait.succeeded();
                applier.refusals.committed(false, Instant::now());
                break;
            }
            Err(error) if error.is_refusal() => {
                wait.succeeded();
                return Some(Err(error));
            }
            Err(error) => {
                batch.keep_alive().await;
                (applier.refusals).unavailable(began, &exit::chain(&error), Instant::now());
                pause(wait.failed(&error), shutdown).await?;
            }
        }
    }
    Some(Ok(()))
}

/// An event that the database refuses when it is saved alone.
struct Refused {
    alone: Arc<Vec<Arrival>>,
    error: StoreError,
    /// Whether others of its batch had been written before.
    after_others: bool,
    /// Whether it can never be applied.
    is_hopeless: bool,
}

impl Refused {
    fn index(&self) -> usize {
        self.alone.first().map_or(0, |arrival| arrival.index)
    }
}

/// The result of saving a batch.
#[derive(Default)]
struct Outcome {
    refused: Vec<Refused>,
    /// The indexes of the events that were not tried, because the database refuses everything.
    untried: Vec<usize>,
    /// Whether any event was saved.
    committed: bool,
    /// Whether a row was written.
    wrote: bool,
    /// The sequences of the events that were saved without their personal data, because that was
    /// erased.
    redacted: Vec<u64>,
}

impl Outcome {
    /// Whether the event of this index was saved.
    fn is_saved(&self, index: usize) -> bool {
        let mut refused = self.refused.iter();
        !self.untried.contains(&index) && !refused.any(|refused| refused.index() == index)
    }

    /// If the database refuses every change that was tried, returns why. An event that changes
    /// nothing is accepted, and shows nothing about what the database accepts.
    fn refuses_all(&self) -> Option<&StoreError> {
        let last = self.refused.last().filter(|_| !self.wrote);
        last.map(|refused| &refused.error)
    }

    /// Whether the refused events of a reapplied batch are at fault themselves, after `tries`.
    fn is_at_fault_alone(&self, error: &StoreError, applier: &Applier, tries: u32) -> bool {
        let accepts_others = self.committed || applier.refusals.has_written();
        let is_at_fault = error.disposition() == Disposition::Poison
            || (tries >= REAPPLY_TRIES && accepts_others);
        is_at_fault && self.untried.is_empty()
    }

    /// Takes out the refused events that are delivered again later, and returns their indexes. The
    /// others can never be applied.
    fn take_postponed(&mut self, applier: &Applier) -> Vec<usize> {
        let is_postponed = |refused: &mut Refused| !refused.is_hopeless;
        let postponed: Vec<_> = self.refused.extract_if(.., is_postponed).collect();
        if let Some(first) = postponed.first().filter(|_| self.wrote) {
            let reason = exit::chain(&first.error);
            (applier.refusals).some_refused(postponed.len(), &reason, Instant::now());
        }
        let postponed = postponed.iter().map(Refused::index);
        postponed.chain(self.untried.iter().copied()).collect()
    }
}

/// Saves the changes that the events cause. Retries for as long as the database is unavailable.
/// Returns `None` if `shutdown` was cancelled before it succeeded.
async fn save_with_retries(
    applier: &Applier,
    arrivals: Arc<Vec<Arrival>>,
    batch: &Batch,
    shutdown: &CancellationToken,
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    let whole = arrivals.len();
    let mut sets = vec![arrivals];
    let mut wait = Wait::with_others(DATABASE, Arc::clone(&applier.waiting));
    while let Some(set) = sets.pop() {
        let began = Instant::now();
        match save(applier, &set).await {
            Ok(Saved { redacted, wrote }) => {
                wait.succeeded();
                applier.refusals.committed(wrote, Instant::now());
                outcome.committed = true;
                outcome.wrote |= wrote;
                outcome.redacted.extend(redacted);
            }
            Err(error) if error.is_refusal() => {
                wait.succeeded();
                if let [one] = set.as_slice() {
                    let deliveries = batch.deliveries(one.index);
                    let is_hopeless = (applier.refusals).is_hopeless(
                        error.disposition(),
                        outcome.wrote,
                        deliveries,
                        began,
                    );
                    outcome.refused.push(Refused {
                        alone: set,
                        error,
                        after_others: outcome.wrote,
                        is_hopeless,
                    });
                } else {
                    sets.extend(split(Arc::unwrap_or_clone(set), whole));
                }
            }
            Err(error) => {
                sets.push(set);
                batch.keep_alive().await;
                (applier.refusals).unavailable(began, &exit::chain(&error), Instant::now());
                pause(wait.failed(&error), shutdown).await?;
            }
        }
        let probes = if outcome.committed {
            REFUSED_MAX
        } else {
            PROBES
        };
        if outcome.refused.len() >= probes && !outcome.wrote {
            let untried = sets.drain(..).flat_map(Arc::unwrap_or_clone);
            outcome.untried = untried.map(|arrival| arrival.index).collect();
        }
        // Until others are written, an event may be refused like all, and for no fault of its own.
        if sets.is_empty() && outcome.wrote {
            let too_early = |refused: &mut Refused| !refused.after_others;
            let too_early = outcome.refused.extract_if(.., too_early);
            sets.extend(too_early.map(|refused| refused.alone));
        }
    }
    Some(outcome)
}

/// Splits a refused set, so that an event that is at fault comes to stand alone. Returns the parts
/// in the reverse of the order in which they are tried. A whole batch is first split into a few
/// single events from all over it and the rest, all others into halves.
fn split(mut set: Vec<Arrival>, whole: usize) -> Vec<Arc<Vec<Arrival>>> {
    let middle = set.len() / 2;
    let parts = if set.len() == whole && whole > PROBES {
        let last = set.split_off(set.len() - 1);
        let between = set.drain(middle..=middle).collect();
        let rest = set.split_off(1);
        vec![rest, last, between, set]
    } else {
        let rest = set.split_off(middle);
        vec![rest, set]
    };
    parts.into_iter().map(Arc::new).collect()
}

/// Applies one event outside of any batch, as a batch would. Returns the reason if the database
/// refuses the event.
pub async fn apply_one(applier: &Applier, arrival: Arrival) -> Result<Option<String>, StoreError> {
    match save(applier, &Arc::new(vec![arrival])).await {
        Ok(_) => Ok(None),
        Err(error) if error.is_refusal() => Ok(Some(exit::chain(&error))),
        Err(error) => Err(error),
    }
}
