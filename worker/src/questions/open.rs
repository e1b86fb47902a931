//! Counts the open questions and those that fail, and warns if some of them wait for a key.

use std::sync::Arc;
use std::time::{Duration, Instant};

use litestripe_domain::question::Kind;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Questions;
use crate::error::StoreError;
use crate::metrics;
use crate::store::clock;
use crate::store::question::{self, Open};
use crate::wait::pause;

/// How often the questions are counted, at most.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// How many times longer than a count the pause after it is, at least: a million questions take a
/// second on SQLite, which does nothing else meanwhile.
const PAUSE_TO_COUNT: u32 = 50;

/// How often the log warns at most that questions wait for a key.
const WARN_EVERY: Duration = Duration::from_secs(60 * 60);

impl Questions {
    /// Counts the open questions until `shutdown`.
    pub(super) async fn count_open(self: Arc<Self>, shutdown: CancellationToken) {
        let mut warned: Option<Instant> = None;
        loop {
            let began = Instant::now();
            let open = self.read_open().await;
            let took = began.elapsed();
            if let Ok((open, now)) = open {
                self.failures.record_counts(&open);
                let waiting = self.record(&open, now);
                metrics::waiting_for_key(waiting > 0);
                let is_due = warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
                if waiting > 0 && is_due {
                    warned = Some(Instant::now());
                    self.warn_of_missing_key(waiting);
                }
            }
            let until_next = COUNT_EVERY.max(took * PAUSE_TO_COUNT);
            if pause(until_next, &shutdown).await.is_none() {
                return;
            }
        }
    }

    /// Returns the open questions, and the time by the clock that dates them.
    async fn read_open(&self) -> Result<(Vec<Open>, OffsetDateTime), StoreError> {
        let db = self.store.connection();
        Ok((question::count_open(db).await?, clock::now(db).await?))
    }

    /// Records the counts as metrics. Returns how many questions wait for a key.
    fn record(&self, open: &[Open], now: OffsetDateTime) -> u64 {
        for kind in Kind::ALL {
            let of_kind = || open.iter().filter(|open| open.kind == kind);
            let oldest = of_kind().filter_map(|open| open.oldest).min();
            let age = oldest.map_or(time::Duration::ZERO, |oldest| now - oldest);
            metrics::questions(
                kind.as_str(),
                of_kind().map(|open| open.count).sum(),
                of_kind().map(|open| open.failing).sum(),
                age.as_seconds_f64().max(0.0),
            );
        }
        let key = self.stripe.as_ref().map(|stripe| stripe.sees(true));
        let waiting = open.iter().filter(|open| open.waits_for_key(key));
        waiting.map(|open| open.count).sum()
    }

    fn warn_of_missing_key(&self, waiting: u64) {
        let fix = match &self.stripe {
            None => "set it to a key that may read subscriptions and Checkout Sessions",
            Some(_) => "it is a key of the other mode, live or test",
        };
        warn!(
            waiting,
            "{waiting} subscriptions and Checkout Sessions with thin events wait for STRIPE_SECRET_KEY: {fix}"
        );
    }
}
