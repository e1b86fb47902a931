//! The names of the message headers that we write and read.
//!
//! Owns their spelling. NATS preserves the case of header names and compares them exactly (ADR-4),
//! so each name is written in one place.

/// The message id by which a stream drops duplicates within its duplicate window. NATS: "JetStream
/// headers".
pub const MESSAGE_ID: &str = "Nats-Msg-Id";

/// The signature header of the delivery, kept so that a stored event can be verified again.
pub const STRIPE_SIGNATURE: &str = "Stripe-Signature";

/// When ingress received the delivery, RFC 3339. The signature was checked against this time.
pub const RECEIVED_AT: &str = "Litestripe-Received-At";

/// The origin of an event that did not come by webhook: `backfill`, `snapshot` or `resolution`.
pub const SOURCE: &str = "Litestripe-Source";

/// Why an event became a dead letter.
pub const REASON: &str = "Litestripe-Reason";

/// The dead letter's sequence in `STRIPE_EVENTS`.
pub const STREAM_SEQUENCE: &str = "Litestripe-Stream-Sequence";

/// W3C Trace Context of an event and of its signals: see [`crate::trace`].
pub const TRACEPARENT: &str = "traceparent";

/// The part of the trace context that belongs to the tracing systems passed so far.
pub const TRACESTATE: &str = "tracestate";

/// CloudEvents 1.0 attributes in binary mode. CloudEvents: "NATS Protocol Binding".
pub mod ce {
    /// Always `1.0`.
    pub const SPECVERSION: &str = "ce-specversion";
    /// Equal to `Nats-Msg-Id`.
    pub const ID: &str = "ce-id";
    /// Always [`SOURCE_VALUE`].
    pub const SOURCE: &str = "ce-source";
    /// [`TYPE_PREFIX`] followed by the signal's subject.
    pub const TYPE: &str = "ce-type";
    /// `created` of the event that led to the signal, RFC 3339.
    pub const TIME: &str = "ce-time";
    /// The subscription's or orphan's id.
    pub const SUBJECT: &str = "ce-subject";
    /// Always `application/json`.
    pub const DATACONTENTTYPE: &str = "ce-datacontenttype";

    /// The value of `ce-source`.
    pub const SOURCE_VALUE: &str = "litestripe";
    /// The part of `ce-type` before the subject.
    pub const TYPE_PREFIX: &str = "litestripe.v1.";
}
