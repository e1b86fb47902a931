//! Applies a replay's events.
//!
//! Owns which events are wanted, how batches overlap, and when the end is reached.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::arrival::Arrival;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::acks::Acks;
use super::{ReplayError, Replayer};
use crate::apply::{self, Decoded, Reapplied};
use crate::error::StoreError;
use crate::store::replay::Replay;
use crate::stream::consumer::{self as stream_consumer, Batches, ReplayConsumer};
use crate::wait::{JETSTREAM, Wait, pause};

/// How long no batch has to arrive before the replay checks whether it has reached its end.
const IDLE: Duration = Duration::from_millis(300);

impl Replayer {
    /// Whether the replay applies the event of this sequence. `arrival` is `None` if the event
    /// cannot be decoded. Events of an erased person must not come back.
    pub(super) fn is_wanted(
        &self,
        replay: &Replay,
        sequence: u64,
        arrival: Option<&Arrival>,
    ) -> bool {
        let wanted = replay.stripe_subscription_id.as_deref();
        let is_about = match arrival {
            Some(arrival) => {
                let is_erased = self.applier.erasures.covers(&arrival.event);
                wanted.is_none_or(|wanted| arrival.event.is_about(wanted)) && !is_erased
            }
            None => wanted.is_none(),
        };
        is_about && sequence <= replay.last_sequence
    }

    /// Applies the events. Returns whether the end was reached.
    pub(super) async fn reapply(
        &self,
        replay: &Replay,
        consumer: &ReplayConsumer,
        shutdown: &CancellationToken,
        mut applied: impl FnMut(Reapplied, u64),
    ) -> Result<bool, ReplayError> {
        let mut wait = Wait::new(JETSTREAM);
        while !shutdown.is_cancelled() {
            if let Ok((first, floor)) = consumer.floor(&self.jetstream).await
                && first > floor.saturating_add(1)
            {
                warn!(
                    "events {} to {} are no longer in {EVENTS_STREAM}: use `backfill` or `reconcile` to restore those that \
                     this replay has not applied",
                    floor + 1,
                    first - 1
                );
            }
            let mut batches = match consumer.open(&self.jetstream, self.batch).await {
                Ok(batches) => batches,
                Err(error) if error.is_refusal() => return Err(ReplayError::Broker(error)),
                Err(error) => {
                    let _ = pause(wait.failed(&error), shutdown).await;
                    continue;
                }
            };
            wait.succeeded();
            if replay
                .stream
                .is_some_and(|stream| stream != batches.stream())
            {
                return Err(ReplayError::OtherStream);
            }
            let is_at_end = self
                .apply_all(&mut batches, replay, consumer, shutdown, &mut applied)
                .await;
            batches.close().await;
            if is_at_end? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Applies batches, several at a time if they share no subscription or payment. Returns whether
    /// the end was reached. If not, the consumer is gone, or a shutdown was requested.
    ///
    /// # Errors
    /// The database has refused every change for long, or the broker drops the acks.
    async fn apply_all(
        &self,
        batches: &mut Batches,
        replay: &Replay,
        consumer: &ReplayConsumer,
        shutdown: &CancellationToken,
        applied: &mut impl FnMut(Reapplied, u64),
    ) -> Result<bool, ReplayError> {
        let wanted =
            |sequence: u64, arrival: Option<&Arrival>| self.is_wanted(replay, sequence, arrival);
        let apply = async |decoded: Decoded| {
            let (last, count) = (decoded.last_sequence(), decoded.count());
            let done = apply::reapply(&self.applier, decoded, wanted, shutdown).await?;
            Ok::<_, StoreError>(done.map(|done| (done, last, count)))
        };
        let progress = consumer.progress(&self.jetstream).await;
        let mut acks = Acks::after(progress.ok().flatten());
        let mut applying = FuturesOrdered::new();
        let mut busy: VecDeque<HashSet<String>> = VecDeque::new();
        let mut waiting: Option<Decoded> = None;
        let mut takes_more = true;
        loop {
            if let Some(decoded) = waiting.take_if(|it| {
                takes_more && busy.iter().all(|busy| busy.is_disjoint(it.entity_ids()))
            }) {
                busy.push_back(decoded.entity_ids().clone());
                applying.push_back(apply(decoded));
            }
            let has_room = waiting.is_none() && applying.len() < apply::IN_FLIGHT;
            let may_be_finished = tokio::select! {
                biased;
                Some(done) = applying.next() => {
                    busy.pop_front();
                    let Some((done, last, count)) = done? else {
                        takes_more = false;
                        continue;
                    };
                    applied(done, last.min(replay.last_sequence));
                    acks.record_sent(count);
                    last >= replay.last_sequence || acks.are_due()
                }
                batch = next(batches, shutdown), if takes_more && has_room => match batch {
                    Some(Some(batch)) => {
                        waiting = Some(Decoded::new(batch, &self.applier.metadata_keys));
                        continue;
                    }
                    Some(None) => applying.is_empty(),
                    None => {
                        takes_more = false;
                        continue;
                    }
                },
                else => break,
            };
            if may_be_finished && self.is_finished(replay, consumer, &mut acks).await? {
                // The rest are redelivered messages. Their effects belong to this replay, so it
                // waits for them.
                while let Some(done) = applying.next().await {
                    done?;
                }
                return Ok(true);
            }
        }
        if let Some(decoded) = waiting {
            decoded.hand_back().await;
        }
        Ok(false)
    }

    /// Whether every event up to the end is applied. False if the progress is unknown.
    async fn is_finished(
        &self,
        replay: &Replay,
        consumer: &ReplayConsumer,
        acks: &mut Acks,
    ) -> Result<bool, ReplayError> {
        let Ok(Some(progress)) = consumer.progress(&self.jetstream).await else {
            return Ok(false);
        };
        acks.check(progress)?;
        Ok(progress.reapplied_until() >= replay.last_sequence)
    }
}

/// Returns the next batch, or `Some(None)` if none arrives for a while. Returns `None` if the
/// consumer is gone or on `shutdown`.
pub(super) async fn next(
    batches: &mut Batches,
    shutdown: &CancellationToken,
) -> Option<Option<stream_consumer::Batch>> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        batch = tokio::time::timeout(IDLE, batches.next()) => match batch {
            Ok(Some(batch)) => Some(Some(batch)),
            Ok(None) => None,
            Err(_) => Some(None),
        },
    }
}
