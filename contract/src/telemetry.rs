//! Log lines, on stderr: stdout is for the output of commands.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::settings::LogSettings;

/// Our own lines already cover what these libraries log at `info`, or an operator has no use for
/// it.
const DEFAULT_FILTER: &str =
    "info,async_nats=warn,async_nats::connector=off,sea_orm_migration=warn";

/// Starts logging. Call it once, before the first log line.
pub fn init(settings: &LogSettings) {
    // The filter is valid: it was parsed when the settings were read.
    let filter = EnvFilter::new(if settings.filter_is_set {
        &settings.filter
    } else {
        DEFAULT_FILTER
    });
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would report a line that cannot be written with `eprintln!`, which panics if the reader
        // of stderr is gone. Then there is nowhere to log to, and the program works on.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    if settings.json {
        lines.json().flatten_event(true).init();
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
