use std::time::Duration;

use super::{Metrics, Outcome};

#[test]
fn the_page_shows_every_outcome_from_the_start() {
    let page = Metrics::new().page(0);
    for (_, label) in Outcome::ALL {
        let line = format!("litestripe_ingress_deliveries_total{{outcome=\"{label}\"}} 0");
        assert!(page.contains(&line), "{line} is missing in\n{page}");
    }
    assert!(page.contains("litestripe_build_info{"), "{page}");
}

#[test]
fn every_outcome_has_its_own_counter() {
    for (outcome, label) in Outcome::ALL {
        let metrics = Metrics::new();
        metrics.record_delivery(outcome);
        let page = metrics.page(0);
        assert!(
            page.contains(&format!("{{outcome=\"{label}\"}} 1")),
            "{page}"
        );
    }
}

#[test]
fn the_page_shows_the_histogram_and_the_bytes_in_flight() {
    let metrics = Metrics::new();
    metrics.record_published(Duration::from_millis(3));
    let page = metrics.page(4096);
    for line in [
        "litestripe_ingress_publish_seconds_bucket{le=\"0.0025\"} 0",
        "litestripe_ingress_publish_seconds_bucket{le=\"0.005\"} 1",
        "litestripe_ingress_publish_seconds_count 1",
        "litestripe_ingress_bodies_in_flight_bytes 4096",
    ] {
        assert!(page.contains(line), "{line} is missing in\n{page}");
    }
}
