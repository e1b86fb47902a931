//! Builds the signals that are written to the outbox.
//!
//! Owns their `Nats-Msg-Id`s: the same change always has the same id, so that a duplicate is
//! dropped.

use litestripe_contract::event::{EventType, SNAPSHOT_TYPE};
use litestripe_contract::signal::{
    EventReference, Orphan, OrphanReason, SubscriptionChanged, Timestamp,
};
use litestripe_contract::subject;
use litestripe_contract::trace::TraceContext;
use serde::Serialize;
use time::OffsetDateTime;

use crate::event::Event;
use crate::merge::State;
use crate::orphan::NewOrphan;

/// A signal that is to be written to the outbox.
#[derive(Debug, Clone)]
pub struct NewSignal {
    /// The subscription's or orphan's id.
    pub entity_id: String,
    pub subject: &'static str,
    /// Its `Nats-Msg-Id`.
    pub message_id: String,
    /// `created` of the event that led to it, in seconds since the Unix epoch.
    pub event_created: i64,
    pub trace: Option<TraceContext>,
    /// When ingress received that event, if it did.
    pub received: Option<OffsetDateTime>,
    pub body: String,
}

/// The event that led to a signal, and the trace it belongs to.
#[derive(Debug, Clone)]
pub struct Cause {
    pub event: EventReference,
    /// The trace that the event's delivery belongs to.
    pub trace: Option<TraceContext>,
    /// When ingress received the event. `None` if it came in another way, or if the signal follows
    /// from something else that came later.
    pub received: Option<OffsetDateTime>,
}

impl From<EventReference> for Cause {
    /// An event whose delivery is long over.
    fn from(event: EventReference) -> Self {
        Self {
            event,
            trace: None,
            received: None,
        }
    }
}

/// Returns `event` as a signal names it.
pub fn reference(event: &Event) -> EventReference {
    EventReference {
        id: event.id.clone(),
        event_type: event.event_type.clone(),
        created: Timestamp::from_unix(event.created)
            .expect("decoding checked the range of `created`"),
    }
}

/// Returns the event that led to a row's state.
///
/// Its type is not a column. The state usually knows it; otherwise the most likely type is used.
pub fn last_event(state: &State) -> Option<EventReference> {
    let (id, created) = state.visible().last_event?;
    let usual = || {
        let is_own = id.as_str().starts_with("litestripe.");
        EventType::parse(if is_own {
            SNAPSHOT_TYPE
        } else {
            "customer.subscription.updated"
        })
        .ok()
    };
    let event_type = state.event_type(&id).cloned().or_else(usual)?;
    Some(EventReference {
        id,
        event_type,
        created: Timestamp::from_unix(created).ok()?,
    })
}

/// Builds the signal of a change. `cause` is the event that it names.
pub(crate) fn subscription_changed(signal: &SubscriptionChanged, cause: Cause) -> NewSignal {
    let id = &signal.stripe_subscription_id;
    new_signal(
        cause,
        id,
        subject::SUBSCRIPTION_CHANGED,
        format!("{id}:{}", signal.revision),
        signal,
    )
}

/// Builds the signal of a row under a revision that was sent before. It needs a new `Nats-Msg-Id`,
/// or JetStream would drop it as a duplicate.
pub(crate) fn subscription_resent(signal: &SubscriptionChanged, now: OffsetDateTime) -> NewSignal {
    let id = &signal.stripe_subscription_id;
    let cause = Cause::from(signal.event.clone());
    let message_id = format!(
        "{id}:{}:again:{}",
        signal.revision,
        now.unix_timestamp_nanos()
    );
    new_signal(cause, id, subject::SUBSCRIPTION_CHANGED, message_id, signal)
}

/// Builds the signal that a payment belongs to no known user.
pub fn orphan_created(orphan: &NewOrphan, cause: Cause) -> NewSignal {
    orphan_signal(orphan, subject::ORPHAN_CREATED, cause)
}

/// Builds the signal that the user of an orphan was found.
pub fn orphan_resolved(orphan: &NewOrphan, cause: Cause) -> NewSignal {
    orphan_signal(orphan, subject::ORPHAN_RESOLVED, cause)
}

/// Builds the signal of an orphan that is still open, as [`orphan_created`] built it at `created`.
/// It needs a new `Nats-Msg-Id`. Only the id of the event is a column; its type is the most likely
/// one.
pub fn orphan_resent(orphan: &NewOrphan, created: Timestamp, now: OffsetDateTime) -> NewSignal {
    let event_type = if orphan.event_id.as_str().starts_with("litestripe.") {
        SNAPSHOT_TYPE
    } else if orphan.reason == OrphanReason::NoCheckoutSession {
        "customer.subscription.created"
    } else {
        "checkout.session.completed"
    };
    let event = EventReference {
        id: orphan.event_id.clone(),
        event_type: EventType::parse(event_type).expect("each of them is valid"),
        created,
    };
    let cause = Cause::from(event);
    let mut signal = orphan_created(orphan, cause);
    signal.message_id += &format!(":again:{}", now.unix_timestamp_nanos());
    signal
}

fn orphan_signal(orphan: &NewOrphan, subject: &'static str, cause: Cause) -> NewSignal {
    let signal = Orphan {
        orphan_id: orphan.id.clone(),
        reason: orphan.reason,
        checkout_session_id: orphan.payment.checkout_session_id.clone(),
        stripe_customer_id: orphan.payment.stripe_customer_id.clone(),
        stripe_subscription_id: orphan.payment.stripe_subscription_id.clone(),
        livemode: orphan.livemode,
        event: cause.event.clone(),
    };
    new_signal(
        cause,
        &orphan.id,
        subject,
        format!("{}:{subject}", orphan.id),
        &signal,
    )
}

fn new_signal<T: Serialize>(
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
        trace: cause.trace,
        received: cause.received,
        body: serde_json::to_string(body).expect("a signal has no map with keys that are not text"),
    }
}
