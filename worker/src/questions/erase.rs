//! Erases customers that were deleted at Stripe, late messages of erased persons, and the emails of
//! old orphans.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use litestripe_domain::question::Kind;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::asker::{POLL, lease};
use super::failures::pause as pause_after;
use super::user::{UNKNOWN_RETRY_FIRST, UNKNOWN_RETRY_MAX};
use super::{Outcome, QuestionError, Questions};
use crate::erasure::{self, Erasure, Receipt, Target};
use crate::error::StoreError;
use crate::store;
use crate::store::question::{Due, Retry, Taken};
use crate::stream::progress;
use crate::wait::{Awaited, Wait, pause};

/// The longest time between two checks for old emails.
const ERASE_EVERY: Duration = Duration::from_secs(60 * 60);

/// The wait of the erasure of old emails, for the database or for the broker's clock.
const EMAILS: Awaited = Awaited {
    begins: "emails of old orphans wait to be erased",
    ends: "emails of old orphans are erased again",
    first: POLL,
    longest: Duration::from_secs(60),
    shown: None,
};

/// Customers that are erased together, at most: the streams are read once for all of them.
const TOGETHER_MAX: u64 = 50;

impl Questions {
    /// Erases a customer that was deleted at Stripe, once all their events are applied, and with
    /// this one all others that are due.
    pub(super) async fn erase_customer(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let (store, jetstream, erasures) = (&self.store, &self.jetstream, &self.erasures);
        let erasure = Erasure {
            store,
            jetstream,
            erasures,
            force: false,
            on_message: &|| {},
        };
        let due = Due {
            kind: Kind::Erase,
            livemode: None,
            limit: TOGETHER_MAX,
        };
        let others = store::question::take(store, due, lease(Kind::Erase)).await?;
        let all: Vec<&Taken> = [taken].into_iter().chain(&others).collect();
        let targets: Vec<_> = all
            .iter()
            .map(|taken| Target::Customer(taken.question.entity_id.clone()))
            .collect();
        let erased = erasure.run(&targets).await;
        let waiting: BTreeSet<usize> = match &erased {
            Ok(outcome) => outcome.waiting.iter().map(|(index, _)| *index).collect(),
            Err(_) => (0..all.len()).collect(),
        };
        for (index, taken) in all.iter().enumerate().skip(1) {
            if waiting.contains(&index) {
                self.retry_erasure(taken).await?;
            } else {
                self.close_erased(taken).await?;
            }
        }
        if let Some(receipt) = erased?.receipt {
            let Receipt {
                events,
                subscriptions,
                orphans,
                ..
            } = receipt;
            let count = all.len() - waiting.len();
            info!(
                events,
                subscriptions, orphans, "erased the data of {count} customers"
            );
        }
        if waiting.contains(&0) {
            return Ok(Outcome::RetryAfter(erasure_pause(taken)));
        }
        self.close_erased(taken).await
    }

    async fn close_erased(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let id = &taken.question.entity_id;
        info!(entity_id = id, "erased {id}");
        self.close(taken).await
    }

    async fn retry_erasure(&self, taken: &Taken) -> Result<(), StoreError> {
        let retry = Retry {
            after: erasure_pause(taken),
            attempts: taken.question.attempts.saturating_add(1),
            error: None,
        };
        store::question::postpone(self.store.connection(), taken, retry).await
    }

    /// Removes a late message of an erased person.
    pub(super) async fn remove_late(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        self.erasures.refresh(self.store.connection()).await?;
        let place = &taken.question.entity_id;
        erasure::remove_covered(&self.jetstream, &self.erasures, place).await?;
        self.close(taken).await
    }

    /// Erases emails that are older than the setting allows, until `shutdown`. They are that old by
    /// each of the clocks of this process, the database and the broker, because an email does not
    /// come back.
    pub(super) async fn erase_old_emails(self: Arc<Self>, shutdown: CancellationToken) {
        let age = self.orphans.email_max_age;
        // So no email is kept for longer than one and a half times the allowed age.
        let every = (age / 2).clamp(POLL, ERASE_EVERY);
        let age = time::Duration::try_from(age).unwrap_or(time::Duration::MAX);
        let mut wait = Wait::new(Awaited {
            longest: EMAILS.longest.min(every),
            ..EMAILS
        });
        loop {
            let erased = match self.earliest_clock().await {
                Ok(now) => self.erase_emails_before(now.checked_sub(age)).await,
                Err(error) => Err(error),
            };
            let until_next = match erased {
                Ok(erased) => {
                    wait.succeeded();
                    if erased > 0 {
                        info!(
                            erased,
                            "erased {erased} emails of old orphans (LITESTRIPE_ORPHAN_EMAIL_MAX_AGE)"
                        );
                    }
                    every
                }
                Err(error) => wait.failed(&error),
            };
            if pause(until_next, &shutdown).await.is_none() {
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

/// Every attempt reads the streams, so the pauses grow.
fn erasure_pause(taken: &Taken) -> Duration {
    pause_after(
        UNKNOWN_RETRY_FIRST,
        UNKNOWN_RETRY_MAX,
        taken.question.attempts.saturating_add(1),
    )
}
