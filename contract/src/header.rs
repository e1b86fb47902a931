//! The names of the message headers that we write and read back.
//!
//! Owns the spelling. NATS preserves the case of header names and compares them exactly (ADR-4), so
//! one place spells each of them.

/// Deduplication of a stream within its duplicate window. NATS: "JetStream headers".
pub const MESSAGE_ID: &str = "Nats-Msg-Id";

/// The signature header of the delivery, kept so that a stored event can be verified again.
pub const STRIPE_SIGNATURE: &str = "Stripe-Signature";

/// When ingress received the delivery, RFC 3339: the time against which the signature was checked.
pub const RECEIVED_AT: &str = "Litestripe-Received-At";

/// Where an event that no webhook delivered comes from: `backfill`, `snapshot`, `resolution`.
pub const SOURCE: &str = "Litestripe-Source";

/// Why an event was put aside as a dead letter.
pub const REASON: &str = "Litestripe-Reason";

/// The dead letter's sequence in `STRIPE_EVENTS`.
pub const STREAM_SEQUENCE: &str = "Litestripe-Stream-Sequence";

/// W3C Trace Context, carried from the delivery to the signal.
pub const TRACEPARENT: &str = "traceparent";

/// CloudEvents 1.0 attributes in binary mode. CloudEvents: "NATS Protocol Binding".
pub mod ce {
    /// Always `1.0`.
    pub const SPECVERSION: &str = "ce-specversion";
    /// Equal to `Nats-Msg-Id`.
    pub const ID: &str = "ce-id";
    /// Always [`SOURCE_VALUE`].
    pub const SOURCE: &str = "ce-source";
    /// [`TYPE_PREFIX`] and the signal's subject.
    pub const TYPE: &str = "ce-type";
    /// `created` of the event that led to the signal, RFC 3339.
    pub const TIME: &str = "ce-time";
    /// The subscription's or orphan's id.
    pub const SUBJECT: &str = "ce-subject";
    /// Always `application/json`.
    pub const DATACONTENTTYPE: &str = "ce-datacontenttype";

    /// What stands in `ce-source`.
    pub const SOURCE_VALUE: &str = "litestripe";
    /// What stands before the subject in `ce-type`.
    pub const TYPE_PREFIX: &str = "litestripe.v1.";
}
