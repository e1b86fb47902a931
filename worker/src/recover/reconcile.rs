//! Reconcile: holds every row against what Stripe says now, and mends it.
//!
//! Owns the walk over Stripe's subscriptions and when a difference counts as one. A repair is an event
//! like any other: what was fetched is stored in `STRIPE_EVENTS` and comes back through whichever worker
//! takes it. May not know how it is shown, or who applies the events.
//!
//! Stripe goes on while we look. A row that is newer than Stripe's answer is no difference, and every
//! other one is looked at a second time before it is reported. Memory is bounded by a page, what is
//! different, and 16 bytes for each subscription.

mod difference;
mod report;
mod sources;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use litestripe_domain::event::api;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::error::StoreError;
use crate::store::whole;
use crate::stream::consumer::{self, OpenError};
use crate::stream::own_event::OwnEventError;
use crate::stripe::api::ApiError;

use report::{repaired, unknown};
use sources::{Fetched, Look, Seen};

pub use difference::Difference;
pub use report::{Finding, Problem, Report};
pub use sources::Sources;

/// Lists of Checkout Sessions that are asked for at a time.
const ASKED_MAX: usize = 4;

/// Snapshots on their way to `STRIPE_EVENTS` at a time.
const IN_FLIGHT_MAX: usize = 16;

/// How long an event may take from Stripe through the stream to its row, as a rule: a difference is
/// looked at again after that.
const SETTLE: Duration = Duration::from_secs(5);

/// Between two looks at a row that is newer than Stripe's answer: an answer is relied on only up to
/// a second or two before it was given.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Looks at one row, at most, before what is seen is reported.
const LOOKS_MAX: usize = 6;

/// Between two looks at how far the events are applied.
const POLL: Duration = Duration::from_millis(50);

/// How long it may be unknown how far they are.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Ids read from the table at a time.
const IDS: u64 = 1000;

/// Rows that Stripe did not list and, asked for one by one, does not know. When it comes to this
/// many, the list's silence is taken for an answer: each costs a call.
const UNKNOWN_ASKED_MAX: usize = 100;

/// The lists of subscriptions that Stripe gives. Stripe: "List subscriptions", `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
#[expect(missing_docs, reason = "Stripe's own names and meanings")]
pub enum Status {
    All,
    Ended,
    Active,
    Trialing,
    PastDue,
    Unpaid,
    Canceled,
    Incomplete,
    IncompleteExpired,
    Paused,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Ended => "ended",
            Self::Active => "active",
            Self::Trialing => "trialing",
            Self::PastDue => "past_due",
            Self::Unpaid => "unpaid",
            Self::Canceled => "canceled",
            Self::Incomplete => "incomplete",
            Self::IncompleteExpired => "incomplete_expired",
            Self::Paused => "paused",
        }
    }
}

/// Why it broke off.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ReconcileError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    OwnEvent(#[from] OwnEventError),
    #[error("cannot see how far the events are applied")]
    Progress(#[source] OpenError),
    #[error("it was told to stop")]
    Stopped,
}

/// One walk.
pub struct Reconcile<'a> {
    sources: Sources<'a>,
    /// Told how many more subscriptions are done.
    advance: Box<dyn FnMut(u64) + Send + 'a>,
    /// What came of it so far.
    pub report: Report,
    calls: AtomicU64,
    again: Vec<Suspect>,
}

/// A row that has to be looked at again.
struct Suspect {
    finding: Finding,
    /// Whether it was newer than Stripe's answer, which then says nothing about it.
    is_newer: bool,
    /// Whether what mends it was stored, and did not.
    is_tried: bool,
    /// The row's version then; 0 for none.
    version: i64,
    seen_at: Instant,
}

impl<'a> Reconcile<'a> {
    /// A walk that tells `advance` how many more subscriptions are done.
    pub fn new(sources: Sources<'a>, advance: impl FnMut(u64) + Send + 'a) -> Self {
        let advance = Box::new(advance);
        Self { sources, advance, report: Report::default(), calls: AtomicU64::new(0), again: Vec::new() }
    }

    /// Walks through Stripe's subscriptions. The report says what came of it, also where it broke off.
    ///
    /// # Errors
    /// When Stripe, the database or the broker gives no answer, or it was told to stop. What is
    /// repaired by then stays, and another walk does the rest.
    pub async fn run(&mut self, status: Status) -> Result<(), ReconcileError> {
        let outcome = self.walk(status).await;
        // What could not be looked at as often as it takes is reported as it was seen last.
        let is_over = outcome.is_ok();
        let unsettled = self.again.drain(..).filter(|suspect| is_over || !suspect.is_newer);
        self.report.findings.extend(unsettled.map(|suspect| suspect.finding));
        self.report.calls = self.calls.load(Ordering::Relaxed);
        outcome
    }

    async fn walk(&mut self, status: Status) -> Result<(), ReconcileError> {
        let began = OffsetDateTime::now_utc();
        let mut listed = HashSet::new();
        let mut after: Option<String> = None;
        loop {
            self.sources.go_on()?;
            self.calls.fetch_add(1, Ordering::Relaxed);
            let list = self.sources.stripe.subscriptions(Some(status.as_str()), after.as_deref());
            let answer = self.sources.answer(list).await??;
            let page = api::page(&answer.body).ok_or_else(|| answer.unusable("it is no list of subscriptions"))?;
            listed.extend(page.objects.iter().map(|object| hash(&object.id)));
            after = page.objects.last().map(|object| object.id.clone());
            self.look_at(page.objects, answer.as_of()?, None).await?;
            if !page.has_more || after.is_none() {
                break;
            }
        }
        if status == Status::All {
            self.look_for_unlisted(began, &listed).await?;
        }
        self.look_again().await
    }

    /// Looks at rows that Stripe did not list. That alone says little: it leaves subscriptions of test
    /// clocks out of its lists (Stripe: "List subscriptions", `test_clock`).
    async fn look_for_unlisted(
        &mut self,
        began: OffsetDateTime,
        listed: &HashSet<[u8; 16]>,
    ) -> Result<(), ReconcileError> {
        let livemode = self.sources.stripe.sees(true);
        let mut after = String::new();
        loop {
            let ids = whole::ids(self.sources.store.connection(), livemode, began, &after, IDS).await?;
            let Some(last) = ids.last() else { return Ok(()) };
            after.clone_from(last);
            for id in ids.iter().filter(|id| !listed.contains(&hash(id))) {
                self.sources.go_on()?;
                let is_asked = self.report.count(Problem::UnknownToStripe) < UNKNOWN_ASKED_MAX;
                match if is_asked { self.fetch(id).await? } else { None } {
                    Some((object, as_of)) => self.look_at(vec![object], as_of, None).await?,
                    None => self.report.findings.push(unknown(id)),
                }
            }
        }
    }

    /// Looks a second time at what was different, and for as long as it takes, within reason, at what
    /// was newer than Stripe's answer.
    async fn look_again(&mut self) -> Result<(), ReconcileError> {
        for look in 2..=LOOKS_MAX {
            let Some(last) = self.again.iter().map(|suspect| suspect.seen_at).max() else { return Ok(()) };
            let is_second = look == 2;
            self.sources.sleep_until(last + if is_second { SETTLE } else { AGAIN_AFTER }).await?;
            let mut suspects = std::mem::take(&mut self.again);
            if is_second && self.sources.repair.is_none() {
                suspects = self.report_unmoved(suspects).await?;
            }
            for suspect in suspects {
                self.sources.go_on()?;
                let id = &suspect.finding.stripe_subscription_id;
                match self.fetch(id).await? {
                    Some((object, as_of)) => self.look_at(vec![object], as_of, Some(suspect)).await?,
                    None => self.report.findings.push(unknown(id)),
                }
            }
        }
        Ok(())
    }

    /// Reports the differences of rows that nobody wrote since, and returns the others.
    async fn report_unmoved(&mut self, suspects: Vec<Suspect>) -> Result<Vec<Suspect>, ReconcileError> {
        let mut moved = Vec::new();
        let mut suspects = suspects.into_iter().peekable();
        while suspects.peek().is_some() {
            let some: Vec<_> = suspects.by_ref().take(100).collect();
            let ids: Vec<&str> = some.iter().map(|suspect| suspect.finding.stripe_subscription_id.as_str()).collect();
            let rows = whole::find(self.sources.store.connection(), &ids).await?;
            for suspect in some {
                let version = rows.get(&suspect.finding.stripe_subscription_id).map_or(0, |row| row.version);
                if version == suspect.version && !suspect.is_newer {
                    self.report.findings.push(suspect.finding);
                } else {
                    moved.push(suspect);
                }
            }
        }
        Ok(moved)
    }

    async fn fetch(&self, id: &str) -> Result<Option<(api::Object, i64)>, ReconcileError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match self.sources.answer(self.sources.stripe.subscription(id, None)).await? {
            Ok(answer) => {
                let object = api::object(&answer.body).ok_or_else(|| answer.unusable("it is no subscription"))?;
                Ok(Some((object, answer.as_of()?)))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Holds subscriptions against their rows, and mends what is different, if that is wanted.
    /// `earlier` is what an earlier look at the one subscription saw.
    async fn look_at(
        &mut self,
        objects: Vec<api::Object>,
        as_of: i64,
        earlier: Option<Suspect>,
    ) -> Result<(), ReconcileError> {
        let is_first = earlier.is_none();
        let mut wanted = Vec::new();
        for object in objects {
            self.report.compared += u64::from(is_first);
            match self.sources.read(object, as_of)? {
                Ok(fetched) => wanted.push(fetched),
                Err(finding) => self.report.findings.push(finding),
            }
        }
        let looks = self.look(wanted, is_first).await?;
        let is_tried = earlier.as_ref().is_some_and(|earlier| earlier.is_tried);
        let mut earlier = earlier.map(|earlier| earlier.finding);
        let mut different = Vec::new();
        for look in looks {
            let suspect = |finding, is_newer| Suspect {
                finding,
                is_newer,
                is_tried,
                version: look.version,
                seen_at: Instant::now(),
            };
            match &look.seen {
                Seen::Equal => self.report.findings.extend(earlier.take().filter(|_| is_tried).map(repaired)),
                Seen::Newer(finding) => self.again.push(suspect(finding.clone(), true)),
                Seen::Stuck(finding) => self.report.findings.push(finding.clone()),
                Seen::Different(finding) if self.sources.repair.is_some() => {
                    // What is reported as mended is what was wrong at first.
                    let finding = earlier.take().filter(|_| is_tried).unwrap_or_else(|| finding.clone());
                    let suspect = Suspect { is_tried: true, ..suspect(finding, false) };
                    different.push((look, suspect));
                }
                Seen::Different(finding) if is_first => self.again.push(suspect(finding.clone(), false)),
                Seen::Different(finding) => self.report.findings.push(finding.clone()),
            }
        }
        if let Some(jetstream) = self.sources.repair.filter(|_| !different.is_empty()) {
            self.repair(jetstream, different).await?;
        }
        Ok(())
    }

    async fn look(&mut self, fetched: Vec<Fetched>, is_first: bool) -> Result<Vec<Look>, ReconcileError> {
        let ids: Vec<&str> = fetched.iter().map(|fetched| fetched.object.id.as_str()).collect();
        let rows = whole::find(self.sources.store.connection(), &ids).await?;
        let (sources, calls, advance) = (&self.sources, &self.calls, &mut self.advance);
        // Nothing is awaited between two looks: a call that waits for its turn holds up all others.
        let looks = stream::iter(fetched).map(|fetched| {
            let row = rows.get(&fetched.object.id);
            sources.compare(fetched, row, calls)
        });
        looks.buffered(ASKED_MAX).inspect_ok(|_| advance(u64::from(is_first))).try_collect().await
    }

    /// Stores what mends the rows, waits until it is applied, and looks whether it did.
    async fn repair(
        &mut self,
        jetstream: &jetstream::Context,
        looks: Vec<(Look, Suspect)>,
    ) -> Result<(), ReconcileError> {
        let sources = &self.sources;
        let published: Vec<u64> = stream::iter(&looks)
            .map(|(look, _)| sources.publish(jetstream, look))
            .buffered(IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        self.wait_until_applied(jetstream, published.into_iter().max().unwrap_or(0)).await?;

        let ids: Vec<&str> = looks.iter().map(|(look, _)| look.fetched.object.id.as_str()).collect();
        let rows = whole::find(self.sources.store.connection(), &ids).await?;
        for (look, suspect) in looks {
            let row = rows.get(&look.fetched.object.id);
            match look.finding(row) {
                None => self.report.findings.push(repaired(suspect.finding)),
                Some(_) => self.again.push(suspect),
            }
        }
        Ok(())
    }

    async fn wait_until_applied(
        &mut self,
        jetstream: &jetstream::Context,
        sequence: u64,
    ) -> Result<(), ReconcileError> {
        let mut silent_since: Option<Instant> = None;
        loop {
            match consumer::is_applied(jetstream, sequence).await {
                Ok(true) => return Ok(()),
                Ok(false) => silent_since = None,
                Err(error) => {
                    let since = *silent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > SILENCE_MAX {
                        return Err(ReconcileError::Progress(error));
                    }
                }
            }
            (self.advance)(0);
            self.sources.sleep_until(Instant::now() + POLL).await?;
        }
    }
}

/// What is remembered of an id.
fn hash(id: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(id).into();
    digest.first_chunk().copied().unwrap_or_default()
}
