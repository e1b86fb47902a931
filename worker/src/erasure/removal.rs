//! The erasure of one person.
//!
//! Owns the steps and their order: find the person's data, check that their events are applied,
//! record the erasure so that every worker knows of it, and remove the data. If a run ends halfway,
//! the next run does the rest: nothing is removed before the erasure is recorded, and data that is
//! already gone causes no error. May not know whether an operator or an event asked for the
//! erasure.

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

/// How often the streams are read, at most. They are read again as long as a read finds new ids.
/// Each read finds one more kind of id, and there are three kinds.
const SEARCHES_MAX: usize = 8;

/// How long a running worker may take to apply the person's events.
const APPLIED_TIMEOUT: Duration = Duration::from_secs(5);

/// How long signals may take to leave the outbox.
const SENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The pause between two checks of either.
const POLL: Duration = Duration::from_millis(100);

/// The person to erase.
pub enum Target {
    /// A customer, by Stripe's id.
    Customer(String),
    /// An orphan, by its id, together with its customer if it has one.
    Orphan(String),
}

/// The erasure of one person.
pub struct Erasure<'a> {
    pub store: &'a Store,
    pub jetstream: &'a jetstream::Context,
    pub erasures: &'a Erasures,
    /// Whether to erase even if an event of the person is not applied.
    pub force: bool,
    /// Called for every message that is read.
    pub on_message: &'a (dyn Fn() + Send + Sync),
}

/// What an erasure removed, and when. Events, dead letters and signals are counted as messages of
/// their streams.
#[derive(Serialize)]
pub struct Receipt {
    pub customer: Option<String>,
    pub orphan: Option<String>,
    /// When the erasure was recorded: it covers everything up to this time.
    pub recorded_at: Timestamp,
    /// All known ids of the person.
    pub ids: Vec<String>,
    pub events: u64,
    pub dead_letters: u64,
    pub signals: u64,
    /// Rows whose metadata was removed.
    pub subscriptions: u64,
    /// Orphans whose email was removed.
    pub orphans: u64,
    /// Removed events that no worker had applied.
    pub unapplied: u64,
}

/// Why a person was not erased, or not completely.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    #[error(
        "there is no orphan {0}: `litestripe-worker orphans list --all` shows all; nothing was changed"
    )]
    UnknownOrphan(String),
    #[error(
        "event {0} in STRIPE_EVENTS belongs to this customer and no worker has applied it yet; nothing was changed. Start a worker (`litestripe-worker run`) and try again, or use `--force` to remove the event without applying it, which loses its change"
    )]
    Unapplied(u64),
    #[error(
        "event {0} arrived meanwhile and no worker has applied it yet; the erasure is recorded: run it again"
    )]
    ArrivedMeanwhile(u64),
    #[error("every search finds more ids of this customer; nothing was changed")]
    TooManyIds,
    #[error(
        "signals of this customer are still in the outbox; everything else is erased: run it again when they are sent"
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

/// The sequences of the person's messages, by stream.
#[derive(Default)]
struct Found {
    events: BTreeSet<u64>,
    dead_letters: BTreeSet<u64>,
    /// The last event that was read.
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
        // An event delivered before the record may have been applied with its personal data.
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

    /// Returns the ids that are known before the streams are read.
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

    /// Reads rows and streams until a read finds no new id.
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

    /// Adds messages and ids that arrived since `found`. Returns whether there were any.
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
            if ids.learn_if_own(message.body) {
                found.insert(message.sequence);
            }
        };
        scan::read(self.jetstream, stream, from, visit).await
    }

    /// Waits for a running worker to apply `events`. Returns those that it did not apply in time.
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

    /// Removes the metadata from the person's rows, and signals each row. Returns how many rows had
    /// metadata, and for each row the first revision whose signals are kept.
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

    /// Removes the person's signals that are older than those of `strip_rows`. Returns their count.
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
            if known.learn_if_own(message.body) && !is_kept(message.body, keep_from) {
                older.push(message.sequence);
            }
        };
        scan::read(self.jetstream, SIGNALS_STREAM, 1, visit).await?;
        Ok(scan::remove(self.jetstream, SIGNALS_STREAM, older).await?)
    }

    /// Waits until the outbox holds no signal of the person.
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

/// The revision in a signal's body. An orphan's signal has none.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Revision {
    stripe_subscription_id: Option<String>,
    revision: Option<i64>,
}

/// Whether a signal has at least its row's revision in `keep_from`.
fn is_kept(body: &[u8], keep_from: &BTreeMap<String, i64>) -> bool {
    let signal: Revision = serde_json::from_slice(body).unwrap_or_default();
    let of_row = signal
        .stripe_subscription_id
        .as_ref()
        .and_then(|id| keep_from.get(id));
    of_row.is_some_and(|of_row| signal.revision >= Some(*of_row))
}

/// Returns the event that signals name as the cause of an erasure's changes.
fn erasure_event(at: Timestamp) -> EventReference {
    EventReference {
        id: EventId::parse(format!("{ERASURE_TYPE}.{}", at.unix())).expect("our own ids are valid"),
        event_type: EventType::parse(ERASURE_TYPE).expect("our own types are valid"),
        created: at,
    }
}
