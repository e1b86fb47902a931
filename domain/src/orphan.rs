//! Which payments are orphans, and the questions that decide it. Pure.
//!
//! Owns the situations that make an orphan, their reasons and the grace period. May not know the
//! database, the clock (now is an argument) or how a user is looked up.

use std::time::Duration;

use litestripe_contract::event::EventId;
use litestripe_contract::signal::OrphanReason;
use time::OffsetDateTime;

use crate::arrival::Arrival;
use crate::event::{CheckoutSession, Email, Event, Resolution};
use crate::merge::Visible;
use crate::payment::PaymentIds;
use crate::question::{Details, Question, later};
use crate::signal;

/// How long after the second of an uncertain row's events Stripe is asked. The answer is only
/// relied on up to one second before it was given.
///
/// Two seconds for that reason, and one because the duration of a request is rounded up.
const FETCH_AFTER: Duration = Duration::from_secs(3);

/// For how long Stripe retries a delivery in live mode (Stripe: "Receive Stripe events in your
/// webhook endpoint", "Retries").
const DELIVERED_WITHIN: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// The operator's settings for orphans.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Whether there is a user lookup for client reference ids.
    pub lookup: bool,
    /// Whether a subscription that no Checkout Session claims becomes an orphan.
    pub without_session: bool,
    /// How long a subscription may wait for a Checkout Session that claims it.
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

/// Returns whether a row needs a user: its subscription may have been paid, no client reference id
/// is known, and no Checkout Session was paid. (The event of a paid session without a client
/// reference id makes the orphan itself.) An unpaid session without a client reference id claims
/// nothing.
///
/// It depends on the row alone, not on which events led to it. A row that is in this state when its
/// grace period ends is an orphan.
pub fn needs_user(row: &Visible) -> bool {
    let may_be_paid = row.subscription.status.as_deref().is_some_and(may_be_paid);
    may_be_paid && row.subscription.client_reference_id.is_none() && !row.paid
}

/// Returns the question whether a subscription that needs a user finds one in time. It is due at
/// the `end` of its grace period.
pub(crate) fn grace_question(
    arrival: &Arrival,
    row: &Visible,
    end: OffsetDateTime,
) -> Option<Question> {
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

/// Returns when a row was first written. If `dt_created` is later than `now`, the clock that wrote
/// it was ahead, and `opened` is nearer: when the database says that the row's question was saved.
pub fn first_written(
    dt_created: OffsetDateTime,
    opened: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> OffsetDateTime {
    match opened {
        Some(opened) if dt_created > now => dt_created.min(opened),
        _ => dt_created,
    }
}

/// Returns how long a grace period still lasts. It ends when both our clock and the broker's have
/// reached its `end`, so that a clock that runs ahead ends none early. `None` if it has ended.
pub fn remaining_grace(
    end: OffsetDateTime,
    ours: OffsetDateTime,
    brokers: OffsetDateTime,
) -> Option<Duration> {
    Duration::try_from(end - ours.min(brokers))
        .ok()
        .filter(|remaining| !remaining.is_zero())
}

/// Returns whether the stream may have received an event, which the broker dates `at`, before
/// `end`. The clocks show `ours` and `brokers` now.
///
/// If the broker's clock is ahead of ours, so was the event's date, and a date in the future was
/// given by a clock that was ahead then.
pub fn may_be_received_before(
    end: OffsetDateTime,
    at: OffsetDateTime,
    ours: OffsetDateTime,
    brokers: OffsetDateTime,
) -> bool {
    let ahead = (brokers - ours).max(time::Duration::ZERO);
    at > brokers || at.saturating_sub(ahead) <= end
}

/// Returns whether the stream, which was created at `stream_created`, held every Checkout Session
/// that could claim the row. The session of a subscription that is older than the stream was
/// delivered before the stream could store it, and only Stripe knows it.
pub fn stream_covers_sessions(row: &Visible, stream_created: OffsetDateTime) -> bool {
    let created = row.subscription.created.map(|created| created.get());
    row.created_event_seen
        || created.is_some_and(|created| later(created, DELIVERED_WITHIN) >= stream_created)
}

/// Returns whether a subscription had already ended when its row was first written, at
/// `dt_created`. If the stream did not cover its beginning either, it makes no orphan: no
/// customer waits for access.
pub fn had_ended_before(row: &Visible, dt_created: OffsetDateTime) -> bool {
    row.subscription
        .ended_at
        .is_some_and(|ended_at| ended_at.get() <= dt_created)
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
        trace: arrival.trace.clone(),
        position: arrival.position(),
    }
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
fn may_be_paid(status: &str) -> bool {
    !matches!(status, "incomplete" | "incomplete_expired")
}

#[cfg(test)]
mod tests;
