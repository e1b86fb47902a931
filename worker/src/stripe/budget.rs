//! The budget of calls to Stripe's API, which all workers share.
//!
//! Owns when a request may be sent. A process reserves a few requests at a time (`plan`) by
//! compare-and-set on one key of the KV bucket, then reads back when the broker stored the
//! reservation. That time is the only one that processes agree on: each measures from it with its
//! own clock, and allows for the round trip. A leaky bucket spreads the requests of one process,
//! and keeps it within the budget even if the key is damaged. Without the broker no process gets a
//! permit.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use leaky_bucket::RateLimiter;
use litestripe_contract::exit;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use crate::settings::BudgetSettings;
use crate::stripe::kv::{Bucket, Entry, KvError};

mod plan;

use plan::Plan;

/// The fewest requests to reserve, even if fewer calls wait: calls often follow one another, and
/// each reservation costs two round trips to the broker.
const RESERVED_MIN: u32 = 4;

/// Calls that may queue for a permit. Further calls wait until the queue has room.
const QUEUE_MAX: usize = 1024;

/// How long reserving may fail before a warning is logged.
const WARN_AFTER: Duration = Duration::from_secs(5);

/// Pauses between attempts. Their jitter keeps processes whose writes conflicted from conflicting
/// again.
const PAUSE_FIRST: Duration = Duration::from_millis(2);
const PAUSE_LONGEST: Duration = Duration::from_secs(1);

/// Pause between two reads for our own write, which a lagging replica may not have yet.
const READ_BACK_PAUSE: Duration = Duration::from_millis(2);

/// The shared budget, which gives out permits for calls to Stripe's API.
pub struct Budget {
    queue: mpsc::Sender<oneshot::Sender<Instant>>,
    _reserver: AbortOnDropHandle<()>,
}

/// The task that reserves requests, and hands out permits in the order in which callers asked.
struct Reserver {
    plan: Plan,
    rate_limiter: RateLimiter,
    bucket: Bucket,
    key: String,
    /// The key's last known entry, and when it was read.
    last: Option<(Entry, Instant)>,
    grant: Option<Grant>,
}

/// A reservation by our clock: `left` requests may be sent between `from` and `until`.
#[derive(Debug, Clone, Copy)]
struct Grant {
    from: Instant,
    until: Instant,
    left: u32,
}

#[derive(Debug, thiserror::Error)]
enum ReserveError {
    #[error(transparent)]
    Kv(#[from] KvError),
    #[error("the broker answers so slowly that a reservation has expired by then")]
    Slow,
}

impl Budget {
    /// Starts the task that reserves requests. The budget is shared through the broker of
    /// `jetstream`.
    pub fn new(settings: &BudgetSettings, jetstream: jetstream::Context, replicas: usize) -> Self {
        let plan = Plan::new(settings.requests, settings.window);
        let (bucket, key) = (Bucket::new(jetstream, replicas), settings.key.clone());
        let reserver = Reserver {
            plan,
            rate_limiter: rate_limiter(settings),
            bucket,
            key,
            last: None,
            grant: None,
        };
        let (queue, queued) = mpsc::channel(QUEUE_MAX);
        Self {
            queue,
            _reserver: AbortOnDropHandle::new(tokio::spawn(reserver.run(queued))),
        }
    }

    /// Waits until one request may be sent. The caller has to send it at once.
    ///
    /// # Cancel safety
    /// If the caller stops waiting, its permit is lost.
    pub async fn acquire(&self) {
        loop {
            let (sender, permit) = oneshot::channel();
            // Never fails: the reserver lives as long as `self`.
            if self.queue.send(sender).await.is_err() {
                std::future::pending::<()>().await;
            }
            if permit.await.is_ok_and(|until| Instant::now() <= until) {
                return;
            }
            debug!("a permit for Stripe's API came too late to be used");
        }
    }
}

impl Reserver {
    async fn run(mut self, mut queued: mpsc::Receiver<oneshot::Sender<Instant>>) {
        while let Some(asked) = queued.recv().await {
            if !asked.is_closed() {
                let until = self.permit(queued.len()).await;
                // If the caller has stopped waiting, the permit is lost.
                let _ = asked.send(until);
            }
        }
    }

    /// Waits until a request may be sent. Returns the end of the time in which it may be sent.
    async fn permit(&mut self, also_waiting: usize) -> Instant {
        loop {
            let grant = match self.grant.take() {
                Some(grant) if grant.left > 0 && Instant::now() <= grant.until => grant,
                _ => self.reserve(also_waiting).await,
            };
            tokio::time::sleep_until(grant.from.into()).await;
            self.rate_limiter.acquire_one().await;
            if Instant::now() <= grant.until {
                self.grant = Some(Grant {
                    left: grant.left.saturating_sub(1),
                    ..grant
                });
                return grant.until;
            }
        }
    }

    /// Reserves requests. Retries until it succeeds.
    async fn reserve(&mut self, also_waiting: usize) -> Grant {
        let waiting = u32::try_from(also_waiting)
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        let count = waiting.max(RESERVED_MIN).min(self.plan.size_max);
        let started = Instant::now();
        let mut warned = false;
        let mut pauses = super::pauses(PAUSE_FIRST, PAUSE_LONGEST);
        loop {
            match self.try_reserve(count).await {
                Ok(grant) => {
                    if warned {
                        info!("calls to Stripe's API continue");
                    }
                    return grant;
                }
                Err(error) if !warned && started.elapsed() > WARN_AFTER => {
                    warn!(
                        "calls to Stripe's API wait for their shared budget: {}",
                        exit::chain(&error)
                    );
                    warned = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSE_LONGEST)).await;
        }
    }

    async fn try_reserve(&mut self, count: u32) -> Result<Grant, ReserveError> {
        let (last, seen) = match self.last.take() {
            Some(last) => last,
            None => (self.bucket.read(&self.key).await?, Instant::now()),
        };
        // If the key was never written, nothing is reserved.
        let stored = last.written.unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let next = self.plan.next(
            last.value.as_deref(),
            stored,
            self.plan.interval.saturating_mul(count),
        );
        tokio::time::sleep_until((seen + self.plan.wait(next, stored)).into()).await;

        let sent = Instant::now();
        let revision = self
            .bucket
            .write(&self.key, next.to_value(), last.revision)
            .await?;
        let (entry, stored) = self.read_back(revision, sent + self.plan.usable).await?;
        let received = Instant::now();
        self.last = Some((entry, received));
        let (from, until) = self.plan.permitted(next, stored, sent, received);
        if from < until {
            Ok(Grant {
                from,
                until,
                left: count,
            })
        } else {
            Err(ReserveError::Slow)
        }
    }

    /// Reads our write of `revision`, or a later one, and when the broker stored it.
    async fn read_back(
        &mut self,
        revision: u64,
        until: Instant,
    ) -> Result<(Entry, OffsetDateTime), ReserveError> {
        loop {
            let entry = self.bucket.read(&self.key).await?;
            match entry.written {
                Some(stored) if entry.revision >= revision => return Ok((entry, stored)),
                _ if Instant::now() < until => tokio::time::sleep(READ_BACK_PAUSE).await,
                _ => return Err(ReserveError::Slow),
            }
        }
    }
}

/// Creates the limiter that keeps one process to the budget's rate. It is refilled at most ten
/// times a second: refilled more often, it falls behind.
fn rate_limiter(settings: &BudgetSettings) -> RateLimiter {
    let seconds = u32::try_from(settings.window.as_secs())
        .unwrap_or(u32::MAX)
        .max(1);
    let size = (settings.requests / 10 / seconds).max(1);
    let tokens = usize::try_from(size).unwrap_or(usize::MAX);
    RateLimiter::builder()
        .initial(tokens)
        .max(tokens)
        .refill(tokens)
        .interval(settings.window * size / settings.requests.max(1))
        .build()
}
