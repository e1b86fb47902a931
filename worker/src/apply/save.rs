//! Saving the changes that a batch's events cause.
//!
//! Owns the transaction: load, plan, save, with orphans, questions and signals. Rows that another
//! worker wrote meanwhile are read and merged again. May not know messages.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::payment::ClientReferenceId;
use litestripe_domain::plan::{
    self, Consequences, Context, Plan, Policy, Resolution, Signalling, by_subscription,
};
use litestripe_domain::question::Kind;
use litestripe_domain::signal::{self, NewSignal};
use time::OffsetDateTime;
use tracing::Instrument as _;

use super::Applier;
use crate::erasure::Erasures;
use crate::error::{Cause, StoreError};
use crate::fail_point::fail_point;
use crate::installation::Installation;
use crate::metrics;
use crate::store;
use crate::store::Transaction;
use crate::store::subscription::Found;
use crate::trace;

/// How long saving a batch may take, with all its statements.
const SAVE_MAX: Duration = Duration::from_secs(60);

/// The result of saving.
#[derive(Default)]
pub(super) struct Saved {
    /// The sequences of the events that were saved without their personal data, because that was
    /// erased.
    pub(super) redacted: Vec<u64>,
    /// Whether a row of a subscription was written: events that change nothing show nothing about
    /// what the database accepts.
    pub(super) wrote: bool,
}

/// Saves the changes that `arrivals` cause.
///
/// # Errors
/// The database is unavailable or refuses the data. After a timeout the transaction may still
/// commit, and the retry finds the events merged.
pub(super) async fn save(
    applier: &Applier,
    arrivals: &Arc<Vec<Arrival>>,
) -> Result<Saved, StoreError> {
    // A bug that one event triggers must not stop the others: an event that panics is poisoned.
    let saving = AssertUnwindSafe(save_all(applier, arrivals)).catch_unwind();
    let span = trace::transaction(applier.store.kind(), arrivals.len());
    let saving = tokio::time::timeout(SAVE_MAX, saving).instrument(span.clone());
    let saved = match saving.await {
        Ok(Ok(saved)) => saved,
        Ok(Err(_)) => Err(StoreError::doing("merge an event")(Cause::Panic)),
        Err(_) => Err(StoreError::doing("save a batch")(Cause::Timeout(SAVE_MAX))),
    };
    trace::record_saved(&span, &saved);
    saved
}

async fn save_all(applier: &Applier, arrivals: &Arc<Vec<Arrival>>) -> Result<Saved, StoreError> {
    let mut stale: Option<HashSet<usize>> = None;
    let mut all = Saved::default();
    loop {
        let (arrivals, policy, erasures, installation) = (
            Arc::clone(arrivals),
            Arc::clone(&applier.policy),
            applier.erasures.clone(),
            applier.installation.clone(),
        );
        let once = async move |tx: Transaction| {
            let is_pending = |arrival: &&Arrival| {
                stale
                    .as_ref()
                    .is_none_or(|stale| stale.contains(&arrival.index))
            };
            let pending = arrivals
                .iter()
                .filter(is_pending)
                .map(Cow::Borrowed)
                .collect();
            let guards = Guards {
                erasures: &erasures,
                installation: installation.as_ref(),
            };
            save_once(tx, pending, &policy, guards, OffsetDateTime::now_utc()).await
        };
        let began = Instant::now();
        let (saved, stale_again) = applier.store.uncancelled(once).await?;
        metrics::transaction(began.elapsed());
        all.redacted.extend(saved.redacted);
        all.wrote |= saved.wrote;
        if stale_again.is_empty() {
            return Ok(all);
        }
        stale = Some(stale_again);
    }
}

/// What a transaction's first statement checks before anything is written.
#[derive(Clone, Copy)]
struct Guards<'a> {
    erasures: &'a Erasures,
    installation: Option<&'a Installation>,
}

/// Saves in one transaction. The second result has the indexes of the events whose rows another
/// worker wrote after they were read.
async fn save_once(
    tx: Transaction,
    mut pending: Vec<Cow<'_, Arrival>>,
    policy: &Policy,
    Guards {
        erasures,
        installation,
    }: Guards<'_>,
    now: OffsetDateTime,
) -> Result<(Saved, HashSet<usize>), StoreError> {
    let ids: BTreeSet<&str> = pending
        .iter()
        .filter_map(|arrival| arrival.event.stripe_subscription_id())
        .collect();
    let ids: Vec<&str> = ids.into_iter().collect();
    let Found {
        rows: mut stored,
        rebuilding,
        has_new_erasures,
        installation: found_installation,
    } = store::subscription::find(&tx, &ids, erasures.sequence()).await?;
    // The database may have been replaced by another one, behind the same name.
    if installation.is_some_and(|own| found_installation.as_deref() != Some(own.id())) {
        return Err(StoreError::doing("save a batch")(Cause::OtherInstallation));
    }
    if has_new_erasures {
        erasures.refresh(&tx).await?;
    }
    redact(&mut pending, erasures);
    let (by_subscription, others) = by_subscription(pending.iter().map(Cow::as_ref).collect());
    let context = Context {
        policy,
        rebuilding,
        now,
    };
    let mut plans: Vec<Plan<'_>> = by_subscription
        .into_iter()
        .filter_map(|(id, arrivals)| {
            plan::plan_subscription(id, stored.remove(id), arrivals, context)
        })
        .collect();
    let rows = plans
        .iter_mut()
        .map(|plan| std::mem::take(&mut plan.row))
        .collect();
    let written = store::subscription::save(&tx, rows, now).await?;
    let (saved, stale): (Vec<_>, Vec<_>) = plans
        .into_iter()
        .partition(|plan| written.contains(plan.id));

    let mut signals = Vec::new();
    let mut consequences = Vec::new();
    for plan in saved {
        signals.extend(plan.signals);
        consequences.push((plan.id, plan.consequences));
    }
    consequences.extend(
        others
            .into_iter()
            .map(|(id, arrival)| (id, plan::plan_payment(arrival, &policy.rules, now))),
    );
    signals.extend(save_consequences(&tx, consequences, policy.signalling, now).await?);
    let fetched: Vec<_> = pending
        .iter()
        .filter_map(|arrival| arrival.event.fetched())
        .map(|(id, fetch)| (id, fetch.stamp.mark))
        .collect();
    store::question::remove_fetched(&tx, &fetched).await?;
    store::outbox::insert(&tx, signals, now).await?;
    fail_point!("worker::before_commit");
    tx.commit()
        .await
        .map_err(StoreError::doing("commit a batch"))?;
    fail_point!("worker::after_commit");
    let stale: HashSet<usize> = stale
        .into_iter()
        .flat_map(|plan| plan.arrivals)
        .map(|arrival| arrival.index)
        .collect();
    let redacted = pending
        .iter()
        .filter(|arrival| arrival.event.redacted && !stale.contains(&arrival.index));
    let redacted = redacted.map(|arrival| arrival.stream_sequence).collect();
    let wrote = !written.is_empty();
    Ok((Saved { redacted, wrote }, stale))
}

/// Removes the personal data from the events of erased customers.
fn redact(pending: &mut [Cow<'_, Arrival>], erasures: &Erasures) {
    for arrival in pending {
        if !arrival.event.redacted && erasures.covers(&arrival.event) {
            arrival.to_mut().event.redact();
        }
    }
}

/// Saves the changes to orphans and open questions. Returns the signals that are sent now.
async fn save_consequences(
    tx: &Transaction,
    consequences: Vec<(&str, Consequences<'_>)>,
    signalling: Signalling,
    now: OffsetDateTime,
) -> Result<Vec<NewSignal>, StoreError> {
    let mut orphans = Vec::new();
    let mut resolutions = Vec::new();
    let mut questions = Vec::new();
    let mut answered: BTreeMap<Kind, Vec<&str>> = BTreeMap::new();
    for (id, of_one) in consequences {
        orphans.extend(of_one.orphan);
        resolutions.extend(of_one.resolution);
        questions.extend(of_one.questions);
        of_one
            .answered
            .into_iter()
            .for_each(|kind| answered.entry(kind).or_default().push(id));
    }
    let mut signals = save_orphans(tx, orphans, signalling, now).await?;
    signals.extend(save_resolutions(tx, resolutions, signalling, now).await?);
    for (kind, ids) in answered {
        store::question::remove(tx, kind, &ids).await?;
    }
    store::question::save(tx, questions, now).await?;
    if signalling != Signalling::Now {
        signals.clear();
    }
    Ok(signals)
}

/// Inserts the orphans that do not exist yet. Returns a signal for each of them.
async fn save_orphans(
    tx: &Transaction,
    mut orphans: Vec<(&Arrival, NewOrphan)>,
    signalling: Signalling,
    now: OffsetDateTime,
) -> Result<Vec<NewSignal>, StoreError> {
    // One batch may have several events of one payment; one statement may not name a key twice.
    orphans.sort_by(|(a, x), (b, y)| (&x.id, &a.event.id).cmp(&(&y.id, &b.event.id)));
    orphans.dedup_by(|(_, later), (_, earlier)| later.id == earlier.id);
    let (arrivals, orphans): (Vec<_>, Vec<_>) = orphans.into_iter().unzip();
    let unsent: Vec<_> = match signalling {
        Signalling::Later => arrivals
            .iter()
            .map(|arrival| signal::reference(&arrival.event))
            .collect(),
        Signalling::Now | Signalling::Never => Vec::new(),
    };
    let inserted = store::orphan::insert(tx, &orphans, &unsent, now).await?;
    let created = arrivals
        .iter()
        .zip(&orphans)
        .filter(|(_, orphan)| inserted.contains(&orphan.id));
    Ok(created
        .map(|(arrival, orphan)| signal::orphan_created(orphan, arrival.cause()))
        .collect())
}

/// Resolves the orphans that are open. Returns a signal for each of them.
async fn save_resolutions(
    tx: &Transaction,
    resolutions: Vec<Resolution<'_>>,
    signalling: Signalling,
    now: OffsetDateTime,
) -> Result<Vec<NewSignal>, StoreError> {
    let ids: Vec<&str> = resolutions
        .iter()
        .map(|resolution| resolution.id.as_str())
        .collect();
    // Nearly every subscription finds its user without ever having been an orphan.
    let mut open = store::orphan::open_among(tx, &ids).await?;
    let mut signals = Vec::new();
    for resolution in &resolutions {
        let user = ClientReferenceId(&resolution.client_reference_id);
        // Only the first resolution of an orphan is signalled, even if a batch has several.
        let is_open = open.remove(&resolution.id);
        let unsent =
            (signalling == Signalling::Later).then(|| signal::reference(&resolution.arrival.event));
        let unsent = unsent.as_ref();
        let resolved = match &resolution.by_operator {
            Some((orphan, at)) => {
                store::orphan::resolve_by_operator(tx, orphan, user, *at, unsent, now).await?
            }
            None if is_open => {
                store::orphan::resolve(tx, &resolution.id, user, unsent, now).await?
            }
            None => None,
        };
        let resolved = resolved
            .filter(|_| is_open)
            .as_ref()
            .and_then(store::orphan::to_new_orphan);
        signals.extend(
            resolved.map(|orphan| signal::orphan_resolved(&orphan, resolution.arrival.cause())),
        );
    }
    Ok(signals)
}
