//! The end of a grace period: a subscription that may have been paid and still has no user becomes
//! an orphan.
//!
//! Owns the checks before that: both clocks, the backlog, and Stripe if there is a key for the
//! row's mode. Without a key, a row that may have a session which this installation never received
//! does not become an orphan: its question waits for a key, a session or `reconcile`.

use std::time::Duration;

use litestripe_contract::signal::OrphanReason;
use litestripe_domain::event::{self, Body, Email, Event, MetadataKeys, api};
use litestripe_domain::merge::Visible;
use litestripe_domain::orphan;
use litestripe_domain::question::{Details, Question};
use litestripe_domain::row::Stored;
use time::OffsetDateTime;

use super::failures::{PAUSE_FIRST, PAUSE_MAX, pause};
use super::{
    DECIDED_AFTER, Outcome, QuestionError, Questions, commit, email_if_found, insert_orphan,
    is_erased, rewrite,
};
use crate::error::StoreError;
use crate::store::Transaction;
use crate::store::question::{self, Taken};
use crate::stream::own_event::{self, Fetched, Scope};
use crate::stream::progress::{self, ProgressError};
use crate::stripe::api::StripeApi;

/// How long a fetched session usually takes at most through the stream to its row.
const CLAIM_MAX: Duration = Duration::from_secs(60);

/// How soon a question that only Stripe could answer is retried without a key for the row's mode.
const RETRY_WITHOUT_STRIPE: Duration = Duration::from_secs(60 * 60);

/// The longest pause until a grace period's end is checked again: a clock may be set right.
pub(super) const CHECK_MAX: Duration = Duration::from_secs(60 * 60);

/// What Stripe's API knows of a subscription without a user.
enum Found {
    /// A Checkout Session that claims it, which is on its way to its row.
    Claim,
    /// No such session. The customer's email, if there is one.
    Email(Option<Email>),
    /// Nothing, because Stripe could not be asked.
    Nothing,
}

impl Questions {
    /// Ends a grace period once both clocks have reached its end and every event received before
    /// is applied, so that neither a wrong clock nor a backlog makes orphans. Creates an orphan if
    /// the row still needs a user.
    pub(super) async fn end_grace(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        let Some(stored) = self.load_if_needs_user(question).await? else {
            // If the row needs a user again, that batch opens the question again.
            return self.close(taken).await;
        };
        let row = stored.state.visible();
        // If a session is applied after this read, writing the row as it was read conflicts with
        // it.
        let dt_created = stored.dt_created.unwrap_or(question.due_at);
        let ours = OffsetDateTime::now_utc();
        let brokers = progress::broker_time(&self.jetstream)
            .await?
            .unwrap_or(ours);
        let dt_created = orphan::first_written(dt_created, taken.opened, ours.min(brokers));
        let end = orphan::grace_period_end(&row, dt_created, self.orphans.grace);
        if let Some(remaining) = orphan::remaining_grace(end, ours, brokers) {
            return Ok(Outcome::RetryAfter(remaining.min(CHECK_MAX)));
        }
        let is_before = |at| orphan::may_be_received_before(end, at, ours, brokers);
        if !progress::has_applied_all(&self.jetstream, is_before).await? {
            let pause = pause(PAUSE_FIRST, PAUSE_MAX, question.attempts);
            return Ok(Outcome::RetryAfter(pause));
        }
        let stream_covers_sessions = self.stream_covers_sessions(&row).await?;
        if !stream_covers_sessions && orphan::had_ended_before(&row, dt_created) {
            return self.close(taken).await;
        }
        let stripe = self.stripe.as_ref();
        let stripe = stripe.filter(|stripe| stripe.sees(question.livemode));
        let found = match stripe {
            Some(stripe) => self.search(stripe, taken).await,
            None => Ok(Found::Nothing),
        };
        // A rebuild has yet to bring the session of a withheld row, or has lost it.
        let may_have_session =
            !(stream_covers_sessions || row.searched) || stored.last_sent.is_withheld();
        match found {
            Ok(Found::Claim) => {
                let pause = pause(CLAIM_MAX, PAUSE_MAX, question.attempts);
                Ok(Outcome::RetryAfter(pause))
            }
            Ok(Found::Email(email)) => Ok(self.record_orphan(taken, stored, email).await?),
            Ok(Found::Nothing) if may_have_session => Ok(Outcome::RetryAfter(RETRY_WITHOUT_STRIPE)),
            Ok(Found::Nothing) => Ok(self.record_orphan(taken, stored, None).await?),
            Err(error) => {
                // What Stripe refuses for good is decided as without a key.
                let is_due = taken.is_failing && question.attempts >= DECIDED_AFTER;
                if is_due && error.is_lasting() && !may_have_session {
                    return Ok(self.record_orphan(taken, stored, None).await?);
                }
                Err(error)
            }
        }
    }

    /// Asks Stripe for Checkout Sessions that claim the subscription, and if there is none for its
    /// customer's email.
    async fn search(&self, stripe: &StripeApi, taken: &Taken) -> Result<Found, QuestionError> {
        let question = &taken.question;
        if is_erased(&self.erasures, self.store.connection(), question).await? {
            return Ok(Found::Email(None));
        }
        if self.publish_claims(stripe, question).await? {
            return Ok(Found::Claim);
        }
        let email = email_of_customer(stripe, question).await;
        Ok(Found::Email(email_if_found(taken, email)?))
    }

    /// Loads the row. Returns `None` if it needs no user any more.
    async fn load_if_needs_user(&self, question: &Question) -> Result<Option<Stored>, StoreError> {
        let stored = self.load_row(&question.entity_id).await?;
        Ok(stored.filter(|stored| orphan::needs_user(&stored.state.visible())))
    }

    /// Whether the stream held every Checkout Session that could claim the row.
    async fn stream_covers_sessions(&self, row: &Visible) -> Result<bool, ProgressError> {
        // The creation event is proof enough, and nearly every row has it.
        Ok(row.created_event_seen
            || orphan::stream_covers_sessions(
                row,
                progress::stream_created(&self.jetstream).await?,
            ))
    }

    /// Publishes as events the Checkout Sessions that Stripe lists for the subscription and that
    /// claim it. Returns whether there was one.
    ///
    /// The other sessions add nothing, and publishing them would only conflict with writing the
    /// orphan.
    async fn publish_claims(
        &self,
        stripe: &StripeApi,
        question: &Question,
    ) -> Result<bool, QuestionError> {
        let account = question.account();
        let answer = match stripe
            .checkout_sessions_of(&question.entity_id, account)
            .await
        {
            Ok(answer) => answer,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let page = api::page(&answer.body)
            .ok_or_else(|| answer.unusable("it is no list of Checkout Sessions"))?;
        let fetched = Fetched {
            trace: question.trace.as_ref(),
            ..Fetched::from_answer(&answer)?
        };
        let mut is_claimed = false;
        for session in &page.objects {
            let scope = Scope {
                livemode: session.livemode,
                account,
            };
            let is_claim = own_event::snapshot(&session.id, &session.raw, fetched, scope)
                .is_ok_and(|body| claims(&body, &question.entity_id));
            if !is_claim {
                continue;
            }
            own_event::publish_snapshot(&self.jetstream, &session.id, &session.raw, fetched, scope)
                .await?;
            is_claimed = true;
        }
        Ok(is_claimed)
    }

    /// Records the orphan and closes the question, unless the row changed since it was read.
    async fn record_orphan(
        &self,
        taken: &Taken,
        stored: Stored,
        email: Option<Email>,
    ) -> Result<Outcome, StoreError> {
        let (taken, relay, now) = (taken.clone(), self.relay.clone(), OffsetDateTime::now_utc());
        let erasures = self.erasures.clone();
        let record = async move |tx: Transaction| {
            let question = &taken.question;
            let is_erased = is_erased(&erasures, &tx, question).await?;
            if !rewrite(&tx, &question.entity_id, stored, now).await?
                || !question::remove_answered(&tx, &taken).await?
            {
                return Ok(Outcome::Conflict);
            }
            insert_orphan(
                &tx,
                question,
                OrphanReason::NoCheckoutSession,
                email.filter(|_| !is_erased),
                now,
            )
            .await?;
            commit(tx, &relay).await?;
            Ok(Outcome::Answered)
        };
        self.store.uncancelled(record).await
    }
}

/// Whether the event of a Checkout Session gives the subscription `id` a user or makes it an
/// orphan. A session that cannot be applied does neither.
fn claims(event: &[u8], id: &str) -> bool {
    let none = MetadataKeys::Only(Default::default());
    match event::decode(event, &none) {
        Ok(Some(Event {
            body: Body::CheckoutSession(session),
            ..
        })) => session.stripe_subscription_id.as_deref() == Some(id) && session.is_claim(),
        _ => false,
    }
}

async fn email_of_customer(
    stripe: &StripeApi,
    question: &Question,
) -> Result<Option<Email>, QuestionError> {
    let Details::Grace {
        stripe_customer_id: Some(customer),
    } = &question.details
    else {
        return Ok(None);
    };
    match stripe.customer(customer, question.account()).await {
        Ok(answer) => Ok(api::customer_email(&answer.body)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
