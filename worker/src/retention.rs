//! Keeping room in `STRIPE_EVENTS`.
//!
//! Owns which events are purged, and when: when the stream is over 80 % full, the oldest applied
//! events, so that only unapplied ones can fill it. Invariant: no event above the durable
//! consumer's ack floor, or above that of an open replay that this worker knows of, is ever removed.
//! One whose dead letter is pending is removed only when the stream is nearly full: it must not stop
//! all deliveries. Only then is any removed while the database does not answer. All workers may purge
//! at the same time: purging is idempotent.

use std::time::Duration;

use async_nats::jetstream::{self, consumer::pull, stream::State};
use litestripe_contract::exit;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::metrics;
use crate::recover::replay;
use crate::store::{Store, dead_letter, detached};
use crate::stream::progress::{self, Progress, ProgressError};
use crate::wait::pause;

/// How often the stream's size is checked.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// How full the stream is, in percent of its size, when a purge begins and when it ends.
const PURGE_ABOVE: u64 = 80;
const PURGE_DOWN_TO: u64 = 70;

/// How full the stream is, in percent of its size, when pending dead letters do not hold a purge up
/// any more.
const GIVE_UP_ABOVE: u64 = 95;

/// For how long the floors hold if the database does not answer. Another worker may still reach it,
/// and begin a replay or record a pending dead letter.
const FLOORS_MAX_AGE: Duration = Duration::from_secs(30);

/// The sequences up to which events may be removed.
#[derive(Debug, Clone, Copy, Default)]
struct Floors {
    /// All open replays have reapplied everything up to this one.
    replayed: u64,
    /// No event up to this one has a pending dead letter.
    stored: u64,
}

impl Floors {
    /// Returns the sequence up to which events may be removed, by floors that were read `age` ago, if
    /// the workers have applied everything up to `applied_until`.
    fn removable_until(self, applied_until: u64, age: Duration, is_nearly_full: bool) -> u64 {
        let removable_until = applied_until.min(self.replayed);
        if is_nearly_full {
            removable_until
        } else if age > FLOORS_MAX_AGE {
            0
        } else {
            removable_until.min(self.stored)
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Fill {
    bytes: u64,
    bytes_max: u64,
    messages: u64,
    first_sequence: u64,
    last_sequence: u64,
    /// Every event up to this sequence is applied, and neither an open replay nor a pending dead
    /// letter needs it.
    applied_until: u64,
}

/// Purges until `shutdown`.
pub(crate) async fn run(store: Store, jetstream: jetstream::Context, shutdown: CancellationToken) {
    let mut last = (Floors::default(), Instant::now());
    loop {
        // Before the floors: a dead letter is recorded as pending before its message is terminated, so
        // the floors know of all that this progress includes.
        let progress = progress::find(&jetstream, WORKER_CONSUMER).await;
        let now = Instant::now();
        if let Some(floors) = floors(&store, &jetstream).await {
            last = (floors, now);
        }
        if let Err(error) = purge_if_full(&jetstream, progress, last).await {
            debug!(
                "cannot keep room in STRIPE_EVENTS: {}",
                exit::chain(error.as_ref())
            );
        }
        if pause(CHECK_EVERY, &shutdown).await.is_none() {
            return;
        }
    }
}

/// Returns `None` if the database or the broker does not answer.
async fn floors(store: &Store, jetstream: &jetstream::Context) -> Option<Floors> {
    let (store, jetstream) = (store.clone(), jetstream.clone());
    let floors = detached(async move {
        let replayed = replay::floor(&store, &jetstream).await.ok()?;
        let (stream, _) = progress::begin(&jetstream).await.ok()?;
        let pending = dead_letter::lowest(store.connection(), stream).await.ok()?;
        Some(Floors {
            replayed,
            stored: pending.map_or(u64::MAX, |lowest| lowest.saturating_sub(1)),
        })
    });
    tokio::time::timeout(CHECK_EVERY, floors).await.ok()?
}

async fn purge_if_full(
    jetstream: &jetstream::Context,
    progress: Result<Option<Progress>, ProgressError>,
    (floors, read_at): (Floors, Instant),
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let stream = jetstream.get_stream(EVENTS_STREAM).await?;
    let info = stream.cached_info();
    let Some(bytes_max) = u64::try_from(info.config.max_bytes)
        .ok()
        .filter(|bytes| *bytes > 0)
    else {
        return Ok(());
    };
    let bytes = info.state.bytes;
    debug!(bytes, bytes_max, "checked how full STRIPE_EVENTS is");
    let Some(before) = progress? else {
        return Ok(());
    };
    // Read again: the stream or the consumer may have been created anew.
    let consumer = stream.get_consumer::<pull::Config>(WORKER_CONSUMER).await?;
    let applied_until = Progress::from(consumer.cached_info()).floor();
    let applied_until = applied_until.min(before.floor());
    let State {
        bytes,
        messages,
        first_sequence,
        last_sequence,
        ..
    } = info.state;
    let is_nearly_full = is_above(bytes, bytes_max, GIVE_UP_ABOVE);
    let applied_until = floors.removable_until(applied_until, read_at.elapsed(), is_nearly_full);
    let fill = Fill {
        bytes,
        bytes_max,
        messages,
        first_sequence,
        last_sequence,
        applied_until,
    };
    let Some(keep_from) = keep_from(fill) else {
        return Ok(());
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "removes only events before the first one that is still needed"
    )]
    let purged = stream.purge().sequence(keep_from).await?.purged;
    metrics::events_purged(purged);
    warn!(
        purged,
        keep_from,
        "STRIPE_EVENTS was over {PURGE_ABOVE} % full: purged the oldest {purged} events, all applied \
         (LITESTRIPE_EVENTS_MAX_BYTES, LITESTRIPE_EVENTS_MAX_AGE)"
    );
    Ok(())
}

/// Returns the first sequence to keep, or `None` if there is nothing to purge.
fn keep_from(fill: Fill) -> Option<u64> {
    if !is_above(fill.bytes, fill.bytes_max, PURGE_ABOVE) || fill.messages == 0 {
        return None;
    }
    let wanted = u128::from(fill.bytes_max) * u128::from(PURGE_DOWN_TO) / 100;
    let excess = u128::from(fill.bytes).saturating_sub(wanted);
    // This assumes events of about the same size; the next check corrects the error.
    let span = u128::from(fill.last_sequence - fill.first_sequence + 1);
    let share = (excess * span).div_ceil(u128::from(fill.bytes.max(1)));
    let wanted_from = fill
        .first_sequence
        .saturating_add(u64::try_from(share).unwrap_or(u64::MAX));
    let keep_from = wanted_from.min(fill.applied_until.saturating_add(1));
    (keep_from > fill.first_sequence).then_some(keep_from)
}

fn is_above(bytes: u64, bytes_max: u64, percent: u64) -> bool {
    // In 128 bits, because a size in bytes times a percentage may not fit in 64.
    u128::from(bytes) * 100 > u128::from(bytes_max) * u128::from(percent)
}

#[cfg(test)]
mod tests;
