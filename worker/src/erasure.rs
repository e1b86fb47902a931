//! Erasures: which personal data must not come back.
//!
//! Owns the record of erasures (the table `litestripe_erasure`, a row for each of a person's ids)
//! and what an erasure covers: every event of one of these ids up to the second of the erasure.
//! Workers apply a covered event without its personal data, and reconcile compares and repairs
//! without it. Backfill and replay drop covered events. `removal` removes the data. Records of
//! erasures are kept for ever, because Stripe still lists a subscription years after it was
//! created.
//!
//! Code that writes personal data first reads the new erasures, in the same transaction: see
//! `store::erasure`.

mod ids;
mod removal;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_nats::jetstream;
use backon::{ExponentialBuilder, Retryable as _};
use litestripe_contract::event::SNAPSHOT_TYPE;
use litestripe_contract::exit;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::event::owner::DeletedCustomer;
use litestripe_domain::event::{Body, Event};
use litestripe_domain::question::{Details, Question};
use sea_orm::ConnectionTrait;
use time::OffsetDateTime;
use tracing::debug;

use crate::error::StoreError;
use crate::store::{self, Store};
use crate::stream::scan;

pub use ids::Ids;
pub use removal::{EraseError, Erasure, Receipt, Target};

/// Attempts to record an erasure. Each waits at most the lock timeout for a lock. Together they
/// outlast a hanging transaction, which the server ends after 30 s.
const RECORD_RETRIES: usize = 10;
const RECORD_RETRY: Duration = Duration::from_millis(200);

/// The erasures that this process knows.
#[derive(Clone)]
pub struct Erasures {
    jetstream: jetstream::Context,
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
    pub async fn load(store: &Store, jetstream: jetstream::Context) -> Result<Self, StoreError> {
        let erasures = Self {
            jetstream,
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
        let attempts = ExponentialBuilder::new()
            .with_min_delay(RECORD_RETRY)
            .with_max_times(RECORD_RETRIES)
            .with_jitter();
        once.retry(attempts.with_max_delay(10 * RECORD_RETRY))
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

    /// Whether an erasure covers an object with one of these ids that Stripe created at `created`.
    pub fn covers_object<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        self.known(|known| known.covers_ids(ids, created))
    }

    /// Removes late messages from `STRIPE_EVENTS`: their state is applied, and their personal data
    /// must not stay. Runs in the background, best effort: the person's next erasure removes any
    /// that are left.
    pub fn remove_late(&self, sequences: Vec<u64>) {
        if sequences.is_empty() {
            return;
        }
        let jetstream = self.jetstream.clone();
        tokio::spawn(async move {
            if let Err(error) = scan::remove(&jetstream, EVENTS_STREAM, sequences).await {
                debug!(
                    "cannot remove late events of erased persons from STRIPE_EVENTS: {}",
                    exit::chain(&error)
                );
            }
        });
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
                let ids = [
                    Some(body.stripe_subscription_id.as_str()),
                    body.snapshot.customer.as_deref(),
                    None,
                ];
                (ids, body.snapshot.created)
            }
            Body::CheckoutSession(session) => {
                let subscription = session.stripe_subscription_id.as_deref();
                (
                    [
                        Some(session.id.as_str()),
                        session.stripe_customer_id.as_deref(),
                        subscription,
                    ],
                    session.created,
                )
            }
            Body::Resolution(resolution) => {
                let payment = &resolution.payment;
                let (customer, subscription) = (
                    payment.stripe_customer_id.as_deref(),
                    payment.stripe_subscription_id.as_deref(),
                );
                (
                    [Some(resolution.orphan_id.as_str()), customer, subscription],
                    None,
                )
            }
            Body::Notification(notification) => {
                ([Some(notification.object.id()), None, None], None)
            }
        };
        // A fetched snapshot has the time of the fetch, but its personal data is as old as the
        // object.
        let is_fetched = event.event_type.as_str() == SNAPSHOT_TYPE;
        let created = of_object.filter(|_| is_fetched).unwrap_or(event.created);
        self.covers_ids(ids.into_iter().flatten(), created)
    }

    fn covers_ids<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        ids.into_iter()
            .any(|id| self.erased.get(id).is_some_and(|at| created <= *at))
    }
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
        position,
    }
}

#[cfg(test)]
mod tests;
