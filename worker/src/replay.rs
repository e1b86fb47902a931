//! Replay: events that the stream still holds, applied again.
//!
//! Owns which events those are, when the end is reached, and what is signalled then. A replay merges
//! as live events do and beside them, so it can change no row that is right already. Between its
//! beginning and its end rows may be half rebuilt: of these, subscribers hear nothing until the end,
//! or until a live event changes one.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use litestripe_contract::event::EventType;
use litestripe_contract::subject::{self, EVENTS_STREAM};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::batch::{self, AppliedAgain, Applier, Decoded};
use crate::consumer::{self, Again, Batches, ConsumerError};
use crate::error::StoreError;
use crate::plan::{Arrival, Signalling, Terms};
use crate::store::replay::{BEAT_EVERY, Replay};
use crate::store::{self, Store};

mod dry_run;
mod tell;

pub use dry_run::DryRun;

/// How long nothing must come before it is looked whether the end is reached.
const LOOK_AFTER: Duration = Duration::from_millis(300);

/// The longest name.
const NAME_MAX: usize = 64;

/// Where a replay begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// At this sequence of the stream.
    Sequence(u64),
    /// At the first event that was stored at this time or later; as an end, before it.
    Time(OffsetDateTime),
}

/// Who is told what a replay changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Signals {
    /// Nobody, of events that are applied; of the others the workers will tell.
    None,
    /// Each row that changed, once, at the end, with its final state.
    Changed,
    /// These, and the rows that did not change under their existing revision.
    All,
}

impl Signals {
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Changed => "changed",
            Self::All => "all",
        }
    }

    fn parse(text: &str) -> Self {
        [Self::None, Self::All].into_iter().find(|signals| signals.as_str() == text).unwrap_or(Self::Changed)
    }
}

/// What an operator wants replayed.
#[derive(Debug, Clone)]
pub struct Request {
    /// Under which name its position is kept.
    pub name: Option<String>,
    /// Where it begins: without, at the stream's first event.
    pub from: Option<Bound>,
    /// Where it ends: without, at the stream's last event.
    pub until: Option<Bound>,
    /// Only events of these types; all, if none is named.
    pub event_types: Vec<EventType>,
    /// Only events of this subscription.
    pub stripe_subscription_id: Option<String>,
    /// Who is told.
    pub signals: Signals,
}

impl Request {
    /// The name; empty for none.
    fn name(&self) -> Result<String, ReplayError> {
        let fits = |name: &str| {
            (1..=NAME_MAX).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        match &self.name {
            None => Ok(String::new()),
            Some(name) if fits(name) => Ok(name.clone()),
            Some(_) => Err(ReplayError::Name),
        }
    }

    /// Each type once: JetStream refuses subjects that overlap.
    fn event_types(&self) -> Vec<String> {
        let types: BTreeSet<_> = self.event_types.iter().map(EventType::to_string).collect();
        types.into_iter().collect()
    }

    /// Whether `begun` is the same but for its bounds.
    fn is(&self, begun: &Replay) -> bool {
        (self.event_types(), &self.stripe_subscription_id, self.signals.as_str())
            == (begun.event_types.clone(), &begun.stripe_subscription_id, &begun.signals)
    }
}

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
    /// What `request` comes down to. Nothing if the stream holds no such event.
    ///
    /// # Errors
    /// When the request cannot be met.
    pub async fn resolve(&self, request: &Request, now: OffsetDateTime) -> Result<Option<Replay>, ReplayError> {
        let name = request.name()?;
        let stream = self.jetstream.get_stream(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| ReplayError::Broker(error.into()))?;
        let state = &stream.cached_info().state;
        let (first, last) = (state.first_sequence, state.last_sequence);
        let first_sequence = match request.from {
            None => first,
            Some(bound) => self.sequence(bound, first, last).await?.max(first),
        };
        let last_sequence = match request.until {
            None => last,
            Some(Bound::Time(time)) => self.sequence(Bound::Time(time), first, last).await?.saturating_sub(1),
            Some(bound) => self.sequence(bound, first, last).await?,
        };
        let last_sequence = match request.signals {
            // What it applied silently, a worker would merge to nothing, and nobody would ever be told.
            Signals::None => {
                let applied = consumer::applied_until(&self.jetstream).await;
                last_sequence.min(applied.map_err(ReplayError::Broker)?)
            }
            Signals::Changed | Signals::All => last_sequence,
        };
        let is_backwards = match (request.from, request.until) {
            (Some(Bound::Sequence(from)), Some(Bound::Sequence(until))) => until < from,
            (Some(Bound::Time(from)), Some(Bound::Time(until))) => until < from,
            _ => false,
        };
        if is_backwards {
            return Err(ReplayError::Backwards { first: first_sequence, last: last_sequence });
        }
        let is_empty = state.messages == 0 || first_sequence > last_sequence;
        Ok((!is_empty).then(|| Replay {
            name,
            signals: request.signals.as_str().to_owned(),
            first_sequence,
            last_sequence,
            event_types: request.event_types(),
            stripe_subscription_id: request.stripe_subscription_id.clone(),
            started: now,
            beat: now,
        }))
    }

    async fn sequence(&self, bound: Bound, first: u64, last: u64) -> Result<u64, ReplayError> {
        match bound {
            Bound::Sequence(asked) if (first..=last).contains(&asked) => Ok(asked),
            Bound::Sequence(asked) => Err(ReplayError::NoSuchSequence { asked, first, last }),
            Bound::Time(time) => consumer::sequence_at(&self.jetstream, time).await.map_err(ReplayError::Broker),
        }
    }

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

    /// Whether the replay is about the event of this sequence; None for one that cannot be read. What an
    /// erased person did is not to come back.
    fn is_wanted(&self, replay: &Replay, sequence: u64, arrival: Option<&Arrival>) -> bool {
        let wanted = replay.stripe_subscription_id.as_deref();
        let is_about = match arrival {
            Some(arrival) => {
                let is_erased = self.applier.erasures.covers(&arrival.event);
                wanted.is_none_or(|wanted| arrival.event.stripe_subscription_id() == Some(wanted)) && !is_erased
            }
            None => wanted.is_none(),
        };
        is_about && sequence <= replay.last_sequence
    }

    /// Whether the end was reached.
    async fn apply_again(
        &self,
        replay: &Replay,
        again: &Again,
        shutdown: &CancellationToken,
        mut applied: impl FnMut(AppliedAgain, u64),
    ) -> Result<bool, ReplayError> {
        let mut said = false;
        while !shutdown.is_cancelled() {
            // Whoever shared the work removed the consumer when it was over. Else it is made again, and
            // delivers all of it again.
            if self.is_finished(replay).await {
                return Ok(true);
            }
            if let Ok((first, floor)) = again.floor(&self.jetstream).await
                && first > floor.saturating_add(1)
            {
                warn!(
                    "events {} to {} are not in {EVENTS_STREAM} any more: what was not applied again yet comes back by \
                     `backfill` or `reconcile` only",
                    floor + 1,
                    first - 1
                );
            }
            let mut batches = match again.open(&self.jetstream, self.batch).await {
                Ok(batches) => batches,
                Err(error) if consumer::is_refusal(&error) => return Err(ReplayError::Broker(error)),
                Err(error) => {
                    if !said {
                        warn!("waiting for JetStream: {error}");
                        said = true;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = shutdown.cancelled() => {}
                    }
                    continue;
                }
            };
            said = false;
            let is_at_end = self.apply_all(&mut batches, replay, again, shutdown, &mut applied).await;
            batches.close().await;
            if is_at_end {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Applies a batch while the database has another one, if they concern nothing in common. Whether the
    /// end was reached: else the consumer is gone, or `shutdown` came.
    async fn apply_all(
        &self,
        batches: &mut Batches,
        replay: &Replay,
        again: &Again,
        shutdown: &CancellationToken,
        applied: &mut impl FnMut(AppliedAgain, u64),
    ) -> bool {
        let wanted = |sequence: u64, arrival: Option<&Arrival>| self.is_wanted(replay, sequence, arrival);
        let apply = async |decoded: Decoded| {
            let last = decoded.last_sequence();
            batch::apply_again(&self.applier, decoded, wanted, shutdown).await.map(|done| (done, last))
        };
        let mut applying = FuturesOrdered::new();
        let mut busy: VecDeque<HashSet<String>> = VecDeque::new();
        let mut waiting: Option<Decoded> = None;
        let mut are_more = true;
        loop {
            if let Some(decoded) = waiting.take_if(|it| busy.iter().all(|busy| busy.is_disjoint(it.concerns()))) {
                busy.push_back(decoded.concerns().clone());
                applying.push_back(apply(decoded));
            }
            let has_room = waiting.is_none() && applying.len() < batch::IN_FLIGHT;
            let may_be_over = tokio::select! {
                biased;
                Some(done) = applying.next() => {
                    busy.pop_front();
                    let Some((done, last)): Option<(AppliedAgain, u64)> = done else {
                        are_more = false;
                        continue;
                    };
                    applied(done, last.min(replay.last_sequence));
                    last >= replay.last_sequence
                }
                batch = next(batches, shutdown), if are_more && has_room => match batch {
                    Some(Some(batch)) => {
                        waiting = Some(Decoded::of(&self.applier, batch));
                        continue;
                    }
                    Some(None) => applying.is_empty(),
                    None => {
                        are_more = false;
                        continue;
                    }
                },
                else => return false,
            };
            if may_be_over && self.is_over(replay, again).await {
                return true;
            }
        }
    }

    /// Whether every event up to the end is applied, by whichever process.
    async fn is_over(&self, replay: &Replay, again: &Again) -> bool {
        again.progress(&self.jetstream).await.is_ok_and(|progress| progress.has_reached(replay.last_sequence))
    }

    /// Whether another process has reached the end under this name.
    async fn is_finished(&self, replay: &Replay) -> bool {
        let unfinished = store::replay::unfinished(self.applier.store.connection()).await;
        unfinished.is_ok_and(|unfinished| unfinished.iter().all(|other| other.name != replay.name))
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
        let (_, floor) = again(replay).floor(jetstream).await.map_err(ReplayError::Broker)?;
        lowest = lowest.min(floor);
    }
    Ok(lowest)
}

/// What covers both, and tells whomever either was to tell.
fn wider(begun: Replay, asked: Replay) -> Replay {
    let signals = Signals::parse(&begun.signals).max(Signals::parse(&asked.signals));
    let same_types = begun.event_types == asked.event_types;
    let same_subscription = begun.stripe_subscription_id == asked.stripe_subscription_id;
    Replay {
        signals: signals.as_str().to_owned(),
        first_sequence: begun.first_sequence.min(asked.first_sequence),
        last_sequence: begun.last_sequence.max(asked.last_sequence),
        event_types: if same_types { asked.event_types } else { Vec::new() },
        stripe_subscription_id: asked.stripe_subscription_id.filter(|_| same_subscription),
        started: begun.started,
        ..asked
    }
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

/// The next batch; `Some(None)` when none came for a while; nothing when the consumer is gone or
/// `shutdown` came.
async fn next(batches: &mut Batches, shutdown: &CancellationToken) -> Option<Option<consumer::Batch>> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        batch = tokio::time::timeout(LOOK_AFTER, batches.next()) => match batch {
            Ok(Some(batch)) => Some(Some(batch)),
            Ok(None) => None,
            Err(_) => Some(None),
        },
    }
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
