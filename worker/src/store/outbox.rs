//! `litestripe_signal_outbox`: save signals in the transaction of their change, lock shards, read and delete
//! rows.
//!
//! Invariant: rows of one subscription (or orphan) get their ids in the order in which they are
//! committed, because the transaction that inserts them holds the lock of that row.

use litestripe_contract::subject::SUBSCRIPTION_CHANGED;
use litestripe_domain::signal::NewSignal;
use litestripe_entity::signal_outbox::{Column, Entity, Model};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, EntityTrait as _, PaginatorTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, Statement,
};
use time::OffsetDateTime;

use super::rows::{Cell, Insert};
use crate::error::StoreError;
use crate::store::Transaction;

/// The number of the outbox's shards, as the migration created them. One relay at a time works on a
/// shard; all rows of one subscription are in the same one.
pub const SHARDS: u32 = 16;

const INSERT: Insert<'_> = Insert {
    into: "litestripe_signal_outbox (shard, entity_id, subject, message_id, event_created, traceparent, body, dt_created)",
    select: "UNNEST($1::integer[]), UNNEST($2::text[]), UNNEST($3::text[]), UNNEST($4::text[]), UNNEST($5::bigint[]), \
        UNNEST($6::text[]), UNNEST($7::text[]), UNNEST($8::timestamptz[])",
    then: "",
};

/// Inserts `signals`, in their order.
pub async fn insert(
    tx: &Transaction,
    signals: Vec<NewSignal>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let cells = |signal: NewSignal| -> [Cell; 8] {
        [
            shard_of(&signal.entity_id).into(),
            signal.entity_id.into(),
            signal.subject.to_owned().into(),
            signal.message_id.into(),
            signal.event_created.into(),
            signal.traceparent.into(),
            signal.body.into(),
            now.into(),
        ]
    };
    let inserted = super::rows::insert(tx, INSERT, signals.into_iter().map(cells).collect()).await;
    inserted
        .map(drop)
        .map_err(StoreError::doing("save signals"))
}

/// Whether no signal is waiting.
pub async fn is_empty<C: ConnectionTrait>(db: &C) -> Result<bool, StoreError> {
    // Ordered by the key, or PostgreSQL would read through all deleted rows that are not vacuumed
    // yet.
    let first = Entity::find()
        .select_only()
        .column(Column::Id)
        .order_by_asc(Column::Id)
        .limit(1);
    let first: Result<Option<i64>, _> = first.into_tuple().one(db).await;
    first
        .map(|id| id.is_none())
        .map_err(StoreError::doing("check the outbox"))
}

/// Locks the shards that no other relay has locked, for this transaction, and returns them.
///
/// The transaction's commit will not wait for the disk: after a crash of the server, signals that
/// were sent and deleted may reappear. The relay then sends them again with the same message ids.
///
/// PostgreSQL only: on SQLite one file lock covers all shards.
pub async fn lock_shards(tx: &Transaction) -> Result<Vec<i32>, StoreError> {
    const FREE: &str = "SELECT shard FROM litestripe_signal_shard WHERE (SELECT set_config('synchronous_commit', 'off', true)) = 'off' \
        ORDER BY shard FOR UPDATE SKIP LOCKED";
    let doing = StoreError::doing("lock shards of the outbox");
    let rows = tx
        .query_all_raw(Statement::from_string(tx.get_database_backend(), FREE))
        .await
        .map_err(&doing)?;
    rows.iter()
        .map(|row| row.try_get("", "shard").map_err(&doing))
        .collect()
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
    shards: &[i32],
    except: &[String],
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let rows = Entity::find()
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

/// Returns the shard of a subscription or orphan, by FNV-1a, which is stable over releases and
/// machines.
fn shard_of(entity_id: &str) -> i32 {
    let hash = entity_id.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash % SHARDS).cast_signed()
}
