//! A delivery as it is stored: subject, headers and body.
//!
//! Owns which headers an event has in the stream. May not know how it is published.

use std::num::NonZero;

use async_nats::HeaderMap;
use async_nats::header::{HeaderName, HeaderValue, NATS_EXPECTED_STREAM, NATS_MESSAGE_ID};
use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::telemetry::traces;
use litestripe_contract::trace::TraceContext;
use litestripe_contract::{header, subject};
use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;
use time::format_description::well_known::iso8601::{self, TimePrecision};

use crate::signature::VerifiedBody;

/// An upper bound for the headers without the values of varying length, in bytes: names, line ends,
/// the time of receipt, and the batch headers. They really take about 300.
const HEADERS_OVERHEAD_BYTES: usize = 512;

/// The format of the time of receipt: RFC 3339 in UTC, always with three digits of milliseconds.
const RECEIVED_AT: Iso8601<{ MILLISECONDS.encode() }> = Iso8601;
const MILLISECONDS: iso8601::Config =
    iso8601::Config::DEFAULT.set_time_precision(TimePrecision::Second {
        decimal_digits: NonZero::new(3),
    });

/// A verified delivery, with everything that is stored.
#[derive(Debug)]
pub(crate) struct Delivery {
    /// The event's id. It is the message id, so that JetStream drops a redelivery within the
    /// duplicate window.
    pub(crate) id: EventId,
    /// The event's type, which makes the subject.
    pub(crate) event_type: EventType,
    pub(crate) body: VerifiedBody,
    /// The signature header as received.
    pub(crate) signature: String,
    pub(crate) received: OffsetDateTime,
    /// The trace that it belongs to, if any.
    pub(crate) trace: Option<TraceContext>,
}

impl Delivery {
    pub(super) fn subject(&self) -> String {
        subject::for_event_type(&self.event_type)
    }

    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let signature: HeaderValue = self
            .signature
            .parse()
            .expect("an HTTP header has no line break");
        headers.insert(HeaderName::from_static(header::STRIPE_SIGNATURE), signature);
        headers.insert(
            HeaderName::from_static(header::RECEIVED_AT),
            received_at(self.received),
        );
        if let Some(trace) = &self.trace {
            traces::add_to_headers(&mut headers, trace);
        }
        headers.insert(NATS_MESSAGE_ID, self.id.as_str());
        headers.insert(NATS_EXPECTED_STREAM, subject::EVENTS_STREAM);
        headers
    }

    /// An upper bound of the message's size, headers included.
    pub(super) fn bytes(&self) -> usize {
        let trace = self.trace.as_ref().map_or(0, |trace| {
            trace.traceparent().len() + trace.tracestate().map_or(0, str::len)
        });
        let headers =
            self.signature.len() + trace + self.id.as_str().len() + HEADERS_OVERHEAD_BYTES;
        self.body.bytes().len() + headers
    }
}

fn received_at(received: OffsetDateTime) -> String {
    received
        .to_utc()
        .format(&RECEIVED_AT)
        .expect("a clock shows a year of four digits")
}

#[cfg(test)]
mod tests;
