//! The erasure of one person, or of several at a time.
//!
//! Owns the steps and their order: find the person's data, check that their events are applied,
//! record the erasure so that every worker knows of it, and remove the data. If a run ends halfway,
//! the next run does the rest: nothing is removed before the erasure is recorded, and data that is
//! already gone causes no error. May not know whether an operator or an event asked for the
//! erasure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::exit;
use litestripe_contract::signal::{EventReference, OutOfRange, Timestamp};
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;
use tracing::warn;

use super::{Erasures, Ids, People, copy, reference};
use crate::error::StoreError;
use crate::store::{self, Store};
use crate::stream::progress::{self, ProgressError};
use crate::stream::scan::{self, ScanError, ScannedMessage};

pub(super) mod rows;

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

/// An erasure.
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

/// What was found of one person.
#[derive(Default)]
struct Found {
    /// The sequences of the person's messages, by stream.
    events: BTreeSet<u64>,
    dead_letters: BTreeSet<u64>,
}

/// The people that a run erases, with what was found of each.
struct Search {
    /// The place of each in the list of targets.
    indexes: Vec<usize>,
    people: People,
    found: Vec<Found>,
    /// The last event that was read.
    last: u64,
}

/// The result of a run.
pub struct Outcome {
    /// `None` if no target could be erased.
    pub receipt: Option<Receipt>,
    /// The targets that could not be erased yet, by their index.
    pub waiting: Vec<(usize, EraseError)>,
}

impl Erasure<'_> {
    /// Erases `targets`, for whom the streams are read together. A person with an event that is not
    /// applied yet does not hold up the others.
    pub async fn run(&self, targets: &[Target]) -> Result<Outcome, EraseError> {
        let mut search = self.search(targets).await?;
        self.find(&mut search).await?;
        let mut waiting = Vec::new();
        let mut unapplied = self.unapplied(&search).await?;
        if !self.force {
            waiting.extend(search.drop_unapplied(&unapplied, EraseError::Unapplied));
        }
        if search.is_empty() {
            return Ok(Outcome {
                receipt: None,
                waiting,
            });
        }

        let at = self.now().await?;
        let recorded_at = Timestamp::from_unix(at)?;
        self.record(&search.people.ids(), at).await?;
        // An event delivered before the record may have been applied with its personal data.
        if self.find_more(&mut search).await? {
            self.record(&search.people.ids(), at).await?;
            unapplied = self.unapplied(&search).await?;
            if !self.force {
                waiting.extend(search.drop_unapplied(&unapplied, EraseError::ArrivedMeanwhile));
            }
        }
        let ids = search.people.ids();
        let (events, dead_letters) = search.found();
        unapplied.retain(|event| events.contains(event));

        let events = scan::remove(self.jetstream, EVENTS_STREAM, events).await?;
        let dead_letters = scan::remove(self.jetstream, DEAD_LETTERS_STREAM, dead_letters).await?;
        let orphans = store::orphan::erase_emails_of(self.store.connection(), &ids.all()).await?;
        let (subscriptions, keep_from) = self.strip_rows(&ids, &reference(recorded_at)).await?;
        let signals = self.remove_signals(&ids, &keep_from).await?;
        self.store.truncate_log().await?;
        let (mut customer, mut orphan) = (None, None);
        match targets {
            [Target::Customer(id)] => customer = Some(id.clone()),
            [Target::Orphan(id)] => orphan = Some(id.clone()),
            _ => {}
        }
        let receipt = Receipt {
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
        };
        Ok(Outcome {
            receipt: Some(receipt),
            waiting,
        })
    }

    /// Returns the time as of which the people are erased: by the later of our clock and the
    /// broker's, so that a clock that is behind does not leave their newest events out.
    async fn now(&self) -> Result<i64, EraseError> {
        let now = OffsetDateTime::now_utc();
        let broker = progress::broker_time(self.jetstream).await?;
        Ok(broker
            .map_or(now, |broker| broker.max(now))
            .unix_timestamp())
    }

    async fn record(&self, ids: &Ids, at: i64) -> Result<(), EraseError> {
        self.erasures.record(self.store, ids, at).await?;
        let erased = ids.iter().map(|id| (id.to_owned(), at)).collect();
        if let Err(error) = copy::store(self.jetstream, erased, at).await {
            // A worker stores it later. A stream that is full must not prevent what makes room.
            warn!(
                "the erasure is recorded in the database alone for now: {}",
                exit::chain(&error)
            );
        }
        Ok(())
    }

    /// Prepares the search, with the ids that are known before the streams are read.
    async fn search(&self, targets: &[Target]) -> Result<Search, EraseError> {
        let mut people = Vec::new();
        for target in targets {
            people.push(self.ids_of(target).await?);
        }
        Ok(Search {
            indexes: (0..targets.len()).collect(),
            people: People::new(people),
            found: targets.iter().map(|_| Found::default()).collect(),
            last: 0,
        })
    }

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
    async fn find(&self, search: &mut Search) -> Result<(), EraseError> {
        for _ in 0..SEARCHES_MAX {
            let before = search.people.count();
            self.learn_from_rows(search).await?;
            search
                .found
                .iter_mut()
                .for_each(|found| *found = Found::default());
            search.last = self.read_events(search, 1).await?;
            self.read_dead_letters(search).await?;
            if search.people.count() == before {
                return Ok(());
            }
        }
        Err(EraseError::TooManyIds)
    }

    /// Adds messages and ids that arrived since the last read. Returns whether there were any.
    async fn find_more(&self, search: &mut Search) -> Result<bool, EraseError> {
        let before = (search.people.count(), search.count());
        self.learn_from_rows(search).await?;
        search.last = self.read_events(search, search.last + 1).await?;
        self.read_dead_letters(search).await?;
        if search.people.count() != before.0 {
            self.find(search).await?;
        }
        Ok((search.people.count(), search.count()) != before)
    }

    async fn learn_from_rows(&self, search: &mut Search) -> Result<(), EraseError> {
        let db = self.store.connection();
        let people: Vec<Ids> = search.people.iter().cloned().collect();
        for (index, ids) in people.iter().enumerate() {
            let rows = store::subscription::related_ids(db, &ids.all()).await?;
            let orphans = store::orphan::related_ids(db, &ids.all()).await?;
            search.people.add(index, rows.into_iter().chain(orphans));
        }
        Ok(())
    }

    async fn read_events(&self, search: &mut Search, from: u64) -> Result<u64, ScanError> {
        let (people, found) = (&mut search.people, &mut search.found);
        self.read(EVENTS_STREAM, from, people, |owner, sequence| {
            if let Some(found) = found.get_mut(owner) {
                found.events.insert(sequence);
            }
        })
        .await
    }

    async fn read_dead_letters(&self, search: &mut Search) -> Result<u64, ScanError> {
        let (people, found) = (&mut search.people, &mut search.found);
        self.read(DEAD_LETTERS_STREAM, 1, people, |owner, sequence| {
            if let Some(found) = found.get_mut(owner) {
                found.dead_letters.insert(sequence);
            }
        })
        .await
    }

    async fn read(
        &self,
        stream: &'static str,
        from: u64,
        people: &mut People,
        mut found: impl FnMut(usize, u64),
    ) -> Result<u64, ScanError> {
        let visit = |message: ScannedMessage<'_>| {
            (self.on_message)();
            for owner in people.owners_of(message.body) {
                found(owner, message.sequence);
            }
        };
        scan::read(self.jetstream, stream, from, visit).await
    }

    /// Waits for a running worker to apply the events that were found. Returns those that it did
    /// not apply in time.
    async fn unapplied(&self, search: &Search) -> Result<BTreeSet<u64>, EraseError> {
        let (events, _) = search.found();
        let deadline = Instant::now() + APPLIED_TIMEOUT;
        loop {
            let unapplied = match progress::applied_until(self.jetstream).await? {
                _ if events.is_empty() => BTreeSet::new(),
                None => return Ok(events),
                Some(floor) => events.range(floor.saturating_add(1)..).copied().collect(),
            };
            if unapplied.is_empty() || Instant::now() >= deadline {
                return Ok(unapplied);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Removes the metadata from the people's rows, and signals each row. Returns how many rows had
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

    /// Removes the people's signals that are older than those of `strip_rows`. Returns their count.
    async fn remove_signals(
        &self,
        ids: &Ids,
        keep_from: &BTreeMap<String, i64>,
    ) -> Result<u64, EraseError> {
        self.wait_until_sent(ids).await?;
        let mut known = People::new(vec![ids.clone()]);
        let mut older = Vec::new();
        let visit = |message: ScannedMessage<'_>| {
            (self.on_message)();
            if !known.owners_of(message.body).is_empty() && !is_kept(message.body, keep_from) {
                older.push(message.sequence);
            }
        };
        scan::read(self.jetstream, SIGNALS_STREAM, 1, visit).await?;
        Ok(scan::remove(self.jetstream, SIGNALS_STREAM, older).await?)
    }

    /// Waits until the outbox holds no signal of the people.
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

impl Search {
    fn is_empty(&self) -> bool {
        self.indexes.is_empty()
    }

    /// Returns how many messages were found.
    fn count(&self) -> usize {
        let counts = self.found.iter();
        counts
            .map(|found| found.events.len() + found.dead_letters.len())
            .sum()
    }

    /// Returns the events and dead letters of all people.
    fn found(&self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let all =
            |of: fn(&Found) -> &BTreeSet<u64>| self.found.iter().flat_map(of).copied().collect();
        (all(|found| &found.events), all(|found| &found.dead_letters))
    }

    /// Drops the people with an event in `unapplied`. Returns why each has to wait, by the place
    /// in the list of targets.
    fn drop_unapplied(
        &mut self,
        unapplied: &BTreeSet<u64>,
        reason: fn(u64) -> EraseError,
    ) -> Vec<(usize, EraseError)> {
        let mut waiting = Vec::new();
        let (mut indexes, mut people, mut found) = (Vec::new(), Vec::new(), Vec::new());
        let all = self.indexes.drain(..).zip(self.people.iter().cloned());
        for ((index, ids), of_one) in all.zip(self.found.drain(..)) {
            match of_one.events.intersection(unapplied).next() {
                Some(event) => waiting.push((index, reason(*event))),
                None => {
                    indexes.push(index);
                    people.push(ids);
                    found.push(of_one);
                }
            }
        }
        (self.indexes, self.people, self.found) = (indexes, People::new(people), found);
        waiting
    }
}

/// Removes the message that a question of a removal names, if an erasure covers it: a stream that
/// was made anew may hold another message at this sequence.
pub async fn remove_covered(
    jetstream: &jetstream::Context,
    erasures: &Erasures,
    place: &str,
) -> Result<(), ScanError> {
    let place = place.split_once(' ');
    let place = place.and_then(|(name, sequence)| {
        let stream = [EVENTS_STREAM, DEAD_LETTERS_STREAM]
            .into_iter()
            .find(|stream| *stream == name)?;
        Some((stream, sequence.parse().ok()?))
    });
    // A later version of the program may know more streams.
    let Some((stream, sequence)) = place else {
        return Ok(());
    };
    let body = scan::body(jetstream, stream, sequence).await?;
    if body.is_some_and(|body| erasures.covers_message(&body)) {
        scan::remove(jetstream, stream, [sequence]).await?;
    }
    Ok(())
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
