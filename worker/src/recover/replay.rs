//! Replay: events that the stream still holds, applied again.
//!
//! Owns its beginning and its end: that it is noted what it owes, and who else may be at it. `request`
//! knows which events those are, `apply` how they are applied, `tell` what is signalled then.
//!
//! A replay merges as live events do and beside them, so it can change no row that is right already.
//! Between its beginning and its end rows may be half rebuilt: of these, subscribers hear nothing until
//! the end, or until a live event changes one.

use std::sync::Arc;

use async_nats::jetstream;
use litestripe_contract::subject::{self, EVENTS_STREAM};
use litestripe_domain::plan::{Signalling, Terms};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::apply::Applier;
use crate::error::StoreError;
use crate::store::replay::{BEAT_EVERY, Replay};
use crate::store::{self, Store};
use crate::stream::consumer::{Again, ConsumerError};
use crate::stream::progress::ProgressError;

mod apply;
mod dry_run;
mod request;
mod tell;

pub use dry_run::DryRun;
pub use request::{Bound, Request, Signals};
use request::{NAME_MAX, wider};

/// Why there is no replay.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The name cannot be part of a consumer's.
    #[error("the name of a replay is 1 to {NAME_MAX} letters, digits, `-` and `_`")]
    Name,
    /// The stream has no such sequence.
    #[error("{EVENTS_STREAM} has no event {asked}: it holds {first} to {last}")]
    NoSuchSequence {
        /// What was asked for.
        asked: u64,
        /// The first sequence it holds.
        first: u64,
        /// The last one.
        last: u64,
    },
    /// It would end before it begins.
    #[error("the replay would end (at event {last}) before it begins (at event {first})")]
    Backwards {
        /// Where it would begin.
        first: u64,
        /// Where it would end.
        last: u64,
    },
    /// Only one replay at a time may change rows, or they would signal each other's intermediate states.
    #[error("a replay {} is running since {since}: wait for its end{}", named(name), share(name))]
    Running {
        /// Its name.
        name: String,
        /// When it was started.
        since: OffsetDateTime,
    },
    /// A name stands for one selection until its end is reached.
    #[error(
        "the replay {} was begun with other arguments ({}) and has not reached its end: finish it with these, or \
         take another --name", .0.name, arguments(.0)
    )]
    Differs(Box<Replay>),
    /// What it owes cannot be read.
    #[error("{0} signals that are due cannot be told: their rows cannot be read, or a later version wrote what is due")]
    Untold(u64),
    /// The database is away.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The broker is away, or refuses; or the stream is missing.
    #[error("cannot read {EVENTS_STREAM}")]
    Broker(#[source] ConsumerError),
    /// The broker does not say how far the events are applied.
    #[error(transparent)]
    Progress(#[from] ProgressError),
    /// Somebody removed the consumer.
    #[error("the consumer of this replay is gone: run it again")]
    ConsumerGone,
}

fn named(name: &str) -> String {
    if name.is_empty() { "without a name".to_owned() } else { name.to_owned() }
}

fn share(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(", or share its work with --name {name}") }
}

/// What was asked for, but for bounds, as the command line has it.
fn arguments(replay: &Replay) -> String {
    let types = replay.event_types.iter().map(|name| format!("--type {name}"));
    let subscription = replay.stripe_subscription_id.iter().map(|id| format!("--subscription {id}"));
    let signals = [format!("--signals {}", replay.signals)];
    types.chain(subscription).chain(signals).collect::<Vec<_>>().join(" ")
}

/// What a replay did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// The first sequence it applied again.
    pub first_sequence: u64,
    /// The last one.
    pub last_sequence: u64,
    /// Events this process applied again.
    pub events: u64,
    /// Events among them that can never be applied: they are dead letters.
    pub poisoned: u64,
    /// Signals that were due at the end.
    pub signals: u64,
    /// Whether the end was reached.
    pub finished: bool,
    /// Replays that were cut off, and the signals they still owe.
    pub owed_by_others: Vec<(String, u64)>,
}

/// What a replay needs.
pub struct Replayer {
    /// As for live events, under terms of its own.
    pub applier: Applier,
    /// Where the events are.
    pub jetstream: jetstream::Context,
    /// Events per transaction.
    pub batch: usize,
}

impl Replayer {
    /// Notes the replay in the database, so that what it owes survives a crash, and returns it as it
    /// is to be done: a name that was begun goes on, and one without a name also covers what the last
    /// one without a name did not finish. Nothing if there is nothing to do.
    ///
    /// # Errors
    /// When another one is running, or the request cannot be met.
    pub async fn begin(&self, request: &Request, now: OffsetDateTime) -> Result<Option<(Replay, Again)>, ReplayError> {
        let db = self.applier.store.connection();
        let name = request.name()?;
        let unfinished = store::replay::unfinished(db).await?;
        let running = unfinished.iter().find(|other| other.is_running(now));
        if let Some(other) = running.filter(|other| other.name != name || name.is_empty()) {
            return Err(ReplayError::Running { name: other.name.clone(), since: other.started });
        }
        // Before it is looked what the stream holds: that may have moved on, and signals are owed yet.
        let begun = unfinished.into_iter().find(|other| other.name == name);
        if let Some(begun) = begun.as_ref().filter(|begun| !begun.name.is_empty()) {
            if !request.is(begun) {
                return Err(ReplayError::Differs(Box::new(begun.clone())));
            }
            store::replay::beat(db, &begun.name, now).await?;
            return Ok(Some((begun.clone(), again(begun))));
        }
        let replay = match (begun, self.resolve(request, now).await?) {
            (Some(begun), Some(asked)) => wider(begun, asked),
            (Some(begun), None) => Replay { beat: now, ..begun },
            (None, Some(asked)) => asked,
            (None, None) => return Ok(None),
        };
        let again = again(&replay);
        // Of an earlier one of this name.
        again.remove(&self.jetstream).await.map_err(ReplayError::Broker)?;
        store::replay::start(db, &replay).await?;
        Ok(Some((replay, again)))
    }

    /// Applies the events again, up to the end or until `shutdown`, and signals what is due.
    /// `progress` hears of every batch up to which sequence it goes.
    ///
    /// # Errors
    /// When the broker refuses, or the database gives no answer at the end. Run again, it goes on.
    pub async fn run(
        &self,
        replay: &Replay,
        again: &Again,
        shutdown: &CancellationToken,
        progress: impl FnMut(u64),
    ) -> Result<Summary, ReplayError> {
        let store = &self.applier.store;
        let stop = CancellationToken::new();
        let heart = tokio::spawn(beat(store.clone(), replay.name.clone(), stop.clone()));
        let outcome = self.apply_and_tell(replay, again, shutdown, progress).await;
        stop.cancel();
        let _ = heart.await;
        let now = OffsetDateTime::now_utc();
        if outcome.as_ref().is_ok_and(|summary| summary.finished) {
            if let Err(error) = again.remove(&self.jetstream).await {
                warn!("the consumer {} stays until it is forgotten: {error}", again.consumer);
            }
        } else {
            // Whoever runs it again need not wait until nobody is heard.
            store::replay::beat(store.connection(), &replay.name, now - time::Duration::minutes(1)).await?;
        }
        let mut summary = outcome?;
        for other in store::replay::unfinished(store.connection()).await? {
            let owed = store::signal_due::count(store.connection(), &other.name).await?;
            if other.name != replay.name && owed > 0 {
                summary.owed_by_others.push((other.name, owed));
            }
        }
        Ok(summary)
    }

    async fn apply_and_tell(
        &self,
        replay: &Replay,
        again: &Again,
        shutdown: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<Summary, ReplayError> {
        let mut summary = Summary {
            first_sequence: replay.first_sequence,
            last_sequence: replay.last_sequence,
            ..Summary::default()
        };
        let is_at_end = self.apply_again(replay, again, shutdown, |applied, sequence| {
            summary.events += applied.applied;
            summary.poisoned += applied.poisoned;
            progress(sequence);
        });
        if is_at_end.await? {
            (summary.signals, summary.finished) = self.tell(&replay.name, shutdown).await?;
        }
        Ok(summary)
    }
}

/// Who is told of what a replay changes.
#[must_use]
pub fn signalling(replay: &Replay) -> Signalling {
    match Signals::parse(&replay.signals) {
        Signals::None => Signalling::Never,
        Signals::Changed => Signalling::Later { replay: replay.name.clone(), unchanged: false },
        Signals::All => Signalling::Later { replay: replay.name.clone(), unchanged: true },
    }
}

/// Up to which event all open replays have applied all again: what is above may not be purged.
///
/// # Errors
/// When database or broker is away.
pub async fn floor(store: &Store, jetstream: &jetstream::Context) -> Result<u64, ReplayError> {
    let now = OffsetDateTime::now_utc();
    let mut lowest = u64::MAX;
    for replay in store::replay::unfinished(store.connection()).await?.iter().filter(|replay| replay.is_open(now)) {
        let (_, floor) = again(replay).floor(jetstream).await?;
        lowest = lowest.min(floor);
    }
    Ok(lowest)
}

fn again(replay: &Replay) -> Again {
    let consumer = if replay.name.is_empty() {
        "litestripe-replay".to_owned()
    } else {
        format!("litestripe-replay-{}", replay.name)
    };
    let subjects = replay.event_types.iter().map(|name| format!("{}{name}", subject::EVENTS_PREFIX)).collect();
    Again { consumer, first_sequence: replay.first_sequence, subjects }
}

async fn beat(store: Store, name: String, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(BEAT_EVERY) => {}
        }
        if let Err(error) = store::replay::beat(store.connection(), &name, OffsetDateTime::now_utc()).await {
            tracing::debug!("{error}");
        }
    }
}

/// Terms of a replay: the operator's rules for orphans, and nobody told before its time.
#[must_use]
pub fn terms(terms: Terms, replay: &Replay) -> Arc<Terms> {
    Arc::new(Terms { signalling: signalling(replay), ..terms })
}
