//! Reconcile: compares every row with Stripe's current subscription, and repairs it.
//!
//! Owns the walk over Stripe's subscriptions and when a difference is reported. Stripe's objects
//! are stored as events in `STRIPE_EVENTS`, and any worker applies them. Columns that differ from
//! their row's merge state are written again from it. May not know how a report is shown, or which
//! worker applies the events.
//!
//! Subscriptions change at Stripe during the walk. So a difference that is not repaired at once is
//! checked again, against a new answer, before it is reported. Memory is bounded by one page, the
//! differences, and 16 bytes for each subscription.

mod difference;
mod report;
mod sources;

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use async_nats::jetstream;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use litestripe_domain::event::api;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::error::StoreError;
use crate::recover::short_hash;
use crate::store::{raw, subscription};
use crate::stream::own_event::{Fetched, OwnEventError};
use crate::stream::progress::{self, ProgressError};
use crate::stripe::api::ApiError;

use sources::Comparison;

pub(crate) use difference::Difference;
pub(crate) use report::{Finding, Problem, Report};
pub(crate) use sources::Sources;

/// Lists of Checkout Sessions that are fetched at a time.
const LOOKUPS_IN_FLIGHT_MAX: usize = 4;

/// Repairs in flight at a time.
const REPAIRS_IN_FLIGHT_MAX: usize = 16;

/// How long an event usually takes at most from Stripe through the stream to its row. A difference
/// is checked again after this time.
const RECHECK_AFTER: Duration = Duration::from_secs(5);

/// The pause between two checks of how far the events are applied.
const POLL: Duration = Duration::from_millis(50);

/// How long these checks may fail.
const UNKNOWN_PROGRESS_MAX: Duration = Duration::from_secs(30);

/// Ids read from the table at a time.
const IDS_BATCH: u64 = 1000;

/// Rows that Stripe does not list are fetched one by one until this many are unknown to Stripe.
/// Each fetch costs a call, so the other unlisted rows count as unknown without one.
const UNLISTED_ASKED_MAX: usize = 100;

const ALL: &str = "all";

/// The values of `status` by which Stripe lists subscriptions. Stripe: "List subscriptions",
/// `status`.
pub(crate) const STATUSES: [&str; 10] = [
    ALL,
    "ended",
    "active",
    "trialing",
    "past_due",
    "unpaid",
    "canceled",
    "incomplete",
    "incomplete_expired",
    "paused",
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    OwnEvent(#[from] OwnEventError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error("it was asked to stop")]
    Stopped,
}

pub(crate) struct Reconcile<'a> {
    sources: Sources<'a>,
    /// Called with the number of subscriptions that were compared since the last call.
    advance: Box<dyn FnMut(u64) + Send + 'a>,
    pub report: Report,
    to_recheck: VecDeque<Finding>,
    /// Requests to Stripe before the walk.
    requests_before: u64,
}

impl<'a> Reconcile<'a> {
    /// Creates a walk that calls `advance` with the number of subscriptions compared since the last
    /// call.
    pub(crate) fn new(sources: Sources<'a>, advance: impl FnMut(u64) + Send + 'a) -> Self {
        Self {
            requests_before: sources.stripe.requests(),
            sources,
            advance: Box::new(advance),
            report: Report::default(),
            to_recheck: VecDeque::new(),
        }
    }

    /// Walks through Stripe's subscriptions of `status`, one of [`STATUSES`]. After an error the
    /// report covers the walk up to there: the repairs stay, and another walk does the rest.
    pub(crate) async fn run(&mut self, status: &str) -> Result<(), ReconcileError> {
        let outcome = self.walk(status).await;
        // After an error, differences that were not checked again are reported as they were first
        // found.
        self.report.findings.extend(self.to_recheck.drain(..));
        self.report.calls = self.sources.stripe.requests() - self.requests_before;
        outcome
    }

    async fn walk(&mut self, status: &str) -> Result<(), ReconcileError> {
        let began = OffsetDateTime::now_utc();
        let mut listed = HashSet::new();
        let mut after: Option<String> = None;
        loop {
            let (page, fetched) = self.sources.page(status, after.as_deref()).await?;
            listed.extend(page.objects.iter().map(|object| short_hash(&object.id)));
            after = page.objects.last().map(|object| object.id.clone());
            self.check(page.objects, fetched).await?;
            if !page.has_more || after.is_none() {
                break;
            }
        }
        if status == ALL {
            self.check_unlisted(began, &listed).await?;
        }
        self.recheck().await
    }

    /// Fetches and checks the subscriptions of rows that Stripe did not list. A subscription may
    /// exist and still not be listed: Stripe leaves out those of test clocks (Stripe: "List
    /// subscriptions", `test_clock`).
    async fn check_unlisted(
        &mut self,
        began: OffsetDateTime,
        listed: &HashSet<[u8; 16]>,
    ) -> Result<(), ReconcileError> {
        let livemode = self.sources.stripe.sees(true);
        let mut after = String::new();
        loop {
            let page = raw::ids(
                self.sources.store.connection(),
                livemode,
                began,
                &after,
                IDS_BATCH,
            )
            .await?;
            let Some(last) = page.last else {
                return Ok(());
            };
            after = last;
            for id in page
                .ids
                .iter()
                .filter(|id| !listed.contains(&short_hash(id)))
            {
                let is_asked = self.report.count(Problem::UnknownToStripe) < UNLISTED_ASKED_MAX;
                match if is_asked {
                    self.sources.subscription(id).await?
                } else {
                    None
                } {
                    Some((object, fetched)) => self.check(vec![object], fetched).await?,
                    None => self.report.findings.push(Finding::unknown_to_stripe(id)),
                }
            }
        }
    }

    /// Compares subscriptions with their rows, and repairs the differences if a repair was asked
    /// for.
    async fn check(
        &mut self,
        objects: Vec<api::Object>,
        fetched: Fetched<'static>,
    ) -> Result<(), ReconcileError> {
        self.report.compared += objects.len() as u64;
        let comparisons = self.compare(objects, fetched, 1).await?;
        let Some(jetstream) = self.sources.repair else {
            self.to_recheck
                .extend(comparisons.into_iter().map(|comparison| comparison.finding));
            return Ok(());
        };
        self.repair(jetstream, comparisons).await
    }

    /// Returns the comparisons that found a difference. Calls `advance` with `step` for each
    /// subscription.
    async fn compare(
        &mut self,
        objects: Vec<api::Object>,
        fetched: Fetched<'static>,
        step: u64,
    ) -> Result<Vec<Comparison>, ReconcileError> {
        self.sources
            .erasures
            .refresh(self.sources.store.connection())
            .await?;
        let ids: Vec<&str> = objects.iter().map(|object| object.id.as_str()).collect();
        let mut rows = raw::find(self.sources.store.connection(), &ids).await?;
        let (sources, advance) = (&self.sources, &mut self.advance);
        // Nothing else is awaited between two comparisons: `buffered` makes progress only while it
        // is polled, so a call that waits for the budget would delay all others.
        let comparisons = stream::iter(objects).map(|object| {
            let row = rows.remove(&object.id);
            sources.compare(object, fetched, row)
        });
        let comparisons: Vec<_> = comparisons
            .buffered(LOOKUPS_IN_FLIGHT_MAX)
            .inspect_ok(|_| advance(step))
            .try_collect()
            .await?;
        Ok(comparisons.into_iter().flatten().collect())
    }

    /// Repairs rows, waits until the published events are applied, and checks that the differences
    /// are gone.
    async fn repair(
        &mut self,
        jetstream: &jetstream::Context,
        comparisons: Vec<Comparison>,
    ) -> Result<(), ReconcileError> {
        let repairs =
            stream::iter(&comparisons).map(|comparison| self.sources.repair(jetstream, comparison));
        let stored: Vec<_> = repairs
            .buffered(REPAIRS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        if let Some(last) = stored.into_iter().flatten().max() {
            self.wait_until_applied(jetstream, last).await?;
        }

        let ids: Vec<&str> = comparisons.iter().map(Comparison::id).collect();
        let rows = raw::find(self.sources.store.connection(), &ids).await?;
        for comparison in comparisons {
            if comparison.is_repaired(rows.get(comparison.id())) {
                self.report.findings.push(Finding {
                    repaired: true,
                    ..comparison.finding
                });
            } else {
                self.to_recheck.push_back(comparison.finding);
            }
        }
        Ok(())
    }

    /// Checks the differences again: an event may have been in flight at the first check. Drops
    /// those that are gone.
    async fn recheck(&mut self) -> Result<(), ReconcileError> {
        if !self.to_recheck.is_empty() {
            self.sources.sleep(RECHECK_AFTER).await?;
        }
        while let Some(first) = self.to_recheck.front() {
            let ids = [first.stripe_subscription_id.clone()];
            let is_missing = first.problem == Problem::Missing;
            if is_missing
                && subscription::existing(self.sources.store.connection(), &ids)
                    .await?
                    .is_empty()
            {
                // No new answer of Stripe could change that the row is missing.
                self.report.findings.extend(self.to_recheck.pop_front());
                continue;
            }
            let [id] = &ids;
            let finding = match self.sources.subscription(id).await? {
                Some((object, fetched)) => self
                    .compare(vec![object], fetched, 0)
                    .await?
                    .pop()
                    .map(|comparison| comparison.finding),
                None => Some(Finding::unknown_to_stripe(id)),
            };
            self.to_recheck.pop_front();
            self.report.findings.extend(finding);
        }
        Ok(())
    }

    async fn wait_until_applied(
        &mut self,
        jetstream: &jetstream::Context,
        sequence: u64,
    ) -> Result<(), ReconcileError> {
        let mut last_known = Instant::now();
        loop {
            match progress::applied_until(jetstream).await {
                Ok(Some(until)) if until >= sequence => return Ok(()),
                Ok(_) => last_known = Instant::now(),
                Err(error) if last_known.elapsed() > UNKNOWN_PROGRESS_MAX => {
                    return Err(ReconcileError::Progress(error));
                }
                Err(_) => {}
            }
            (self.advance)(0);
            self.sources.sleep(POLL).await?;
        }
    }
}
