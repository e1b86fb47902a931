//! Which payments are orphans, and the questions that decide it. Pure.
//!
//! Owns the situations that make an orphan, their reasons and the grace period. May not know the
//! database, the clock (now is an argument) or how a user is looked up.

use std::time::Duration;

use litestripe_contract::event::EventId;
use litestripe_contract::signal::OrphanReason;
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::arrival::Arrival;
use crate::event::{CheckoutSession, Email, Event, Resolution};
use crate::merge::Visible;
use crate::payment::PaymentIds;
use crate::question::{Details, Question};
use crate::signal;

/// How long after the second of an uncertain row's events Stripe is asked. The answer is only
/// relied on up to one second before it was given.
///
/// Two seconds for that reason, and one because the duration of a request is rounded up.
const FETCH_AFTER: Duration = Duration::from_secs(3);

/// The operator's settings for orphans.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Whether there is a user lookup for client reference ids.
    pub lookup: bool,
    /// Whether a subscription without a Checkout Session becomes an orphan.
    pub without_session: bool,
    /// How long a subscription may wait for its Checkout Session.
    pub grace: Duration,
}

/// A payment that belongs to no known user.
#[derive(Debug, Clone)]
pub struct NewOrphan {
    /// The subscription's id, else the Checkout Session's.
    pub id: String,
    pub reason: OrphanReason,
    pub payment: PaymentIds,
    pub customer_email: Option<Email>,
    pub event_id: EventId,
    pub livemode: bool,
}

impl NewOrphan {
    /// Returns the orphan of a Checkout Session that is paid and has no client reference id.
    pub(crate) fn from_session(event: &Event, session: &CheckoutSession) -> Option<Self> {
        if !session.is_paid() || session.client_reference_id.is_some() {
            return None;
        }
        Some(Self {
            id: payment_id(session).to_owned(),
            reason: OrphanReason::MissingClientReferenceId,
            payment: PaymentIds::from_session(session),
            customer_email: session.customer_email.clone(),
            event_id: event.id.clone(),
            livemode: event.livemode,
        })
    }

    /// Returns the orphan that a resolution names, with what the resolution itself knows of it.
    ///
    /// It is written as resolved, in case a rebuild applies the resolution before the payment: the
    /// row then keeps that payment from becoming an open orphan.
    pub(crate) fn from_resolution(event: &Event, resolution: &Resolution) -> Self {
        let reason = resolution.reason.as_deref().and_then(OrphanReason::parse);
        Self {
            id: resolution.orphan_id.clone(),
            reason: reason.unwrap_or(OrphanReason::MissingClientReferenceId),
            payment: resolution.payment.clone(),
            customer_email: None,
            event_id: event.id.clone(),
            livemode: event.livemode,
        }
    }
}

/// Returns the question whether a Checkout Session's client reference id belongs to a user.
pub(crate) fn lookup_question(
    arrival: &Arrival,
    client_reference_id: &str,
    is_paid: bool,
    now: OffsetDateTime,
) -> Option<Question> {
    let session = arrival.session()?;
    let (payment, client_reference_id) = (
        PaymentIds::from_session(session),
        client_reference_id.to_owned(),
    );
    let details = Details::Lookup {
        payment,
        client_reference_id,
        is_paid,
    };
    Some(question(details, payment_id(session), arrival, now))
}

/// Returns the question whether a new subscription's Checkout Session arrived in time. It is due at
/// the `end` of its grace period. `None` if there is no reason to wait for a session.
pub(crate) fn grace_question(
    arrival: &Arrival,
    row: &Visible,
    rules: &Rules,
    end: OffsetDateTime,
) -> Option<Question> {
    let needs_session = row.created_event_seen && row.checkout_session_id.is_none();
    if !rules.without_session || !needs_session || row.subscription.client_reference_id.is_some() {
        return None;
    }
    let details = Details::Grace {
        stripe_customer_id: row.subscription.stripe_customer_id.clone(),
    };
    Some(question(
        details,
        arrival.event.stripe_subscription_id()?,
        arrival,
        end,
    ))
}

/// Returns the end of the grace period of a row that was first written at `dt_created`. It starts
/// at the later of that and Stripe's `created`. A retry does not extend it.
pub fn grace_period_end(
    row: &Visible,
    dt_created: OffsetDateTime,
    grace: Duration,
) -> OffsetDateTime {
    let created = row
        .subscription
        .created
        .map_or(dt_created, |created| created.get());
    later(dt_created.max(created), grace)
}

/// Returns the question for the current state of a subscription, if its row is uncertain.
pub(crate) fn fetch_question(
    arrival: &Arrival,
    row: &Visible,
    now: OffsetDateTime,
) -> Option<Question> {
    if !row.subscription.uncertain {
        return None;
    }
    let head = OffsetDateTime::from_unix_timestamp(row.head_created?).ok()?;
    let due_at = later(now.max(head), FETCH_AFTER);
    Some(question(
        Details::Fetch,
        arrival.event.stripe_subscription_id()?,
        arrival,
        due_at,
    ))
}

fn question(details: Details, id: &str, arrival: &Arrival, due_at: OffsetDateTime) -> Question {
    Question {
        entity_id: id.to_owned(),
        details,
        due_at,
        attempts: 0,
        stripe_account_id: arrival.event.stripe_account_id.clone(),
        livemode: arrival.event.livemode,
        event: signal::reference(&arrival.event),
        stream_sequence: arrival.stream_sequence,
    }
}

/// Adds `delay` to `at`, up to the end of the calendar: an event may have any date.
fn later(at: OffsetDateTime, delay: Duration) -> OffsetDateTime {
    at.checked_add(time::Duration::try_from(delay).unwrap_or(time::Duration::MAX))
        .unwrap_or(PrimitiveDateTime::MAX.assume_utc())
}

/// Returns the one id of a payment: the subscription's, else the session's.
fn payment_id(session: &CheckoutSession) -> &str {
    session
        .stripe_subscription_id
        .as_deref()
        .unwrap_or(&session.id)
}

/// Returns whether a customer may have paid for a subscription of this status. Stripe: "The
/// Subscription object", `status`: `incomplete` waits for its first payment, `incomplete_expired`
/// never got it.
pub fn may_be_paid(status: Option<&str>) -> bool {
    !matches!(status, Some("incomplete" | "incomplete_expired"))
}
