//! Names of streams, subjects and the durable consumer; building and parsing subjects.
//!
//! Invariant: parsing a subject that was built here returns the event type it was built from.

use crate::event::EventType;

/// The stream of raw events.
pub const EVENTS_STREAM: &str = "STRIPE_EVENTS";
/// The stream of signals.
pub const SIGNALS_STREAM: &str = "LITESTRIPE_SIGNALS";
/// The stream of events that can never be applied.
pub const DEAD_LETTERS_STREAM: &str = "STRIPE_DEAD_LETTERS";
/// The durable pull consumer that all workers share.
pub const WORKER_CONSUMER: &str = "litestripe-worker";
/// The JetStream KV bucket that all workers share.
pub const KV_BUCKET: &str = "litestripe";
/// The stream that holds it.
pub const KV_STREAM: &str = "KV_litestripe";

/// The part before the event type in the subject of a raw event.
pub const EVENTS_PREFIX: &str = "stripe.events.";
/// The part before the event type in the subject of a dead letter.
pub const DEAD_LETTERS_PREFIX: &str = "stripe.dead.";

/// The subject of the signal that a subscription changed.
pub const SUBSCRIPTION_CHANGED: &str = "subscription.changed";
/// The subject of the signal that a payment belongs to no known user.
pub const ORPHAN_CREATED: &str = "orphan.created";
/// The subject of the signal that an orphan's user was found.
pub const ORPHAN_RESOLVED: &str = "orphan.resolved";

/// Returns the subject under which a raw event is stored.
pub fn for_event_type(event_type: &EventType) -> String {
    [EVENTS_PREFIX, event_type.as_str()].concat()
}

/// Parses the event type from the subject of a raw event or a dead letter.
pub fn event_type(subject: &str) -> Option<EventType> {
    EventType::parse(type_part(subject)?).ok()
}

/// Whether `subject` is that of a raw event or a dead letter of this type.
pub fn is_for_event_type(subject: &str, event_type: &EventType) -> bool {
    type_part(subject) == Some(event_type.as_str())
}

fn type_part(subject: &str) -> Option<&str> {
    subject
        .strip_prefix(EVENTS_PREFIX)
        .or_else(|| subject.strip_prefix(DEAD_LETTERS_PREFIX))
}

#[cfg(test)]
mod tests;
