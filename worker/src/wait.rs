//! Waiting for something that will come back: the database, the broker, an answer.
//!
//! Owns the pauses between tries and what is said about them: once that waiting began and why, and
//! once that it is over. May not know what is tried.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use backon::BackoffBuilder as _;
use litestripe_contract::exit;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::metrics;

/// Something that is waited for, and how it is said.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Awaited {
    /// Logged when waiting begins, in front of the reason.
    pub(crate) begins: &'static str,
    pub(crate) ends: &'static str,
    /// The pause before the second try. It doubles with each one, with jitter.
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
    /// The gauge that is 1 meanwhile.
    pub(crate) gauge: Option<fn(bool)>,
}

pub(crate) const DATABASE: Awaited = Awaited {
    begins: "waiting for the database (DATABASE_URL)",
    ends: "the database is back",
    first: Duration::from_millis(50),
    longest: Duration::from_secs(5),
    gauge: Some(metrics::waiting_for_database),
};

/// JetStream, with its streams and consumers.
pub(crate) const JETSTREAM: Awaited = Awaited {
    begins: "waiting for JetStream",
    ends: "JetStream is back",
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    gauge: Some(metrics::waiting_for_broker),
};

/// How many wait for the same thing. Only the first and the last of them say so.
#[derive(Debug, Default)]
pub struct Waiting(AtomicUsize);

/// Tries of one thing.
#[derive(Debug)]
pub(crate) struct Wait {
    awaited: Awaited,
    pauses: backon::ExponentialBackoff,
    is_waiting: bool,
    all: Arc<Waiting>,
}

impl Wait {
    pub(crate) fn new(awaited: Awaited) -> Self {
        Self::with_others(awaited, Arc::default())
    }

    /// Tries beside others of the same thing.
    pub(crate) fn with_others(awaited: Awaited, all: Arc<Waiting>) -> Self {
        Self {
            awaited,
            pauses: pauses(awaited),
            is_waiting: false,
            all,
        }
    }

    /// Whether the last try failed.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// A try failed. Returns how long to wait before the next one.
    pub(crate) fn failed(&mut self, error: &(dyn Error + 'static)) -> Duration {
        let reason = exit::chain(error);
        let begins = self.awaited.begins;
        let is_first = !std::mem::replace(&mut self.is_waiting, true);
        if is_first && self.all.0.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!(error = reason, "{begins}: {reason}");
            self.show(true);
        } else {
            debug!(error = reason, "another try failed: {reason}");
        }
        self.pauses.next().unwrap_or(self.awaited.longest)
    }

    pub(crate) fn succeeded(&mut self) {
        if !self.is_waiting {
            return;
        }
        if self.end() {
            info!("{}", self.awaited.ends);
        }
        self.pauses = pauses(self.awaited);
    }

    /// Ends the waiting. Returns whether nobody waits any more.
    fn end(&mut self) -> bool {
        let is_last =
            std::mem::take(&mut self.is_waiting) && self.all.0.fetch_sub(1, Ordering::Relaxed) == 1;
        if is_last {
            self.show(false);
        }
        is_last
    }

    fn show(&self, waiting: bool) {
        if let Some(gauge) = self.awaited.gauge {
            gauge(waiting);
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.end();
    }
}

/// Tries until it succeeds.
pub(crate) async fn until_ok<T, E: Error + 'static>(
    awaited: Awaited,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let mut wait = Wait::new(awaited);
    loop {
        match attempt().await {
            Err(error) => tokio::time::sleep(wait.failed(&error)).await,
            Ok(value) => {
                wait.succeeded();
                return value;
            }
        }
    }
}

/// Sleeps, unless `shutdown` comes first: then it returns `None`.
pub(crate) async fn pause(duration: Duration, shutdown: &CancellationToken) -> Option<()> {
    tokio::select! {
        () = shutdown.cancelled() => None,
        () = tokio::time::sleep(duration) => Some(()),
    }
}

/// With jitter, so that no two workers try at the same moment.
fn pauses(awaited: Awaited) -> backon::ExponentialBackoff {
    backon::ExponentialBuilder::new()
        .with_min_delay(awaited.first)
        .with_max_delay(awaited.longest)
        .without_max_times()
        .with_jitter()
        .build()
}

#[cfg(test)]
mod tests;
