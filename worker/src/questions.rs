//! Questions: what the worker has to find out outside a batch, stored as a row until it is
//! answered.
//!
//! There are six kinds, one file each: the user lookup (`user`), the end of a grace period
//! (`grace`), the fetch of an uncertain subscription (`uncertain`) and of an object that thin
//! events name (`notification`), the erasure of a deleted customer and the removal of a late
//! message of an erased one (`erase`). `open` is about their number. An open question becomes due,
//! a worker asks it (`asker`), and it is retried until it is answered. Any worker may ask; a lease
//! gives each question to one of them at a time. This module also creates and resolves the orphans
//! that follow from an answer. Where an answer depends on a row, it writes that row too, so that a
//! batch that changes the row at the same time conflicts with it.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::exit;
use litestripe_contract::signal::OrphanReason;
use litestripe_contract::telemetry::traces;
use litestripe_domain::event::Email;
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::question::Question;
use litestripe_domain::row::Stored;
use litestripe_domain::signal::{self, Cause};
use sea_orm::ConnectionTrait;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tracing::debug;

use crate::erasure::{EraseError, Erasures};
use crate::error::StoreError;
use crate::settings::OrphanSettings;
use crate::store::Transaction;
use crate::store::question::{self, Taken};
use crate::store::{self, Store};
use crate::stream::own_event::OwnEventError;
use crate::stream::progress::ProgressError;
use crate::stream::scan::ScanError;
use crate::stripe::api::{ApiError, StripeApi};
use crate::wait::Waiting;
pub use failures::Failures;
use lookup::{Lookup, LookupError};

mod asker;
mod erase;
mod failures;
mod grace;
pub mod lookup;
mod notification;
pub(crate) mod open;
mod uncertain;
mod user;

/// The task that asks open questions and records the answers.
pub struct Questions {
    pub store: Store,
    pub jetstream: jetstream::Context,
    pub lookup: Lookup,
    pub stripe: Option<StripeApi>,
    pub orphans: OrphanSettings,
    /// The ids whose personal data must not come back.
    pub erasures: Erasures,
    /// Whether a customer that is deleted at Stripe is erased here too.
    pub erase_on_customer_deleted: bool,
    /// Notified when a batch may have stored new questions.
    pub wake: Arc<Notify>,
    pub relay: Arc<Notify>,
    /// The kinds of questions that currently wait for the database.
    pub waiting: Arc<Waiting>,
    pub failures: Arc<Failures>,
}

/// The outcome of asking a question once.
enum Outcome {
    Answered,
    /// The question is asked again after this time.
    RetryAfter(Duration),
    /// The row or the question changed meanwhile.
    Conflict,
    /// This worker stops: the question is due again at once.
    HandedBack,
}

/// Why a question has no answer yet.
#[derive(Debug, thiserror::Error)]
enum QuestionError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    OwnEvent(#[from] OwnEventError),
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error(transparent)]
    Remove(#[from] ScanError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error("cannot read the Checkout Session's event for its email")]
    Email(#[from] user::EmailError),
}

impl QuestionError {
    /// Whether every retry fails in the same way until an operator changes something.
    fn is_lasting(&self) -> bool {
        matches!(self, Self::Api(error) if error.is_lasting())
    }

    /// The pause that the answer asks for, if it does.
    fn asks_to_wait(&self) -> Option<Duration> {
        match self {
            Self::Api(ApiError::RetryLater { after, .. }) => Some(*after),
            _ => None,
        }
    }
}

/// After how many failed attempts in a row a question is decided without what it still lacks, if it
/// can be decided without that.
const DECIDED_AFTER: i32 = 5;

/// Returns what was found of an orphan's email. An orphan is not withheld for an email: if it is
/// refused, or not found after some attempts, the orphan has none.
fn email_if_found(
    taken: &Taken,
    found: Result<Option<Email>, QuestionError>,
) -> Result<Option<Email>, QuestionError> {
    let is_due = taken.is_failing && taken.question.attempts >= DECIDED_AFTER;
    match found {
        Err(error) if is_due || error.is_lasting() => {
            let id = &taken.question.entity_id;
            debug!(
                entity_id = id,
                "{id} becomes an orphan without an email: {}",
                exit::chain(&error)
            );
            Ok(None)
        }
        found => found,
    }
}

impl Questions {
    /// Closes a question that needs no answer any more.
    async fn close(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let removed = question::remove_answered(self.store.connection(), taken).await?;
        Ok(if removed {
            Outcome::Answered
        } else {
            Outcome::Conflict
        })
    }

    async fn load_row(&self, id: &str) -> Result<Option<Stored>, StoreError> {
        Ok(store::subscription::load(self.store.connection(), &[id])
            .await?
            .remove(id))
    }
}

async fn commit(tx: Transaction, relay: &Notify) -> Result<(), StoreError> {
    tx.commit()
        .await
        .map_err(StoreError::doing("commit an answer"))?;
    relay.notify_one();
    Ok(())
}

/// Writes a row unchanged over the version that was read. Returns false if it was written since
/// then.
async fn rewrite(
    tx: &Transaction,
    id: &str,
    stored: Stored,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    Ok(
        !store::subscription::save(tx, vec![stored.into_row(id)], now)
            .await?
            .is_empty(),
    )
}

async fn insert_orphan(
    tx: &Transaction,
    question: &Question,
    reason: OrphanReason,
    customer_email: Option<Email>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let orphan = NewOrphan {
        id: question.entity_id.clone(),
        reason,
        payment: question.payment(),
        customer_email,
        event_id: question.event.id.clone(),
        livemode: question.livemode,
    };
    let inserted = store::orphan::insert(tx, std::slice::from_ref(&orphan), &[], now).await?;
    let signals = inserted
        .iter()
        .map(|_| signal::orphan_created(&orphan, cause(question)))
        .collect();
    store::outbox::insert(tx, signals, now).await
}

fn cause(question: &Question) -> Cause {
    Cause {
        trace: traces::current().or_else(|| question.trace.clone()),
        ..Cause::from(question.event.clone())
    }
}

/// Whether an erasure covers the event that led to the question. If so, no personal data is
/// fetched.
///
/// Reads new erasures first. A transaction that writes personal data calls this as its first
/// statement: see `store::erasure`.
async fn is_erased<C: ConnectionTrait>(
    erasures: &Erasures,
    db: &C,
    question: &Question,
) -> Result<bool, StoreError> {
    erasures.refresh(db).await?;
    let payment = question.payment();
    let ids = payment.iter().chain([question.entity_id.as_str()]);
    Ok(erasures.covers_object(ids, question.event.created.unix()))
}
