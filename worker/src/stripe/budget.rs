//! The budget of calls to Stripe's API, which all workers share.
//!
//! Owns when a request may be sent. The budget's slots (`plan`) are dealt out through one key of the
//! KV bucket, which holds the next free one: a process takes a block of them by compare-and-set, as many
//! as are asked for and, while it uses them up in time, some ahead, so that most calls cost no round trip
//! to the broker. It uses each at its time on the broker's clock (`clock`), or shortly after, or never. A
//! leaky bucket keeps one process to about its budget whatever somebody does to that key. Without the
//! broker nobody gets a permit: the limit fails safe.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use backon::BackoffBuilder as _;
use leaky_bucket::RateLimiter;
use litestripe_contract::exit;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use crate::settings::BudgetSettings;
use crate::stripe::kv::{Bucket, Entry, KvError};

mod clock;
mod plan;

use clock::Clock;
use plan::{Plan, Stored};

/// How long before its last slot a process takes the next block: a round trip to a broker that is far.
const AHEAD: Duration = Duration::from_millis(250);

/// Requests that may wait to be noticed; more wait just the same.
const ASKED: usize = 1024;

/// How long the broker may be away before somebody is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// A shared budget.
pub struct Budget {
    asked: mpsc::Sender<oneshot::Sender<Permit>>,
    pace: RateLimiter,
    _dealer: AbortOnDropHandle<()>,
}

/// One request may be sent between these.
#[derive(Debug, Clone, Copy)]
struct Permit {
    from: Instant,
    until: Instant,
}

/// Takes slots of the budget and deals them out to whoever asked.
struct Dealer {
    plan: Plan,
    bucket: Bucket,
    key: String,
    clock: Clock,
    /// What we wrote last: while nobody else writes, nobody has to read.
    entry: Option<Entry>,
    /// Permits of the last block that nobody has asked for yet.
    spare: VecDeque<Permit>,
    last: Option<LastBlock>,
}

/// The block that was taken last.
#[derive(Debug, Clone, Copy)]
struct LastBlock {
    size: usize,
    last: Permit,
    /// Whether a permit of it was not asked for in time.
    is_wasted: bool,
}

/// Why no block was taken.
#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Its answers take so long that nobody can say what its clock shows.
    #[error("the broker answers too slowly to agree on a time")]
    Slow,
}

impl Budget {
    /// The budget of `settings`, shared through the broker of `jetstream`.
    #[must_use]
    pub fn new(settings: &BudgetSettings, jetstream: jetstream::Context, replicas: usize) -> Self {
        let plan = Plan::new(settings.requests, settings.window);
        let bucket = Bucket::new(jetstream, replicas);
        let dealer = Dealer {
            plan,
            bucket,
            key: settings.key.clone(),
            clock: Clock::default(),
            entry: None,
            spare: VecDeque::new(),
            last: None,
        };
        let pace = pace(plan);
        let (asked, asking) = mpsc::channel(ASKED);
        Self { asked, pace, _dealer: AbortOnDropHandle::new(tokio::spawn(dealer.run(asking))) }
    }

    /// Returns when one request may be sent, and only then: at once.
    ///
    /// # Cancel safety
    /// A permit that is not waited for is lost.
    pub async fn acquire(&self) {
        loop {
            let (sender, permit) = oneshot::channel();
            // Both ends live as long as `self`.
            if self.asked.send(sender).await.is_err() {
                std::future::pending::<()>().await;
            }
            let Ok(permit) = permit.await else { continue };
            tokio::time::sleep_until(permit.from.into()).await;
            self.pace.acquire_one().await;
            if Instant::now() <= permit.until {
                return;
            }
            debug!("a permit for Stripe's API came too late to be used");
        }
    }
}

impl Dealer {
    async fn run(mut self, mut asking: mpsc::Receiver<oneshot::Sender<Permit>>) {
        let mut waiting = Vec::new();
        while asking.recv_many(&mut waiting, self.plan.block()).await > 0 {
            self.deal(&mut waiting);
            if waiting.is_empty() {
                continue;
            }
            // One block at a time, so that a process that dies takes no more with it.
            if let Some(next) = self.last.and_then(|block| block.last.from.checked_sub(AHEAD)) {
                tokio::time::sleep_until(next.into()).await;
            }
            let room = self.plan.block().saturating_sub(waiting.len());
            waiting.extend(std::iter::from_fn(|| asking.try_recv().ok()).take(room));
            let size = self.next_size().clamp(waiting.len(), self.plan.block().max(waiting.len()));
            self.spare = self.take(size).await.into();
            self.last = self.spare.back().map(|last| LastBlock { size, last: *last, is_wasted: false });
            self.deal(&mut waiting);
        }
    }

    /// Gives what is there to whoever asked first.
    fn deal(&mut self, waiting: &mut Vec<oneshot::Sender<Permit>>) {
        waiting.retain(|asked| !asked.is_closed());
        let now = Instant::now();
        let taken = self.spare.len();
        self.spare.retain(|permit| permit.until > now);
        if let Some(block) = self.last.as_mut().filter(|_| self.spare.len() < taken) {
            block.is_wasted = true;
        }
        let count = self.spare.len().min(waiting.len());
        for (asked, permit) in waiting.drain(..count).zip(self.spare.drain(..count)) {
            // Whoever asked may have gone: the permit is lost.
            let _ = asked.send(permit);
        }
    }

    /// How many slots are worth taking, whoever asks for them: more than last time, if those were used
    /// up in time, just now.
    fn next_size(&self) -> usize {
        let now = Instant::now();
        match self.last {
            Some(block) if !block.is_wasted && now <= block.last.until => {
                let due = block.last.from + self.plan.interval();
                self.plan.next_size(block.size, now.saturating_duration_since(due))
            }
            _ => 1,
        }
    }

    /// Takes a block, however long that takes.
    async fn take(&mut self, count: usize) -> Vec<Permit> {
        let started = Instant::now();
        let mut said = false;
        let mut delays = delays();
        loop {
            match self.try_take(count).await {
                Ok(permits) => {
                    if said {
                        info!("calls to Stripe's API go on");
                    }
                    return permits;
                }
                Err(error) => {
                    self.entry = None;
                    if !said && started.elapsed() > PATIENCE {
                        warn!("calls to Stripe's API wait for their shared budget: {}", exit::chain(&error));
                        said = true;
                    }
                }
            }
            tokio::time::sleep(delays.next().unwrap_or(PATIENCE)).await;
        }
    }

    async fn try_take(&mut self, count: usize) -> Result<Vec<Permit>, TakeError> {
        let mut entry = match self.entry.take() {
            Some(entry) => entry,
            None => self.read().await?,
        };
        let mut now = self.now();
        if now.is_none() {
            entry = self.look_at_clock(entry).await?;
            now = self.now();
        }
        let now = now.ok_or(TakeError::Slow)?;
        let block = self.plan.take(Stored::read(entry.value.as_deref()), now, count);
        let value = Stored::write(block.next);
        let revision = self.bucket.write(&self.key, value.clone(), entry.revision).await?;
        self.entry = Some(Entry { value: Some(value.into()), revision, written: None });
        let lateness = self.plan.lateness();
        let spans = self.plan.slots(block).filter_map(|slot| self.clock.span(slot, lateness));
        Ok(spans.map(|(from, until)| Permit { from, until }).collect())
    }

    /// What the broker's clock shows, if that is known well enough to use a permit by it.
    fn now(&self) -> Option<OffsetDateTime> {
        self.clock.shows(Instant::now(), self.plan.lateness() / 4)
    }

    async fn read(&mut self) -> Result<Entry, KvError> {
        let entry = self.bucket.read(&self.key).await?;
        if let Some(written) = entry.written {
            self.clock.check(written, Instant::now());
        }
        Ok(entry)
    }

    /// Writes the entry as it is, to see when the broker thinks that this was.
    async fn look_at_clock(&mut self, entry: Entry) -> Result<Entry, KvError> {
        let value = entry.value.unwrap_or_else(|| Stored::write(OffsetDateTime::UNIX_EPOCH).into());
        let sent = Instant::now();
        let revision = self.bucket.write(&self.key, value, entry.revision).await?;
        let received = Instant::now();
        let entry = self.bucket.read(&self.key).await?;
        match entry.written {
            Some(written) if entry.revision == revision => {
                self.clock.learn(sent, received, written);
                Ok(entry)
            }
            _ => Err(KvError::Crossed(self.key.clone())),
        }
    }
}

/// About the budget, for one process: what it may use at once, and then a slot's share at a time.
fn pace(plan: Plan) -> RateLimiter {
    // The bucket counts in milliseconds.
    const TICK: Duration = Duration::from_millis(1);
    let per_tick = TICK.as_micros().div_ceil(plan.interval().as_micros().max(1));
    RateLimiter::builder()
        .initial(plan.burst())
        .max(plan.burst())
        .interval(plan.interval().max(TICK))
        .refill(usize::try_from(per_tick).unwrap_or(usize::MAX))
        .build()
}

/// Waits between tries: several processes that crossed must not cross again.
fn delays() -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(2))
        .with_max_delay(Duration::from_secs(1))
        .without_max_times()
        .with_jitter()
        .build()
}
