//! Reports when events stop being stored, why, and when they are stored again: once in the log, not
//! per event, and to readiness if it lasts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::outcome::Trouble;
use crate::throttle::Throttle;

/// The least time between two warnings, so that trouble that comes and goes does not fill the log.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(10);

/// How long events may not be stored before ingress is not ready.
const NOT_WORKING_AFTER: Duration = Duration::from_secs(30);

/// How long the last failure keeps ingress from being ready: if no deliveries are sent to it any
/// more, none can show that the trouble is over.
const FAILURE_LASTS: Duration = Duration::from_secs(60);

pub(super) struct Report {
    /// Whether `failing` is set. Storing an event looks only at this.
    is_failing: AtomicBool,
    failing: Mutex<Option<Failing>>,
    throttle: Throttle,
}

/// A time in which no event was stored.
struct Failing {
    since: Instant,
    latest: Instant,
    trouble: Trouble,
    logged: Option<Trouble>,
}

impl Report {
    pub(super) fn new() -> Self {
        Self {
            is_failing: AtomicBool::new(false),
            failing: Mutex::new(None),
            throttle: Throttle::new(TROUBLE_INTERVAL),
        }
    }

    pub(super) fn record_failure(&self, trouble: &Trouble, now: Instant) {
        let mut failing = self.locked();
        let failing = failing.get_or_insert_with(|| Failing {
            since: now,
            latest: now,
            trouble: trouble.clone(),
            logged: None,
        });
        self.is_failing.store(true, Ordering::Release);
        failing.latest = now;
        failing.trouble = trouble.clone();
        if failing.logged.as_ref() == Some(trouble) || self.throttle.admit(now).is_none() {
            return;
        }
        failing.logged = Some(trouble.clone());
        warn!("events are not stored, deliveries are answered 503: {trouble}");
    }

    pub(super) fn record_stored(&self) {
        if self.is_failing.load(Ordering::Relaxed) && self.is_failing.swap(false, Ordering::AcqRel)
        {
            let failing = self.locked().take();
            if failing.is_some_and(|failing| failing.logged.is_some()) {
                info!("events are stored again");
            }
        }
    }

    /// Returns the latest trouble if no event has been stored for long although some have come.
    pub(super) fn lasting_trouble(&self, now: Instant) -> Option<Trouble> {
        let failing = self.locked();
        let failing = failing.as_ref()?;
        let lasted = failing.latest.saturating_duration_since(failing.since);
        let is_recent = now.saturating_duration_since(failing.latest) < FAILURE_LASTS;
        (lasted >= NOT_WORKING_AFTER && is_recent).then(|| failing.trouble.clone())
    }

    fn locked(&self) -> MutexGuard<'_, Option<Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
