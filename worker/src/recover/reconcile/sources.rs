//! One subscription: as Stripe has it, held against its row, and what mends the row.
//!
//! Owns whose a subscription is where its row does not say, and what is stored to mend it. May not know
//! the walk, or when a difference counts.

use std::sync::atomic::{AtomicU64, Ordering};

use async_nats::jetstream;
use litestripe_contract::signal::Subscription;
use litestripe_domain::event::{self, Body, DecodeError, MetadataKeys, api};
use litestripe_domain::merge::State;
use litestripe_domain::payment::PaymentIds;
use litestripe_entity::orphaned_payment;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ReconcileError;
use super::difference::{self, Claim};
use super::report::{Finding, Problem};
use crate::erasure::Erasures;
use crate::store::whole::{self, Whole};
use crate::store::{self, Store};
use crate::stream::own_event::{self, Resolution, Scope};
use crate::stripe::api::{ApiError, StripeApi};
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

/// A subscription as Stripe has it.
pub(super) struct Fetched {
    pub(super) object: api::Object,
    as_of: i64,
    shown: Subscription,
    /// Whether it is an erased person's: then nothing personal is compared, asked for, or stored.
    is_erased: bool,
}

/// A subscription held against its row.
pub(super) struct Look {
    pub(super) fetched: Fetched,
    claims: Claims,
    pub(super) version: i64,
    pub(super) seen: Seen,
}

pub(super) enum Seen {
    Equal,
    /// The row is newer than the answer.
    Newer(Finding),
    Different(Finding),
    /// Different, and writing the row would make it worse.
    Stuck(Finding),
}

/// What is known of whose a subscription is, beyond its row.
#[derive(Default)]
pub(super) struct Claims {
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

impl Sources<'_> {
    /// What Stripe answers, unless it is told to stop first: a question changes nothing.
    pub(super) async fn answer<T>(
        &self,
        question: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<Result<T, ApiError>, ReconcileError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(ReconcileError::Stopped),
            answer = question => Ok(answer),
        }
    }

    pub(super) fn go_on(&self) -> Result<(), ReconcileError> {
        if self.stop.is_cancelled() { Err(ReconcileError::Stopped) } else { Ok(()) }
    }

    pub(super) async fn sleep_until(&self, end: Instant) -> Result<(), ReconcileError> {
        tokio::select! {
            () = tokio::time::sleep_until(end) => Ok(()),
            () = self.stop.cancelled() => Err(ReconcileError::Stopped),
        }
    }

    /// What the row would show of a subscription, had nothing else come.
    pub(super) fn read(&self, object: api::Object, as_of: i64) -> Result<Result<Fetched, Finding>, ReconcileError> {
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
    pub(super) async fn compare(
        &self,
        fetched: Fetched,
        row: Option<&Whole>,
        calls: &AtomicU64,
    ) -> Result<Look, ReconcileError> {
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
    pub(super) async fn publish(&self, jetstream: &jetstream::Context, look: &Look) -> Result<u64, ReconcileError> {
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
                payment: PaymentIds { stripe_subscription_id: Some(id.to_owned()), ..store::orphan::payment(orphan) },
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

impl Look {
    /// What is wrong with another version of its row, if anything.
    pub(super) fn finding(&self, row: Option<&Whole>) -> Option<Finding> {
        finding_of(&self.fetched, &self.claims.claim, row)
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

/// What is listed without `Stripe-Account` is the account's own.
fn scope(livemode: bool) -> Scope<'static> {
    Scope { livemode, account: None }
}
