//! One batch of events through the worker.
//!
//! Owns the order of effects: decode → load → merge → save → ack → wake the relay. No other code
//! may order them. May not know SQL (the store's) or how a message is acknowledged (the consumer's).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use litestripe_contract::exit;
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event::{self, MetadataKeys, whose};
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::plan::{
    self, Circumstances, Consequences, Plan, Resolution, Signalling, Terms, by_subscription,
};
use litestripe_domain::question::Kind;
use litestripe_domain::signal::{self, NewSignal};
use sea_orm::{DatabaseTransaction, DbErr};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::erasure::{self, Erasures};
use crate::error::{Disposition, StoreError};
use crate::fail_point::fail_point;
use crate::metrics;
use crate::store::subscription::Found;
use crate::store::{self, Store};
use crate::stream::consumer::Batch;
use crate::stream::dead_letter::DeadLetters;
use crate::wait::{DATABASE, Wait, Waiting, pause};

pub mod in_flight;

/// Batches that are applied at the same time: one is decoded and merged while the database has another.
pub const IN_FLIGHT: usize = 2;

/// How long a batch may take. The server ends a statement sooner, but a server that vanished without
/// a word ends nothing, and TCP gives a connection up after a quarter of an hour.
const SAVE_MAX: Duration = Duration::from_secs(60);

/// What applying a batch needs.
#[derive(Clone)]
pub struct Applier {
    /// Where rows and outbox are.
    pub store: Store,
    /// The metadata that is kept.
    pub metadata_keys: MetadataKeys,
    /// What the events are applied under.
    pub terms: Arc<Terms>,
    /// Whose personal data is not to come back.
    pub erasures: Erasures,
    /// Whether a customer that is deleted at Stripe is erased here.
    pub erase_on_customer_deleted: bool,
    /// Where poisoned events go.
    pub dead_letters: DeadLetters,
    /// Wakes the relay when there may be signals to send.
    pub relay: Arc<Notify>,
    /// Wakes the questions when there may be users to look up.
    pub questions: Arc<Notify>,
    /// Who waits for the database.
    pub waiting: Arc<Waiting>,
}

impl Applier {
    /// Tries to reach the database. That it is away is said once for the whole worker.
    fn wait(&self) -> Wait {
        Wait::with_others(DATABASE, Arc::clone(&self.waiting))
    }
}

/// A batch whose events were read.
pub struct Decoded {
    batch: Batch,
    arrivals: Vec<Arrival>,
    poisoned: Vec<(usize, String)>,
    concerns: HashSet<String>,
}

impl Decoded {
    /// Reads the events of `batch`.
    #[must_use]
    pub fn of(applier: &Applier, batch: Batch) -> Self {
        let (arrivals, poisoned) = decode(&batch, &applier.metadata_keys);
        let (by_subscription, others) = by_subscription(arrivals.iter().collect());
        let ids = by_subscription.into_keys().chain(others.into_iter().map(|(id, _)| id));
        let concerns = ids.map(str::to_owned).collect();
        Self { batch, arrivals, poisoned, concerns }
    }

    /// Takes in what came later.
    pub fn append(&mut self, later: Self) {
        let before = self.batch.count();
        self.batch.append(later.batch);
        let arrivals = later.arrivals.into_iter();
        self.arrivals.extend(arrivals.map(|arrival| Arrival { index: before + arrival.index, ..arrival }));
        self.poisoned.extend(later.poisoned.into_iter().map(|(index, why)| (before + index, why)));
        self.concerns.extend(later.concerns);
    }

    /// How many messages it is of.
    #[must_use]
    pub fn count(&self) -> usize {
        self.batch.count()
    }

    /// The ids of the subscriptions and payments that its events are about. Batches that have one in
    /// common are applied one after the other, or a subscriber would not hear of states between.
    #[must_use]
    pub fn concerns(&self) -> &HashSet<String> {
        &self.concerns
    }

    /// The highest sequence in the stream.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        self.batch.last_sequence()
    }

    /// Gives the messages to whichever worker asks next.
    pub async fn hand_back(self) {
        self.batch.hand_back().await;
    }
}

/// Applies a batch: commit, then ack, then wake the relay.
///
/// A database that is away is waited for, with the batch's messages kept alive. When `shutdown`
/// comes while waiting, the messages are handed back.
pub async fn apply(applier: &Applier, decoded: Decoded, shutdown: &CancellationToken) {
    let Decoded { batch, arrivals, mut poisoned, .. } = decoded;
    let events = arrivals.len();
    if applier.erase_on_customer_deleted && queue_erasures(applier, &batch, shutdown).await.is_none() {
        batch.hand_back().await;
        return;
    }
    let Some(Outcome { refused, late }) = save_when_possible(applier, arrivals, &batch, shutdown).await else {
        batch.hand_back().await;
        return;
    };
    poisoned.extend(refused);
    batch.ack_except(poisoned.iter().map(|(index, _)| *index)).await;
    fail_point!("worker::after_ack");
    applier.relay.notify_one();
    if applier.terms.rules.lookup {
        applier.questions.notify_one();
    }
    metrics::applied(events);
    applier.erasures.remove_late(late);
    applier.dead_letters.put_aside(batch, poisoned).await;
}

/// What became of a batch that was applied again.
#[derive(Debug, Default, Clone, Copy)]
pub struct AppliedAgain {
    /// Events that were applied.
    pub applied: u64,
    /// Events that can never be applied.
    pub poisoned: u64,
}

/// Applies those events again that are `wanted`: what [`apply`] does, but poison, which is a
/// dead letter already, is only counted. `wanted` hears an event's sequence, and the event if it can be
/// read. None when `shutdown` came while the database was away.
pub async fn apply_again(
    applier: &Applier,
    decoded: Decoded,
    wanted: impl Fn(u64, Option<&Arrival>) -> bool,
    shutdown: &CancellationToken,
) -> Option<AppliedAgain> {
    let Decoded { batch, mut arrivals, poisoned, .. } = decoded;
    let poisoned = wanted_poison(&batch, &poisoned, &wanted);
    arrivals.retain(|arrival| wanted(arrival.stream_sequence, Some(arrival)));
    let events = arrivals.len() as u64;
    let Some(outcome) = save_when_possible(applier, arrivals, &batch, shutdown).await else {
        batch.hand_back().await;
        return None;
    };
    batch.ack_except([]).await;
    let refused = outcome.refused.len() as u64;
    Some(AppliedAgain { applied: events - refused, poisoned: refused + poisoned })
}

/// How many of the poisoned messages are `wanted`.
pub fn wanted_poison(
    batch: &Batch,
    poisoned: &[(usize, String)],
    wanted: impl Fn(u64, Option<&Arrival>) -> bool,
) -> u64 {
    let messages = batch.messages().enumerate();
    let poisoned = messages.filter(|(index, _)| poisoned.iter().any(|(poisoned, _)| poisoned == index));
    poisoned.filter(|(_, message)| wanted(message.stream_sequence(), None)).count() as u64
}

/// Reads the events of a batch. The second list says which messages are poison, and why.
pub fn decode(batch: &Batch, keys: &MetadataKeys) -> (Vec<Arrival>, Vec<(usize, String)>) {
    let mut arrivals = Vec::new();
    let mut poisoned = Vec::new();
    for (index, message) in batch.messages().enumerate() {
        match event::decode(message.payload, keys) {
            Ok(Some(event)) => arrivals.push(Arrival {
                index,
                event,
                traceparent: message.traceparent(),
                stream_sequence: message.stream_sequence(),
            }),
            Ok(None) => metrics::ignored(),
            Err(error) => poisoned.push((index, error.to_string())),
        }
    }
    (arrivals, poisoned)
}

/// Queues the erasure of the customers that were deleted at Stripe, for the sweep: before their
/// messages are acked, however long the database is away. Nothing when `shutdown` came first.
async fn queue_erasures(applier: &Applier, batch: &Batch, shutdown: &CancellationToken) -> Option<()> {
    let now = OffsetDateTime::now_utc();
    let deleted = batch.messages().filter_map(|message| {
        let customer = whose::deleted_customer(message.payload)?;
        Some(erasure::question(customer, message.stream_sequence(), now))
    });
    let checks: Vec<_> = deleted.collect();
    let mut wait = applier.wait();
    while !checks.is_empty() {
        let (store, checks) = (applier.store.clone(), checks.clone());
        let task = tokio::spawn(async move {
            let tx = store.begin().await?;
            store::due::put(&tx, checks).await?;
            tx.commit().await.map_err(StoreError::doing("commit erasures"))
        });
        match task.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic())) {
            Ok(()) => {
                wait.succeeded();
                break;
            }
            Err(error) => {
                batch.keep_alive().await;
                pause(wait.failed(&error), shutdown).await?;
            }
        }
    }
    Some(())
}

/// What became of the events of a batch that is saved.
#[derive(Default)]
struct Outcome {
    /// Those that the database refuses for good, and why.
    refused: Vec<(usize, String)>,
    /// The sequences of those that count without their personal data.
    late: Vec<u64>,
}

/// Saves what the events lead to, however long the database is away. Nothing when `shutdown` came first.
async fn save_when_possible(
    applier: &Applier,
    arrivals: Vec<Arrival>,
    batch: &Batch,
    shutdown: &CancellationToken,
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    // A refused set is halved until the event that is at fault stands alone.
    let mut sets = vec![Arc::new(arrivals)];
    let mut wait = applier.wait();
    while let Some(set) = sets.pop() {
        match save_in_own_task(applier, Arc::clone(&set)).await {
            Ok(late) => {
                outcome.late.extend(late);
                wait.succeeded();
            }
            Err(error) if error.disposition() == Disposition::Wait => {
                sets.push(set);
                batch.keep_alive().await;
                pause(wait.failed(&error), shutdown).await?;
            }
            Err(error) => match Arc::try_unwrap(set).ok()? {
                single if single.len() == 1 => outcome.refused.push((single[0].index, exit::chain(&error))),
                mut half => {
                    let rest = half.split_off(half.len() / 2);
                    sets.extend([Arc::new(rest), Arc::new(half)]);
                }
            },
        }
    }
    Some(outcome)
}

/// Applies one event outside any batch, as a batch would. Returns why the database refuses it for
/// good, if it does.
///
/// # Errors
/// When the database is away.
pub async fn apply_one(applier: &Applier, arrival: Arrival) -> Result<Option<String>, StoreError> {
    match save_in_own_task(applier, Arc::new(vec![arrival])).await {
        Ok(_) => Ok(None),
        Err(error) if error.disposition() == Disposition::Poison => Ok(Some(exit::chain(&error))),
        Err(error) => Err(error),
    }
}

/// A cancelled transaction would leave a poisoned connection in the pool, so nothing cancels it.
async fn save_in_own_task(applier: &Applier, arrivals: Arc<Vec<Arrival>>) -> Result<Vec<u64>, StoreError> {
    let (store, terms, erasures) = (applier.store.clone(), Arc::clone(&applier.terms), applier.erasures.clone());
    let task = tokio::spawn(async move { save(&store, &arrivals, &terms, &erasures).await });
    let Ok(joined) = tokio::time::timeout(SAVE_MAX, task).await else {
        // The task goes on by itself; what it may still commit, the next try finds merged.
        let silent = DbErr::Custom(format!("no answer within {} s", SAVE_MAX.as_secs()));
        return Err(StoreError::doing("save a batch")(silent));
    };
    // A bug that one event brings out must not stop the others: what panics is poison.
    let panicked = |_| DbErr::Type("it panicked, which is a bug".to_owned());
    joined.map_err(panicked).map_err(StoreError::doing("merge an event"))?
}

/// Saves what `arrivals` lead to. Rows that another worker wrote meanwhile are read and merged again.
/// Returns the sequences of the events that count without their personal data.
async fn save(store: &Store, arrivals: &[Arrival], terms: &Terms, erasures: &Erasures) -> Result<Vec<u64>, StoreError> {
    let mut pending: Vec<_> = arrivals.iter().map(Cow::Borrowed).collect();
    let mut late = Vec::new();
    while !pending.is_empty() {
        let stale = save_once(store, &mut pending, terms, erasures, OffsetDateTime::now_utc()).await?;
        let redacted = pending.iter().filter(|arrival| arrival.event.redacted && !stale.contains(&arrival.index));
        late.extend(redacted.map(|arrival| arrival.stream_sequence));
        pending.retain(|arrival| stale.contains(&arrival.index));
    }
    Ok(late)
}

/// One transaction. Returns which events are of rows that another worker wrote since they were read.
async fn save_once(
    store: &Store,
    pending: &mut [Cow<'_, Arrival>],
    terms: &Terms,
    erasures: &Erasures,
    now: OffsetDateTime,
) -> Result<HashSet<usize>, StoreError> {
    let tx = store.begin().await?;
    let ids: BTreeSet<&str> = pending.iter().filter_map(|arrival| arrival.event.stripe_subscription_id()).collect();
    let ids: Vec<&str> = ids.into_iter().collect();
    let Found { rows: mut stored, rebuilding, has_new_erasures } =
        store::subscription::find(&tx, &ids, erasures.sequence(), now).await?;
    if has_new_erasures {
        erasures.refresh(&tx).await?;
    }
    redact(pending, erasures);
    let (by_subscription, others) = by_subscription(pending.iter().map(Cow::as_ref).collect());
    let circumstances = Circumstances { terms, rebuilding, now };
    let mut plans: Vec<Plan<'_>> = by_subscription
        .into_iter()
        .filter_map(|(id, arrivals)| plan::of_subscription(id, stored.remove(id), arrivals, circumstances))
        .collect();
    let rows = plans.iter_mut().map(|plan| std::mem::take(&mut plan.row)).collect();
    let written = store::subscription::save(&tx, rows, now).await?;
    let (saved, stale): (Vec<_>, Vec<_>) = plans.into_iter().partition(|plan| written.contains(plan.id));

    let mut signals = Vec::new();
    let mut consequences = Vec::new();
    for plan in saved {
        signals.extend(plan.signals);
        consequences.push((plan.id, plan.consequences));
    }
    consequences.extend(others.into_iter().map(|(id, arrival)| (id, plan::of_payment(arrival, &terms.rules, now))));
    signals.extend(save_consequences(&tx, consequences, terms.signalling, now).await?);
    store::outbox::insert(&tx, signals, now).await?;
    fail_point!("worker::before_commit");
    tx.commit().await.map_err(StoreError::doing("commit a batch"))?;
    fail_point!("worker::after_commit");
    Ok(stale.into_iter().flat_map(|plan| plan.arrivals).map(|arrival| arrival.index).collect())
}

/// Takes the personal data out of the events of erased persons.
fn redact(pending: &mut [Cow<'_, Arrival>], erasures: &Erasures) {
    for arrival in pending {
        if !arrival.event.redacted && erasures.covers(&arrival.event) {
            arrival.to_mut().event.redact();
        }
    }
}

/// Writes what follows for orphans and open questions, and returns the signals that are sent now.
async fn save_consequences(
    tx: &DatabaseTransaction,
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
        of_one.answered.into_iter().for_each(|kind| answered.entry(kind).or_default().push(id));
    }
    let mut signals = save_orphans(tx, orphans, signalling, now).await?;
    signals.extend(save_resolutions(tx, resolutions, signalling, now).await?);
    for (kind, ids) in answered {
        store::due::remove(tx, kind, &ids).await?;
    }
    store::due::put(tx, questions).await?;
    if signalling != Signalling::Now {
        signals.clear();
    }
    Ok(signals)
}

/// Inserts the orphans that are not there yet, and returns a signal for each.
async fn save_orphans(
    tx: &DatabaseTransaction,
    mut orphans: Vec<(&Arrival, NewOrphan)>,
    signalling: Signalling,
    now: OffsetDateTime,
) -> Result<Vec<NewSignal>, StoreError> {
    // One payment may come several times in one batch; one statement may not name a key twice.
    orphans.sort_by(|(a, x), (b, y)| (&x.id, &a.event.id).cmp(&(&y.id, &b.event.id)));
    orphans.dedup_by(|(_, later), (_, earlier)| later.id == earlier.id);
    let (arrivals, orphans): (Vec<_>, Vec<_>) = orphans.into_iter().unzip();
    let owed: Vec<_> = match signalling {
        Signalling::Later => arrivals.iter().map(|arrival| signal::reference(&arrival.event)).collect(),
        Signalling::Now | Signalling::Never => Vec::new(),
    };
    let inserted = store::orphan::insert(tx, &orphans, &owed, now).await?;
    let created = arrivals.iter().zip(&orphans).filter(|(_, orphan)| inserted.contains(&orphan.id));
    Ok(created.map(|(arrival, orphan)| signal::orphan_created(orphan, arrival.cause())).collect())
}

/// Resolves the orphans that are open, and returns a signal for each.
async fn save_resolutions(
    tx: &DatabaseTransaction,
    resolutions: Vec<Resolution<'_>>,
    signalling: Signalling,
    now: OffsetDateTime,
) -> Result<Vec<NewSignal>, StoreError> {
    let ids: Vec<&str> = resolutions.iter().map(|resolution| resolution.id.as_str()).collect();
    // Nearly every subscription finds its user without ever having been an orphan.
    let mut open = store::orphan::open_among(tx, &ids).await?;
    let mut signals = Vec::new();
    for resolution in &resolutions {
        let user = resolution.client_reference_id.as_str();
        // Told once, however many words about it came together.
        let is_open = open.remove(&resolution.id);
        let owed = (signalling == Signalling::Later).then(|| signal::reference(&resolution.arrival.event));
        let owed = owed.as_ref();
        let resolved = match &resolution.by_operator {
            Some((orphan, at)) => store::orphan::resolve_by_operator(tx, orphan, user, *at, owed, now).await?,
            None if is_open => store::orphan::resolve(tx, &resolution.id, user, owed, now).await?,
            None => None,
        };
        let resolved = resolved.filter(|_| is_open).as_ref().and_then(store::orphan::known);
        signals.extend(resolved.map(|orphan| signal::orphan_resolved(&orphan, resolution.arrival.cause())));
    }
    Ok(signals)
}
