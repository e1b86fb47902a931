//! Erasures: whose personal data is not to come back.
//!
//! Owns what is remembered of an erasure (JetStream KV bucket `litestripe`, `erased.<id>`, for each of
//! the person's ids) and what it covers: what happened up to its second and is of one of those ids.
//! Live workers apply what it covers without its personal data, and reconcile compares and mends
//! without it; backfill and replay drop it. How the data is removed is in the modules below. An erasure
//! is never forgotten: Stripe still lists a subscription years after it was created.

mod ids;
mod removal;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_nats::jetstream::stream::RawMessageErrorKind;
use async_nats::jetstream::{self, kv};
use litestripe_contract::event::SNAPSHOT_TYPE;
use litestripe_contract::exit;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::event::whose::DeletedCustomer;
use litestripe_domain::event::{Body, Event};
use litestripe_domain::question::{Asked, Question};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use crate::stream::scan;

pub use ids::Ids;
pub use removal::{EraseError, Erasure, Receipt, Target};

/// What stands before an id in the bucket.
const PREFIX: &str = "erased.";

/// How often a worker looks for new erasures. A poll, because it cannot break without being noticed,
/// as a watch's consumer can.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is remembered of an erased id.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// When it was erased: seconds since the Unix epoch.
    at: i64,
}

/// The erasures could not be read or recorded.
#[derive(Debug, thiserror::Error)]
pub enum ErasuresError {
    /// There is no bucket.
    #[error(transparent)]
    Open(#[from] crate::stripe::kv::OpenError),
    /// The bucket does not answer.
    #[error("cannot read the erasures in the KV bucket")]
    Read(#[source] jetstream::stream::RawMessageError),
    /// The bucket does not take it.
    #[error("cannot record the erasure in the KV bucket")]
    Record(#[source] kv::PutError),
}

/// All erasures, as this process knows them.
#[derive(Clone)]
pub struct Erasures(Arc<Inner>);

struct Inner {
    jetstream: jetstream::Context,
    replicas: usize,
    known: RwLock<Known>,
    place: Mutex<Place>,
}

/// How far the bucket is read.
#[derive(Default)]
struct Place {
    /// Which bucket it was: one that was made anew is read from its start.
    created: Option<OffsetDateTime>,
    sequence: u64,
}

/// When each id was erased, in seconds since the Unix epoch.
#[derive(Debug, Default)]
struct Known(HashMap<String, i64>);

impl Erasures {
    /// Reads all erasures.
    ///
    /// # Errors
    /// When the bucket cannot be read.
    pub async fn load(jetstream: jetstream::Context, replicas: usize) -> Result<Self, ErasuresError> {
        let (known, place) = (RwLock::default(), Mutex::default());
        let erasures = Self(Arc::new(Inner { jetstream, replicas, known, place }));
        erasures.look().await?;
        Ok(erasures)
    }

    /// Looks for new ones every second until `shutdown`.
    pub async fn follow(self, shutdown: CancellationToken) {
        let mut waiting = false;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.cancelled() => return,
            }
            let looked = self.look().await;
            if let Err(error) = looked.as_ref()
                && !waiting
            {
                warn!("new erasures are not seen: {}", exit::chain(error));
            }
            waiting = looked.is_err();
        }
    }

    /// Looks for new ones every second, for as long as what is returned lives.
    pub fn followed(&self) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(self.clone().follow(CancellationToken::new())))
    }

    /// Reads what is new since the last look.
    async fn look(&self) -> Result<(), ErasuresError> {
        let mut place = self.0.place.lock().await;
        let bucket = crate::stripe::kv::open(&self.0.jetstream, self.0.replicas).await?;
        let created = bucket.stream.cached_info().created;
        if place.created != Some(created) {
            *place = Place { created: Some(created), sequence: 0 };
        }
        let all = format!("{}{PREFIX}>", bucket.prefix);
        loop {
            let message = match bucket.stream.get_first_raw_message_by_subject(&all, place.sequence + 1).await {
                Ok(message) => message,
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(()),
                Err(error) => return Err(ErasuresError::Read(error)),
            };
            place.sequence = message.sequence;
            let key = message.subject.strip_prefix(bucket.prefix.as_str()).unwrap_or_default();
            let Some(id) = id_of(key) else { continue };
            let mut known = self.0.known.write().unwrap_or_else(PoisonError::into_inner);
            match serde_json::from_slice(&message.payload) {
                Ok(Record { at }) => known.0.insert(id, at),
                // An operator took it back: KV writes an empty message.
                Err(_) => known.0.remove(&id),
            };
        }
    }

    /// Records that `ids` are erased as of `at`, in seconds since the Unix epoch.
    ///
    /// # Errors
    /// When one is not recorded. Others may be, which another try mends.
    pub async fn record(&self, ids: &Ids, at: i64) -> Result<(), ErasuresError> {
        let bucket = crate::stripe::kv::open(&self.0.jetstream, self.0.replicas).await?;
        for id in ids.iter() {
            // Clocks of two hosts may differ: an erasure never moves back.
            let at = at.max(self.known(|known| known.0.get(id).copied()).unwrap_or(at));
            let record = serde_json::to_vec(&Record { at }).expect("a number is JSON");
            bucket.put(key_of(id), record.into()).await.map_err(ErasuresError::Record)?;
            self.0.known.write().unwrap_or_else(PoisonError::into_inner).0.insert(id.to_owned(), at);
        }
        Ok(())
    }

    /// Whether `event` is of an erased person and not younger than the erasure.
    #[must_use]
    pub fn covers(&self, event: &Event) -> bool {
        self.known(|known| known.covers(event))
    }

    /// `event`, without its personal data if it is covered.
    #[must_use]
    pub fn redacted(&self, mut event: Event) -> Event {
        if self.covers(&event) {
            event.redact();
        }
        event
    }

    /// Whether an object of these ids, which Stripe created at `created`, is covered.
    #[must_use]
    pub fn covers_object<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        self.known(|known| known.covers_ids(ids, created))
    }

    /// Removes late messages from `STRIPE_EVENTS`, whose state is applied and whose personal data is
    /// erased. Done in passing: what is missed, the next erasure of the person removes.
    pub fn remove_late(&self, sequences: Vec<u64>) {
        if sequences.is_empty() {
            return;
        }
        let jetstream = self.0.jetstream.clone();
        tokio::spawn(async move {
            if let Err(error) = scan::remove(&jetstream, EVENTS_STREAM, sequences).await {
                debug!("late events of erased persons stay in STRIPE_EVENTS: {}", exit::chain(&error));
            }
        });
    }

    fn known<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&self.0.known.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Known {
    fn covers(&self, event: &Event) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let (ids, of_object) = match &event.body {
            Body::Subscription(body) => {
                let ids = [Some(body.stripe_subscription_id.as_str()), body.snapshot.customer.as_deref(), None];
                (ids, body.snapshot.created)
            }
            Body::CheckoutSession(session) => {
                let subscription = session.stripe_subscription_id.as_deref();
                ([Some(session.id.as_str()), session.stripe_customer_id.as_deref(), subscription], session.created)
            }
            Body::Resolution(resolution) => {
                let payment = &resolution.payment;
                let (customer, subscription) =
                    (payment.stripe_customer_id.as_deref(), payment.stripe_subscription_id.as_deref());
                ([Some(resolution.orphan_id.as_str()), customer, subscription], None)
            }
        };
        // What we fetched is dated to the fetch, and shows what is as old as the object.
        let is_fetched = event.event_type.as_str() == SNAPSHOT_TYPE;
        let created = of_object.filter(|_| is_fetched).unwrap_or(event.created);
        self.covers_ids(ids.into_iter().flatten(), created)
    }

    fn covers_ids<'a>(&self, ids: impl IntoIterator<Item = &'a str>, created: i64) -> bool {
        ids.into_iter().any(|id| self.0.get(id).is_some_and(|at| created <= *at))
    }
}

/// The erasure of a customer that was deleted at Stripe, as a question that waits.
#[must_use]
pub fn question(customer: DeletedCustomer, stream_sequence: u64, now: OffsetDateTime) -> Question {
    Question {
        entity_id: customer.stripe_customer_id,
        asked: Asked::Erase,
        due_at: now,
        attempts: 0,
        stripe_account_id: customer.stripe_account_id,
        livemode: customer.livemode,
        event: customer.event,
        stream_sequence,
    }
}

/// The key of an id. One with characters that no key may have is written in hexadecimal digits
/// after a `=`, which no plain one has.
fn key_of(id: &str) -> String {
    let is_plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    if is_plain {
        return format!("{PREFIX}{id}");
    }
    let digits: String = id.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}={digits}")
}

fn id_of(key: &str) -> Option<String> {
    let id = key.strip_prefix(PREFIX)?;
    let Some(digits) = id.strip_prefix('=') else { return Some(id.to_owned()) };
    let digits = digits.as_bytes().chunks(2);
    let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

#[cfg(test)]
mod tests;
