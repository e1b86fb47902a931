//! The relay: the only publisher of signals.
//!
//! Owns their order: a signal is sent only when the previous one of the same subscription (or
//! orphan) has its PubAck. Only one relay at a time works on a shard of the outbox, so the order
//! holds over all workers. Any worker sends the signals that a crashed one left.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::HeaderName;
use async_nats::jetstream;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use futures_util::{FutureExt as _, StreamExt as _};
use litestripe_contract::header::{self, ce};
use litestripe_contract::settings::NatsSettings;
use litestripe_contract::{connect, exit, signal::Timestamp};
use litestripe_entity::signal_outbox::Model;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use crate::error::StoreError;
use crate::fail_point::fail_point;
use crate::metrics;
use crate::store::Transaction;
use crate::store::{self, Store, detached};
use crate::wait::{Awaited, Wait};

/// How often the relay checks the outbox without being woken up: the signals of a crashed worker
/// wait this long.
const POLL: Duration = Duration::from_secs(1);

/// The relay's wait, for the database or for the broker.
const SIGNALS: Awaited = Awaited {
    begins: "signals wait in the outbox",
    ends: "the relay is sending signals again",
    first: POLL,
    longest: POLL,
    gauge: None,
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

/// How long a subscription with a signal that is too large is skipped before the relay tries it
/// again: the signal may be gone.
const SKIP_FOR: Duration = Duration::from_secs(60);

/// Subscriptions that are skipped, at most. With more of them, other subscriptions may have to
/// wait.
const SKIPPED_MAX: usize = 10_000;

/// Subscriptions with a signal in flight, at a time.
const CHAINS_IN_FLIGHT: usize = 256;

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
    blocked: Mutex<Blocked>,
}

/// Subscriptions and orphans with a next signal that is larger than the server accepts. They wait
/// until it does and are skipped meanwhile: if the relay read them every time, enough of them would
/// hold up all others.
#[derive(Default)]
struct Blocked {
    /// The server's limit when they were found.
    max_payload: usize,
    /// When the relay began to skip each of them.
    since: HashMap<String, Instant>,
    /// The outbox ids of the signals that were logged.
    logged: HashSet<i64>,
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
    ) -> Self {
        Self {
            store,
            jetstream,
            nats,
            wake,
            blocked: Mutex::default(),
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
                Ok(_) => {
                    if wait.is_waiting() {
                        // After an outage the database may be another one, or lack the last writes.
                        outbox_checked_at = None;
                    }
                    wait.succeeded();
                    POLL
                }
                Err(error) => wait.failed(error),
            };
            let is_blocked = !relay.blocked().since.is_empty();
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
                Ok(Round::Busy) => (BUSY_POLL, false),
                Ok(Round::Shared) => (BUSY_POLL, true),
                Ok(Round::Idle) => (pause, true),
                Err(_) => (pause, false),
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
        let skipped = self.refresh_skipped();
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
            &self.refresh_skipped(),
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

    /// Drops a pending wake-up. The signals that it was for are committed: this round reads them,
    /// or they are in the shards of another relay, and then this one checks again anyway.
    fn clear_wakes(&self) {
        let _ = self.wake.notified().now_or_never();
    }

    /// Publishes `rows`: those of one subscription one after another, many subscriptions at a time.
    /// Returns the ids of those that were sent.
    async fn send(&self, rows: Vec<Model>) -> (Vec<i64>, Result<Round, RelayError>) {
        let full = rows.len() as u64 == TAKE_MAX;
        let deadline = Instant::now() + HOLD_MAX;
        let blocked_before = self.blocked().since.len();
        let sending =
            futures_util::stream::iter(chains(rows)).map(|chain| self.send_chain(chain, deadline));
        let (sent, failures): (Vec<_>, Vec<_>) =
            sending.buffer_unordered(CHAINS_IN_FLIGHT).unzip().await;
        let ids = sent.concat();
        metrics::signals_sent(ids.len());
        let round = match failures.into_iter().find_map(Result::err) {
            Some(error) => Err(RelayError::Publish(error)),
            None if full && (!ids.is_empty() || self.blocked().since.len() > blocked_before) => {
                Ok(Round::More)
            }
            None => Ok(Round::Idle),
        };
        (ids, round)
    }

    /// Publishes the signals of one subscription, up to the first that fails. Returns the ids of
    /// those before it.
    async fn send_chain(
        &self,
        chain: Vec<Model>,
        deadline: Instant,
    ) -> (Vec<i64>, Result<(), PublishError>) {
        let mut sent = Vec::with_capacity(chain.len());
        for row in chain {
            let (id, entity_id) = (row.id, row.entity_id.clone());
            match tokio::time::timeout_at(deadline, self.publish(row)).await {
                Ok(Ok(())) => sent.push(id),
                Ok(Err(error)) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                    self.block(entity_id, id);
                    break;
                }
                Ok(Err(error)) => return (sent, Err(error)),
                Err(_) => break,
            }
        }
        (sent, Ok(()))
    }

    /// Skips the subscription, with all signals behind this one. Logs each signal once.
    fn block(&self, entity_id: String, id: i64) {
        let mut blocked = self.blocked();
        if blocked.since.len() >= SKIPPED_MAX {
            return;
        }
        blocked.since.insert(entity_id, Instant::now());
        if blocked.logged.insert(id) {
            error!(
                outbox_id = id,
                "signal {id} is larger than the NATS server's max_payload: raise it, the signal waits"
            );
        }
    }

    /// Returns the subscriptions and orphans to skip now. Drops those that were skipped for
    /// [`SKIP_FOR`], and all when the server's limit has changed.
    fn refresh_skipped(&self) -> Vec<String> {
        let mut blocked = self.blocked();
        let max_payload = self.jetstream.client().max_payload();
        if blocked.max_payload != max_payload {
            *blocked = Blocked {
                max_payload,
                ..Blocked::default()
            };
        }
        blocked.since.retain(|_, since| since.elapsed() < SKIP_FOR);
        blocked.since.keys().cloned().collect()
    }

    fn blocked(&self) -> MutexGuard<'_, Blocked> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn publish(&self, row: Model) -> Result<(), PublishError> {
        let headers = headers(&row);
        let ack = self
            .jetstream
            .publish_with_headers(row.subject, headers, row.body.into())
            .await?;
        ack.await.map(|_| ())
    }
}

/// Groups the rows by subscription or orphan, each group in its order.
fn chains(rows: Vec<Model>) -> Vec<Vec<Model>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut chains: Vec<Vec<Model>> = Vec::new();
    for row in rows {
        let place = *places.entry(row.entity_id.clone()).or_insert_with(|| {
            chains.push(Vec::new());
            chains.len() - 1
        });
        chains[place].push(row);
    }
    chains
}

fn headers(row: &Model) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut insert = |name, value: &str| headers.insert(HeaderName::from_static(name), value);
    insert(header::MESSAGE_ID, &row.message_id);
    insert(ce::SPECVERSION, "1.0");
    insert(ce::ID, &row.message_id);
    insert(ce::SOURCE, ce::SOURCE_VALUE);
    insert(ce::TYPE, &format!("{}{}", ce::TYPE_PREFIX, row.subject));
    insert(ce::SUBJECT, &row.entity_id);
    insert(ce::DATACONTENTTYPE, "application/json");
    if let Ok(created) = Timestamp::from_unix(row.event_created) {
        insert(ce::TIME, &created.to_string());
    }
    if let Some(traceparent) = &row.traceparent {
        insert(header::TRACEPARENT, traceparent);
    }
    headers
}
