//! The sweep: asks the questions that no batch waits for.
//!
//! Owns the life of an orphan beyond its events: the user lookup, the grace period, the age of an
//! email; the fetch of uncertain subscriptions; and the erasure of customers deleted at Stripe. Any worker may ask; a question is with one of
//! them at a time. Writes rows only where a batch would conflict with it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{self, stream::RawMessageErrorKind};
use fail::fail_point;
use litestripe_contract::exit;
use litestripe_contract::signal::OrphanReason;
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_domain::event::{self, Body, Email, MetadataKeys, api};
use litestripe_domain::orphan::{self, NewOrphan};
use litestripe_domain::question::{Check, Kind};
use litestripe_domain::row::{Row, Stored};
use litestripe_domain::signal::{self, Cause};
use sea_orm::{ConnectionTrait, DatabaseTransaction};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::erasure::{EraseError, Erasure, Erasures, Receipt, Target};
use crate::error::StoreError;
use crate::questions::lookup::{Lookup, LookupError};
use crate::settings::OrphanSettings;
use crate::store::due;
use crate::store::{self, Store};
use crate::stream::own_event::{self, OwnEventError, Scope};
use crate::stripe::api::{ApiError, StripeApi};
use crate::wait::{DATABASE, Wait};

pub mod lookup;

/// How often it is looked for questions that came due.
const POLL: Duration = Duration::from_secs(1);

/// How long a question is with one worker before another may take it: longer than the longest
/// answer, which is two of Stripe's with all their tries and the waits that it asks for.
const LEASE: Duration = Duration::from_secs(12 * 60);

/// Questions of one kind that are asked at a time. Few where Stripe's budget makes them queue.
const ASKED_MAX: usize = 16;
const ASKED_OF_STRIPE_MAX: usize = 4;

/// A question without an answer is logged no more often than this.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// How often old emails are looked for, at least.
const ERASE_EVERY: Duration = Duration::from_secs(60 * 60);

/// How soon a question without an answer is asked again.
const RETRY: Duration = Duration::from_secs(3);

/// How long a session that was fetched may take through the stream to its row.
const CLAIM_MAX: Duration = Duration::from_secs(60);

/// How soon a user who was unknown is asked for again: doubles with each answer.
const UNKNOWN_FIRST: Duration = Duration::from_secs(15);
const UNKNOWN_MAX: Duration = Duration::from_secs(60 * 60);

/// What the sweep needs.
pub struct Questions {
    /// Where rows, orphans and questions are.
    pub store: Store,
    /// Where events are, and go.
    pub jetstream: jetstream::Context,
    /// Whom to ask for users.
    pub lookup: Lookup,
    /// Whom to ask for subscriptions.
    pub stripe: Option<StripeApi>,
    /// When a payment is an orphan.
    pub orphans: OrphanSettings,
    /// Whose personal data is not to come back.
    pub erasures: Erasures,
    /// Whether a customer that is deleted at Stripe is erased here.
    pub erase_on_customer_deleted: bool,
    /// Says that there may be questions.
    pub wake: Arc<Notify>,
    /// Wakes the relay.
    pub relay: Arc<Notify>,
    /// When it was last said that a question has no answer.
    pub complained: Mutex<Option<Instant>>,
}

/// What became of a question.
enum Outcome {
    /// It is answered.
    Answered,
    /// It is to be asked again then.
    Again(Duration),
    /// Something else changed the row or the question meanwhile: at once.
    Crossed,
}

/// Why a question has no answer yet.
#[derive(Debug, thiserror::Error)]
enum QuestionError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    OwnEvent(#[from] OwnEventError),
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error("cannot see how far the events are applied")]
    Progress(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Questions {
    /// Asks until `shutdown`. Kinds of questions do not wait for each other.
    pub async fn run(self, shutdown: CancellationToken) {
        let questions = Arc::new(self);
        let of_stripe = if questions.stripe.is_some() { ASKED_OF_STRIPE_MAX } else { ASKED_MAX };
        let kinds = [
            (Kind::Lookup, questions.lookup.asks(), ASKED_MAX),
            (Kind::Grace, questions.orphans.without_session, of_stripe),
            (Kind::Fetch, questions.stripe.is_some(), of_stripe),
            (Kind::Erase, questions.erase_on_customer_deleted, 1),
        ];
        let mut loops = JoinSet::new();
        for (kind, _, at_a_time) in kinds.into_iter().filter(|(_, asked, _)| *asked) {
            loops.spawn(Arc::clone(&questions).ask(kind, at_a_time, shutdown.clone()));
        }
        loops.spawn(questions.erase(shutdown));
        while let Some(ended) = loops.join_next().await {
            // Questions of one kind would not be asked any more, and nobody would know.
            ended.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
        }
    }

    /// Takes questions of one kind as they come due, and asks several at a time. One that has to
    /// wait for its answer holds up no other.
    async fn ask(self: Arc<Self>, kind: Kind, at_a_time: usize, shutdown: CancellationToken) {
        let mut asked = JoinSet::new();
        let mut wait = Wait::new(DATABASE);
        while !shutdown.is_cancelled() {
            fail_point!("worker::before_question");
            while asked.try_join_next().is_some() {}
            let room = at_a_time - asked.len();
            // In its own task: a cancelled transaction would leave a poisoned connection in the pool.
            let taken = tokio::spawn({
                let questions = Arc::clone(&self);
                async move { due::take(&questions.store, &[kind], OffsetDateTime::now_utc(), LEASE, room as u64).await }
            });
            let taken = taken.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
            let checks = taken.inspect(|_| wait.succeeded()).unwrap_or_else(|error| {
                wait.failed(&error);
                Vec::new()
            });
            let is_full = checks.len() == room;
            for check in checks {
                let questions = Arc::clone(&self);
                asked.spawn(async move { questions.settle(&check).await });
            }
            tokio::select! {
                Some(_) = asked.join_next(), if is_full => {}
                () = self.wake.notified(), if kind == Kind::Lookup && !is_full && !wait.is_waiting() => {}
                () = tokio::time::sleep(POLL) => {}
                () = shutdown.cancelled() => {}
            }
        }
        // What was asked and is not answered within the stop's patience comes due again.
        while asked.join_next().await.is_some() {}
    }

    /// Erases emails as they become too old.
    async fn erase(self: Arc<Self>, shutdown: CancellationToken) {
        // None is seen for longer than half again as long as it may be.
        let every = (self.orphans.email_max_age / 2).clamp(POLL, ERASE_EVERY);
        while !shutdown.is_cancelled() {
            let again = if self.erase_old_emails().await { every } else { POLL };
            tokio::select! {
                () = tokio::time::sleep(again) => {}
                () = shutdown.cancelled() => {}
            }
        }
    }

    /// Asks one question, and notes when it has to be asked again.
    async fn settle(&self, check: &Check) {
        let outcome = match check.kind {
            Kind::Lookup => self.look_up(check).await,
            Kind::Grace => self.end_grace(check).await,
            Kind::Fetch => self.fetch(check).await,
            Kind::Erase => self.erase_customer(check).await,
        };
        let (again, attempts) = match outcome {
            Ok(Outcome::Answered) => return,
            Ok(Outcome::Crossed) => (Duration::ZERO, check.attempts),
            Ok(Outcome::Again(delay)) => (delay, check.attempts.saturating_add(1)),
            Err(error) => {
                self.complain(check, &exit::chain(&error));
                (RETRY, check.attempts)
            }
        };
        let due_at = OffsetDateTime::now_utc() + again;
        if let Err(error) = due::postpone(self.store.connection(), check, due_at, attempts).await {
            debug!("the question comes due by itself after its lease: {}", exit::chain(&error));
        }
    }

    fn complain(&self, check: &Check, error: &str) {
        let (id, kind) = (&check.entity_id, check.kind.as_str());
        let mut last = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < COMPLAIN_EVERY) {
            return debug!(entity_id = id, kind, "no answer yet about {id}: {error}");
        }
        *last = Some(Instant::now());
        warn!(entity_id = id, kind, "no answer yet about {id}, asking again: {error}");
    }

    /// Asks whether the client reference id is a user. An unknown one with a payment is an orphan.
    async fn look_up(&self, check: &Check) -> Result<Outcome, QuestionError> {
        // The row may have another client reference id by now.
        let stored = self.stored(self.store.connection(), check).await?;
        let Some(client_reference_id) = reference(check, stored.as_ref()) else { return self.forget(check).await };
        if self.lookup.knows(&client_reference_id).await? {
            return Ok(self.note_known(check, &client_reference_id).await?);
        }
        let is_wanted = check.is_paid && !self.is_erased(check);
        let email = if is_wanted { self.email_of_session(check).await? } else { None };
        Ok(self.note_unknown(check, &client_reference_id, email).await?)
    }

    async fn note_known(&self, check: &Check, client_reference_id: &str) -> Result<Outcome, StoreError> {
        let now = OffsetDateTime::now_utc();
        let tx = self.store.begin().await?;
        if !self.holds_row(&tx, check, client_reference_id, now).await? || !due::settle(&tx, check).await? {
            return Ok(Outcome::Crossed);
        }
        let resolved = store::orphan::resolve(&tx, &check.entity_id, client_reference_id, now).await?;
        let resolved = resolved.as_ref().and_then(store::orphan::known);
        let signal = resolved.map(|orphan| signal::orphan_resolved(&orphan, cause(check)));
        store::outbox::insert(&tx, signal.into_iter().collect(), now).await?;
        self.commit(tx).await?;
        Ok(Outcome::Answered)
    }

    /// Notes a paid session's user as unknown, and asks again for as long as that is open.
    async fn note_unknown(
        &self,
        check: &Check,
        client_reference_id: &str,
        email: Option<Email>,
    ) -> Result<Outcome, StoreError> {
        let now = OffsetDateTime::now_utc();
        let tx = self.store.begin().await?;
        if !self.holds_row(&tx, check, client_reference_id, now).await? {
            return Ok(Outcome::Crossed);
        }
        if check.is_paid {
            let email = email.filter(|_| !self.is_erased(check));
            let orphan = new_orphan(check, OrphanReason::UnknownClientReferenceId, email);
            insert_orphan(&tx, &orphan, check, now).await?;
        }
        let orphan = store::orphan::find(&tx, &check.entity_id).await?;
        let is_open = orphan.is_some_and(|orphan| orphan.resolved_at.is_none());
        if !is_open {
            due::settle(&tx, check).await?;
        }
        self.commit(tx).await?;
        Ok(if is_open { Outcome::Again(delay(UNKNOWN_FIRST, UNKNOWN_MAX, check.attempts)) } else { Outcome::Answered })
    }

    /// Whether the row still names this user. Writes it, so that a batch that changes it at this
    /// moment conflicts instead of crossing. A payment without a subscription has no row to cross.
    async fn holds_row(
        &self,
        tx: &DatabaseTransaction,
        check: &Check,
        client_reference_id: &str,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let Some(stored) = self.stored(tx, check).await? else { return Ok(check.stripe_subscription_id.is_none()) };
        let is_same = reference(check, Some(&stored)).as_deref() == Some(client_reference_id);
        Ok(is_same && rewrite(tx, check, stored, now).await?)
    }

    async fn stored<C: ConnectionTrait>(&self, db: &C, check: &Check) -> Result<Option<Stored>, StoreError> {
        let Some(id) = &check.stripe_subscription_id else { return Ok(None) };
        Ok(store::subscription::load(db, &[id]).await?.remove(id))
    }

    /// The email in the session's event, which is still in the stream, as a rule. A stream that was
    /// made anew has another event there.
    async fn email_of_session(&self, check: &Check) -> Result<Option<Email>, QuestionError> {
        let stream = self.jetstream.get_stream_no_info(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| QuestionError::Progress(error.into()))?;
        let message = match stream.get_raw_message(check.stream_sequence).await {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(None),
            Err(error) => return Err(QuestionError::Progress(error.into())),
        };
        let none = MetadataKeys::Only(Default::default());
        Ok(match event::decode(&message.payload, &none) {
            Ok(Some(event::Event { id, body: Body::CheckoutSession(session), .. })) if id == check.event.id => {
                session.customer_email
            }
            _ => None,
        })
    }

    /// Ends a grace period, once every event received before its end is applied: a backlog makes
    /// no orphans.
    async fn end_grace(&self, check: &Check) -> Result<Outcome, QuestionError> {
        let Some(stored) = self.unclaimed(check).await? else { return self.forget(check).await };
        let row = stored.state.visible();
        if !orphan::may_be_paid(row.subscription.status.as_deref()) {
            // The batch in which it is paid asks again.
            return self.forget(check).await;
        }
        // A session that is applied from here on conflicts with the row as it was read.
        let end = orphan::end_of_grace(&row, stored.dt_created.unwrap_or(check.due_at), self.orphans.grace);
        if !self.is_applied_until(end).await? {
            return Ok(Outcome::Again(RETRY));
        }
        let mut email = None;
        let asked = |stripe: &&StripeApi| stripe.sees(check.livemode) && !self.is_erased(check);
        if let Some(stripe) = self.stripe.as_ref().filter(asked) {
            if self.publish_sessions(stripe, check).await? {
                return Ok(Outcome::Again(CLAIM_MAX));
            }
            email = email_of_customer(stripe, check).await?;
        }
        self.note_unclaimed(check, stored, email).await
    }

    /// The row, if still neither a Checkout Session nor anybody else says whose it is.
    async fn unclaimed(&self, check: &Check) -> Result<Option<Stored>, StoreError> {
        let mut stored = store::subscription::load(self.store.connection(), &[&check.entity_id]).await?;
        Ok(stored.remove(&check.entity_id).filter(|stored| {
            let row = stored.state.visible();
            row.checkout_session_id.is_none() && row.subscription.client_reference_id.is_none()
        }))
    }

    /// Stores the sessions that Stripe lists for the subscription, if any, as events.
    async fn publish_sessions(&self, stripe: &StripeApi, check: &Check) -> Result<bool, QuestionError> {
        let account = check.stripe_account_id.as_deref();
        let answer = stripe.checkout_sessions_of(&check.entity_id, account).await?;
        let sessions =
            api::page(&answer.body).ok_or_else(|| answer.unusable("it is no list of Checkout Sessions"))?.objects;
        for session in &sessions {
            let scope = Scope { livemode: session.livemode, account };
            own_event::publish_snapshot(&self.jetstream, &session.id, &session.raw, answer.as_of()?, scope).await?;
        }
        Ok(!sessions.is_empty())
    }

    async fn note_unclaimed(
        &self,
        check: &Check,
        stored: Stored,
        email: Option<Email>,
    ) -> Result<Outcome, QuestionError> {
        let now = OffsetDateTime::now_utc();
        let tx = self.store.begin().await?;
        if !rewrite(&tx, check, stored, now).await? || !due::settle(&tx, check).await? {
            return Ok(Outcome::Crossed);
        }
        let orphan = new_orphan(check, OrphanReason::NoCheckoutSession, email.filter(|_| !self.is_erased(check)));
        insert_orphan(&tx, &orphan, check, now).await?;
        self.commit(tx).await?;
        Ok(Outcome::Answered)
    }

    /// Whether every event that was stored before `end` is applied.
    async fn is_applied_until(&self, end: OffsetDateTime) -> Result<bool, QuestionError> {
        let consumer =
            self.jetstream.get_consumer_from_stream::<pull::Config, _, _>(WORKER_CONSUMER, EVENTS_STREAM).await;
        let consumer = consumer.map_err(|error| QuestionError::Progress(error.into()))?;
        let progress = consumer.cached_info();
        if progress.num_pending == 0 && progress.num_ack_pending == 0 {
            return Ok(true);
        }
        let stream = self.jetstream.get_stream_no_info(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| QuestionError::Progress(error.into()))?;
        let oldest = progress.ack_floor.stream_sequence + 1;
        match stream.get_first_raw_message_by_subject(format!("{EVENTS_PREFIX}>"), oldest).await {
            Ok(message) => Ok(message.time > end),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(true),
            Err(error) => Err(QuestionError::Progress(error.into())),
        }
    }

    /// Fetches an uncertain subscription and stores it as an event, which merges like any other.
    async fn fetch(&self, check: &Check) -> Result<Outcome, QuestionError> {
        let Some(stripe) = self.stripe.as_ref().filter(|stripe| stripe.sees(check.livemode)) else {
            return Ok(Outcome::Again(UNKNOWN_MAX));
        };
        let stored = store::subscription::load(self.store.connection(), &[&check.entity_id]).await?;
        let row = stored.get(&check.entity_id).map(|stored| stored.state.visible());
        let Some(row) = row.filter(|row| row.subscription.uncertain) else { return self.forget(check).await };
        let account = check.stripe_account_id.as_deref();
        let answer = match stripe.subscription(&check.entity_id, account).await {
            Ok(answer) => answer,
            Err(error) if error.is_not_found() => {
                warn!(entity_id = check.entity_id, "{} stays uncertain: {error}", check.entity_id);
                return self.forget(check).await;
            }
            Err(error) => return Err(error.into()),
        };
        let behind = row.head_created.unwrap_or_default() - answer.as_of()?;
        if let Ok(behind @ 0..) = u64::try_from(behind) {
            // Our clock is ahead of Stripe's: the answer may not have the last second's events.
            return Ok(Outcome::Again(Duration::from_secs(behind + 1)));
        }
        let object = api::object(&answer.body).ok_or_else(|| answer.unusable("it is no subscription"))?;
        let scope = Scope { livemode: check.livemode, account };
        own_event::publish_snapshot(&self.jetstream, &object.id, &object.raw, answer.as_of()?, scope).await?;
        self.forget(check).await
    }

    /// Erases a customer that was deleted at Stripe, once all that came of them is applied.
    async fn erase_customer(&self, check: &Check) -> Result<Outcome, QuestionError> {
        let (store, jetstream, erasures) = (&self.store, &self.jetstream, &self.erasures);
        let erasure = Erasure { store, jetstream, erasures, force: false, seen: &|| {} };
        match erasure.run(&Target::Customer(check.entity_id.clone())).await {
            Ok(receipt) => {
                let Receipt { events, subscriptions, orphans, .. } = receipt;
                info!(entity_id = check.entity_id, events, subscriptions, orphans, "erased {}", check.entity_id);
                self.forget(check).await
            }
            // Every try reads the whole stream.
            Err(EraseError::Unapplied(_) | EraseError::CameMeanwhile(_)) => {
                Ok(Outcome::Again(delay(UNKNOWN_FIRST, UNKNOWN_MAX, check.attempts)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether what led to the question is covered by an erasure: then nothing personal is looked for.
    fn is_erased(&self, check: &Check) -> bool {
        let others = [&check.checkout_session_id, &check.stripe_customer_id, &check.stripe_subscription_id];
        let ids = others.into_iter().filter_map(Option::as_deref).chain([check.entity_id.as_str()]);
        self.erasures.covers_object(ids, check.event.created.unix())
    }

    async fn forget(&self, check: &Check) -> Result<Outcome, QuestionError> {
        due::settle(self.store.connection(), check).await?;
        Ok(Outcome::Answered)
    }

    async fn commit(&self, tx: DatabaseTransaction) -> Result<(), StoreError> {
        tx.commit().await.map_err(StoreError::doing("commit an answer"))?;
        self.relay.notify_one();
        Ok(())
    }

    /// Erases emails that are too old. Returns whether it could.
    async fn erase_old_emails(&self) -> bool {
        let Some(before) = OffsetDateTime::now_utc().checked_sub(age(self.orphans.email_max_age)) else { return true };
        match store::orphan::erase_emails(self.store.connection(), before).await {
            Ok(0) => true,
            Ok(erased) => {
                info!(erased, "erased {erased} emails of old orphans (LITESTRIPE_ORPHAN_EMAIL_MAX_AGE)");
                true
            }
            Err(_) => false,
        }
    }
}

async fn email_of_customer(stripe: &StripeApi, check: &Check) -> Result<Option<Email>, QuestionError> {
    let Some(customer) = &check.stripe_customer_id else { return Ok(None) };
    match stripe.customer(customer, check.stripe_account_id.as_deref()).await {
        Ok(answer) => Ok(api::customer_email(&answer.body)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes a row as it is over the version that was read. Returns whether nobody else wrote it since.
async fn rewrite(
    tx: &DatabaseTransaction,
    check: &Check,
    stored: Stored,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let row = Row {
        stripe_subscription_id: check.entity_id.clone(),
        version: stored.version + 1,
        revision: stored.revision,
        visible: stored.state.visible(),
        state: stored.state,
    };
    Ok(!store::subscription::save(tx, vec![row], now).await?.is_empty())
}

/// The client reference id to ask about: the row's, or where there is no row the session's.
fn reference(check: &Check, stored: Option<&Stored>) -> Option<String> {
    match stored {
        Some(stored) => stored.state.visible().subscription.client_reference_id,
        None => check.client_reference_id.clone(),
    }
}

async fn insert_orphan(
    tx: &DatabaseTransaction,
    orphan: &NewOrphan,
    check: &Check,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let inserted = store::orphan::insert(tx, std::slice::from_ref(orphan), now).await?;
    let signals = inserted.iter().map(|_| signal::orphan_created(orphan, cause(check))).collect();
    store::outbox::insert(tx, signals, now).await
}

fn new_orphan(check: &Check, reason: OrphanReason, customer_email: Option<Email>) -> NewOrphan {
    NewOrphan {
        id: check.entity_id.clone(),
        reason,
        checkout_session_id: check.checkout_session_id.clone(),
        stripe_customer_id: check.stripe_customer_id.clone(),
        stripe_subscription_id: check.stripe_subscription_id.clone(),
        customer_email,
        event_id: check.event.id.clone(),
        livemode: check.livemode,
    }
}

fn cause(check: &Check) -> Cause {
    Cause { event: check.event.clone(), traceparent: None }
}

/// `first`, doubled with each attempt, up to `max`.
fn delay(first: Duration, max: Duration, attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(0).min(16);
    first.saturating_mul(1 << doublings).min(max)
}

fn age(duration: Duration) -> time::Duration {
    time::Duration::try_from(duration).unwrap_or(time::Duration::MAX)
}
