//! The erasure of one person.
//!
//! Owns its steps and their order: find what is theirs, see that it is applied, record the erasure, from
//! when on every worker knows of it, remove. Whatever ends it half-way, the next run does the rest: nothing
//! is removed before it is recorded, and what is gone is not missed. May not know who asked, an operator or
//! an event.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::event::{ERASURE_TYPE, EventId, EventType};
use litestripe_contract::signal::{EventReference, OutOfRange, Timestamp};
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{Erasures, Ids};
use crate::error::StoreError;
use crate::store::{self, Store};
use crate::stream::progress::{self, ProgressError};
use crate::stream::scan::{self, ScanError, ScannedMessage};

mod rows;

/// How often the streams are read through because the last time brought up ids that were not known.
/// Each brings up one more kind of them, and there are three.
const SEARCHES_MAX: usize = 8;

/// How long events may take to be applied, where a worker runs.
const APPLIED_TIMEOUT: Duration = Duration::from_secs(5);

/// How long signals may take to leave the outbox.
const SENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two looks at either.
const POLL: Duration = Duration::from_millis(100);

/// Whom to erase.
pub enum Target {
    /// A customer, by Stripe's id.
    Customer(String),
    /// An orphan, by its id; with its customer, if it has one.
    Orphan(String),
}

/// What an erasure needs.
pub struct Erasure<'a> {
    pub store: &'a Store,
    pub jetstream: &'a jetstream::Context,
    pub erasures: &'a Erasures,
    /// Also if an event of the person is not applied.
    pub force: bool,
    /// Told of every message that was looked at.
    pub on_message: &'a (dyn Fn() + Send + Sync),
}

/// What was removed, and when: events, dead letters and signals are messages of their streams.
#[derive(Serialize)]
pub struct Receipt {
    pub customer: Option<String>,
    pub orphan: Option<String>,
    /// When it was recorded: what is not younger does not come back.
    pub recorded_at: Timestamp,
    /// All ids of the person that are known.
    pub ids: Vec<String>,
    pub events: u64,
    pub dead_letters: u64,
    pub signals: u64,
    /// Rows whose metadata was removed.
    pub subscriptions: u64,
    /// Orphans whose email was removed.
    pub orphans: u64,
    /// Events among those removed that no worker had applied.
    pub unapplied: u64,
}

/// Why a person was not erased, or not wholly.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    #[error(
        "there is no orphan {0}: `litestripe-worker orphans list --all` shows all; nothing was changed"
    )]
    UnknownOrphan(String),
    #[error(
        "event {0} in STRIPE_EVENTS is of this customer and no worker has applied it yet; nothing was changed. Let a worker run (`litestripe-worker run`) and try again; `--force` removes it all the same, and what it says is lost"
    )]
    Unapplied(u64),
    #[error(
        "event {0} came meanwhile and no worker has applied it yet; the erasure is recorded: run it again"
    )]
    ArrivedMeanwhile(u64),
    #[error("ever more ids belong to this customer; nothing was changed")]
    TooManyIds,
    #[error(
        "signals of this customer wait in the outbox; all else is erased: run it again when they are sent"
    )]
    SignalsWait,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error("the clock of this machine is beyond the year 9999")]
    Clock(#[from] OutOfRange),
}

/// What is the person's, by where it is.
#[derive(Default)]
struct Found {
    events: BTreeSet<u64>,
    dead_letters: BTreeSet<u64>,
    /// The last event that was looked at.
    last: u64,
}

impl Erasure<'_> {
    /// Erases `target`.
    pub async fn run(&self, target: &Target) -> Result<Receipt, EraseError> {
        let mut ids = self.ids_of(target).await?;
        let mut found = self.find(&mut ids).await?;
        let mut unapplied = self.unapplied(&found.events).await?;
        if let Some(first) = unapplied.first().filter(|_| !self.force) {
            return Err(EraseError::Unapplied(*first));
        }

        let now = OffsetDateTime::now_utc().unix_timestamp();
        let recorded_at = Timestamp::from_unix(now)?;
        self.erasures.record(self.store, &ids, now).await?;
        // What was delivered before that may have been applied as it came.
        if self.find_more(&mut ids, &mut found).await? {
            self.erasures.record(self.store, &ids, now).await?;
            unapplied.extend(self.unapplied(&found.events).await?);
            if let Some(first) = unapplied.first().filter(|_| !self.force) {
                return Err(EraseError::ArrivedMeanwhile(*first));
            }
        }

        let events = scan::remove(self.jetstream, EVENTS_STREAM, found.events).await?;
        let dead_letters =
            scan::remove(self.jetstream, DEAD_LETTERS_STREAM, found.dead_letters).await?;
        let orphans = store::orphan::erase_emails_of(self.store.connection(), &ids.all()).await?;
        let (subscriptions, keep_from) = self.strip_rows(&ids, &erasure_event(recorded_at)).await?;
        let signals = self.remove_signals(&ids, &keep_from).await?;
        self.store.truncate_log().await?;
        let (customer, orphan) = match target {
            Target::Customer(id) => (Some(id.clone()), None),
            Target::Orphan(id) => (None, Some(id.clone())),
        };
        Ok(Receipt {
            customer,
            orphan,
            recorded_at,
            ids: ids.iter().map(str::to_owned).collect(),
            events,
            dead_letters,
            signals,
            subscriptions,
            orphans,
            unapplied: unapplied.len() as u64,
        })
    }

    /// What is known of the person before anything was read.
    async fn ids_of(&self, target: &Target) -> Result<Ids, EraseError> {
        let mut ids = Ids::default();
        match target {
            Target::Customer(id) => ids.add([id.clone()]),
            Target::Orphan(id) => {
                let orphan = store::orphan::find(self.store.connection(), id).await?;
                let orphan = orphan.ok_or_else(|| EraseError::UnknownOrphan(id.clone()))?;
                let others = [
                    orphan.checkout_session_id,
                    orphan.stripe_subscription_id,
                    orphan.stripe_customer_id,
                ];
                ids.add(others.into_iter().flatten().chain([orphan.id]))
            }
        };
        Ok(ids)
    }

    /// Reads all there is, until no id is new.
    async fn find(&self, ids: &mut Ids) -> Result<Found, EraseError> {
        for _ in 0..SEARCHES_MAX {
            let before = ids.clone();
            self.learn_from_rows(ids).await?;
            let mut found = Found::default();
            found.last = self.read(EVENTS_STREAM, 1, ids, &mut found.events).await?;
            self.read(DEAD_LETTERS_STREAM, 1, ids, &mut found.dead_letters)
                .await?;
            if *ids == before {
                return Ok(found);
            }
        }
        Err(EraseError::TooManyIds)
    }

    /// Adds what came since `found`. Returns whether there was anything.
    async fn find_more(&self, ids: &mut Ids, found: &mut Found) -> Result<bool, EraseError> {
        let before = (ids.clone(), found.events.len(), found.dead_letters.len());
        self.learn_from_rows(ids).await?;
        found.last = self
            .read(EVENTS_STREAM, found.last + 1, ids, &mut found.events)
            .await?;
        self.read(DEAD_LETTERS_STREAM, 1, ids, &mut found.dead_letters)
            .await?;
        if *ids != before.0 {
            *found = self.find(ids).await?;
        }
        Ok(
            (&*ids, found.events.len(), found.dead_letters.len())
                != (&before.0, before.1, before.2),
        )
    }

    async fn learn_from_rows(&self, ids: &mut Ids) -> Result<(), EraseError> {
        let db = self.store.connection();
        let rows = store::subscription::related_ids(db, &ids.all()).await?;
        let orphans = store::orphan::related_ids(db, &ids.all()).await?;
        ids.add(rows.into_iter().chain(orphans));
        Ok(())
    }

    async fn read(
        &self,
        stream: &'static str,
        from: u64,
        ids: &mut Ids,
        found: &mut BTreeSet<u64>,
    ) -> Result<u64, ScanError> {
        let visit = |message: ScannedMessage<'_>| {
            (self.on_message)();
            if ids.add_from_message(message.body) {
                found.insert(message.sequence);
            }
        };
        scan::read(self.jetstream, stream, from, visit).await
    }

    /// Which of `events` are not applied, once a running worker had time for them.
    async fn unapplied(&self, events: &BTreeSet<u64>) -> Result<BTreeSet<u64>, EraseError> {
        let deadline = Instant::now() + APPLIED_TIMEOUT;
        loop {
            let unapplied = match progress::applied_until(self.jetstream).await? {
                _ if events.is_empty() => BTreeSet::new(),
                None => return Ok(events.clone()),
                Some(floor) => events.range(floor.saturating_add(1)..).copied().collect(),
            };
            if unapplied.is_empty() || Instant::now() >= deadline {
                return Ok(unapplied);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Takes the metadata out of the person's rows, each of which is signalled. Returns how many had some, and
    /// by row the revision from which on its signals stay.
    async fn strip_rows(
        &self,
        ids: &Ids,
        cause: &EventReference,
    ) -> Result<(u64, BTreeMap<String, i64>), EraseError> {
        let mut had_metadata = 0;
        let mut keep_from = BTreeMap::new();
        for id in ids.iter() {
            if let Some(stripped) = rows::strip(self.store, id, cause).await? {
                had_metadata += u64::from(stripped.had_metadata);
                keep_from.insert(id.to_owned(), stripped.keep_from);
            }
        }
        Ok((had_metadata, keep_from))
    }

    /// Removes the person's signals that are older than those of `strip_rows`. Returns how many.
    async fn remove_signals(
        &self,
        ids: &Ids,
        keep_from: &BTreeMap<String, i64>,
    ) -> Result<u64, EraseError> {
        self.wait_until_sent(ids).await?;
        let mut known = ids.clone();
        let mut older = Vec::new();
        let visit = |message: ScannedMessage<'_>| {
            (self.on_message)();
            if known.add_from_message(message.body) && !is_kept(message.body, keep_from) {
                older.push(message.sequence);
            }
        };
        scan::read(self.jetstream, SIGNALS_STREAM, 1, visit).await?;
        Ok(scan::remove(self.jetstream, SIGNALS_STREAM, older).await?)
    }

    /// Waits until no signal of the person is on its way.
    async fn wait_until_sent(&self, ids: &Ids) -> Result<(), EraseError> {
        let deadline = Instant::now() + SENT_TIMEOUT;
        while store::outbox::has_signals_of(self.store.connection(), &ids.all()).await? {
            if Instant::now() >= deadline {
                return Err(EraseError::SignalsWait);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

/// The revision that a signal is of. An orphan's has none.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Revision {
    stripe_subscription_id: Option<String>,
    revision: Option<i64>,
}

/// Whether a signal is not below the revision of its row.
fn is_kept(body: &[u8], keep_from: &BTreeMap<String, i64>) -> bool {
    let signal: Revision = serde_json::from_slice(body).unwrap_or_default();
    let of_row = signal
        .stripe_subscription_id
        .as_ref()
        .and_then(|id| keep_from.get(id));
    of_row.is_some_and(|of_row| signal.revision >= Some(*of_row))
}

/// What signals say led to an erasure's changes.
fn erasure_event(at: Timestamp) -> EventReference {
    EventReference {
        id: EventId::parse(format!("{ERASURE_TYPE}.{}", at.unix())).expect("our own ids are ids"),
        event_type: EventType::parse(ERASURE_TYPE).expect("our own types are types"),
        created: at,
    }
}
