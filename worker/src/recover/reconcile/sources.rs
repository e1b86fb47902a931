//! One subscription: as Stripe has it, compared with its row, and what repairs the row.
//!
//! Owns whose a subscription is where its row does not say, and what is written or stored to repair
//! it. May not know the walk, or when a difference is reported.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use litestripe_domain::event::{self, Body, Event, MetadataKeys, api};
use litestripe_domain::merge::State;
use litestripe_entity::orphaned_payment;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::ReconcileError;
use super::difference;
use super::report::{Finding, Problem};
use crate::erasure::Erasures;
use crate::store::raw::{self, Fields, RawRow};
use crate::store::{self, Store};
use crate::stream::own_event::{self, Resolution, Scope};
use crate::stripe::api::{Answer, ApiError, StripeApi};
use crate::wait::pause;

pub(crate) struct Sources<'a> {
    pub store: &'a Store,
    pub stripe: &'a StripeApi,
    pub metadata_keys: &'a MetadataKeys,
    /// Where repairs are stored, for somebody to apply them. None: nothing is changed.
    pub repair: Option<&'a jetstream::Context>,
    /// Whose personal data is not to come back.
    pub erasures: &'a Erasures,
    pub stop: &'a CancellationToken,
    /// Requests to Stripe so far, retries aside.
    pub calls: AtomicU64,
}

/// A subscription whose row is not as Stripe has it.
pub(super) struct Comparison {
    pub(super) finding: Finding,
    object: api::Object,
    as_of: i64,
    /// The Checkout Session that tells whose it is, and up to when that is known.
    session: Option<(api::Object, i64)>,
    /// The orphan that it was, where no session names its user.
    resolved: Option<orphaned_payment::Model>,
    /// The columns that all of these tell, and what they should be.
    stripe_values: Fields,
    row: Option<RawRow>,
    repair: Repair,
}

/// What repairs a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// Nothing, or not now: events overtook what was fetched.
    None,
    /// Its columns are written anew from its merge state, which is right.
    Columns,
    /// What Stripe says, as events.
    Events,
}

impl Sources<'_> {
    pub(super) async fn sleep(&self, duration: Duration) -> Result<(), ReconcileError> {
        pause(duration, self.stop)
            .await
            .ok_or(ReconcileError::Stopped)
    }

    /// The page of subscriptions after `after`, and up to when it tells every change.
    pub(super) async fn page(
        &self,
        status: &str,
        after: Option<&str>,
    ) -> Result<(api::Page, i64), ReconcileError> {
        let list = self.stripe.subscriptions(status, after);
        self.ask(list, api::page, "it is no list of subscriptions")
            .await
    }

    /// A subscription, and up to when it tells every change. None if Stripe does not know it.
    pub(super) async fn subscription(
        &self,
        id: &str,
    ) -> Result<Option<(api::Object, i64)>, ReconcileError> {
        let subscription = self.stripe.subscription(id, None);
        none_if_not_found(
            self.ask(subscription, api::object, "it is no subscription")
                .await,
        )
    }

    /// What Stripe answers, unless it is told to stop first: a question changes nothing.
    async fn ask<T>(
        &self,
        question: impl Future<Output = Result<Answer, ApiError>>,
        read: fn(&[u8]) -> Option<T>,
        problem: &'static str,
    ) -> Result<(T, i64), ReconcileError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let answer = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(ReconcileError::Stopped),
            answer = question => answer?,
        };
        let read = read(&answer.body).ok_or_else(|| answer.unusable(problem))?;
        Ok((read, answer.as_of()?))
    }

    /// Compares a subscription with its row, and asks for its Checkout Sessions where the row does not
    /// know whose it is. None if there is no difference.
    pub(super) async fn compare(
        &self,
        object: api::Object,
        as_of: i64,
        row: Option<RawRow>,
    ) -> Result<Option<Comparison>, ReconcileError> {
        let finding = Finding::new(&object.id, Problem::CannotBeKept);
        let (session, resolved, stripe_values, repair) = (None, None, Fields::new(), Repair::None);
        let mut comparison = Comparison {
            finding,
            object,
            as_of,
            session,
            resolved,
            stripe_values,
            row,
            repair,
        };
        let event = match self.decode(&comparison.object, as_of) {
            Ok(event) => event,
            Err(note) => {
                comparison.finding.note = Some(note);
                return Ok(Some(comparison));
            }
        };
        let is_erased = self.erasures.covers(&event);
        let mut state = State::default();
        state.merge(&self.erasures.redacted(event));
        comparison.stripe_values = difference::stripe_columns(raw::columns_of(&state));
        if is_erased {
            // What Stripe has of it is not to come back, and what the row has is younger than the erasure.
            comparison.stripe_values.remove("subscription_metadata");
            comparison.object = comparison
                .object
                .without_personal_data()
                .unwrap_or(comparison.object);
        } else {
            self.add_user(&mut comparison).await?;
        }
        let Some(finding) = comparison.compared_with(comparison.row.as_ref()) else {
            return Ok(None);
        };
        comparison.finding = finding;
        comparison.choose_repair();
        Ok(Some(comparison))
    }

    /// The event that stores `object`, or why it cannot be kept.
    fn decode(&self, object: &api::Object, as_of: i64) -> Result<Event, String> {
        let body = own_event::snapshot(&object.id, &object.raw, as_of, scope(object.livemode));
        let body = body.map_err(|error| error.to_string())?;
        let event = event::decode(&body, self.metadata_keys).map_err(|error| error.to_string())?;
        event.ok_or_else(|| "it is no subscription".to_owned())
    }

    /// Adds whose a subscription is, if its merge state does not say: as was found when it was an orphan,
    /// else as its newest Checkout Session with a client reference id says.
    async fn add_user(&self, comparison: &mut Comparison) -> Result<(), ReconcileError> {
        let state = comparison
            .row
            .as_ref()
            .and_then(|row| row.expected.as_ref());
        let knows = |field: &str| state.is_some_and(|state| !state[field].is_null());
        // A row that is missing is different, whosever it is: only its repair has to know.
        if knows("client_reference_id") || (comparison.row.is_none() && self.repair.is_none()) {
            return Ok(());
        }
        // Without a user a session only makes an orphan: of a subscription that ended, nobody's to care for.
        let status = comparison.stripe_values["status"].as_str();
        let ended = matches!(status, Some("canceled" | "incomplete_expired"));
        let wants_any = !ended && !knows("checkout_session_id");
        let id = comparison.id();
        let orphan = store::orphan::find(self.store.connection(), id).await?;
        let user = orphan
            .as_ref()
            .and_then(|orphan| orphan.resolved_client_reference_id.clone());
        let listed = self.stripe.checkout_sessions_of(id, None);
        let listed = self
            .ask(listed, api::page, "it is no list of Checkout Sessions")
            .await;
        let listed = none_if_not_found(listed)?;
        let (objects, as_of) = listed.map_or((Vec::new(), comparison.as_of), |(page, as_of)| {
            (page.objects, as_of)
        });
        let mut sessions = Vec::new();
        for object in objects {
            // What cannot be kept says nothing about whose it is.
            if let Ok(Event {
                body: Body::CheckoutSession(session),
                ..
            }) = self.decode(&object, as_of)
            {
                sessions.push((object, session.client_reference_id));
            }
        }
        // An operator may have said otherwise: a session that is stored as of now would overrule that.
        sessions.retain(|(_, named)| user.is_none() || named.is_none() || *named == user);
        let named = sessions.iter().position(|(_, named)| named.is_some());
        let chosen = named.or((wants_any && !sessions.is_empty()).then_some(0));
        let (session, named) = chosen.map(|index| sessions.swap_remove(index)).unzip();
        let named = named.flatten();
        comparison.resolved = orphan.filter(|_| user.is_some() && named.is_none());
        if let Some(user) = named.or(user) {
            comparison
                .stripe_values
                .insert("client_reference_id".to_owned(), json!(user));
        }
        if let Some(session) = &session {
            comparison
                .stripe_values
                .insert("checkout_session_id".to_owned(), json!(session.id));
        }
        comparison.session = session.map(|session| (session, as_of));
        Ok(())
    }

    /// Writes or stores what repairs a row. Returns the last sequence of what was stored in
    /// `STRIPE_EVENTS`.
    pub(super) async fn repair(
        &self,
        jetstream: &jetstream::Context,
        comparison: &Comparison,
    ) -> Result<Option<u64>, ReconcileError> {
        let id = comparison.id();
        if let Some(row) = &comparison.row
            && (comparison.repair == Repair::Columns
                || comparison.repair == Repair::Events && row.state.is_none())
        {
            raw::repair(self.store.connection(), id, row).await?;
        }
        if comparison.repair != Repair::Events {
            return Ok(None);
        }
        let scope = scope(comparison.object.livemode);
        let mut last = own_event::publish_snapshot(
            jetstream,
            id,
            &comparison.object.raw,
            comparison.as_of,
            scope,
        )
        .await?;
        if let Some((object, as_of)) = &comparison.session {
            last = own_event::publish_snapshot(jetstream, &object.id, &object.raw, *as_of, scope)
                .await?
                .max(last);
        }
        if let Some(orphan) = &comparison.resolved {
            let user = orphan.resolved_client_reference_id.as_deref();
            let mut payment = store::orphan::payment_ids(orphan);
            payment.stripe_subscription_id = Some(id.to_owned());
            let resolution = Resolution {
                orphan_id: &orphan.id,
                client_reference_id: user.unwrap_or_default(),
                payment,
                reason: &orphan.reason,
            };
            let at = orphan
                .resolved_at
                .unwrap_or(orphan.dt_last_updated)
                .unix_timestamp();
            last =
                own_event::repeat_resolution(jetstream, &resolution, at, scope, comparison.as_of)
                    .await?
                    .max(last);
        }
        Ok(Some(last))
    }
}

impl Comparison {
    /// What is wrong with `row`, if anything.
    fn compared_with(&self, row: Option<&RawRow>) -> Option<Finding> {
        let finding = |problem| Finding::new(&self.object.id, problem);
        let Some(row) = row else {
            return Some(finding(Problem::Missing));
        };
        let mut finding = match (&row.columns, &row.expected) {
            (None, _) => finding(Problem::Unreadable).with_note("a column cannot be read"),
            (_, None) => finding(Problem::Unreadable).with_note("merge_state cannot be read"),
            _ => finding(Problem::Different),
        };
        finding.differences = difference::differences(&self.stripe_values, row);
        (finding.problem == Problem::Unreadable || !finding.differences.is_empty())
            .then_some(finding)
    }

    /// Where the merge state says what Stripe says, its columns need no event. An answer that is not newer
    /// than the row says nothing about it, so that it is only looked at again.
    fn choose_repair(&mut self) {
        let (stripe_values, row) = (&self.stripe_values, self.row.as_ref());
        if row.is_some_and(|row| difference::only_the_column_knows_the_user(stripe_values, row)) {
            let note = "not repairable: only this column knows the client reference id, and writing the row would lose it";
            self.finding.note = Some(note.to_owned());
            return;
        }
        let head = row.and_then(|row| row.state.as_ref()?.visible().head_created);
        if row.is_some_and(|row| difference::only_columns_differ(stripe_values, row)) {
            self.repair = Repair::Columns;
        } else if head.is_none_or(|head| head < self.as_of) {
            self.repair = Repair::Events;
        }
    }

    /// Whether it was repaired, `row` being what it is now.
    pub(super) fn is_repaired(&self, row: Option<&RawRow>) -> bool {
        self.repair != Repair::None && self.compared_with(row).is_none()
    }

    pub(super) fn id(&self) -> &str {
        &self.object.id
    }
}

/// What Stripe answered, or None if it has no such object.
fn none_if_not_found<T>(answer: Result<T, ReconcileError>) -> Result<Option<T>, ReconcileError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(ReconcileError::Api(error)) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is listed without `Stripe-Account` is the account's own.
fn scope(livemode: bool) -> Scope<'static> {
    Scope {
        livemode,
        account: None,
    }
}
