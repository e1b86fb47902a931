//! Log lines, on stderr: stdout belongs to what a command prints.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::settings::LogSettings;

/// What libraries say at `info` is said by us, or of no use to an operator.
const DEFAULT_FILTER: &str =
    "info,async_nats=warn,async_nats::connector=off,sea_orm_migration=warn";

/// Starts logging. To be called once, before anything is logged.
pub fn init(settings: &LogSettings) {
    // The filter was parsed when the settings were read.
    let filter = EnvFilter::new(if settings.filter_is_set {
        &settings.filter
    } else {
        DEFAULT_FILTER
    });
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if settings.json {
        lines.json().flatten_event(true).init();
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
