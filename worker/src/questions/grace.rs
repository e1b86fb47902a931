//! The end of a grace period: a subscription that no Checkout Session has claimed becomes an
//! orphan.

use std::time::Duration;

use litestripe_contract::signal::OrphanReason;
use litestripe_domain::event::{Email, api};
use litestripe_domain::orphan;
use litestripe_domain::question::{Details, Question};
use litestripe_domain::row::Stored;
use sea_orm::DatabaseTransaction;
use time::OffsetDateTime;

use super::asker::RETRY;
use super::{Outcome, QuestionError, Questions, commit, insert_orphan, is_erased, rewrite};
use crate::error::StoreError;
use crate::store::question::{self, Taken};
use crate::stream::own_event::{self, Fetched, Scope};
use crate::stream::progress;
use crate::stripe::api::StripeApi;

/// How long a fetched session may take through the stream to its row.
const CLAIM_MAX: Duration = Duration::from_secs(60);

impl Questions {
    /// Ends a grace period once every event received before its end is applied, so that a backlog
    /// makes no orphans. Creates an orphan if the subscription is still unclaimed and may have been
    /// paid.
    pub(super) async fn end_grace(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        let Some(stored) = self.load_unclaimed(question).await? else {
            return self.close(taken).await;
        };
        let row = stored.state.visible();
        if !orphan::may_be_paid(row.subscription.status.as_deref()) {
            // The batch that applies the payment opens the question again.
            return self.close(taken).await;
        }
        // If a session is applied after this read, writing the row as it was read conflicts with
        // it.
        let end = orphan::grace_period_end(
            &row,
            stored.dt_created.unwrap_or(question.due_at),
            self.orphans.grace,
        );
        if !progress::has_applied_all_before(&self.jetstream, end).await? {
            return Ok(Outcome::RetryAfter(RETRY));
        }
        let mut email = None;
        let stripe = self
            .stripe
            .as_ref()
            .filter(|stripe| stripe.sees(question.livemode));
        if let Some(stripe) = stripe
            && !is_erased(&self.erasures, self.store.connection(), question).await?
        {
            if self.publish_sessions(stripe, question).await? {
                return Ok(Outcome::RetryAfter(CLAIM_MAX));
            }
            email = email_of_customer(stripe, question).await?;
        }
        Ok(self.record_unclaimed(taken, stored, email).await?)
    }

    /// Loads the row. Returns `None` if it has a Checkout Session or a client reference id by now.
    async fn load_unclaimed(&self, question: &Question) -> Result<Option<Stored>, StoreError> {
        Ok(self.load_row(&question.entity_id).await?.filter(|stored| {
            let row = stored.state.visible();
            row.checkout_session_id.is_none() && row.subscription.client_reference_id.is_none()
        }))
    }

    /// Publishes the Checkout Sessions that Stripe lists for the subscription as events. Returns
    /// whether there was one.
    async fn publish_sessions(
        &self,
        stripe: &StripeApi,
        question: &Question,
    ) -> Result<bool, QuestionError> {
        let account = question.account();
        let mark = progress::last_sequence(&self.jetstream).await?;
        let answer = stripe
            .checkout_sessions_of(&question.entity_id, account)
            .await?;
        let page = api::page(&answer.body)
            .ok_or_else(|| answer.unusable("it is no list of Checkout Sessions"))?;
        for session in &page.objects {
            let scope = Scope {
                livemode: session.livemode,
                account,
            };
            own_event::publish_snapshot(
                &self.jetstream,
                &session.id,
                &session.raw,
                Fetched::from_answer(&answer, mark)?,
                scope,
            )
            .await?;
        }
        Ok(!page.objects.is_empty())
    }

    /// Records the orphan and closes the question, unless the row changed since it was read.
    async fn record_unclaimed(
        &self,
        taken: &Taken,
        stored: Stored,
        email: Option<Email>,
    ) -> Result<Outcome, StoreError> {
        let (taken, relay, now) = (taken.clone(), self.relay.clone(), OffsetDateTime::now_utc());
        let erasures = self.erasures.clone();
        let record = async move |tx: DatabaseTransaction| {
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
