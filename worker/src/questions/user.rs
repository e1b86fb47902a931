//! The user lookup's questions: a paid session whose user is unknown becomes an orphan.

use std::time::Duration;

use async_nats::jetstream::context::GetStreamError;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};
use litestripe_contract::signal::OrphanReason;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::arrival::StreamId;
use litestripe_domain::event::{self, Body, Email, Event, MetadataKeys};
use litestripe_domain::payment::ClientReferenceId;
use litestripe_domain::question::{Details, Question};
use litestripe_domain::row::Stored;
use litestripe_domain::signal;
use sea_orm::ConnectionTrait;
use time::OffsetDateTime;

use super::failures::pause;
use super::{
    Outcome, QuestionError, Questions, cause, commit, email_if_found, insert_orphan, is_erased,
    rewrite,
};
use crate::error::StoreError;
use crate::store;
use crate::store::Transaction;
use crate::store::question::{self, Taken};

/// How soon the lookup is asked again about an unknown user. The pause doubles with each answer.
pub(super) const UNKNOWN_RETRY_FIRST: Duration = Duration::from_secs(15);
pub(super) const UNKNOWN_RETRY_MAX: Duration = Duration::from_secs(60 * 60);

/// Why the session's event cannot be read from the stream.
#[derive(Debug, thiserror::Error)]
pub(super) enum EmailError {
    #[error(transparent)]
    Stream(#[from] GetStreamError),
    #[error(transparent)]
    Message(#[from] RawMessageError),
}

impl Questions {
    /// Asks whether the client reference id is a user's. If it is unknown and the session is paid,
    /// creates an orphan.
    pub(super) async fn look_up(&self, taken: &Taken) -> Result<Outcome, QuestionError> {
        let question = &taken.question;
        // The row may have a different client reference id by now.
        let stored = load_row(self.store.connection(), question).await?;
        if stored.is_none() && question.payment().stripe_subscription_id.is_some() {
            // The session and its row were saved together: the row was deleted by hand.
            return self.close(taken).await;
        }
        let Some(user) = client_reference_id(question, stored.as_ref()) else {
            return self.close(taken).await;
        };
        if self.lookup.knows(ClientReferenceId(&user)).await? {
            return Ok(self.record_known(taken, user).await?);
        }
        let needs_email = is_paid(question)
            && !is_erased(&self.erasures, self.store.connection(), question).await?;
        let email = if needs_email {
            let found = self.email_of_session(question).await;
            email_if_found(taken, found.map_err(QuestionError::from))?
        } else {
            None
        };
        Ok(self.record_unknown(taken, user, email).await?)
    }

    /// Records that the user is known: resolves the orphan, if there is one, and closes the
    /// question.
    async fn record_known(&self, taken: &Taken, user: String) -> Result<Outcome, StoreError> {
        let (taken, relay, now) = (taken.clone(), self.relay.clone(), OffsetDateTime::now_utc());
        let record = async move |tx: Transaction| {
            let question = &taken.question;
            if !rewrite_if_same_user(&tx, question, ClientReferenceId(&user), now).await? {
                return Ok(Outcome::Conflict);
            }
            // The orphan before the question, as in a batch: otherwise both could deadlock.
            let resolved = store::orphan::resolve(
                &tx,
                &question.entity_id,
                ClientReferenceId(&user),
                None,
                now,
            )
            .await?;
            if !question::remove_answered(&tx, &taken).await? {
                return Ok(Outcome::Conflict);
            }
            let resolved = resolved.as_ref().and_then(store::orphan::to_new_orphan);
            let signal = resolved.map(|orphan| signal::orphan_resolved(&orphan, cause(question)));
            store::outbox::insert(&tx, signal.into_iter().collect(), now).await?;
            commit(tx, &relay).await?;
            Ok(Outcome::Answered)
        };
        self.store.uncancelled(record).await
    }

    /// Records that the user is unknown: creates an orphan if the session is paid, and retries for
    /// as long as the orphan is open.
    async fn record_unknown(
        &self,
        taken: &Taken,
        user: String,
        email: Option<Email>,
    ) -> Result<Outcome, StoreError> {
        let (taken, relay, now) = (taken.clone(), self.relay.clone(), OffsetDateTime::now_utc());
        let erasures = self.erasures.clone();
        let record = async move |tx: Transaction| {
            let question = &taken.question;
            let is_erased = is_erased(&erasures, &tx, question).await?;
            let email = email.filter(|_| !is_erased);
            if !rewrite_if_same_user(&tx, question, ClientReferenceId(&user), now).await? {
                return Ok(Outcome::Conflict);
            }
            if is_paid(question) {
                insert_orphan(
                    &tx,
                    question,
                    OrphanReason::UnknownClientReferenceId,
                    email,
                    now,
                )
                .await?;
            }
            let orphan = store::orphan::find(&tx, &question.entity_id).await?;
            let is_open = orphan.is_some_and(|orphan| orphan.resolved_at.is_none());
            if !is_open {
                question::remove_answered(&tx, &taken).await?;
            }
            commit(tx, &relay).await?;
            let attempts = if taken.is_failing {
                0
            } else {
                question.attempts
            };
            let pause = pause(
                UNKNOWN_RETRY_FIRST,
                UNKNOWN_RETRY_MAX,
                attempts.saturating_add(1),
            );
            Ok(if is_open {
                Outcome::RetryAfter(pause)
            } else {
                Outcome::Answered
            })
        };
        self.store.uncancelled(record).await
    }

    /// Returns the email in the session's event, which usually is still in the stream.
    async fn email_of_session(&self, question: &Question) -> Result<Option<Email>, EmailError> {
        let stream = self.jetstream.get_stream(EVENTS_STREAM).await?;
        let id = StreamId::from_created(stream.cached_info().created);
        let Some(sequence) = id.sequence(question.position) else {
            return Ok(None);
        };
        let message = match stream.get_raw_message(sequence).await {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let none = MetadataKeys::Only(Default::default());
        Ok(match event::decode(&message.payload, &none) {
            Ok(Some(Event {
                id,
                body: Body::CheckoutSession(session),
                ..
            })) if id == question.event.id => session.customer_email,
            _ => None,
        })
    }
}

/// Writes the row unchanged if it still names this user, so that a batch that changes it at the
/// same moment conflicts. Returns whether the answer still holds. A payment without a subscription
/// has no row to write.
async fn rewrite_if_same_user(
    tx: &Transaction,
    question: &Question,
    user: ClientReferenceId<'_>,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let Some(stored) = load_row(tx, question).await? else {
        return Ok(question.payment().stripe_subscription_id.is_none());
    };
    let is_same = client_reference_id(question, Some(&stored)).as_deref() == Some(user.0);
    Ok(is_same && rewrite(tx, &question.entity_id, stored, now).await?)
}

async fn load_row<C: ConnectionTrait>(
    db: &C,
    question: &Question,
) -> Result<Option<Stored>, StoreError> {
    let Some(id) = question.payment().stripe_subscription_id else {
        return Ok(None);
    };
    Ok(store::subscription::load(db, &[&id]).await?.remove(&id))
}

/// Returns the client reference id to ask about: the row's, or the session's if there is no row.
fn client_reference_id(question: &Question, stored: Option<&Stored>) -> Option<String> {
    match (stored, &question.details) {
        (Some(stored), _) => stored.state.visible().subscription.client_reference_id,
        (
            None,
            Details::Lookup {
                client_reference_id,
                ..
            },
        ) => Some(client_reference_id.clone()),
        (None, _) => None,
    }
}

fn is_paid(question: &Question) -> bool {
    matches!(question.details, Details::Lookup { is_paid: true, .. })
}
