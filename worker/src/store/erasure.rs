//! `litestripe_erasure`: record erasures, and read those that are new.
//!
//! Invariant: a transaction that reads the new erasures with `newest_after` or [`after`] before anything
//! else knows every erasure that is committed, and none is recorded until it ends. On PostgreSQL both
//! statements lock the table in the mode ROW SHARE, which is what `FOR KEY SHARE` is for (nearly always there
//! is no row to lock), and [`record`] takes EXCLUSIVE, which waits for those and not for plain readers such as
//! a `pg_dump`. Neither waits with another lock in hand, so there is no deadlock. On SQLite one transaction
//! writes at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use litestripe_entity::erasure::{Column, Entity, Model};
use sea_orm::sea_query::{LockType, SelectStatement};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DatabaseTransaction, DbBackend, EntityTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, QueryTrait as _,
};
use time::OffsetDateTime;

use super::Store;
use super::rows::{Cell, Insert};
use crate::error::StoreError;

const INSERT: Insert<'_> = Insert {
    into: "litestripe_erasure (stripe_id, erased_at, sequence)",
    select: "UNNEST($1::text[]), UNNEST($2::bigint[]), UNNEST($3::bigint[])",
    then: "ON CONFLICT (stripe_id) DO UPDATE SET erased_at = excluded.erased_at, sequence = excluded.sequence \
        WHERE litestripe_erasure.erased_at < excluded.erased_at",
};

/// A subquery: the newest erasure's sequence if it is above `sequence`.
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

/// The erasures after `sequence`.
pub async fn after<C: ConnectionTrait>(db: &C, sequence: i64) -> Result<Vec<Model>, StoreError> {
    let new = Entity::find()
        .filter(Column::Sequence.gt(sequence))
        .lock(LockType::KeyShare);
    new.all(db)
        .await
        .map_err(StoreError::doing("read the erasures"))
}

/// Records when each of these ids was erased, in seconds since the Unix epoch. An erasure never moves back:
/// clocks of two hosts may differ. Waits until every transaction has ended that does not know of them.
pub async fn record(
    store: &Store,
    erased: Arc<BTreeMap<String, i64>>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const LOCK: &str = "LOCK TABLE litestripe_erasure IN EXCLUSIVE MODE";
    let record = async move |tx: DatabaseTransaction| {
        let doing = StoreError::doing("record an erasure");
        if tx.get_database_backend() == DbBackend::Postgres {
            tx.execute_unprepared(LOCK).await.map_err(&doing)?;
        }
        let newest = Entity::find()
            .select_only()
            .column_as(Column::Sequence.max(), "newest")
            .into_tuple();
        let newest: Option<Option<i64>> = newest.one(&tx).await.map_err(&doing)?;
        // As of the clock, so that it also grows past rows that were deleted by hand.
        let milliseconds =
            i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
        let first = std::cmp::max(milliseconds, newest.flatten().unwrap_or_default() + 1);
        let cells = |(sequence, (id, at)): (i64, (&String, &i64))| -> [Cell; 3] {
            [id.clone().into(), (*at).into(), sequence.into()]
        };
        let rows = (first..).zip(erased.iter()).map(cells).collect();
        super::rows::insert(&tx, INSERT, rows)
            .await
            .map_err(&doing)?;
        tx.commit().await.map_err(&doing)
    };
    store.uncancelled(record).await
}
