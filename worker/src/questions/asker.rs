//! The asker: takes questions as they become due and asks several at a time.
//!
//! Owns when a question is asked and when it is retried.

use std::sync::Arc;
use std::time::{Duration, Instant};

use litestripe_contract::exit;
use litestripe_domain::question::Kind;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info};

use super::failures::{MANY_PAUSE_MAX, PAUSE_MAX, pause};
use super::grace::CHECK_MAX;
use super::user::UNKNOWN_RETRY_MAX;
use super::{Outcome, Questions};
use crate::fail_point::fail_point;
use crate::store::question::{self, Due, Retry, Taken};
use crate::trace;
use crate::wait::{Awaited, Wait};

/// How often the asker checks for due questions.
pub(super) const POLL: Duration = Duration::from_secs(1);

/// How long one worker holds a question before another may take it. It is longer than the longest
/// answer: two calls to Stripe, each with all its retries and the pauses that Stripe asks for.
const LEASE: Duration = Duration::from_secs(12 * 60);

/// The same for a lookup, and for the object of a thin event. Its answer rarely takes as long. If
/// it does, another worker asks too, which costs a call. The lease is short, because after a worker
/// died a customer waits for its end.
const SHORT_LEASE: Duration = Duration::from_secs(60);

/// How often the asker looks for questions that are due too far in the future.
const CORRECT_EVERY: Duration = Duration::from_secs(10);

/// How many failing questions are asked again at once when one of them does not fail. If what
/// failed works again, all of them are asked soon; if not, each answer costs that many calls.
const HASTENED: u64 = 2;

/// Questions of one kind that are asked at a time. Fewer if they call Stripe, where they queue for
/// the request budget.
pub(super) const IN_FLIGHT_MAX: usize = 16;
const STRIPE_IN_FLIGHT_MAX: usize = 4;
const NOTIFICATIONS_IN_FLIGHT_MAX: usize = 8;

/// The wait of the questions for the database. Batches wait for it separately.
const QUESTIONS: Awaited = Awaited {
    begins: "questions wait for the database",
    ends: "questions are asked again",
    first: POLL,
    longest: POLL,
    shown: None,
};

impl Questions {
    /// Asks questions until `shutdown`. Each kind has its own loop, so that no kind waits for
    /// another.
    pub async fn run(self, shutdown: CancellationToken) {
        let questions = Arc::new(self);
        let stripe_max = if questions.stripe.is_some() {
            STRIPE_IN_FLIGHT_MAX
        } else {
            IN_FLIGHT_MAX
        };
        let has_key = questions.stripe.is_some();
        let kinds = [
            (Kind::Lookup, questions.lookup.is_enabled(), IN_FLIGHT_MAX),
            (Kind::Grace, questions.orphans.without_session, stripe_max),
            (Kind::Fetch, has_key, stripe_max),
            (Kind::Erase, questions.erase_on_customer_deleted, 1),
            (Kind::Notification, has_key, NOTIFICATIONS_IN_FLIGHT_MAX),
            (Kind::Removal, true, IN_FLIGHT_MAX),
        ];
        let mut loops = JoinSet::new();
        for (kind, _, in_flight_max) in kinds.into_iter().filter(|(_, is_enabled, _)| *is_enabled) {
            loops.spawn(Arc::clone(&questions).ask_due(kind, in_flight_max, shutdown.clone()));
        }
        loops.spawn(questions.erase_old_emails(shutdown));
        while let Some(ended) = loops.join_next().await {
            // Without this panic, questions of that kind would silently never be asked again.
            ended.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
        }
    }

    /// Takes questions of one kind as they become due, and asks several at a time, so that a slow
    /// answer delays no other question.
    async fn ask_due(
        self: Arc<Self>,
        kind: Kind,
        in_flight_max: usize,
        shutdown: CancellationToken,
    ) {
        let mut in_flight = JoinSet::new();
        let mut wait = Wait::with_others(QUESTIONS, Arc::clone(&self.waiting));
        let mut corrected: Option<Instant> = None;
        while !shutdown.is_cancelled() {
            fail_point!("worker::before_question");
            while in_flight.try_join_next().is_some() {}
            let room = in_flight_max - in_flight.len();
            let due = Due {
                kind,
                livemode: self.mode_to_ask(kind),
                limit: room as u64,
            };
            if corrected.is_none_or(|at| at.elapsed() >= CORRECT_EVERY) {
                corrected = Some(Instant::now());
                self.correct_future(kind).await;
            }
            let taken = question::take(&self.store, due, lease(kind)).await;
            let taken = taken.inspect(|_| wait.succeeded()).unwrap_or_else(|error| {
                wait.failed(&error);
                Vec::new()
            });
            let is_full = taken.len() == room;
            for taken in taken {
                let (questions, shutdown) = (Arc::clone(&self), shutdown.clone());
                let span = trace::question(&taken.question);
                let asking = async move { questions.ask(taken, &shutdown).await };
                in_flight.spawn(asking.instrument(span));
            }
            tokio::select! {
                Some(_) = in_flight.join_next(), if is_full => {}
                () = self.wake.notified(), if kind == Kind::Lookup && !is_full && !wait.is_waiting() => {}
                () = tokio::time::sleep(poll(kind)) => {}
                () = shutdown.cancelled() => {}
            }
        }
        // Questions that are not answered before the shutdown deadline become due again after their
        // lease.
        while in_flight.join_next().await.is_some() {}
    }

    /// Returns the mode of the questions to ask, if only one can be asked: the key's. The others
    /// stay due, so that they are asked at once when their key is set.
    fn mode_to_ask(&self, kind: Kind) -> Option<bool> {
        let stripe = self.stripe.as_ref()?;
        (kind == Kind::Notification).then(|| stripe.sees(true))
    }

    /// Makes questions due that a clock which was ahead postponed by hours.
    async fn correct_future(&self, kind: Kind) {
        let pause_max = match kind {
            Kind::Grace => self.orphans.grace.saturating_add(CHECK_MAX),
            _ => UNKNOWN_RETRY_MAX.max(LEASE),
        };
        let db = self.store.connection();
        // Without the database nothing else succeeds either, and `take` says so.
        let mut count = 0;
        while let Ok(more @ 1..) =
            question::correct_future(db, kind, 2 * pause_max, 2 * MANY_PAUSE_MAX).await
        {
            count += more;
        }
        if count > 0 {
            let kind = kind.as_str();
            info!(
                kind,
                "a clock was ahead when it postponed {count} questions of the kind {kind}: they are asked now"
            );
        }
    }

    /// Asks one question. Without an answer, records when the question is due again.
    async fn ask(&self, taken: Taken, shutdown: &CancellationToken) {
        let question = &taken.question;
        let outcome = match question.kind() {
            Kind::Lookup => self.look_up(&taken).await,
            Kind::Grace => self.end_grace(&taken).await,
            Kind::Fetch => self.fetch_uncertain(&taken).await,
            Kind::Erase => self.erase_customer(&taken).await,
            Kind::Notification => self.fetch_notified(&taken, shutdown).await,
            Kind::Removal => self.remove_late(&taken).await,
        };
        let kind = question.kind();
        let db = self.store.connection();
        let in_a_row = |is_failure: bool| {
            let before = if taken.is_failing == is_failure {
                question.attempts
            } else {
                0
            };
            before.saturating_add(1)
        };
        if taken.is_failing
            && matches!(
                outcome,
                Ok(Outcome::Answered | Outcome::RetryAfter(_) | Outcome::Conflict)
            )
        {
            self.record_recovery(kind).await;
        }
        let retry = match outcome {
            Ok(Outcome::Answered) => return,
            Ok(Outcome::HandedBack) => Retry {
                after: Duration::ZERO,
                attempts: question.attempts,
                error: None,
            },
            Ok(Outcome::Conflict) => Retry {
                after: pause(POLL, PAUSE_MAX, in_a_row(false)),
                attempts: in_a_row(false),
                error: None,
            },
            Ok(Outcome::RetryAfter(after)) => Retry {
                after,
                attempts: in_a_row(false),
                error: None,
            },
            Err(error) => {
                let reason = exit::chain(&error);
                self.failures.log(question, &reason);
                trace::record_no_answer();
                let attempts = in_a_row(true);
                let asked_to_wait = error.asks_to_wait().unwrap_or_default().min(PAUSE_MAX);
                Retry {
                    after: self.failures.pause(kind, attempts).max(asked_to_wait),
                    attempts,
                    error: Some(reason),
                }
            }
        };
        if let Err(error) = question::postpone(db, &taken, retry).await {
            debug!(
                "cannot postpone a question, it becomes due again after its lease: {}",
                exit::chain(&error)
            );
        }
    }

    /// Has other failing questions asked again, because one that failed before did not fail now.
    async fn record_recovery(&self, kind: Kind) {
        self.failures.recovered(kind);
        if let Err(error) = question::hasten(self.store.connection(), kind, HASTENED).await {
            debug!(
                "failing questions wait for their time: {}",
                exit::chain(&error)
            );
        }
    }
}

/// Returns how often due questions of a kind are looked for: more often for thin events, because
/// the change that they announce has already happened.
fn poll(kind: Kind) -> Duration {
    if kind == Kind::Notification {
        POLL / 4
    } else {
        POLL
    }
}

pub(super) fn lease(kind: Kind) -> Duration {
    match kind {
        Kind::Lookup | Kind::Notification => SHORT_LEASE,
        Kind::Grace | Kind::Fetch | Kind::Erase | Kind::Removal => LEASE,
    }
}
