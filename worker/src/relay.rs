//! The relay: the only publisher of signals.
//!
//! Owns their order: a signal is sent only when the one before it for the same subscription (or
//! orphan) has its PubAck. One relay at a time works on one shard of the outbox, so that this holds
//! over all workers. What a crashed worker left is sent by any other.

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
use litestripe_contract::{connect, signal::Timestamp};
use litestripe_entity::signal_outbox::Model;
use sea_orm::DatabaseTransaction;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::error::StoreError;
use crate::fail_point::fail_point;
use crate::metrics;
use crate::store::{self, Store, detached};
use crate::wait::{Awaited, Wait};

/// How often the outbox is looked at unasked: what a crashed worker left waits this long.
const POLL: Duration = Duration::from_secs(1);

/// The database or the broker, as the relay needs them.
const SIGNALS: Awaited = Awaited {
    begins: "signals wait in the outbox",
    ends: "signals are sent again",
    first: POLL,
    longest: POLL,
    gauge: None,
};

/// How often while another relay is at it, which may end before it sees what came last. Not more often
/// when woken: of many workers under load, all but one would ask in vain after every batch.
const BUSY_POLL: Duration = Duration::from_millis(20);

/// How long shards are held, at most.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// How long one round may take. A server that vanished without a word ends no statement.
const ROUND_MAX: Duration = Duration::from_secs(30);

/// Signals taken out at a time.
const TAKE_MAX: u64 = 1000;

/// How long a subscription with a signal that is too large is passed over before it is tried again:
/// the signal may be gone.
const PASSED_OVER: Duration = Duration::from_secs(60);

/// Subscriptions that are passed over, at most. With more of them others may wait.
const PASSED_OVER_MAX: usize = 10_000;

/// Subscriptions whose signals are in flight at a time.
const CHAINS_IN_FLIGHT: usize = 256;

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no answer from the database within {} s", ROUND_MAX.as_secs())]
    Silence,
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

/// Subscriptions and orphans whose next signal is larger than the server takes. They wait until it
/// takes it, and are passed over: read again and again, enough of them would hold up all others.
#[derive(Default)]
struct Blocked {
    /// What the server took when they were found out.
    max_payload: usize,
    /// Since when each is passed over.
    since: HashMap<String, Instant>,
    complained: HashSet<i64>,
}

/// What one round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// It sent all there is.
    Idle,
    /// It sent all there is in some shards. Another relay has the others, and may not know of what came last.
    Shared,
    /// Another relay has all shards.
    Busy,
    /// There may be more.
    More,
}

impl Relay {
    /// A relay that looks at the outbox when `wake` says so.
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

    /// Sends signals until `shutdown`, and then those that are still there, once.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let relay = Arc::new(self);
        let mut wait = Wait::new(SIGNALS);
        let mut is_woken = false;
        let mut asked = Instant::now();
        loop {
            let last = shutdown.is_cancelled();
            let round = detached({
                let relay = Arc::clone(&relay);
                async move { relay.round(is_woken).await }
            });
            // A round that hears no more from the database goes on by itself, with its connection.
            let outcome = tokio::time::timeout(ROUND_MAX, round)
                .await
                .unwrap_or(Err(RelayError::Silence));
            let pause = match &outcome {
                Ok(_) => {
                    wait.succeeded();
                    POLL
                }
                Err(error) => wait.failed(error),
            };
            let is_blocked = !relay.blocked().since.is_empty();
            metrics::waiting_for_signals(wait.is_waiting() || is_blocked);
            if is_blocked && asked.elapsed() >= connect::MAX_PAYLOAD_CHECK_INTERVAL {
                asked = Instant::now();
                connect::reconnect_if_max_payload_grew(
                    &relay.jetstream.client(),
                    &relay.nats,
                    "litestripe-worker",
                )
                .await;
            }
            // Somebody works at signals, so there is no need to ask whether there are any.
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

    /// Whoever was woken need not look whether there is anything.
    async fn round(self: Arc<Self>, is_woken: bool) -> Result<Round, RelayError> {
        if !is_woken && store::outbox::is_empty(self.store.connection()).await? {
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

    /// On PostgreSQL the shards' row locks are held by a transaction: death releases them.
    async fn round_under_row_locks(&self, tx: DatabaseTransaction) -> Result<Round, RelayError> {
        let shards = store::outbox::lock_shards(&tx).await?;
        if shards.is_empty() {
            tx.rollback()
                .await
                .map_err(StoreError::doing("end a look into the outbox"))?;
            return Ok(Round::Busy);
        }
        self.forget_wakes();
        let over = if shards.len() < store::outbox::SHARDS as usize {
            Round::Shared
        } else {
            Round::Idle
        };
        let rows = store::outbox::oldest(&tx, &shards, &self.passed_over(), TAKE_MAX).await?;
        if rows.is_empty() {
            tx.rollback()
                .await
                .map_err(StoreError::doing("end a look into the outbox"))?;
            return Ok(over);
        }
        let (sent, round) = self.send(rows).await;
        fail_point!("worker::after_signal");
        store::outbox::delete(&tx, sent).await?;
        tx.commit()
            .await
            .map_err(StoreError::doing("commit what was sent"))?;
        round.map(|round| if round == Round::Idle { over } else { round })
    }

    /// On SQLite all processes share one host, and a file lock beside the database is held while
    /// signals are in flight, so that the one writer is not: death releases it.
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
        self.forget_wakes();
        let rows = store::outbox::oldest(
            db,
            &store::outbox::all_shards(),
            &self.passed_over(),
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

    /// Whoever woke the relay until now has committed its signals: they are about to be read, or are in shards of
    /// another relay, after which this one looks again by itself.
    fn forget_wakes(&self) {
        let _ = self.wake.notified().now_or_never();
    }

    /// Publishes `rows`: those of one subscription one after another, many subscriptions at a time. Returns which
    /// are sent.
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

    /// Publishes the signals of one subscription, up to the first that cannot be. Returns the ids of those before.
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

    /// Passes the subscription over, with the signals behind this one, and says so once.
    fn block(&self, entity_id: String, id: i64) {
        let mut blocked = self.blocked();
        if blocked.since.len() >= PASSED_OVER_MAX {
            return;
        }
        blocked.since.insert(entity_id, Instant::now());
        if blocked.complained.insert(id) {
            error!(
                outbox_id = id,
                "signal {id} is larger than the NATS server's max_payload: raise it, the signal waits"
            );
        }
    }

    /// Whose signals are not to be read now. Nobody's, once the server may take more.
    fn passed_over(&self) -> Vec<String> {
        let mut blocked = self.blocked();
        let max_payload = self.jetstream.client().max_payload();
        if blocked.max_payload != max_payload {
            *blocked = Blocked {
                max_payload,
                ..Blocked::default()
            };
        }
        blocked
            .since
            .retain(|_, since| since.elapsed() < PASSED_OVER);
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

/// The rows by subscription or orphan, each in its order.
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
