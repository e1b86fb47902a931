//! `litestripe_signal_outbox`: save signals in the transaction of their change, lock shards, read
//! and delete rows.
//!
//! Invariant: rows of one subscription (or orphan) get their ids in the order in which they are
//! committed, because the transaction that inserts them holds the lock of that row.
//!
//! Reads begin at the [`LowWater`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use litestripe_contract::subject::SUBSCRIPTION_CHANGED;
use litestripe_contract::trace::TraceContext;
use litestripe_domain::signal::NewSignal;
use litestripe_entity::signal_outbox::{Column, Entity, Model};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DbBackend, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, Statement,
};
use time::OffsetDateTime;
use tracing::warn;

use super::Store;
use super::rows::{Cell, Insert};
use crate::error::StoreError;
use crate::store::Transaction;

/// The number of the outbox's shards, as the migration created them. One relay at a time works on a
/// shard; all rows of one subscription are in the same one.
pub const SHARDS: u32 = 16;

const INSERT: Insert<'_> = Insert {
    into: "litestripe_signal_outbox (shard, entity_id, subject, message_id, event_created, traceparent, tracestate, \
        body, dt_created, received_at_ms)",
    select: "UNNEST($1::integer[]), UNNEST($2::text[]), UNNEST($3::text[]), UNNEST($4::text[]), UNNEST($5::bigint[]), \
        UNNEST($6::text[]), UNNEST($7::text[]), UNNEST($8::text[]), UNNEST($9::timestamptz[]), UNNEST($10::bigint[])",
    then: "",
};

/// Inserts `signals`, in their order.
pub async fn insert(
    tx: &Transaction,
    signals: Vec<NewSignal>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let cells = |signal: NewSignal| -> [Cell; 10] {
        let (traceparent, tracestate) = signal.trace.map(TraceContext::into_parts).unzip();
        [
            shard_of(&signal.entity_id).into(),
            signal.entity_id.into(),
            signal.subject.to_owned().into(),
            signal.message_id.into(),
            signal.event_created.into(),
            traceparent.into(),
            tracestate.flatten().into(),
            signal.body.into(),
            now.into(),
            signal.received.map(unix_ms).into(),
        ]
    };
    let inserted = super::rows::insert(tx, INSERT, signals.into_iter().map(cells).collect()).await;
    inserted
        .map(drop)
        .map_err(StoreError::doing("save signals"))
}

/// Up to which id all rows are deleted, as far as this process knows.
///
/// PostgreSQL cannot remove deleted rows that an old snapshot may still see, such as that of a
/// `pg_dump`. A read from the first id would pass over all of them, more with every signal that is
/// sent. SQLite removes them at once, and there the mark stays at 0.
#[derive(Debug, Default)]
pub struct LowWater(Mutex<Mark>);

#[derive(Debug, Default)]
struct Mark {
    /// The server that it is about. Another one, such as a promoted standby, may lack the last
    /// deletions, and numbers its ids and transactions in its own way. The same one may also lack
    /// them after a crash.
    server: i64,
    id: i64,
    next: Next,
}

/// How the mark rises: no transaction may still insert a row below it. A transaction that has taken
/// an id from the sequence has written a row before (the invariant above), so it has a number by
/// then. The snapshot of a *later* statement knows that number, and once all transactions up to it
/// have ended, their rows are visible.
#[derive(Debug, Default, Clone, Copy)]
enum Next {
    #[default]
    Unknown,
    /// The last id that the sequence gave.
    LastId(i64),
    /// The same, and a number above those of all transactions that may insert a row up to that id.
    Awaits { last_id: i64, transaction: i64 },
}

/// What [`lock_shards`] finds besides the shards.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// When the server was started, in microseconds.
    server: i64,
    /// The first row above the mark, if there is one.
    first_id: Option<i64>,
    /// The last id that the sequence gave.
    last_id: i64,
    /// All transactions below this number have ended, and this statement sees their rows.
    ended_below: i64,
    /// No transaction had this number or a higher one when this statement began.
    next_transaction: i64,
}

impl LowWater {
    fn mark(&self) -> MutexGuard<'_, Mark> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn id(&self) -> i64 {
        self.mark().id
    }
}

impl Mark {
    fn rise(&mut self, seen: Seen) {
        // If the ids begin anew, another database stands behind the same name.
        if seen.server != self.server || seen.last_id < self.id {
            *self = Self {
                server: seen.server,
                ..Self::default()
            };
        }
        self.next = match self.next {
            Next::Unknown => Next::LastId(seen.last_id),
            Next::LastId(last_id) => Next::Awaits {
                last_id,
                transaction: seen.next_transaction,
            },
            Next::Awaits {
                last_id,
                transaction,
            } if transaction <= seen.ended_below => {
                let all_below = seen.first_id.map_or(last_id, |first| first - 1);
                self.id = self.id.max(last_id.min(all_below));
                Next::LastId(seen.last_id)
            }
            awaits @ Next::Awaits { .. } => awaits,
        };
    }
}

/// Whether no signal is waiting.
pub async fn is_empty(store: &Store) -> Result<bool, StoreError> {
    is_at_most(store, 0).await
}

/// Whether at most `count` signals are waiting.
pub async fn is_at_most(store: &Store, count: u64) -> Result<bool, StoreError> {
    let next = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(Column::Id.gt(store.low_water().id()))
        .order_by_asc(Column::Id)
        .offset(count)
        .limit(1);
    let next: Result<Option<i64>, _> = next.into_tuple().one(store.connection()).await;
    next.map(|id| id.is_none())
        .map_err(StoreError::doing("check the outbox"))
}

/// Lowers the mark if there is a row at or below it, because no relay would send that signal.
///
/// A server that crashed may lack the last deletions, and one process's crash does not change when
/// the server was started. Costs one read over the deleted rows that PostgreSQL cannot remove.
pub async fn verify_low_water<C: ConnectionTrait>(
    db: &C,
    low_water: &LowWater,
) -> Result<(), StoreError> {
    let mark = low_water.id();
    if mark == 0 {
        return Ok(());
    }
    let below = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(Column::Id.lte(mark))
        .order_by_asc(Column::Id)
        .limit(1);
    let below: Result<Option<i64>, _> = below.into_tuple().one(db).await;
    if let Some(id) = below.map_err(StoreError::doing("check the outbox"))? {
        *low_water.mark() = Mark::default();
        warn!(
            outbox_id = id,
            "signals from {id} on are in the outbox again: the database lost the removal of sent signals. They are sent again"
        );
    }
    Ok(())
}

/// Restores rows of shards that were deleted: no relay would send the signals of such a shard.
/// PostgreSQL only.
pub async fn restore_shards<C: ConnectionTrait>(db: &C) -> Result<(), StoreError> {
    if db.get_database_backend() != DbBackend::Postgres {
        return Ok(());
    }
    let shards = format!(
        "INSERT INTO litestripe_signal_shard (shard) SELECT generate_series(0, {}) ON CONFLICT DO NOTHING",
        SHARDS - 1
    );
    let restored = db.execute_unprepared(&shards).await;
    let restored = restored.map_err(StoreError::doing("restore shards of the outbox"))?;
    if restored.rows_affected() > 0 {
        warn!(
            "{} rows of litestripe_signal_shard were missing and are restored: signals of their shards were not sent",
            restored.rows_affected()
        );
    }
    Ok(())
}

/// Locks the shards that no other relay has locked, for this transaction, and returns them. Raises
/// the mark, in the same statement.
///
/// The transaction's commit will not wait for the disk: after a crash of the server, signals that
/// were sent and deleted may reappear. The relay then sends them again with the same message ids.
///
/// PostgreSQL only: on SQLite one file lock covers all shards.
pub async fn lock_shards(tx: &Transaction, low_water: &LowWater) -> Result<Vec<i32>, StoreError> {
    const FREE: &str = "SELECT seen.*, free.shard FROM ( \
            SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint AS server, \
                (SELECT min(id) FROM litestripe_signal_outbox WHERE id > $1) AS first_id, \
                COALESCE(pg_sequence_last_value(pg_get_serial_sequence('litestripe_signal_outbox', 'id')::regclass), 0) AS last_id, \
                pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS ended_below, \
                pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_transaction \
        ) AS seen LEFT JOIN LATERAL ( \
            SELECT shard FROM litestripe_signal_shard \
            WHERE (SELECT set_config('synchronous_commit', 'off', true)) = 'off' \
            ORDER BY shard FOR UPDATE SKIP LOCKED \
        ) AS free ON TRUE";
    let doing = StoreError::doing("lock shards of the outbox");
    let free =
        Statement::from_sql_and_values(tx.get_database_backend(), FREE, [low_water.id().into()]);
    let rows = tx.query_all_raw(free).await.map_err(&doing)?;
    if let Some(row) = rows.first() {
        let seen = Seen {
            server: row.try_get("", "server").map_err(&doing)?,
            first_id: row.try_get("", "first_id").map_err(&doing)?,
            last_id: row.try_get("", "last_id").map_err(&doing)?,
            ended_below: row.try_get("", "ended_below").map_err(&doing)?,
            next_transaction: row.try_get("", "next_transaction").map_err(&doing)?,
        };
        low_water.mark().rise(seen);
    }
    let shards: Result<Vec<Option<i32>>, _> =
        rows.iter().map(|row| row.try_get("", "shard")).collect();
    Ok(shards.map_err(&doing)?.into_iter().flatten().collect())
}

/// Deletes the waiting `subscription.changed` signals of the subscription `id`.
pub async fn delete_changes_of<C: ConnectionTrait>(db: &C, id: &str) -> Result<(), StoreError> {
    let waiting = Entity::delete_many()
        .filter(Column::EntityId.eq(id))
        .filter(Column::Subject.eq(SUBSCRIPTION_CHANGED));
    waiting
        .exec(db)
        .await
        .map(|_| ())
        .map_err(StoreError::doing("remove a subscription's signals"))
}

/// Whether a signal of any of these subscriptions and orphans is waiting.
pub async fn has_signals_of<C: ConnectionTrait>(db: &C, ids: &[&str]) -> Result<bool, StoreError> {
    let any = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(Column::EntityId.is_in(ids.iter().copied()));
    let any: Result<Option<i64>, _> = any.into_tuple().one(db).await;
    any.map(|id| id.is_some())
        .map_err(StoreError::doing("check the outbox"))
}

/// Returns up to `limit` signals of `shards`, oldest first, without those of the subscriptions and
/// orphans `except`.
pub async fn oldest<C: ConnectionTrait>(
    db: &C,
    low_water: &LowWater,
    shards: &[i32],
    except: &[String],
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let rows = Entity::find()
        .filter(Column::Id.gt(low_water.id()))
        .filter(Column::Shard.is_in(shards.iter().copied()))
        .filter(Column::EntityId.is_not_in(except))
        .order_by_asc(Column::Id)
        .limit(limit)
        .all(db)
        .await;
    rows.map_err(StoreError::doing("read the outbox"))
}

pub fn all_shards() -> Vec<i32> {
    (0..SHARDS.cast_signed()).collect()
}

/// Deletes signals that JetStream has stored.
pub async fn delete<C: ConnectionTrait>(db: &C, mut ids: Vec<i64>) -> Result<(), StoreError> {
    ids.sort_unstable();
    let those = super::among(db.get_database_backend(), Column::Id, ids);
    let deleted = Entity::delete_many().filter(those).exec(db).await;
    deleted
        .map(|_| ())
        .map_err(StoreError::doing("remove sent signals"))
}

/// Returns the number of waiting signals, and when the oldest was created.
pub async fn backlog<C: ConnectionTrait>(
    db: &C,
) -> Result<(u64, Option<OffsetDateTime>), StoreError> {
    let doing = StoreError::doing("count signals in the outbox");
    let count = Entity::find().count(db).await.map_err(&doing)?;
    let oldest = Entity::find()
        .order_by_asc(Column::Id)
        .one(db)
        .await
        .map_err(&doing)?;
    Ok((count, oldest.map(|row| row.dt_created)))
}

/// Returns a time in milliseconds since the Unix epoch.
fn unix_ms(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

/// Returns the shard of a subscription or orphan, by FNV-1a, which is stable over releases and
/// machines.
fn shard_of(entity_id: &str) -> i32 {
    let hash = entity_id.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash % SHARDS).cast_signed()
}

#[cfg(test)]
mod tests;
