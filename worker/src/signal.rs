//! Signals on their way to the outbox, from what was decided.
//!
//! Owns their `Nats-Msg-Id`s: the same change always has the same one, so that a repeat is dropped.

use litestripe_contract::event::{EventType, SNAPSHOT_TYPE};
use litestripe_contract::signal::{EventReference, Orphan, OrphanReason, SubscriptionChanged, Timestamp};
use litestripe_contract::subject;
use litestripe_entity::orphaned_payment;
use serde::Serialize;
use time::OffsetDateTime;

use crate::event::Event;
use crate::merge::State;
use crate::store::orphan::NewOrphan;
use crate::store::outbox::NewSignal;

/// The event that led to a signal, and the trace it belongs to.
#[derive(Debug, Clone)]
pub struct Cause {
    /// The event.
    pub event: EventReference,
    /// Its delivery's trace.
    pub traceparent: Option<String>,
}

/// How a signal names `event`.
#[must_use]
pub fn reference(event: &Event) -> EventReference {
    EventReference {
        id: event.id.clone(),
        event_type: event.event_type.clone(),
        created: Timestamp::from_unix(event.created).expect("decoding checked the range of `created`"),
    }
}

/// The event that a row stands on. Its type is not a column: the state knows it, as a rule.
#[must_use]
pub fn standing(state: &State) -> Option<EventReference> {
    let (id, created) = state.visible().last_event?;
    let usual = || {
        let is_own = id.as_str().starts_with("litestripe.");
        EventType::parse(if is_own { SNAPSHOT_TYPE } else { "customer.subscription.updated" }).ok()
    };
    let event_type = state.type_of(&id).cloned().or_else(usual)?;
    Some(EventReference { id, event_type, created: Timestamp::from_unix(created).ok()? })
}

/// A subscription's row changed.
#[must_use]
pub fn subscription_changed(signal: &SubscriptionChanged, traceparent: Option<String>) -> NewSignal {
    let id = &signal.stripe_subscription_id;
    let cause = Cause { event: signal.event.clone(), traceparent };
    outgoing(cause, id, subject::SUBSCRIPTION_CHANGED, format!("{id}:{}", signal.revision), signal)
}

/// A subscription's row again, under a revision that was sent before: under a `Nats-Msg-Id` of its
/// own, or it would be dropped as a repeat.
#[must_use]
pub fn subscription_again(signal: &SubscriptionChanged, now: OffsetDateTime) -> NewSignal {
    let id = &signal.stripe_subscription_id;
    let cause = Cause { event: signal.event.clone(), traceparent: None };
    let message_id = format!("{id}:{}:again:{}", signal.revision, now.unix_timestamp_nanos());
    outgoing(cause, id, subject::SUBSCRIPTION_CHANGED, message_id, signal)
}

/// What is left to tell of an orphan at the end of a replay: that it is open, or that it was
/// resolved. Nothing for a reason that only a later program knows.
#[must_use]
pub fn orphan_stands(orphan: &orphaned_payment::Model, cause: Cause) -> Option<NewSignal> {
    if orphan.resolved_at.is_some() {
        return orphan_resolved(orphan, cause);
    }
    let signal = of_model(orphan, cause.event.clone())?;
    Some(outgoing(cause, &orphan.id, subject::ORPHAN_CREATED, format!("{}:orphan.created", orphan.id), &signal))
}

/// A payment belongs to no known user.
#[must_use]
pub fn orphan_created(orphan: &NewOrphan, cause: Cause) -> NewSignal {
    let signal = Orphan {
        orphan_id: orphan.id.clone(),
        reason: orphan.reason,
        checkout_session_id: orphan.checkout_session_id.clone(),
        stripe_customer_id: orphan.stripe_customer_id.clone(),
        stripe_subscription_id: orphan.stripe_subscription_id.clone(),
        livemode: orphan.livemode,
        event: cause.event.clone(),
    };
    outgoing(cause, &orphan.id, subject::ORPHAN_CREATED, format!("{}:orphan.created", orphan.id), &signal)
}

/// The user of an orphan was found. Nothing for a reason that only a later program knows.
#[must_use]
pub fn orphan_resolved(orphan: &orphaned_payment::Model, cause: Cause) -> Option<NewSignal> {
    let signal = of_model(orphan, cause.event.clone())?;
    Some(outgoing(cause, &orphan.id, subject::ORPHAN_RESOLVED, format!("{}:orphan.resolved", orphan.id), &signal))
}

fn of_model(orphan: &orphaned_payment::Model, event: EventReference) -> Option<Orphan> {
    Some(Orphan {
        orphan_id: orphan.id.clone(),
        reason: OrphanReason::parse(&orphan.reason)?,
        checkout_session_id: orphan.checkout_session_id.clone(),
        stripe_customer_id: orphan.stripe_customer_id.clone(),
        stripe_subscription_id: orphan.stripe_subscription_id.clone(),
        livemode: orphan.livemode,
        event,
    })
}

fn outgoing<T: Serialize>(
    cause: Cause,
    entity_id: &str,
    subject: &'static str,
    message_id: String,
    body: &T,
) -> NewSignal {
    NewSignal {
        entity_id: entity_id.to_owned(),
        subject,
        message_id,
        event_created: cause.event.created.unix(),
        traceparent: cause.traceparent,
        body: serde_json::to_string(body).expect("a signal has no map with keys that are not text"),
    }
}
