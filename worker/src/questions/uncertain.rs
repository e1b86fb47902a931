//! The fetch of an uncertain subscription: its events alone do not determine its state.

use std::time::Duration;

use litestripe_domain::event::api;
use tracing::warn;

use super::grace::CHECK_MAX;
use super::user::UNKNOWN_RETRY_MAX;
use super::{Outcome, QuestionError, Questions};
use crate::store::question::Taken;
use crate::stream::own_event::{self, Fetched, Scope};

impl Questions {
    /// Fetches the subscription from Stripe and publishes it as an event, which merges like any
    /// other.
    pub(super) async fn fetch_uncertain(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        let Some(stripe) = self
            .stripe
            .as_ref()
            .filter(|stripe| stripe.sees(question.livemode))
        else {
            return Ok(Outcome::RetryAfter(UNKNOWN_RETRY_MAX));
        };
        let row = self
            .load_row(&question.entity_id)
            .await?
            .map(|stored| stored.state.visible());
        let Some(row) = row.filter(|row| row.subscription.uncertain) else {
            return self.close(taken).await;
        };
        let account = question.account();
        let answer = match stripe.subscription(&question.entity_id, account).await {
            Ok(answer) => answer,
            Err(error) if error.is_not_found() => {
                warn!(
                    entity_id = question.entity_id,
                    "{} stays uncertain: {error}", question.entity_id
                );
                return self.close(taken).await;
            }
            Err(error) => return Err(error.into()),
        };
        let behind = row
            .head_created
            .unwrap_or_default()
            .saturating_sub(answer.as_of()?);
        if let Ok(behind @ 0..) = u64::try_from(behind) {
            // Our clock is ahead of Stripe's, so it is too early: the answer may lack events of the
            // row's newest second.
            let after = Duration::from_secs(behind.saturating_add(1));
            return Ok(Outcome::RetryAfter(after.min(CHECK_MAX)));
        }
        let object =
            api::object(&answer.body).ok_or_else(|| answer.unusable("it is no subscription"))?;
        let scope = Scope {
            livemode: question.livemode,
            account,
        };
        let fetched = Fetched {
            trace: question.trace.as_ref(),
            ..Fetched::from_answer(&answer)?
        };
        own_event::publish_snapshot(&self.jetstream, &object.id, &object.raw, fetched, scope)
            .await?;
        self.close(taken).await
    }
}
