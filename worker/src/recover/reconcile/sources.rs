//! The comparison of one of Stripe's subscriptions with its row, and the row's repair.
//!
//! Owns how to find a subscription's user if its row does not have one, and what is written or
//! published to repair the row. May not know the walk, or when a difference is reported.

use std::time::Duration;

use async_nats::jetstream;
use litestripe_domain::event::{self, Body, Event, MetadataKeys, api};
use litestripe_domain::merge::State;
use litestripe_entity::orphaned_payment;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::ReconcileError;
use super::difference::{self, Difference};
use super::report::{Finding, Problem};
use crate::erasure::Erasures;
use crate::store::raw::{self, Fields, RawRow};
use crate::store::{self, Store};
use crate::stream::own_event::{self, Fetched, Resolution, Scope};
use crate::stripe::api::{Answer, ApiError, StripeApi};
use crate::wait::pause;

pub(crate) struct Sources<'a> {
    pub store: &'a Store,
    pub stripe: &'a StripeApi,
    pub metadata_keys: &'a MetadataKeys,
    /// Where repairs are published, for a worker to apply them. `None`: nothing is changed.
    pub repair: Option<&'a jetstream::Context>,
    /// The ids whose personal data must not come back.
    pub erasures: &'a Erasures,
    pub stop: &'a CancellationToken,
}

/// A subscription whose row differs from Stripe.
pub(super) struct Comparison {
    pub(super) finding: Finding,
    object: api::Object,
    fetched: Fetched<'static>,
    /// The Checkout Session to publish for the repair, and how it was fetched.
    session: Option<(api::Object, Fetched<'static>)>,
    /// The resolved orphan of this subscription, if no session names the user.
    resolved: Option<orphaned_payment::Model>,
    /// The columns that these objects determine, with their expected values.
    stripe_values: Fields,
    row: Option<RawRow>,
    repair: Repair,
}

/// How a row is repaired.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// Not at all, or not now: newer events than the fetched object are applied.
    None,
    /// Its columns are written again from its merge state, which is right.
    Columns,
    /// Stripe's objects are published as events.
    Events,
}

impl Sources<'_> {
    pub(super) async fn sleep(&self, duration: Duration) -> Result<(), ReconcileError> {
        pause(duration, self.stop)
            .await
            .ok_or(ReconcileError::Stopped)
    }

    /// Fetches the page of subscriptions after `after`.
    pub(super) async fn page(
        &self,
        status: &str,
        after: Option<&str>,
    ) -> Result<(api::Page, Fetched<'static>), ReconcileError> {
        let list = self.stripe.subscriptions(status, after);
        self.ask(list, api::page, "it is no list of subscriptions")
            .await
    }

    /// Fetches a subscription. `None` if Stripe does not know it.
    pub(super) async fn subscription(
        &self,
        id: &str,
    ) -> Result<Option<(api::Object, Fetched<'static>)>, ReconcileError> {
        let subscription = self.stripe.subscription(id, None);
        none_if_not_found(
            self.ask(subscription, api::object, "it is no subscription")
                .await,
        )
    }

    /// Returns a listed subscription with all of its items.
    async fn complete(&self, object: api::Object) -> Result<api::Object, ReconcileError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(ReconcileError::Stopped),
            object = self.stripe.complete(object, None) => Ok(object?),
        }
    }

    /// Returns Stripe's answer, unless a stop is requested first. A request only reads, so that it
    /// can be abandoned at any time.
    async fn ask<T>(
        &self,
        question: impl Future<Output = Result<Answer, ApiError>>,
        read: fn(&[u8]) -> Option<T>,
        problem: &'static str,
    ) -> Result<(T, Fetched<'static>), ReconcileError> {
        let answer = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(ReconcileError::Stopped),
            answer = question => answer?,
        };
        let read = read(&answer.body).ok_or_else(|| answer.unusable(problem))?;
        Ok((read, Fetched::from_answer(&answer)?))
    }

    /// Compares a subscription with its row. Fetches its Checkout Sessions if needed: see
    /// `add_user`. Returns `None` if there is no difference.
    pub(super) async fn compare(
        &self,
        object: api::Object,
        fetched: Fetched<'static>,
        row: Option<RawRow>,
    ) -> Result<Option<Comparison>, ReconcileError> {
        let object = self.complete(object).await?;
        let finding = Finding::new(&object.id, Problem::CannotBeKept);
        let (session, resolved, stripe_values, repair) = (None, None, Fields::new(), Repair::None);
        let mut comparison = Comparison {
            finding,
            object,
            fetched,
            session,
            resolved,
            stripe_values,
            row,
            repair,
        };
        let event = match self.decode(&comparison.object, fetched) {
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
            // Stripe's metadata must not come back, and the row's metadata is newer than the
            // erasure.
            comparison.stripe_values.remove("subscription_metadata");
            comparison.object = comparison
                .object
                .without_personal_data()
                .unwrap_or(comparison.object);
            // The user of an erased customer is not searched for.
            comparison.fetched.searched = true;
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

    /// Decodes `object` as the event that would store it. The error says why that is impossible.
    fn decode(&self, object: &api::Object, fetched: Fetched<'_>) -> Result<Event, String> {
        let body = own_event::snapshot(&object.id, &object.raw, fetched, scope(object.livemode));
        let body = body.map_err(|error| error.to_string())?;
        let event = event::decode(&body, self.metadata_keys).map_err(|error| error.to_string())?;
        event.ok_or_else(|| "it is no subscription".to_owned())
    }

    /// Adds the user, if the merge state has none: the one to whom the subscription was resolved
    /// when it was an orphan, else the one in its newest Checkout Session with a client reference
    /// id.
    async fn add_user(&self, comparison: &mut Comparison) -> Result<(), ReconcileError> {
        let state = comparison
            .row
            .as_ref()
            .and_then(|row| row.expected.as_ref());
        let knows = |field: &str| state.is_some_and(|state| !state[field].is_null());
        // A missing row is a difference whatever its user. Only a repair needs the user.
        if knows("client_reference_id") || (comparison.row.is_none() && self.repair.is_none()) {
            return Ok(());
        }
        // A session without a user only creates an orphan, which an ended subscription does not
        // need.
        let status = comparison.stripe_values["status"].as_str();
        let ended = matches!(status, Some("canceled" | "incomplete_expired"));
        let accepts_any = !ended && !knows("checkout_session_id");
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
        let (objects, fetched) = listed
            .map_or((Vec::new(), comparison.fetched), |(page, fetched)| {
                (page.objects, fetched)
            });
        let mut sessions = Vec::new();
        for object in objects {
            // A session that cannot be stored is no evidence of the user.
            if let Ok(Event {
                body: Body::CheckoutSession(session),
                ..
            }) = self.decode(&object, fetched)
            {
                sessions.push((object, session.client_reference_id));
            }
        }
        // A session is stored as of now, so one that names another user would overrule the
        // operator's resolution.
        sessions.retain(|(_, named)| user.is_none() || named.is_none() || *named == user);
        let named = sessions.iter().position(|(_, named)| named.is_some());
        let chosen = named.or((accepts_any && !sessions.is_empty()).then_some(0));
        let (session, named) = chosen.map(|index| sessions.swap_remove(index)).unzip();
        let named = named.flatten();
        comparison.resolved = orphan.filter(|_| user.is_some() && named.is_none());
        comparison.fetched.searched = session.is_none() && user.is_none();
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
        comparison.session = session.map(|session| (session, fetched));
        Ok(())
    }

    /// Repairs a row: writes its columns, or publishes events. Returns the sequence of the last
    /// published event.
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
            comparison.fetched,
            scope,
        )
        .await?;
        if let Some((object, fetched)) = &comparison.session {
            last = own_event::publish_snapshot(jetstream, &object.id, &object.raw, *fetched, scope)
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
            last = own_event::repeat_resolution(
                jetstream,
                &resolution,
                at,
                scope,
                comparison.fetched.as_of,
            )
            .await?
            .max(last);
        }
        Ok(Some(last))
    }
}

impl Comparison {
    /// Returns the problem of `row`, if it has one.
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
        if row.is_withheld {
            finding.differences.push(Difference::withheld());
        }
        (finding.problem == Problem::Unreadable || !finding.differences.is_empty())
            .then_some(finding)
    }

    /// Chooses the repair. If the merge state agrees with Stripe, the columns are written without
    /// an event. An answer that is not newer than the row proves nothing about it, so that the row
    /// is only checked again.
    fn choose_repair(&mut self) {
        let (stripe_values, row) = (&self.stripe_values, self.row.as_ref());
        if row.is_some_and(|row| difference::only_the_column_knows_the_user(stripe_values, row)) {
            let note = "not repairable: only this column knows the client reference id, and writing the row would lose it";
            self.finding.note = Some(note.to_owned());
            return;
        }
        let head = row.and_then(|row| row.state.as_ref()?.visible().head_created);
        let needs_no_event =
            |row: &RawRow| !row.is_withheld && difference::only_columns_differ(stripe_values, row);
        if row.is_some_and(needs_no_event) {
            self.repair = Repair::Columns;
        } else if head.is_none_or(|head| head < self.fetched.as_of) {
            self.repair = Repair::Events;
        }
    }

    /// Whether the repair succeeded; `row` is the current row.
    pub(super) fn is_repaired(&self, row: Option<&RawRow>) -> bool {
        self.repair != Repair::None && self.compared_with(row).is_none()
    }

    pub(super) fn id(&self) -> &str {
        &self.object.id
    }
}

/// Returns the answer, or `None` if Stripe has no such object.
fn none_if_not_found<T>(answer: Result<T, ReconcileError>) -> Result<Option<T>, ReconcileError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(ReconcileError::Api(error)) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The scope of the account itself: objects are listed without `Stripe-Context`.
fn scope(livemode: bool) -> Scope<'static> {
    Scope {
        livemode,
        account: None,
    }
}
