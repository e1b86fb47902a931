//! The metrics of ingress: names, help texts and labels, in one place.

use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

const DELIVERIES: &str = "litestripe_ingress_deliveries_total";
const PUBLISH_SECONDS: &str = "litestripe_ingress_publish_seconds";
const BODIES_IN_FLIGHT_BYTES: &str = "litestripe_ingress_bodies_in_flight_bytes";
const BUILD_INFO: &str = "litestripe_build_info";

/// From the latency of a local disk to the longest time that an answer may take.
const PUBLISH_SECONDS_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 8.0,
];

/// The outcome of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored,
    Duplicate,
    /// Not stored: the settings leave its type out.
    Ignored,
    /// The same, for a thin event.
    ThinIgnored,
    Method,
    UnknownHook,
    TooLarge,
    /// The body did not come in time, or broke off.
    Incomplete,
    /// There is no signature, or a malformed one.
    Unsigned,
    /// No signing secret made the signature.
    Mismatch,
    /// The signature is right but too old.
    Stale,
    /// The signed body is not an event, or its type cannot be a subject.
    NotAnEvent,
    NoRoom,
    Unavailable,
}

impl Outcome {
    /// All outcomes with their labels, in the order of the enum.
    const ALL: [(Self, &str); 14] = [
        (Self::Stored, "stored"),
        (Self::Duplicate, "duplicate"),
        (Self::Ignored, "ignored"),
        (Self::ThinIgnored, "thin_ignored"),
        (Self::Method, "method"),
        (Self::UnknownHook, "unknown_hook"),
        (Self::TooLarge, "too_large"),
        (Self::Incomplete, "incomplete"),
        (Self::Unsigned, "unsigned"),
        (Self::Mismatch, "mismatch"),
        (Self::Stale, "stale"),
        (Self::NotAnEvent, "not_an_event"),
        (Self::NoRoom, "no_room"),
        (Self::Unavailable, "unavailable"),
    ];
}

/// The counters, and the page that shows them. Not global: each `run` has its own.
pub(crate) struct Metrics {
    deliveries: [Counter; Outcome::ALL.len()],
    publish_seconds: Histogram,
    bodies_in_flight_bytes: Gauge,
    page: PrometheusHandle,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(
                Matcher::Full(PUBLISH_SECONDS.to_owned()),
                &PUBLISH_SECONDS_BUCKETS,
            )
            .expect("there are buckets")
            .build_recorder();
        metrics::with_local_recorder(&recorder, || {
            describe_counter!(DELIVERIES, "Deliveries answered, by outcome");
            describe_histogram!(
                PUBLISH_SECONDS,
                "Seconds from a verified delivery to its PubAck"
            );
            describe_gauge!(
                BODIES_IN_FLIGHT_BYTES,
                "Bytes of bodies read and not yet stored or dropped"
            );
            describe_gauge!(BUILD_INFO, "The version of the running program");
            gauge!(BUILD_INFO, "program" => env!("CARGO_PKG_NAME"), "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            Self {
                deliveries: Outcome::ALL.map(|(_, label)| counter!(DELIVERIES, "outcome" => label)),
                publish_seconds: histogram!(PUBLISH_SECONDS),
                bodies_in_flight_bytes: gauge!(BODIES_IN_FLIGHT_BYTES),
                page: recorder.handle(),
            }
        })
    }

    pub(crate) fn record_delivery(&self, outcome: Outcome) {
        if let Some(counter) = self.deliveries.get(outcome as usize) {
            counter.increment(1);
        }
    }

    pub(crate) fn record_published(&self, took: Duration) {
        self.publish_seconds.record(took);
    }

    pub(crate) fn page(&self, bodies_in_flight_bytes: usize) -> String {
        self.bodies_in_flight_bytes
            .set(bodies_in_flight_bytes as f64);
        self.page.render()
    }

    /// Summarizes the samples since the last call. Must be called every few seconds, or memory
    /// grows.
    pub(crate) fn run_upkeep(&self) {
        self.page.run_upkeep();
    }
}

#[cfg(test)]
mod tests;
