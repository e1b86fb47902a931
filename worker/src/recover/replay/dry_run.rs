//! The dry run of a replay: computes what it would change, without changing anything.
//!
//! Owns the rows as the events would leave them, in memory until the end.

use std::collections::{BTreeSet, HashMap};

use litestripe_domain::arrival::Arrival;
use litestripe_domain::merge;
use litestripe_domain::plan::{self, Context};
use litestripe_domain::row::{Row, Stored};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::acks::Acks;
use super::apply::next;
use super::{ReplayError, Replayer, replay_consumer};
use crate::apply::{self, Applier};
use crate::error::StoreError;
use crate::store;
use crate::store::replay::Replay;
use crate::stream::consumer::{Batches, ReplayConsumer};

impl Replayer {
    /// Computes what the replay would change. Keeps the rows that would change in memory. Calls
    /// `progress` with the last sequence of every batch. Fails if the database or the broker is
    /// unavailable even for a moment: a partial result would look complete.
    pub(crate) async fn dry_run(
        &self,
        replay: &Replay,
        shutdown: &CancellationToken,
        progress: impl FnMut(u64),
    ) -> Result<DryRun, ReplayError> {
        let mut consumer = replay_consumer(replay);
        consumer.name = format!(
            "{}-dry-{}",
            consumer.name,
            OffsetDateTime::now_utc().unix_timestamp_nanos()
        );
        let mut batches = consumer
            .open(&self.jetstream, self.batch)
            .await
            .map_err(ReplayError::Broker)?;
        let outcome = self
            .apply_in_memory(&mut batches, replay, &consumer, shutdown, progress)
            .await;
        batches.close().await;
        self.remove(&consumer).await;
        outcome
    }

    async fn apply_in_memory(
        &self,
        batches: &mut Batches,
        replay: &Replay,
        consumer: &ReplayConsumer,
        shutdown: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<DryRun, ReplayError> {
        let wanted =
            |sequence: u64, arrival: Option<&Arrival>| self.is_wanted(replay, sequence, arrival);
        let mut dry = DryRun::default();
        let mut acks = Acks::default();
        while !dry.finished
            && let Some(batch) = next(batches, shutdown).await
        {
            if batch.is_none() || acks.are_due() {
                let progress = consumer.progress(&self.jetstream).await?;
                let progress = progress.ok_or(ReplayError::ConsumerGone)?;
                acks.check(progress)?;
                dry.finished = progress.reapplied_until() >= replay.last_sequence;
            }
            let Some(batch) = batch else { continue };
            let apply::Contents {
                mut arrivals,
                poisoned,
                ..
            } = apply::decode(&batch, &self.applier.metadata_keys);
            dry.poisoned += apply::count_wanted_poisoned(&batch, &poisoned, wanted);
            arrivals.retain(|arrival| wanted(arrival.stream_sequence, Some(arrival)));
            dry.apply(&self.applier, &arrivals).await?;
            let last = batch.last_sequence();
            progress(last.min(replay.last_sequence));
            batch.ack_except([]).await;
            acks.record_sent(batch.count());
            dry.finished = last >= replay.last_sequence;
        }
        Ok(dry)
    }
}

#[derive(Debug, Default)]
pub(crate) struct DryRun {
    pub events: u64,
    /// Poisoned events among them.
    pub poisoned: u64,
    pub orphans: BTreeSet<String>,
    pub finished: bool,
    /// Rows that would change: as they are (`None` if new), and as they would be.
    rows: HashMap<String, (Option<merge::Visible>, Stored)>,
}

impl DryRun {
    /// Returns the rows that would change: the id, whether the row is new, and the changed fields.
    pub(crate) fn changes(&self) -> Vec<(&str, bool, Vec<String>)> {
        let mut changes: Vec<_> = self
            .rows
            .iter()
            .filter_map(|(id, (before, after))| {
                let is_new = before.is_none();
                let before = before.clone().unwrap_or_default().subscription;
                let changes = merge::changes(&before, &after.state.visible().subscription);
                let fields = changes.map(|changes| changes.changed);
                (is_new || fields.is_some())
                    .then(|| (id.as_str(), is_new, fields.unwrap_or_default()))
            })
            .collect();
        changes.sort_unstable();
        changes
    }

    async fn apply(&mut self, applier: &Applier, arrivals: &[Arrival]) -> Result<(), StoreError> {
        let db = applier.store.connection();
        self.events += arrivals.len() as u64;
        let now = OffsetDateTime::now_utc();
        let (by_subscription, others) = plan::by_subscription(arrivals.iter().collect());
        let ids: Vec<&str> = by_subscription
            .keys()
            .copied()
            .filter(|id| !self.rows.contains_key(*id))
            .collect();
        let mut stored = store::subscription::load(db, &ids).await?;
        let mut orphans = Vec::new();
        for (id, arrivals) in by_subscription {
            let (before, now_stored) = match self.rows.remove(id) {
                Some((before, stored)) => (before, Some(stored)),
                None => {
                    let stored = stored.remove(id);
                    (stored.as_ref().map(|stored| stored.state.visible()), stored)
                }
            };
            let context = Context {
                policy: &applier.policy,
                rebuilding: None,
                now,
            };
            let plan = plan::plan_subscription(id, now_stored.clone(), arrivals, context);
            let after = match plan {
                Some(plan) => {
                    orphans.extend(plan.consequences.orphan.map(|(_, orphan)| orphan.id));
                    let dt_created = now_stored.and_then(|stored| stored.dt_created);
                    let Row {
                        state,
                        version,
                        revision,
                        last_sent,
                        ..
                    } = plan.row;
                    Some(Stored {
                        state,
                        version,
                        revision,
                        dt_created,
                        last_sent,
                    })
                }
                // These events change nothing: the row is kept only if earlier ones changed it.
                None => {
                    now_stored.filter(|stored| before.as_ref() != Some(&stored.state.visible()))
                }
            };
            if let Some(after) = after {
                self.rows.insert(id.to_owned(), (before, after));
            }
        }
        let payments = others
            .into_iter()
            .map(|(_, arrival)| plan::plan_payment(arrival, &applier.policy.rules, now));
        orphans.extend(
            payments.filter_map(|consequences| consequences.orphan.map(|(_, orphan)| orphan.id)),
        );
        for id in orphans {
            if !self.orphans.contains(&id) && store::orphan::find(db, &id).await?.is_none() {
                self.orphans.insert(id);
            }
        }
        Ok(())
    }
}
