//! Which payments are orphans, and what has to be asked to know. Pure.
//!
//! Owns the situations, their reasons and the grace period. May not know the database, the clock
//! (now is an argument) or how a user is looked up.

use std::time::Duration;

use litestripe_contract::event::EventId;
use litestripe_contract::signal::OrphanReason;
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::event::{Body, CheckoutSession, Email, Event, Resolution};
use crate::merge::Visible;
use crate::question::{Check, Kind};
use crate::signal;

/// After the second of an uncertain row's events, before Stripe is asked: an answer is relied on
/// only up to a second before it was given.
///
/// Two seconds for that, and one because the time a request takes is rounded up.
const FETCH_AFTER: Duration = Duration::from_secs(3);

/// What the operator wants.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Whether client reference ids are looked up at all.
    pub lookup: bool,
    /// Whether a subscription that no Checkout Session claims is an orphan.
    pub without_session: bool,
    /// How long a subscription may wait for its Checkout Session.
    pub grace: Duration,
}

/// A payment that matches no user.
#[derive(Debug, Clone)]
pub struct NewOrphan {
    /// The subscription's id, else the Checkout Session's.
    pub id: String,
    /// Why it is one.
    pub reason: OrphanReason,
    /// The Checkout Session that was paid.
    pub checkout_session_id: Option<String>,
    /// Stripe's customer.
    pub stripe_customer_id: Option<String>,
    /// The subscription, if there is one.
    pub stripe_subscription_id: Option<String>,
    /// Where the customer can be reached.
    pub customer_email: Option<Email>,
    /// The event that led to it.
    pub event_id: EventId,
    /// Whether it happened in live mode.
    pub livemode: bool,
}

/// The orphan that a Checkout Session is, if it is paid and names no user.
#[must_use]
pub fn of_session(event: &Event, session: &CheckoutSession) -> Option<NewOrphan> {
    let orphan = || session_orphan(event, session, OrphanReason::MissingClientReferenceId);
    (session.is_paid() && session.client_reference_id.is_none()).then(orphan)
}

/// A Checkout Session as an orphan for `reason`.
#[must_use]
pub fn session_orphan(event: &Event, session: &CheckoutSession, reason: OrphanReason) -> NewOrphan {
    NewOrphan {
        id: payment_id(session).to_owned(),
        reason,
        checkout_session_id: Some(session.id.clone()),
        stripe_customer_id: session.stripe_customer_id.clone(),
        stripe_subscription_id: session.stripe_subscription_id.clone(),
        customer_email: session.customer_email.clone(),
        event_id: event.id.clone(),
        livemode: event.livemode,
    }
}

/// The orphan that a resolution speaks of, as far as the resolution itself knows it. It is resolved
/// from the start; its row keeps a payment that comes later from becoming an orphan.
#[must_use]
pub fn of_resolution(event: &Event, resolution: &Resolution) -> NewOrphan {
    let reason = resolution.reason.as_deref().and_then(OrphanReason::parse);
    NewOrphan {
        id: resolution.orphan_id.clone(),
        reason: reason.unwrap_or(OrphanReason::MissingClientReferenceId),
        checkout_session_id: resolution.checkout_session_id.clone(),
        stripe_customer_id: resolution.stripe_customer_id.clone(),
        stripe_subscription_id: resolution.stripe_subscription_id.clone(),
        customer_email: None,
        event_id: event.id.clone(),
        livemode: event.livemode,
    }
}

/// The question whose client reference id a Checkout Session's is.
#[must_use]
pub fn lookup(event: &Event, stream_sequence: u64, now: OffsetDateTime) -> Option<Check> {
    let Body::CheckoutSession(session) = &event.body else { return None };
    Some(Check {
        checkout_session_id: Some(session.id.clone()),
        stripe_customer_id: session.stripe_customer_id.clone(),
        client_reference_id: session.client_reference_id.clone(),
        is_paid: session.is_paid(),
        ..check(Kind::Lookup, payment_id(session), event, stream_sequence, now)
    })
}

/// The question whether a new subscription's Checkout Session came in time, asked at the `end` of its
/// grace period.
#[must_use]
pub fn grace(event: &Event, stream_sequence: u64, row: &Visible, rules: &Rules, end: OffsetDateTime) -> Option<Check> {
    let waits = row.created_event_seen && row.checkout_session_id.is_none();
    if !rules.without_session || !waits || row.subscription.client_reference_id.is_some() {
        return None;
    }
    let stripe_customer_id = row.subscription.stripe_customer_id.clone();
    let id = event.stripe_subscription_id()?;
    Some(Check { stripe_customer_id, ..check(Kind::Grace, id, event, stream_sequence, end) })
}

/// When the grace period of a row that was first written at `dt_created` ends. It starts at the later
/// of that and Stripe's `created`, and asking in vain does not move it.
#[must_use]
pub fn end_of_grace(row: &Visible, dt_created: OffsetDateTime, grace: Duration) -> OffsetDateTime {
    let created = row.subscription.created.map_or(dt_created, |created| created.get());
    later(dt_created.max(created), grace)
}

/// The question what Stripe says an uncertain subscription is.
#[must_use]
pub fn fetch(event: &Event, stream_sequence: u64, row: &Visible, now: OffsetDateTime) -> Option<Check> {
    if !row.subscription.uncertain {
        return None;
    }
    let head = OffsetDateTime::from_unix_timestamp(row.head_created?).ok()?;
    let due_at = later(now.max(head), FETCH_AFTER);
    Some(check(Kind::Fetch, event.stripe_subscription_id()?, event, stream_sequence, due_at))
}

fn check(kind: Kind, id: &str, event: &Event, stream_sequence: u64, due_at: OffsetDateTime) -> Check {
    Check {
        entity_id: id.to_owned(),
        kind,
        due_at,
        leased_until: due_at,
        attempts: 0,
        checkout_session_id: None,
        stripe_customer_id: None,
        stripe_subscription_id: event.stripe_subscription_id().map(str::to_owned),
        stripe_account_id: event.stripe_account_id.clone(),
        client_reference_id: None,
        is_paid: false,
        livemode: event.livemode,
        event: signal::reference(event),
        stream_sequence,
    }
}

/// `delay` after `at`, or the end of the calendar: an event may be dated anywhere in it.
fn later(at: OffsetDateTime, delay: Duration) -> OffsetDateTime {
    at.checked_add(time::Duration::try_from(delay).unwrap_or(time::Duration::MAX))
        .unwrap_or(PrimitiveDateTime::MAX.assume_utc())
}

/// One payment has one id: the subscription's, else the session's.
fn payment_id(session: &CheckoutSession) -> &str {
    session.stripe_subscription_id.as_deref().unwrap_or(&session.id)
}

/// Whether a subscription without a session may still have cost somebody money. Stripe: "The
/// Subscription object", `status`: `incomplete` waits for its first payment, `incomplete_expired`
/// never got it.
#[must_use]
pub fn may_be_paid(status: Option<&str>) -> bool {
    !matches!(status, Some("incomplete" | "incomplete_expired"))
}
