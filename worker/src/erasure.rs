//! Erasures: which personal data must not come back.
//!
//! Owns the record of erasures (the table `litestripe_erasure`, a row for each of a person's ids)
//! and what an erasure covers: every event of one of these ids up to the second of the erasure.
//! Workers apply a covered event without its personal data, and reconcile compares and repairs
//! without it. Backfill and replay drop covered events. A covered message that arrives late is
//! removed from its stream, whether a worker can apply it or not. `removal` removes the data.
//! Records of erasures are kept for ever, because Stripe still lists a subscription years after it
//! was created; `copy` has them outlive the database.
//!
//! Code that writes personal data first reads the new erasures, in the same transaction: see
//! `store::erasure`.

pub mod copy;
mod ids;
mod removal;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use litestripe_contract::event::{ERASURE_TYPE, EventId, EventType, SNAPSHOT_TYPE};
use litestripe_contract::signal::{EventReference, Timestamp};
use litestripe_domain::event::owner::{self, DeletedCustomer, Owner};
use litestripe_domain::event::{self, Body, Event, MetadataKeys};
use litestripe_domain::question::{Details, Question};
use sea_orm::ConnectionTrait;
use time::OffsetDateTime;

use crate::error::StoreError;
use crate::store::{self, Store};

pub use ids::{Ids, People};
pub use removal::{EraseError, Erasure, Outcome, Receipt, Target, remove_covered};

/// Attempts to record an erasure. Each waits at most the lock timeout for a lock. Together they
/// outlast a hanging transaction, which the server ends after 30 s.
const RECORD_RETRIES: usize = 10;
const RECORD_RETRY: Duration = Duration::from_millis(200);

/// The erasures that this process knows.
#[derive(Clone)]
pub struct Erasures {
    known: Arc<RwLock<Known>>,
}

/// The erasures that were read from the table.
#[derive(Debug, Default)]
struct Known {
    /// When each id was erased, in seconds since the Unix epoch.
    erased: HashMap<String, i64>,
    /// The highest sequence among them.
    sequence: i64,
}

impl Erasures {
    /// Reads all erasures.
    pub async fn load(store: &Store) -> Result<Self, StoreError> {
        let erasures = Self {
            known: Arc::default(),
        };
        erasures.refresh(store.connection()).await?;
        Ok(erasures)
    }

    /// Reads the erasures that are new since the last read.
    pub async fn refresh<C: ConnectionTrait>(&self, db: &C) -> Result<(), StoreError> {
        let new = store::erasure::after(db, self.sequence()).await?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for erasure in new {
            known.sequence = known.sequence.max(erasure.sequence);
            known.erased.insert(erasure.stripe_id, erasure.erased_at);
        }
        Ok(())
    }

    /// Returns the highest sequence that was read.
    pub fn sequence(&self) -> i64 {
        self.known(|known| known.sequence)
    }

    /// Records that `ids` are erased as of `at`, in seconds since the Unix epoch. When it returns,
    /// every transaction that started without knowing of the erasure has ended.
    pub async fn record(&self, store: &Store, ids: &Ids, at: i64) -> Result<(), StoreError> {
        let erased: Arc<BTreeMap<_, _>> =
            Arc::new(ids.iter().map(|id| (id.to_owned(), at)).collect());
        let once = || async {
            store::erasure::record(store, Arc::clone(&erased), OffsetDateTime::now_utc()).await
        };
        once.retry(attempts())
            .when(StoreError::is_temporary)
            .await?;
        self.refresh(store.connection()).await
    }

    /// Whether `event` belongs to an erased person and is not newer than the erasure.
    pub fn covers(&self, event: &Event) -> bool {
        self.known(|known| known.covers(event))
    }

    /// Returns `event`, without its personal data if an erasure covers it.
    pub fn redacted(&self, mut event: Event) -> Event {
        if self.covers(&event) {
            event.redact();
        }
        event
    }

    /// Whether a message with this body belongs to an erased person and is not newer than the
    /// erasure. The event need not be of a type that is handled, nor be valid.
    pub fn covers_message(&self, body: &[u8]) -> bool {
        self.known(|known| known.covers_message(body))
    }

    /// Whether an erasure covers an object with one of these ids that Stripe created at `created`.
    pub fn covers_object<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        self.known(|known| known.covers_ids(ids, created))
    }

    fn known<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Known {
    fn covers(&self, event: &Event) -> bool {
        if self.erased.is_empty() {
            return false;
        }
        let (ids, of_object) = match &event.body {
            Body::Subscription(body) => {
                let snapshot = &body.snapshot;
                let ids = [
                    Some(body.stripe_subscription_id.as_str()),
                    snapshot.customer.as_deref(),
                    snapshot.details.customer_account.as_deref(),
                    None,
                ];
                (ids, snapshot.created)
            }
            Body::CheckoutSession(session) => {
                let ids = [
                    Some(session.id.as_str()),
                    session.stripe_customer_id.as_deref(),
                    session.customer_account.as_deref(),
                    session.stripe_subscription_id.as_deref(),
                ];
                (ids, session.created)
            }
            Body::Resolution(resolution) => {
                let payment = &resolution.payment;
                let ids = [
                    Some(resolution.orphan_id.as_str()),
                    payment.checkout_session_id.as_deref(),
                    payment.stripe_customer_id.as_deref(),
                    payment.stripe_subscription_id.as_deref(),
                ];
                (ids, None)
            }
            Body::Notification(notification) => {
                ([Some(notification.object.id()), None, None, None], None)
            }
        };
        // A fetched snapshot has the time of the fetch, but its personal data is as old as the
        // object.
        let is_fetched = event.event_type.as_str() == SNAPSHOT_TYPE;
        let created = of_object.filter(|_| is_fetched).unwrap_or(event.created);
        self.covers_ids(ids.into_iter().flatten(), created)
    }

    fn covers_message(&self, body: &[u8]) -> bool {
        if self.erased.is_empty() {
            return false;
        }
        if let Ok(Some(event)) = event::decode(body, &MetadataKeys::Only(Default::default())) {
            return self.covers(&event);
        }
        match Owner::parse(body) {
            // Without a readable time it cannot be shown to be newer.
            Some(owner) => {
                let created = owner.created().unwrap_or(i64::MIN);
                owner.belongs_to(|id| self.covers_ids([id], created))
            }
            None => owner::words(body).any(|word| self.erased.contains_key(word)),
        }
    }

    fn covers_ids<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        ids.into_iter()
            .any(|id| self.erased.get(id).is_some_and(|at| created <= *at))
    }
}

/// The pauses between attempts to record or read erasures.
pub(crate) fn attempts() -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_min_delay(RECORD_RETRY)
        .with_max_delay(10 * RECORD_RETRY)
        .with_max_times(RECORD_RETRIES)
        .with_jitter()
}

/// Makes a question of the erasure of a customer that was deleted at Stripe.
pub fn question(customer: DeletedCustomer, position: u64, now: OffsetDateTime) -> Question {
    Question {
        entity_id: customer.stripe_customer_id,
        details: Details::Erase,
        due_at: now,
        attempts: 0,
        stripe_account_id: customer.stripe_account_id,
        livemode: customer.livemode,
        event: customer.event,
        trace: None,
        position,
    }
}

/// Makes a question of the removal of a message: its stream and sequence are its id.
pub fn removal(stream: &str, sequence: u64, now: OffsetDateTime) -> Question {
    let now_or_never = Timestamp::from_unix(now.unix_timestamp())
        .unwrap_or(Timestamp::from_unix(0).expect("the Unix epoch is a time"));
    Question {
        entity_id: format!("{stream} {sequence}"),
        details: Details::Removal,
        due_at: now,
        attempts: 0,
        stripe_account_id: None,
        livemode: false,
        event: reference(now_or_never),
        trace: None,
        // Not the message's: no replay changes what has to be removed, so it waits for none.
        position: i64::MAX.cast_unsigned(),
    }
}

/// Returns the event that signals name as the cause of what an erasure changes.
fn reference(at: Timestamp) -> EventReference {
    EventReference {
        id: EventId::parse(format!("{ERASURE_TYPE}.{}", at.unix())).expect("our own ids are valid"),
        event_type: EventType::parse(ERASURE_TYPE).expect("our own types are valid"),
        created: at,
    }
}

#[cfg(test)]
mod tests;
