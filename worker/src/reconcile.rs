//! Reconcile: holds every row against what Stripe says now, and mends it.
//!
//! Owns the walk over Stripe's subscriptions, when a difference counts as one, and what mends it. A
//! repair is an event like any other: what was fetched is stored in `STRIPE_EVENTS` and comes back
//! through whichever worker takes it. May not know how it is shown, or who applies the events.
//!
//! Stripe goes on while we look. A row that is newer than Stripe's answer is no difference, and every
//! other one is looked at a second time before it is reported. Memory is bounded by a page, what is
//! different, and 16 bytes for each subscription.

mod difference;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use litestripe_contract::signal::Subscription;
use litestripe_entity::orphaned_payment;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::consumer::{self, OpenError};
use crate::erasure::Erasures;
use crate::error::StoreError;
use crate::event::{self, Body, DecodeError, MetadataKeys, api};
use crate::merge::State;
use crate::own_event::{self, OwnEventError, Resolution, Scope};
use crate::store::whole::{self, Whole};
use crate::store::{self, Store};
use crate::stripe_api::{ApiError, StripeApi};

use difference::Claim;

pub use difference::Difference;

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

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// Columns are not as Stripe has them.
    Different,
    /// There is none.
    Missing,
    /// Its columns or its merge state cannot be read.
    Unreadable,
    /// Stripe has no such subscription.
    UnknownToStripe,
    /// What Stripe says cannot be kept.
    CannotBeKept,
}

/// A row that is not as Stripe has it.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The row's key.
    pub stripe_subscription_id: String,
    /// What is wrong.
    pub problem: Problem,
    /// Whether it is mended.
    pub repaired: bool,
    /// Where it is wrong.
    pub differences: Vec<Difference>,
    /// What a person has to know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Finding {
    fn new(id: &str, problem: Problem) -> Self {
        let stripe_subscription_id = id.to_owned();
        Self { stripe_subscription_id, problem, repaired: false, differences: Vec::new(), note: None }
    }

    fn with_note(self, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..self }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Subscriptions of Stripe's that were held against their rows.
    pub compared: u64,
    /// Rows that are not as Stripe has them, or were not.
    pub findings: Vec<Finding>,
    /// Questions asked of Stripe, repetitions after its troubles aside.
    pub calls: u64,
}

impl Report {
    /// How many rows are still wrong.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.findings.iter().filter(|finding| !finding.repaired).count()
    }

    /// How many have this problem.
    #[must_use]
    pub fn count(&self, problem: Problem) -> usize {
        self.findings.iter().filter(|finding| finding.problem == problem).count()
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

/// What is asked, and where.
pub struct Sources<'a> {
    /// Where the rows are.
    pub store: &'a Store,
    /// Who knows what they should be.
    pub stripe: &'a StripeApi,
    /// The metadata that is kept.
    pub metadata_keys: &'a MetadataKeys,
    /// Where repairs are stored, for somebody to apply them. None: nothing is changed.
    pub repair: Option<&'a jetstream::Context>,
    /// Whose personal data is not to come back.
    pub erasures: &'a Erasures,
    /// Ends it early.
    pub stop: &'a CancellationToken,
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

/// A subscription as Stripe has it.
struct Fetched {
    object: api::Object,
    as_of: i64,
    shown: Subscription,
    /// Whether it is an erased person's: then nothing personal is compared, asked for, or stored.
    is_erased: bool,
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

/// A subscription held against its row.
struct Look {
    fetched: Fetched,
    claims: Claims,
    version: i64,
    seen: Seen,
}

enum Seen {
    Equal,
    /// The row is newer than the answer.
    Newer(Finding),
    Different(Finding),
    /// Different, and writing the row would make it worse.
    Stuck(Finding),
}

/// What is known of whose a subscription is, beyond its row.
#[derive(Default)]
struct Claims {
    claim: Claim,
    session: Option<(api::Object, i64)>,
    /// The orphan that it was, where no session names its user.
    resolved: Option<orphaned_payment::Model>,
}

impl Claims {
    /// An operator may have said otherwise than the session: a session that is stored as of now would
    /// overrule that, and so is left out.
    fn of(
        session: Option<(api::Object, Option<String>)>,
        as_of: i64,
        resolved: Option<orphaned_payment::Model>,
    ) -> Self {
        let user = resolved.as_ref().and_then(|orphan| orphan.resolved_client_reference_id.clone());
        let is_overruled = |said: &Option<String>| user.is_some() && said.is_some() && *said != user;
        let session = session.filter(|(_, said)| !is_overruled(said));
        let is_named = session.as_ref().is_some_and(|(_, said)| said.is_some());
        let said = session.as_ref().and_then(|(_, said)| said.clone());
        let claim = Claim {
            checkout_session_id: session.as_ref().map(|(object, _)| object.id.clone()),
            client_reference_id: user.or(said),
        };
        let session = session.map(|(object, _)| (object, as_of));
        Self { claim, session, resolved: resolved.filter(|_| !is_named) }
    }
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
            match finding_of(&look.fetched, &look.claims.claim, row) {
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

impl Sources<'_> {
    /// What Stripe answers, unless it is told to stop first: a question changes nothing.
    async fn answer<T>(
        &self,
        question: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<Result<T, ApiError>, ReconcileError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(ReconcileError::Stopped),
            answer = question => Ok(answer),
        }
    }

    fn go_on(&self) -> Result<(), ReconcileError> {
        if self.stop.is_cancelled() { Err(ReconcileError::Stopped) } else { Ok(()) }
    }

    async fn sleep_until(&self, end: Instant) -> Result<(), ReconcileError> {
        tokio::select! {
            () = tokio::time::sleep_until(end) => Ok(()),
            () = self.stop.cancelled() => Err(ReconcileError::Stopped),
        }
    }

    /// What the row would show of a subscription, had nothing else come.
    fn read(&self, object: api::Object, as_of: i64) -> Result<Result<Fetched, Finding>, ReconcileError> {
        match self.decode(&object, as_of)? {
            Ok(Some(event)) => {
                let is_erased = self.erasures.covers(&event);
                let object = if is_erased { object.impersonal().unwrap_or(object) } else { object };
                let mut state = State::default();
                state.merge(&self.erasures.redacted(event));
                Ok(Ok(Fetched { shown: state.visible().subscription, object, as_of, is_erased }))
            }
            Ok(None) => Ok(Err(Finding::new(&object.id, Problem::CannotBeKept))),
            Err(error) => Ok(Err(Finding::new(&object.id, Problem::CannotBeKept).with_note(error.to_string()))),
        }
    }

    fn decode(
        &self,
        object: &api::Object,
        as_of: i64,
    ) -> Result<Result<Option<event::Event>, DecodeError>, ReconcileError> {
        let body = own_event::snapshot(&object.id, &object.raw, as_of, scope(object.livemode))?;
        Ok(event::decode(&body, self.metadata_keys))
    }

    /// Holds a subscription against its row, and asks for its Checkout Sessions where nobody knows
    /// whose it is.
    async fn compare(&self, fetched: Fetched, row: Option<&Whole>, calls: &AtomicU64) -> Result<Look, ReconcileError> {
        let visible = row.and_then(|row| row.state.as_ref()).map(State::visible);
        let user = visible.as_ref().and_then(|visible| visible.subscription.client_reference_id.as_ref());
        let column = row.and_then(|row| row.columns.as_ref()).and_then(|row| row.client_reference_id.as_ref());
        // A row that is missing is different, whosever it is: only its repair has to know.
        let is_asked = (user.is_none() || user != column) && (row.is_some() || self.repair.is_some());
        let is_asked = is_asked && !fetched.is_erased;
        let has_session = visible.as_ref().is_some_and(|visible| visible.checkout_session_id.is_some());
        let claims = if is_asked { self.claims(&fetched, has_session, calls).await? } else { Claims::default() };
        let is_newer = visible.and_then(|visible| visible.head_created).is_some_and(|head| head >= fetched.as_of);
        let seen = match finding_of(&fetched, &claims.claim, row) {
            None => Seen::Equal,
            Some(finding) if row.is_some_and(|row| difference::only_the_column_knows_the_user(&claims.claim, row)) => {
                Seen::Stuck(finding.with_note(
                    "not repairable: only this column knows the client reference id, and writing the row would lose it",
                ))
            }
            Some(finding) if is_newer => Seen::Newer(finding),
            Some(finding) => Seen::Different(finding),
        };
        Ok(Look { version: row.map_or(0, |row| row.version), fetched, claims, seen })
    }

    /// Whose a subscription is: as was found when it was an orphan, else as its newest Checkout Session
    /// with a client reference id says.
    async fn claims(&self, fetched: &Fetched, has_session: bool, calls: &AtomicU64) -> Result<Claims, ReconcileError> {
        calls.fetch_add(1, Ordering::Relaxed);
        let id = fetched.object.id.as_str();
        let (listed, as_of) = match self.answer(self.stripe.checkout_sessions_of(id, None)).await? {
            Ok(answer) => {
                let page =
                    api::page(&answer.body).ok_or_else(|| answer.unusable("it is no list of Checkout Sessions"))?;
                (page.objects, answer.as_of()?)
            }
            Err(error) if error.is_not_found() => (Vec::new(), fetched.as_of),
            Err(error) => return Err(error.into()),
        };
        let mut sessions = Vec::new();
        for object in listed {
            // What cannot be kept says nothing about whose it is.
            if let Ok(Some(event::Event { body: Body::CheckoutSession(session), .. })) = self.decode(&object, as_of)? {
                sessions.push((object, session.client_reference_id));
            }
        }
        let named = sessions.iter().position(|(_, user)| user.is_some());
        // Without a user it only makes an orphan: of a subscription that ended, nobody's to care for.
        let ended = matches!(fetched.shown.status.as_deref(), Some("canceled" | "incomplete_expired"));
        let chosen = named.or((!ended && !has_session && !sessions.is_empty()).then_some(0));
        let session = chosen.map(|index| sessions.swap_remove(index));
        let orphan = store::orphan::find(self.store.connection(), id).await?;
        let resolved = orphan.filter(|orphan| orphan.resolved_client_reference_id.is_some());
        Ok(Claims::of(session, as_of, resolved))
    }

    /// Stores what mends a row. Returns the last sequence.
    async fn publish(&self, jetstream: &jetstream::Context, look: &Look) -> Result<u64, ReconcileError> {
        let Look { fetched, claims, version, seen } = look;
        let id = fetched.object.id.as_str();
        let Seen::Different(finding) = seen else { return Ok(0) };
        if finding.problem == Problem::Unreadable {
            // Where its merge state can be read, it is left alone. Where somebody else wrote the row
            // meanwhile, the second look tells.
            self.forget_unreadable_state(id, *version).await?;
        }
        let scope = scope(fetched.object.livemode);
        let mut last = own_event::publish_snapshot(jetstream, id, &fetched.object.raw, fetched.as_of, scope).await?;
        if let Some((session, as_of)) = &claims.session {
            last = own_event::publish_snapshot(jetstream, &session.id, &session.raw, *as_of, scope).await?.max(last);
        }
        if let Some(orphan) = &claims.resolved {
            let resolution = Resolution {
                orphan_id: &orphan.id,
                client_reference_id: orphan.resolved_client_reference_id.as_deref().unwrap_or_default(),
                stripe_subscription_id: Some(id),
                checkout_session_id: orphan.checkout_session_id.as_deref(),
                stripe_customer_id: orphan.stripe_customer_id.as_deref(),
                reason: &orphan.reason,
            };
            let at = orphan.resolved_at.unwrap_or(orphan.dt_last_updated).unix_timestamp();
            last = own_event::repeat_resolution(jetstream, &resolution, at, scope, fetched.as_of).await?.max(last);
        }
        Ok(last)
    }

    async fn forget_unreadable_state(&self, id: &str, version: i64) -> Result<(), ReconcileError> {
        let db = self.store.connection();
        let rows = whole::find(db, &[id]).await?;
        if rows.get(id).is_some_and(|row| row.state.is_none()) {
            whole::forget_state(db, id, version).await?;
        }
        Ok(())
    }
}

/// What is wrong with the row, if anything.
fn finding_of(fetched: &Fetched, claim: &Claim, row: Option<&Whole>) -> Option<Finding> {
    let finding = |problem| Finding::new(&fetched.object.id, problem);
    let Some(row) = row else { return Some(finding(Problem::Missing)) };
    let mut differences = difference::differences(&fetched.shown, claim, row);
    // What Stripe has of it is not to come back, and what the row has is younger than the erasure.
    differences.retain(|difference| !fetched.is_erased || difference.field != "subscription_metadata");
    if row.columns.is_none() || row.state.is_none() {
        let what = if row.columns.is_none() { "a column" } else { "merge_state" };
        let finding = finding(Problem::Unreadable).with_note(format!("{what} cannot be read"));
        return Some(Finding { differences, ..finding });
    }
    (!differences.is_empty()).then(|| Finding { differences, ..finding(Problem::Different) })
}

fn repaired(finding: Finding) -> Finding {
    Finding { repaired: true, ..finding }
}

fn unknown(id: &str) -> Finding {
    Finding::new(id, Problem::UnknownToStripe)
        .with_note("not repairable: Stripe has no such subscription in the account and mode of STRIPE_SECRET_KEY")
}

/// What is listed without `Stripe-Account` is the account's own.
fn scope(livemode: bool) -> Scope<'static> {
    Scope { livemode, account: None }
}

/// What is remembered of an id.
fn hash(id: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(id).into();
    digest.first_chunk().copied().unwrap_or_default()
}
