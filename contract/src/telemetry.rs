//! Log lines, on stderr (stdout is for the output of commands), and traces.

use std::io::IsTerminal as _;
use std::time::Duration;

use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Subscriber, warn};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt};

use crate::settings::{LogSettings, TraceSettings};

mod json;
pub mod traces;

pub use traces::TracesError;

/// Our own lines already cover what these libraries log at `info`, or an operator has no use for
/// it.
const DEFAULT_FILTER: &str =
    "info,async_nats=warn,async_nats::connector=off,sea_orm_migration=warn";

/// How long sending the last spans may take at the end.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Sends the last spans when it is dropped, for two seconds at most.
#[must_use]
pub struct Telemetry(Option<SdkTracerProvider>);

/// Starts logging, and recording traces if there are settings for them. `program` is the name of
/// the service unless the settings have one. Call it once, before the first log line, and drop the
/// result last.
///
/// # Errors
/// The client that sends traces cannot be made.
pub fn init(
    log: &LogSettings,
    traces: Option<&TraceSettings>,
    program: &'static str,
) -> Result<Telemetry, TracesError> {
    // The filter is valid: it was parsed when the settings were read.
    let filter = EnvFilter::new(if log.filter_is_set {
        &log.filter
    } else {
        DEFAULT_FILTER
    });
    let filter = filter.add_directive(traces::never_logged());
    let registry = tracing_subscriber::registry();
    let Some(settings) = traces else {
        // A filter of all layers: what it does not want is never made.
        registry.with(filter).with(lines(log)).init();
        return Ok(Telemetry(None));
    };
    let provider = traces::provider(settings, program)?;
    registry
        .with(lines(log).with_filter(filter))
        .with(traces::layer(&provider))
        .init();
    Ok(Telemetry(Some(provider)))
}

fn lines<S>(log: &LogSettings) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = fmt::layer()
        // It would report a line that cannot be written with `eprintln!`, which panics if the reader
        // of stderr is gone. Then there is nowhere to log to, and the program works on.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    if log.json {
        let lines = lines.json().flatten_event(true);
        lines.map_event_format(json::WithTrace).boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).boxed()
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = &self.0
            && let Err(error) = provider.shutdown_with_timeout(FLUSH_MAX)
        {
            warn!("the last spans may be lost: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
