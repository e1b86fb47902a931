//! The metrics of ingress: names, help texts and labels, in one place.

use std::collections::BTreeMap;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use metrics_process::Collector;

use crate::publish::GroupState;
use crate::signature::SigningSecret;

const DELIVERIES: &str = "litestripe_ingress_deliveries_total";
const REQUEST_SECONDS: &str = "litestripe_ingress_request_seconds";
const PUBLISH_SECONDS: &str = "litestripe_ingress_publish_seconds";
const BODIES_IN_FLIGHT_BYTES: &str = "litestripe_ingress_bodies_in_flight_bytes";
const WAITING: &str = "litestripe_ingress_waiting";
const GROUP_COMMIT: &str = "litestripe_ingress_group_commit";
const SECRET_LAST_USED: &str = "litestripe_ingress_signing_secret_last_used_timestamp_seconds";
const BUILD_INFO: &str = "litestripe_build_info";

/// From the latency of a local disk to the longest time that an answer may take.
const SECONDS_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 8.0,
];

/// All states of the group commit with their labels.
const GROUP_STATES: [(GroupState, &str); 4] = [
    (GroupState::Off, "off"),
    (GroupState::Unsupported, "unsupported"),
    (GroupState::Single, "single"),
    (GroupState::Grouped, "grouped"),
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

    pub(crate) fn label(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// What the page shows of the rest of ingress.
pub(crate) struct State<'a> {
    pub(crate) bodies_in_flight_bytes: usize,
    pub(crate) is_ready: bool,
    pub(crate) group_commit: GroupState,
    /// The signing secrets in use.
    pub(crate) secrets: &'a [SigningSecret],
}

/// The metrics, and the page that shows them. Not global: each `run` has its own.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    page: PrometheusHandle,
    handles: Handles,
}

struct Handles {
    deliveries: [Counter; Outcome::ALL.len()],
    request_seconds: [Histogram; Outcome::ALL.len()],
    publish_seconds: Histogram,
    bodies_in_flight_bytes: Gauge,
    waiting: Gauge,
    group_commit: [Gauge; GROUP_STATES.len()],
}

impl Handles {
    /// Registers all metrics with the recorder of this thread.
    fn register() -> Self {
        describe();
        gauge!(BUILD_INFO, "program" => env!("CARGO_PKG_NAME"), "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        Self {
            deliveries: Outcome::ALL.map(|(_, label)| counter!(DELIVERIES, "outcome" => label)),
            request_seconds: Outcome::ALL
                .map(|(_, label)| histogram!(REQUEST_SECONDS, "outcome" => label)),
            publish_seconds: histogram!(PUBLISH_SECONDS),
            bodies_in_flight_bytes: gauge!(BODIES_IN_FLIGHT_BYTES),
            waiting: gauge!(WAITING, "for" => "broker"),
            group_commit: GROUP_STATES.map(|(_, label)| gauge!(GROUP_COMMIT, "state" => label)),
        }
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let buckets = |builder: PrometheusBuilder, name: &str| {
            builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), &SECONDS_BUCKETS)
                .expect("there are buckets")
        };
        let recorder = [REQUEST_SECONDS, PUBLISH_SECONDS]
            .into_iter()
            .fold(PrometheusBuilder::new(), buckets)
            .build_recorder();
        Self {
            handles: metrics::with_local_recorder(&recorder, Handles::register),
            page: recorder.handle(),
            recorder,
        }
    }

    /// Counts an answer. `took` is the time since the request's head was read.
    pub(crate) fn record_delivery(&self, outcome: Outcome, took: Duration) {
        if let Some(counter) = self.handles.deliveries.get(outcome as usize) {
            counter.increment(1);
        }
        if let Some(histogram) = self.handles.request_seconds.get(outcome as usize) {
            histogram.record(took);
        }
    }

    pub(crate) fn record_published(&self, took: Duration) {
        self.handles.publish_seconds.record(took);
    }

    pub(crate) fn page(&self, state: &State<'_>) -> String {
        let handles = &self.handles;
        let bodies = state.bodies_in_flight_bytes as f64;
        handles.bodies_in_flight_bytes.set(bodies);
        handles.waiting.set(f64::from(!state.is_ready));
        for ((of, _), gauge) in GROUP_STATES.iter().zip(&handles.group_commit) {
            gauge.set(f64::from(*of == state.group_commit));
        }
        metrics::with_local_recorder(&self.recorder, || Collector::default().collect());
        let mut page = self.page.render();
        page += &last_uses(state.secrets);
        page
    }

    /// Summarizes the samples since the last call. Must be called every few seconds, or memory
    /// grows.
    pub(crate) fn run_upkeep(&self) {
        self.page.run_upkeep();
    }
}

fn describe() {
    describe_counter!(DELIVERIES, "Deliveries answered, by outcome");
    describe_histogram!(
        REQUEST_SECONDS,
        "Seconds from a delivery's head to its answer, by outcome"
    );
    describe_histogram!(
        PUBLISH_SECONDS,
        "Seconds from a verified delivery to its PubAck"
    );
    describe_gauge!(
        BODIES_IN_FLIGHT_BYTES,
        "Bytes of bodies read and not yet stored or dropped"
    );
    describe_gauge!(WAITING, "1 while ingress is not ready, else 0");
    describe_gauge!(
        GROUP_COMMIT,
        "1 for how events that find others in flight are published, else 0"
    );
    describe_gauge!(
        BUILD_INFO,
        "Always 1; the labels name the program and its version"
    );
    Collector::default().describe();
}

/// Renders when each secret was last used. By hand, because the recorder cannot forget a secret that
/// is no longer in use.
fn last_uses(secrets: &[SigningSecret]) -> String {
    let mut lines = format!(
        "# HELP {SECRET_LAST_USED} When the last delivery that was verified with this signing secret came; 0 if none did\n\
         # TYPE {SECRET_LAST_USED} gauge\n"
    );
    // A secret may be listed twice, a series may not.
    let uses: BTreeMap<_, _> = secrets
        .iter()
        .map(|secret| (secret.fingerprint(), secret.last_used_s()))
        .collect();
    for (fingerprint, last_used) in uses {
        lines += &format!("{SECRET_LAST_USED}{{fingerprint=\"{fingerprint}\"}} {last_used}\n");
    }
    lines
}

#[cfg(test)]
mod tests;
