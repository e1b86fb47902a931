//! The envelope of a Stripe event: the fields that both programs read.
//!
//! Owns the ids and types of events as values that are checked once. May not know the content of
//! `data`: only the worker reads it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The longest id we accept, in bytes. Stripe documents ids of up to 255 characters.
pub const ID_BYTES_MAX: usize = 255;

/// The longest event type we accept, in bytes. With its prefix it must still fit into a subject.
pub const TYPE_BYTES_MAX: usize = 200;

/// The error for a text that is empty, too long, or not printable ASCII.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an event id")]
pub struct InvalidEventId;

/// The id of a Stripe event (`evt_…`). Printable ASCII, so that it can be sent in a header.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct EventId(String);

impl EventId {
    /// Accepts printable ASCII of 1 to [`ID_BYTES_MAX`] bytes.
    pub fn parse(id: impl Into<String>) -> Result<Self, InvalidEventId> {
        let id = id.into();
        if Self::fits(&id) {
            Ok(Self(id))
        } else {
            Err(InvalidEventId)
        }
    }

    /// Returns whether `id` follows the rules for event ids. All of Stripe's ids do.
    pub fn fits(id: &str) -> bool {
        (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    }

    /// Returns the id as Stripe wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for EventId {
    type Error = InvalidEventId;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        Self::parse(id)
    }
}

impl From<EventId> for String {
    fn from(id: EventId) -> Self {
        id.0
    }
}

/// The error for a text that cannot be part of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an event type: lower-case letters, digits and `_`, in parts joined by single dots")]
pub struct InvalidEventType;

/// The type of a Stripe event (`customer.subscription.updated`). Always a valid end of a subject.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct EventType(String);

impl EventType {
    /// Accepts lower-case letters, digits and `_` in parts joined by single dots, up to
    /// [`TYPE_BYTES_MAX`] bytes.
    pub fn parse(name: impl Into<String>) -> Result<Self, InvalidEventType> {
        let name = name.into();
        let plain = |part: &str| {
            let allowed =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
            !part.is_empty() && part.bytes().all(allowed)
        };
        if name.len() <= TYPE_BYTES_MAX && name.split('.').all(plain) {
            Ok(Self(name))
        } else {
            Err(InvalidEventType)
        }
    }

    /// Returns the type as Stripe writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for EventType {
    type Error = InvalidEventType;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::parse(name)
    }
}

impl From<EventType> for String {
    fn from(name: EventType) -> Self {
        name.0
    }
}

/// The event types that the worker handles, and therefore the types that ingress stores by default.
///
/// Stripe: "Types of events".
pub const HANDLED_TYPES: [&str; 12] = [
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.trial_will_end",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
];

/// The value of `object` in a thin event. Stripe: "Thin events".
pub const THIN_OBJECT: &str = "v2.core.event";

/// What the type of a thin event about a v1 resource begins with. The rest is the type of the
/// snapshot event, or a finer one that has no snapshot event.
pub const THIN_PREFIX: &str = "v1.";

/// The types of thin events that the worker handles, and that ingress therefore stores by default.
/// A `*` at the end stands for any rest: Stripe keeps adding finer types, and all of them mean that
/// the subscription changed.
pub const HANDLED_THIN_TYPES: [&str; 5] = [
    "v1.customer.subscription.*",
    "v1.checkout.session.completed",
    "v1.checkout.session.async_payment_succeeded",
    "v1.checkout.session.async_payment_failed",
    "v1.checkout.session.expired",
];

/// A subscription or a Checkout Session fetched from Stripe's API, published by a worker into the
/// events stream.
pub const SNAPSHOT_TYPE: &str = "litestripe.snapshot";

/// The event type in the signal of a row that an erasure changed. No message has this type.
pub const ERASURE_TYPE: &str = "litestripe.erasure";

/// An operator's resolution of an orphan, published by a worker into the events stream.
pub const RESOLUTION_TYPE: &str = "litestripe.resolution";

#[cfg(test)]
mod tests;
