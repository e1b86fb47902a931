//! `litestripe_erasure`: record erasures, and read the new ones.
//!
//! Invariant: a transaction that reads the new erasures with `newest_after` or [`after`] as its
//! first statement sees every committed erasure, and none is recorded until it ends. On PostgreSQL
//! both statements lock the table in mode ROW SHARE; that is the purpose of their `FOR KEY SHARE`
//! (there is nearly never a row to lock). [`record`] locks it in mode EXCLUSIVE, which waits for
//! those transactions but not for plain readers such as a `pg_dump`. Neither waits while it holds
//! another lock, so there is no deadlock. On SQLite one transaction writes at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use litestripe_entity::erasure::{Column, Entity, Model};
use sea_orm::sea_query::{LockType, SelectStatement};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DbBackend, EntityTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, QueryTrait as _,
};
use time::OffsetDateTime;

use super::Store;
use super::rows::{Cell, Insert};
use crate::error::StoreError;
use crate::store::Transaction;

const INSERT: Insert<'_> = Insert {
    into: "litestripe_erasure (stripe_id, erased_at, sequence)",
    select: "UNNEST($1::text[]), UNNEST($2::bigint[]), UNNEST($3::bigint[])",
    then: "ON CONFLICT (stripe_id) DO UPDATE SET erased_at = excluded.erased_at, sequence = excluded.sequence \
        WHERE litestripe_erasure.erased_at < excluded.erased_at",
};

/// Returns a subquery for the newest erasure's sequence if it is above `sequence`.
pub(super) fn newest_after(sequence: i64) -> SelectStatement {
    let newest = Entity::find()
        .select_only()
        .column(Column::Sequence)
        .filter(Column::Sequence.gt(sequence));
    newest
        .order_by_desc(Column::Sequence)
        .limit(1)
        .lock(LockType::KeyShare)
        .into_query()
}

/// Returns the erasures after `sequence`.
pub async fn after<C: ConnectionTrait>(db: &C, sequence: i64) -> Result<Vec<Model>, StoreError> {
    let new = Entity::find()
        .filter(Column::Sequence.gt(sequence))
        .lock(LockType::KeyShare);
    new.all(db)
        .await
        .map_err(StoreError::doing("read the erasures"))
}

/// Returns all erasures, without a lock.
pub async fn all<C: ConnectionTrait>(db: &C) -> Result<Vec<Model>, StoreError> {
    let all = Entity::find().all(db).await;
    all.map_err(StoreError::doing("read the erasures"))
}

/// Records erasures: see [`record_in`].
pub async fn record(
    store: &Store,
    erased: Arc<BTreeMap<String, i64>>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let record = async move |tx: Transaction| {
        record_in(&tx, &erased, now).await?;
        tx.commit()
            .await
            .map_err(StoreError::doing("record an erasure"))
    };
    store.uncancelled(record).await
}

/// Records when each of these ids was erased, in seconds since the Unix epoch, as the first
/// statement of `tx`. The time of an existing erasure never moves back, because the clocks of two
/// hosts may differ. First waits for the end of every transaction that does not know of these
/// erasures.
pub async fn record_in(
    tx: &Transaction,
    erased: &BTreeMap<String, i64>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const LOCK: &str = "LOCK TABLE litestripe_erasure IN EXCLUSIVE MODE";
    let doing = StoreError::doing("record an erasure");
    if tx.get_database_backend() == DbBackend::Postgres {
        tx.execute_unprepared(LOCK).await.map_err(&doing)?;
    }
    let newest = Entity::find()
        .select_only()
        .column_as(Column::Sequence.max(), "newest")
        .into_tuple();
    let newest: Option<Option<i64>> = newest.one(tx).await.map_err(&doing)?;
    // From the clock, so that it is also above the sequences of rows that were deleted by hand.
    let milliseconds = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    let first = std::cmp::max(milliseconds, newest.flatten().unwrap_or_default() + 1);
    let cells = |(sequence, (id, at)): (i64, (&String, &i64))| -> [Cell; 3] {
        [id.clone().into(), (*at).into(), sequence.into()]
    };
    let rows = (first..).zip(erased.iter()).map(cells).collect();
    let recorded = super::rows::insert(tx, INSERT, rows).await;
    recorded.map(drop).map_err(&doing)
}
