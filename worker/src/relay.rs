//! The relay: the only publisher of signals.
//!
//! Owns which signals are sent when: only one relay at a time works on a shard of the outbox, so
//! their order, which `send` keeps, holds over all workers. Any worker sends the signals that a
//! crashed one left.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::context::PublishError;
use futures_util::FutureExt as _;
use litestripe_contract::settings::NatsSettings;
use litestripe_contract::{connect, exit};
use litestripe_entity::signal_outbox::Model;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug};

use crate::error::StoreError;
use crate::fail_point::fail_point;
use crate::metrics;
use crate::store::Transaction;
use crate::store::{self, Store, detached};
use crate::trace;
use crate::wait::{Awaited, Wait};

mod cost;
mod send;

pub use cost::SignalCosts;
use send::Sender;

/// How often the relay checks the outbox without being woken up: the signals of a crashed worker
/// wait this long.
const POLL: Duration = Duration::from_secs(1);

/// The relay's wait, for the database or for the broker.
const SIGNALS: Awaited = Awaited {
    begins: "signals wait in the outbox",
    ends: "the relay is sending signals again",
    first: POLL,
    longest: POLL,
    shown: None,
};

/// How often the relay checks while another relay holds shards, because that one may finish without
/// having seen the newest signals. A wake-up does not shorten this: under load, all workers but one
/// would try to lock the shards after every batch, and fail.
const BUSY_POLL: Duration = Duration::from_millis(20);

/// How long shards are held, at most.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// How often the rows of the shards and the outbox's low-water mark are checked.
const CHECK_EVERY: Duration = Duration::from_secs(60);

/// How long one round may take, with all its statements.
const ROUND_MAX: Duration = Duration::from_secs(30);

/// Signals read at a time.
const TAKE_MAX: u64 = 1000;

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no answer from the database within {} s", ROUND_MAX.as_secs())]
    Timeout,
    #[error("cannot publish signals")]
    Publish(#[source] PublishError),
    #[error("cannot lock {}", path.display())]
    Lock {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Sends signals from the outbox.
pub struct Relay {
    store: Store,
    jetstream: jetstream::Context,
    nats: NatsSettings,
    wake: Arc<Notify>,
    sender: Sender,
}

/// The result of one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// It sent everything.
    Idle,
    /// It sent everything in some shards. Another relay holds the others, and may not have seen the
    /// newest signals.
    Shared,
    /// Another relay holds all shards.
    Busy,
    /// There may be more.
    More,
}

impl Relay {
    /// Creates a relay that checks the outbox when `wake` is notified.
    pub(crate) fn new(
        store: Store,
        jetstream: jetstream::Context,
        nats: NatsSettings,
        wake: Arc<Notify>,
        costs: Arc<SignalCosts>,
    ) -> Self {
        let sender = Sender::new(jetstream.clone(), costs);
        Self {
            store,
            jetstream,
            nats,
            wake,
            sender,
        }
    }

    /// Sends signals until `shutdown`, and then those that are left, once.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let relay = Arc::new(self);
        let mut wait = Wait::new(SIGNALS);
        let mut is_woken = false;
        let mut checked_at = Instant::now();
        let mut outbox_checked_at: Option<Instant> = None;
        loop {
            let last = shutdown.is_cancelled();
            if outbox_checked_at.is_none_or(|at| at.elapsed() >= CHECK_EVERY) {
                outbox_checked_at = Some(Instant::now());
                relay.check_outbox().await;
            }
            let round = detached({
                let relay = Arc::clone(&relay);
                async move { relay.round(is_woken).await }
            });
            // After a timeout the round continues in its own task, with its connection.
            let outcome = tokio::time::timeout(ROUND_MAX, round)
                .await
                .unwrap_or(Err(RelayError::Timeout));
            let pause = match &outcome {
                // Whether the signals of the other relay's shards can be sent is not known.
                Ok(Round::Busy | Round::Shared) => BUSY_POLL,
                Ok(Round::Idle | Round::More) => {
                    if wait.is_waiting() {
                        // After an outage the database may be another one, or lack the last writes.
                        outbox_checked_at = None;
                    }
                    wait.succeeded();
                    POLL
                }
                Err(error) => wait.failed(error),
            };
            let is_blocked = relay.sender.is_skipping();
            metrics::waiting_for_signals(wait.is_waiting() || is_blocked);
            if is_blocked && checked_at.elapsed() >= connect::MAX_PAYLOAD_CHECK_INTERVAL {
                checked_at = Instant::now();
                connect::reconnect_if_max_payload_grew(
                    &relay.jetstream.client(),
                    &relay.nats,
                    "litestripe-worker",
                )
                .await;
            }
            // Another relay is sending signals, so the next round need not check whether there are
            // any.
            let was_busy = matches!(outcome, Ok(Round::Busy));
            let (pause, may_wake) = match outcome {
                Ok(Round::More) => {
                    is_woken = true;
                    continue;
                }
                _ if last => return,
                Ok(Round::Shared | Round::Idle) => (pause, true),
                Ok(Round::Busy) | Err(_) => (pause, false),
            };
            is_woken = tokio::select! {
                () = relay.wake.notified(), if may_wake => true,
                () = tokio::time::sleep(pause) => was_busy,
                () = shutdown.cancelled() => false,
            };
        }
    }

    async fn check_outbox(&self) {
        let store = self.store.clone();
        let checking = detached(async move {
            store::outbox::restore_shards(store.connection()).await?;
            store::outbox::verify_low_water(store.connection(), store.low_water()).await
        });
        if let Ok(Err(error)) = tokio::time::timeout(ROUND_MAX, checking).await {
            debug!("{}", exit::chain(&error));
        }
    }

    /// Sends the signals that are in the outbox now. A relay that was woken up does not check first
    /// whether there are any.
    async fn round(self: Arc<Self>, is_woken: bool) -> Result<Round, RelayError> {
        if !is_woken && store::outbox::is_empty(&self.store).await? {
            return Ok(Round::Idle);
        }
        match self.store.relay_lock_path() {
            Some(path) => self.round_under_file_lock(path).await,
            None => {
                self.store
                    .clone()
                    .uncancelled(async move |tx| self.round_under_row_locks(tx).await)
                    .await
            }
        }
    }

    /// On PostgreSQL a transaction holds the shards' row locks: if the process dies, they are
    /// released.
    async fn round_under_row_locks(&self, tx: Transaction) -> Result<Round, RelayError> {
        let shards = store::outbox::lock_shards(&tx, self.store.low_water()).await?;
        if shards.is_empty() {
            tx.rollback()
                .await
                .map_err(StoreError::doing("end a transaction on the outbox"))?;
            return Ok(Round::Busy);
        }
        self.clear_wakes();
        let over = if shards.len() < store::outbox::SHARDS as usize {
            Round::Shared
        } else {
            Round::Idle
        };
        let low_water = self.store.low_water();
        let skipped = self.sender.refresh_skipped();
        let rows = store::outbox::oldest(&tx, low_water, &shards, &skipped, TAKE_MAX).await?;
        if rows.is_empty() {
            tx.rollback()
                .await
                .map_err(StoreError::doing("end a transaction on the outbox"))?;
            return Ok(over);
        }
        let (sent, round) = self.send(rows).await;
        fail_point!("worker::after_signal");
        store::outbox::delete(&tx, sent).await?;
        tx.commit()
            .await
            .map_err(StoreError::doing("commit the removal of sent signals"))?;
        round.map(|round| if round == Round::Idle { over } else { round })
    }

    /// On SQLite all processes share one host. While signals are in flight, the relay holds a file
    /// lock beside the database and not the database's only write lock. If the process dies, the
    /// file lock is released.
    async fn round_under_file_lock(&self, path: PathBuf) -> Result<Round, RelayError> {
        let db = self.store.connection();
        let refused = |source| RelayError::Lock {
            path: path.clone(),
            source,
        };
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(Round::Busy),
            Err(std::fs::TryLockError::Error(source)) => return Err(refused(source)),
        }
        self.clear_wakes();
        let rows = store::outbox::oldest(
            db,
            self.store.low_water(),
            &store::outbox::all_shards(),
            &self.sender.refresh_skipped(),
            TAKE_MAX,
        )
        .await?;
        if rows.is_empty() {
            return Ok(Round::Idle);
        }
        let (sent, round) = self.send(rows).await;
        fail_point!("worker::after_signal");
        store::outbox::delete(db, sent).await?;
        round
    }

    /// Publishes `rows`. Returns the ids of those that were sent.
    async fn send(&self, rows: Vec<Model>) -> (Vec<i64>, Result<Round, RelayError>) {
        let full = rows.len() as u64 == TAKE_MAX;
        self.sender.ask().await;
        let span = trace::publication(&rows);
        let sending = self.sender.send(rows, Instant::now() + HOLD_MAX);
        let sent = sending.instrument(span.clone()).await;
        trace::record_published(&span, sent.ids.len(), sent.failure.is_some());
        let round = match sent.failure {
            Some(error) => Err(RelayError::Publish(error)),
            None if full && (!sent.ids.is_empty() || sent.has_blocked) => Ok(Round::More),
            None => Ok(Round::Idle),
        };
        (sent.ids, round)
    }

    /// Drops a pending wake-up. The signals that it was for are committed: this round reads them,
    /// or they are in the shards of another relay, and then this one checks again anyway.
    fn clear_wakes(&self) {
        let _ = self.wake.notified().now_or_never();
    }
}
