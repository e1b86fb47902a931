//! What follows from the number of open questions: the pauses of those that fail, and a warning if
//! some wait for a key.

use std::sync::Arc;
use std::time::{Duration, Instant};

use litestripe_domain::question::Kind;
use tracing::warn;

use super::Failures;
use crate::metrics;
use crate::store::figures::{COUNT_MAX, Figures};

/// How often the log warns at most that questions wait for a key.
const WARN_EVERY: Duration = Duration::from_secs(60 * 60);

pub(crate) struct OpenQuestions {
    failures: Arc<Failures>,
    /// Whether the key is of live mode, if there is one.
    key: Option<bool>,
    warned: Option<Instant>,
}

impl OpenQuestions {
    pub(crate) fn new(failures: Arc<Failures>, key: Option<bool>) -> Self {
        Self {
            failures,
            key,
            warned: None,
        }
    }

    pub(crate) fn record(&mut self, figures: &Figures) {
        let failing = |kind| (kind, figures.questions(kind).failing.count);
        self.failures.record_counts(Kind::ALL.map(failing));
        let waiting = figures.waiting_for_key(self.key);
        metrics::waiting_for_key(waiting > 0);
        let is_due = (self.warned).is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
        if waiting > 0 && is_due {
            self.warned = Some(Instant::now());
            self.warn_of_missing_key(waiting);
        }
    }

    fn warn_of_missing_key(&self, waiting: u64) {
        let or_more = if waiting < COUNT_MAX { "" } else { " or more" };
        let fix = match self.key {
            None => "set it to a key that may read subscriptions and Checkout Sessions",
            Some(_) => "it is a key of the other mode, live or test",
        };
        warn!(
            waiting,
            "{waiting}{or_more} subscriptions and Checkout Sessions with thin events wait for STRIPE_SECRET_KEY: {fix}"
        );
    }
}
