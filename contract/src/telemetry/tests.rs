use tracing::level_filters::LevelFilter;
use tracing::{debug_span, info_span};

use super::init;
use super::traces::{self, TARGET};
use crate::settings::LogSettings;

/// Only one test of a process may start the log.
#[test]
fn while_traces_are_off_no_span_is_made_and_lines_below_the_filter_cost_nothing() {
    let log = LogSettings {
        filter: "debug".to_owned(),
        filter_is_set: true,
        json: true,
    };
    let telemetry = init(&log, None, "test").expect("there is nothing that can fail");
    assert_eq!(LevelFilter::current(), LevelFilter::DEBUG);
    let span = info_span!(target: TARGET, "delivery");
    assert!(span.is_disabled());
    assert!(!debug_span!("of another target").is_disabled());
    let _entered = span.enter();
    assert_eq!((traces::context(&span), traces::current()), (None, None));
    drop(telemetry);
}
