use std::time::Duration;

use time::macros::datetime;

use super::{GROUP_STATES, Metrics, Outcome, State};
use crate::publish::GroupState;
use crate::signature::SigningSecret;

const STATE: State<'_> = State {
    bodies_in_flight_bytes: 0,
    is_ready: true,
    group_commit: GroupState::Single,
    secrets: &[],
};

fn check(page: &str, lines: &[&str]) {
    for line in lines {
        assert!(
            page.lines().any(|found| found == *line),
            "{line} is missing in\n{page}"
        );
    }
}

#[test]
fn the_page_shows_every_outcome_from_the_start() {
    let page = Metrics::new().page(&STATE);
    for (_, label) in Outcome::ALL {
        let count = format!("litestripe_ingress_deliveries_total{{outcome=\"{label}\"}} 0");
        let seconds = format!("litestripe_ingress_request_seconds_count{{outcome=\"{label}\"}} 0");
        check(&page, &[&count, &seconds]);
    }
    assert!(page.contains("litestripe_build_info{"), "{page}");
    assert!(page.contains("\nprocess_start_time_seconds "), "{page}");
}

#[test]
fn every_outcome_has_its_own_counter_and_histogram() {
    for (outcome, label) in Outcome::ALL {
        let metrics = Metrics::new();
        metrics.record_delivery(outcome, Duration::from_millis(3));
        let page = metrics.page(&STATE);
        let count = format!("litestripe_ingress_deliveries_total{{outcome=\"{label}\"}} 1");
        let seconds = format!("litestripe_ingress_request_seconds_count{{outcome=\"{label}\"}} 1");
        check(&page, &[&count, &seconds]);
    }
}

#[test]
fn the_page_shows_the_histogram_and_the_bytes_in_flight() {
    let metrics = Metrics::new();
    metrics.record_published(Duration::from_millis(3));
    let page = metrics.page(&State {
        bodies_in_flight_bytes: 4096,
        ..STATE
    });
    check(
        &page,
        &[
            "litestripe_ingress_publish_seconds_bucket{le=\"0.0025\"} 0",
            "litestripe_ingress_publish_seconds_bucket{le=\"0.005\"} 1",
            "litestripe_ingress_publish_seconds_count 1",
            "litestripe_ingress_bodies_in_flight_bytes 4096",
        ],
    );
}

#[test]
fn the_page_shows_readiness_and_how_events_are_published() {
    let metrics = Metrics::new();
    for (group_commit, label) in GROUP_STATES {
        let page = metrics.page(&State {
            is_ready: group_commit == GroupState::Off,
            group_commit,
            ..STATE
        });
        let is_waiting = u8::from(group_commit != GroupState::Off);
        let waiting = format!("litestripe_ingress_waiting{{for=\"broker\"}} {is_waiting}");
        let state = format!("litestripe_ingress_group_commit{{state=\"{label}\"}} 1");
        check(&page, &[&waiting, &state]);
        let ones = |line: &&str| {
            line.starts_with("litestripe_ingress_group_commit{") && line.ends_with(" 1")
        };
        assert_eq!(page.lines().filter(ones).count(), 1, "{page}");
    }
}

#[test]
fn each_secret_in_use_has_its_last_use() {
    let [old, new, gone] = ["whsec_old", "whsec_new", "whsec_gone"].map(SigningSecret::new);
    new.record_use(datetime!(2026-12-01 12:00:01 UTC));
    // Deliveries are not recorded in the order in which they came.
    new.record_use(datetime!(2026-12-01 12:00:00 UTC));
    gone.record_use(datetime!(2026-12-01 12:00:00 UTC));
    let metrics = Metrics::new();
    let page = |secrets: &[SigningSecret]| metrics.page(&State { secrets, ..STATE });
    let (first, later) = (
        page(&[old.clone(), gone.clone()]),
        page(&[old.clone(), new.clone(), new.clone()]),
    );
    let line = |secret: &SigningSecret, at: i64| {
        format!(
            "litestripe_ingress_signing_secret_last_used_timestamp_seconds{{fingerprint=\"{}\"}} {at}",
            secret.fingerprint()
        )
    };
    check(&first, &[&line(&old, 0), &line(&gone, 1_796_126_400)]);
    check(&later, &[&line(&old, 0), &line(&new, 1_796_126_401)]);
    assert_eq!(later.matches("{fingerprint=").count(), 2, "{later}");
}
