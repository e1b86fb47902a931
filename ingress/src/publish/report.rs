//! Logs when events stop being stored, why, and when they are stored again: once, not per event.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use super::outcome::Trouble;
use crate::throttle::Throttle;

/// The least time between two warnings, so that trouble that comes and goes does not fill the log.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Report {
    is_announced: AtomicBool,
    last: Mutex<Option<Trouble>>,
    throttle: Throttle,
}

impl Report {
    pub(super) fn new() -> Self {
        Self {
            is_announced: AtomicBool::new(false),
            last: Mutex::new(None),
            throttle: Throttle::new(TROUBLE_INTERVAL),
        }
    }

    pub(super) fn record_failure(&self, trouble: &Trouble) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(trouble)
            || self.throttle.admit(std::time::Instant::now()).is_none()
        {
            return;
        }
        *last = Some(trouble.clone());
        self.is_announced.store(true, Ordering::Release);
        warn!("events are not stored, deliveries are answered 503: {trouble}");
    }

    pub(super) fn record_stored(&self) {
        if self.is_announced.load(Ordering::Relaxed)
            && self.is_announced.swap(false, Ordering::AcqRel)
        {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
            info!("events are stored again");
        }
    }
}

#[cfg(test)]
mod tests;
