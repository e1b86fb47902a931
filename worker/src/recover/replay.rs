//! Replay: applies events that the stream still holds again.
//!
//! Owns the beginning and the end of a replay, and that only one runs at a time. `request` decides
//! which events are replayed, `apply` how they are applied, and `unsent` sends the signals at the
//! end.
//!
//! A replay merges events as live batches do, and runs beside them, so it does not change a row
//! that is already right. Until its end, rows may be half rebuilt. Subscribers receive no first
//! signal of such a row before the end, unless a live event brings the subscription's current state
//! and the row is whole. A row that is not whole at the end is withheld (`recover/withheld`).

use std::sync::Arc;

use async_nats::jetstream;
use litestripe_contract::subject::{self, EVENTS_STREAM};
use litestripe_domain::arrival::StreamId;
use litestripe_domain::plan::{Policy, Rebuilt, Signalling};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::apply::Applier;
use crate::error::StoreError;
use crate::recover::unsent;
use crate::recover::withheld::{self, Withheld};
use crate::store::replay::{HEARTBEAT_EVERY, Replay};
use crate::store::{self, Store};
use crate::stream::consumer::{ConsumerError, ReplayConsumer};
use crate::stream::progress::{self, ProgressError};
use crate::wait::pause;

mod acks;
mod apply;
mod dry_run;
mod request;

pub(crate) use dry_run::DryRun;
pub(crate) use request::{Bound, Request, Signals};
use request::{is_continuation, union};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    #[error("{EVENTS_STREAM} has no event {asked}: it holds {first} to {last}")]
    NoSuchSequence { asked: u64, first: u64, last: u64 },
    #[error("the replay would end (at event {last}) before it begins (at event {first})")]
    Backwards { first: u64, last: u64 },
    /// Only one replay at a time may change rows, or one would signal the other's intermediate
    /// states.
    #[error("a replay has been running since {since}: wait for its end")]
    Running { since: OffsetDateTime },
    #[error("the signals of {} rows cannot be sent, because these cannot be read: {}", .0.len(), .0.join(", "))]
    Unreadable(Vec<String>),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The broker is unavailable or refuses, or the stream is missing.
    #[error("cannot read {EVENTS_STREAM}")]
    Broker(#[source] ConsumerError),
    #[error("cannot read {EVENTS_STREAM}")]
    Progress(#[from] ProgressError),
    #[error("the consumer of this replay is gone: run it again")]
    ConsumerGone,
    #[error(
        "NATS drops the acks of this replay: allow its user to publish to $JS.ACK.{EVENTS_STREAM}.> \
         (docs/permissions.md), then run it again"
    )]
    AcksRefused,
    /// The events that it was about are gone.
    #[error(
        "{EVENTS_STREAM} was created anew: run the replay again for the events that it holds now"
    )]
    OtherStream,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Summary {
    pub first_sequence: u64,
    pub last_sequence: u64,
    /// Events that this process applied again.
    pub events: u64,
    /// Poisoned events among them, which are dead letters.
    pub poisoned: u64,
    pub signals: u64,
    /// The rows that are not signalled, because their user is unknown.
    #[serde(flatten)]
    pub withheld: Withheld,
    pub finished: bool,
}

/// A replay that is recorded in the database.
pub(crate) struct Begun {
    pub replay: Replay,
    pub consumer: ReplayConsumer,
    /// Whether the rebuild applies all that the stream holds, without a gap.
    covers_stream: bool,
}

pub(crate) struct Replayer {
    /// The same as for live events, but with the replay's own policy.
    pub applier: Applier,
    pub jetstream: jetstream::Context,
    /// Events per transaction.
    pub batch: usize,
}

impl Replayer {
    /// Records the replay in the database and returns it. It also covers what an unfinished replay
    /// left, and resumes from that replay's position if both differ only in their end. Returns
    /// `None` if there is nothing to replay.
    pub(crate) async fn begin(&self, request: &Request) -> Result<Option<Begun>, ReplayError> {
        let db = self.applier.store.connection();
        let now = store::clock::now(db).await?;
        let (stream, _) = progress::begin(&self.jetstream).await?;
        let unfinished = store::replay::unfinished(db).await?;
        let unfinished: Vec<_> = unfinished
            .into_iter()
            .map(|other| in_stream(other, stream))
            .collect();
        if let Some(running) = unfinished.iter().find(|other| other.is_running(now)) {
            return Err(ReplayError::Running {
                since: running.started,
            });
        }
        let asked = self.resolve(request, now).await?;
        let Some(replay) = unfinished.iter().cloned().chain(asked).reduce(union) else {
            return Ok(None);
        };
        let replay = Replay {
            heartbeat: now,
            ..replay
        };
        let consumer = replay_consumer(&replay);
        let is_fresh = unfinished.iter().all(Replay::is_lost_rows_record);
        let continues = matches!(&unfinished[..], [begun] if is_continuation(begun, &replay));
        if !continues {
            consumer
                .remove(&self.jetstream)
                .await
                .map_err(ReplayError::Broker)?;
        }
        // An interrupted replay may have applied a subscription's creation, and its session may
        // have left the stream since.
        let (first, floor) = consumer.floor(&self.jetstream).await?;
        let covers_stream = request.covers_stream() && (is_fresh || first <= floor + 1);
        store::replay::start(db, &replay).await?;
        Ok(Some(Begun {
            replay,
            consumer,
            covers_stream,
        }))
    }

    /// Applies the events again, up to the end or until `shutdown`. At the end, sends the unsent
    /// signals. After a failure, the next run resumes. Calls `progress` with the last sequence of
    /// every batch.
    pub(crate) async fn run(
        &self,
        begun: &Begun,
        shutdown: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<Summary, ReplayError> {
        let Begun {
            replay, consumer, ..
        } = begun;
        let store = &self.applier.store;
        let (first_sequence, last_sequence) = (replay.first_sequence, replay.last_sequence);
        let mut summary = Summary {
            first_sequence,
            last_sequence,
            ..Summary::default()
        };
        let stop = CancellationToken::new();
        let heartbeat = tokio::spawn(send_heartbeats(store.clone(), stop.clone()));
        let applying = self.reapply(replay, consumer, shutdown, |applied, sequence| {
            summary.events += applied.applied;
            summary.poisoned += applied.poisoned;
            progress(sequence);
        });
        let is_at_end = applying.await;
        stop.cancel();
        let _ = heartbeat.await;
        if matches!(is_at_end, Ok(true)) {
            self.finish(begun, shutdown, &mut summary).await?;
        } else {
            // The heartbeat is set back, so that the next run need not wait until this one counts
            // as dead.
            let db = store.connection();
            let long_ago = store::clock::now(db).await? - time::Duration::minutes(1);
            store::replay::record_heartbeat(db, long_ago).await?;
        }
        is_at_end.map(|_| summary)
    }

    /// Decides which rows are withheld, records the end, and sends the unsent signals. From then on
    /// every worker may send them too.
    async fn finish(
        &self,
        begun: &Begun,
        shutdown: &CancellationToken,
        summary: &mut Summary,
    ) -> Result<(), ReplayError> {
        let store = &self.applier.store;
        let rebuilt = Rebuilt {
            started: begun.replay.started,
            covers_stream: begun.covers_stream,
        };
        withheld::withhold_or_release(store, rebuilt).await?;
        summary.withheld = Withheld::find(store).await?;
        summary.signals = unsent::count(store).await?;
        let now = store::clock::now(store.connection()).await?;
        store::replay::finish(store.connection(), now).await?;
        summary.finished = true;
        self.remove(&begun.consumer).await;
        let sent = unsent::send(store, &self.applier.relay, shutdown).await?;
        if shutdown.is_cancelled() {
            warn!("stopped before all signals were sent: a running worker sends the others");
        }
        if sent.unreadable.is_empty() {
            Ok(())
        } else {
            Err(ReplayError::Unreadable(sent.unreadable))
        }
    }

    async fn remove(&self, consumer: &ReplayConsumer) {
        if let Err(error) = consumer.remove(&self.jetstream).await {
            warn!(
                "cannot delete the consumer {}, the server deletes it once it is inactive: {error}",
                consumer.name
            );
        }
    }
}

/// Returns the sequence up to which all open replays have applied their events again. Events above
/// it must not be purged.
pub(crate) async fn floor(
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<u64, ReplayError> {
    let now = store::clock::now(store.connection()).await?;
    let mut lowest = u64::MAX;
    let mut open = store::replay::unfinished(store.connection()).await?;
    open.retain(|replay| replay.is_open(now));
    if open.is_empty() {
        return Ok(lowest);
    }
    let (stream, _) = progress::begin(jetstream).await?;
    for replay in open.iter().filter(|replay| replay.is_about(stream)) {
        lowest = lowest.min(replay_consumer(replay).floor(jetstream).await?.1);
    }
    Ok(lowest)
}

/// Returns an unfinished replay as it concerns `stream`. Of a replay of an earlier stream no event
/// is left, but the rows that it was to rebuild may still be half rebuilt: only the next replay
/// ends it.
fn in_stream(replay: Replay, stream: StreamId) -> Replay {
    if replay.is_about(stream) {
        return Replay {
            stream: Some(stream),
            ..replay
        };
    }
    warn!(
        "{EVENTS_STREAM} was created anew since the replay of events {} to {} was started: they are gone, use \
         `backfill` or `reconcile` to restore those that it has not applied",
        replay.first_sequence, replay.last_sequence
    );
    Replay {
        stream: Some(stream),
        first_sequence: 1,
        last_sequence: 0,
        ..replay
    }
}

fn replay_consumer(replay: &Replay) -> ReplayConsumer {
    let subjects = replay
        .event_types
        .iter()
        .map(|name| format!("{}{name}", subject::EVENTS_PREFIX))
        .collect();
    ReplayConsumer {
        name: "litestripe-replay".to_owned(),
        first_sequence: replay.first_sequence,
        subjects,
    }
}

async fn send_heartbeats(store: Store, stop: CancellationToken) {
    while pause(HEARTBEAT_EVERY, &stop).await.is_some() {
        let db = store.connection();
        let recorded = match store::clock::now(db).await {
            Ok(now) => store::replay::record_heartbeat(db, now).await,
            Err(error) => Err(error),
        };
        if let Err(error) = recorded {
            tracing::debug!("{error}");
        }
    }
}

/// Returns the policy of a replay: the operator's rules for orphans, and no signals before its end.
pub(crate) fn policy(policy: Policy, replay: &Replay) -> Arc<Policy> {
    let signalling = match Signals::parse(&replay.signals) {
        Signals::None => Signalling::Never,
        Signals::Changed => Signalling::Later,
    };
    Arc::new(Policy {
        signalling,
        ..policy
    })
}
