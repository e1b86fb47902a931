//! The fetch of an object that changed according to thin events.

use litestripe_domain::event::{NotifiedObject, api};
use litestripe_domain::question::{Details, GATHER, Notified};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Outcome, QuestionError, Questions, is_erased};
use crate::store::question::Taken;
use crate::stream::own_event::{self, Fetched, Scope};

impl Questions {
    /// Fetches the object and publishes it as an event, which merges like any other. One fetch
    /// answers all thin events about the object that were received before it began.
    pub(super) async fn fetch_notified(
        &self,
        taken: &Taken,
        shutdown: &CancellationToken,
    ) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        let (Some(stripe), Details::Notification(notified)) = (&self.stripe, &question.details)
        else {
            // Such questions are not taken without a key.
            return Ok(Outcome::HandedBack);
        };
        let (id, account) = (question.entity_id.as_str(), question.account());
        let fetch = async {
            match notified.object {
                NotifiedObject::Subscription(_) => stripe.subscription(id, account).await,
                NotifiedObject::CheckoutSession(_) => stripe.checkout_session(id, account).await,
            }
        };
        // A call may have to wait for the budget. A stopping worker hands the question back, so
        // that another one need not wait for the end of the lease.
        let Some(answer) = shutdown.run_until_cancelled(fetch).await else {
            return Ok(Outcome::HandedBack);
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) if error.is_not_found() => {
                warn!(
                    entity_id = id,
                    event_id = %question.event.id,
                    "{id} does not exist at Stripe, although a thin event announced a change of it: {error}"
                );
                return self.close(taken).await;
            }
            Err(error) => return Err(error.into()),
        };
        let mut object = api::object(&answer.body)
            .filter(|object| object.id == id)
            .ok_or_else(|| answer.unusable("it is not the object that was asked for"))?;
        if is_erased(&self.erasures, self.store.connection(), question).await? {
            object = object.without_personal_data().unwrap_or(object);
        }
        let fetched = Fetched {
            notifications: &notified.references(),
            trace: question.trace.as_ref(),
            ..Fetched::from_answer(&answer)?
        };
        let fetched = Fetched {
            as_of: as_of(notified, &fetched),
            ..fetched
        };
        let scope = Scope {
            livemode: question.livemode,
            account: question.stripe_account(),
        };
        own_event::publish_snapshot(&self.jetstream, &object.id, &object.raw, fetched, scope)
            .await?;
        Ok(match self.close(taken).await? {
            // Thin events came during the fetch, and more of them may follow.
            Outcome::Conflict => Outcome::RetryAfter(GATHER),
            outcome => outcome,
        })
    }
}

/// Returns the time of the event that carries the fetched object.
///
/// Which Checkout Session of a subscription is the newest must not depend on which of them was
/// fetched last, so a session has the time of its newest thin event, as its snapshot event would.
fn as_of(notified: &Notified, fetched: &Fetched<'_>) -> i64 {
    let created = notified
        .notifications
        .values()
        .map(|event| event.created.unix());
    match notified.object {
        NotifiedObject::Subscription(_) => fetched.as_of,
        NotifiedObject::CheckoutSession(_) => created.max().unwrap_or(fetched.as_of),
    }
}
