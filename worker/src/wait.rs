//! Waiting for something that will come back: the database, the broker, an answer.
//!
//! Owns the pauses between attempts and their log lines: one when waiting begins, with the reason,
//! and one when it ends. May not know what is attempted.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use backon::BackoffBuilder as _;
use litestripe_contract::exit;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::metrics;

/// Something that is waited for, with its log lines and pauses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Awaited {
    /// Logged when waiting begins, in front of the reason.
    pub(crate) begins: &'static str,
    pub(crate) ends: &'static str,
    /// The pause before the first retry. It doubles with each retry, with jitter.
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
    /// What the metrics show while waiting.
    pub(crate) shown: Option<&'static metrics::Awaited>,
}

pub(crate) const DATABASE: Awaited = Awaited {
    begins: "waiting for the database (DATABASE_URL)",
    ends: "the database is back",
    first: Duration::from_millis(50),
    longest: Duration::from_secs(5),
    shown: Some(&metrics::DATABASE),
};

/// JetStream, with its streams and consumers.
pub(crate) const JETSTREAM: Awaited = Awaited {
    begins: "waiting for JetStream",
    ends: "JetStream is back",
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    shown: Some(&metrics::BROKER),
};

/// The number of tasks that wait for the same thing. Only the first and the last of them log it.
#[derive(Debug, Default)]
pub struct Waiting(AtomicUsize);

/// The attempts of one task at one thing.
#[derive(Debug)]
pub(crate) struct Wait {
    awaited: Awaited,
    pauses: backon::ExponentialBackoff,
    is_waiting: bool,
    /// Shows in the metrics that this task waits.
    shown: Option<metrics::Waiting>,
    all: Arc<Waiting>,
}

impl Wait {
    pub(crate) fn new(awaited: Awaited) -> Self {
        Self::with_others(awaited, Arc::default())
    }

    /// Creates a `Wait` that shares its log lines with the others that hold `all`.
    pub(crate) fn with_others(awaited: Awaited, all: Arc<Waiting>) -> Self {
        Self {
            awaited,
            pauses: pauses(awaited),
            is_waiting: false,
            shown: None,
            all,
        }
    }

    /// Whether the last attempt failed.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Records a failed attempt. Returns the pause before the retry.
    pub(crate) fn failed(&mut self, error: &(dyn Error + 'static)) -> Duration {
        let reason = exit::chain(error);
        let begins = self.awaited.begins;
        let is_first = !std::mem::replace(&mut self.is_waiting, true);
        if is_first {
            self.shown = self.awaited.shown.map(metrics::Awaited::begin);
        }
        if is_first && self.all.0.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!(error = reason, "{begins}: {reason}");
        } else {
            debug!(error = reason, "a retry failed: {reason}");
        }
        self.pauses.next().unwrap_or(self.awaited.longest)
    }

    /// Records a successful attempt.
    pub(crate) fn succeeded(&mut self) {
        if !self.is_waiting {
            return;
        }
        if self.end() {
            info!("{}", self.awaited.ends);
        }
        self.pauses = pauses(self.awaited);
    }

    /// Ends this task's waiting. Returns whether it was the last task to wait.
    fn end(&mut self) -> bool {
        self.shown = None;
        std::mem::take(&mut self.is_waiting) && self.all.0.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.end();
    }
}

/// Retries `attempt` until it succeeds.
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

/// Sleeps for `duration`. Returns `None` if `shutdown` is cancelled first.
pub(crate) async fn pause(duration: Duration, shutdown: &CancellationToken) -> Option<()> {
    tokio::select! {
        () = shutdown.cancelled() => None,
        () = tokio::time::sleep(duration) => Some(()),
    }
}

/// Returns the pauses between attempts, with jitter, so that no two workers retry at the same
/// moment.
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
