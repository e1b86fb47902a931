//! Erases customers that were deleted at Stripe, and the emails of old orphans.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::asker::POLL;
use super::failures::pause as pause_after;
use super::user::{UNKNOWN_RETRY_FIRST, UNKNOWN_RETRY_MAX};
use super::{Outcome, QuestionError, Questions};
use crate::erasure::{EraseError, Erasure, Receipt, Target};
use crate::store;
use crate::store::question::Taken;
use crate::stream::progress;
use crate::wait::pause;

/// The longest time between two checks for old emails.
const ERASE_EVERY: Duration = Duration::from_secs(60 * 60);

impl Questions {
    /// Erases a customer that was deleted at Stripe, once all their events are applied.
    pub(super) async fn erase_customer(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        let (store, jetstream, erasures) = (&self.store, &self.jetstream, &self.erasures);
        let erasure = Erasure {
            store,
            jetstream,
            erasures,
            force: false,
            on_message: &|| {},
        };
        match erasure
            .run(&Target::Customer(question.entity_id.clone()))
            .await
        {
            Ok(receipt) => {
                let Receipt {
                    events,
                    subscriptions,
                    orphans,
                    ..
                } = receipt;
                info!(
                    entity_id = question.entity_id,
                    events, subscriptions, orphans, "erased {}", question.entity_id
                );
                self.close(taken).await
            }
            // Every attempt reads the whole stream, so the pauses grow.
            Err(EraseError::Unapplied(_) | EraseError::ArrivedMeanwhile(_)) => {
                Ok(Outcome::RetryAfter(pause_after(
                    UNKNOWN_RETRY_FIRST,
                    UNKNOWN_RETRY_MAX,
                    question.attempts.saturating_add(1),
                )))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Erases emails that are older than the setting allows, until `shutdown`. They are that old by
    /// each of the clocks of this process, the database and the broker, because an email does not
    /// come back.
    pub(super) async fn erase_old_emails(self: Arc<Self>, shutdown: CancellationToken) {
        let age = self.orphans.email_max_age;
        // So no email is kept for longer than one and a half times the allowed age.
        let every = (age / 2).clamp(POLL, ERASE_EVERY);
        let age = time::Duration::try_from(age).unwrap_or(time::Duration::MAX);
        loop {
            let erased = match self.earliest_clock().await {
                Ok(now) => self.erase_emails_before(now.checked_sub(age)).await,
                Err(error) => Err(error),
            };
            if let Ok(erased @ 1..) = erased {
                info!(
                    erased,
                    "erased {erased} emails of old orphans (LITESTRIPE_ORPHAN_EMAIL_MAX_AGE)"
                );
            }
            if pause(if erased.is_ok() { every } else { POLL }, &shutdown)
                .await
                .is_none()
            {
                return;
            }
        }
    }

    async fn erase_emails_before(
        &self,
        before: Option<OffsetDateTime>,
    ) -> Result<u64, QuestionError> {
        match before {
            Some(before) => Ok(store::orphan::erase_emails(self.store.connection(), before).await?),
            None => Ok(0),
        }
    }

    async fn earliest_clock(&self) -> Result<OffsetDateTime, QuestionError> {
        let ours = OffsetDateTime::now_utc();
        let databases = store::clock::now(self.store.connection()).await?;
        let brokers = progress::broker_time(&self.jetstream)
            .await?
            .unwrap_or(ours);
        Ok(ours.min(databases).min(brokers))
    }
}
