//! `litestripe_installation`: which installation the database belongs to, and which
//! `STRIPE_EVENTS` its workers know.

use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::arrival::StreamId;
use litestripe_domain::question::Kind;
use litestripe_entity::installation::{ActiveModel, Column, Entity};
use litestripe_entity::{backfill, dead_letter, question, replay};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict, SelectStatement};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, DbErr, EntityTrait as _, QueryFilter as _,
    QuerySelect as _, QueryTrait as _,
};

use tracing::warn;

use super::{Store, Transaction};
use crate::error::StoreError;

/// What the database knows of its installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    pub id: String,
    /// The broker's id that this one replaces, if any.
    pub replaces: Option<String>,
    /// The stream that the workers know, and its last sequence at some time. `None` before they
    /// have seen it.
    pub stream: Option<(StreamId, u64)>,
}

/// Returns a subquery for the installation's id.
pub(super) fn id() -> SelectStatement {
    Entity::find()
        .select_only()
        .column(Column::Id)
        .limit(1)
        .into_query()
}

/// Returns what the database knows. `None` if it belongs to no installation yet.
pub async fn find<C: ConnectionTrait>(db: &C) -> Result<Option<Installation>, StoreError> {
    let row = Entity::find().one(db).await;
    let row = row.map_err(StoreError::doing("read the installation's id"))?;
    Ok(row.map(|row| Installation {
        id: row.id,
        replaces: row.replaces,
        stream: row
            .stream_created
            .map(StreamId::from_column)
            .zip(row.stream_end.map(i64::cast_unsigned)),
    }))
}

/// Makes `id` the installation's, unless there is one already.
pub async fn insert<C: ConnectionTrait>(
    db: &C,
    id: &str,
    replaces: Option<String>,
) -> Result<(), StoreError> {
    let model = ActiveModel {
        only_row: Set(true),
        id: Set(id.to_owned()),
        replaces: Set(replaces),
        stream_created: Set(None),
        stream_end: Set(None),
    };
    let once = OnConflict::column(Column::OnlyRow).do_nothing().to_owned();
    let inserted = Entity::insert_many([model])
        .on_conflict(once)
        .exec_without_returning(db)
        .await;
    match inserted {
        Ok(_) | Err(DbErr::RecordNotInserted) => Ok(()),
        Err(error) => Err(StoreError::doing("record the installation's id")(error)),
    }
}

/// Records that `STRIPE_EVENTS` is `stream` now and ends at `end`, unless another worker has
/// recorded something since `known` was read. Returns whether it was recorded.
///
/// If the stream is another one than before, the next backfill begins again: what the old one held
/// and no worker had applied is gone. If it is the same and ends earlier than before, because the
/// broker lost its last events or was restored, its sequences are used again: positions behind its
/// end are moved to it, and pending dead letters behind it are deleted: their events are gone.
pub async fn see_stream(
    store: &Store,
    known: Option<(StreamId, u64)>,
    stream: StreamId,
    end: u64,
) -> Result<bool, StoreError> {
    let record = async move |tx: Transaction| {
        let doing = StoreError::doing("record the event stream's id");
        let as_read = match known {
            Some((known, end)) => Column::StreamCreated
                .eq(known.to_column())
                .and(Column::StreamEnd.eq(end.cast_signed())),
            None => Column::StreamCreated.is_null(),
        };
        let seen = Entity::update_many()
            .col_expr(Column::StreamCreated, Expr::value(stream.to_column()))
            .col_expr(Column::StreamEnd, Expr::value(end.cast_signed()))
            .filter(as_read);
        if seen.exec(&tx).await.map_err(&doing)?.rows_affected == 0 {
            return Ok(false);
        }
        let is_other = known.is_some_and(|(known, _)| known != stream);
        let is_shorter = known.is_some_and(|(known, before)| known == stream && end < before);
        if is_other || is_shorter {
            let again = backfill::Entity::delete_many().exec(&tx).await;
            again.map_err(&doing)?;
        }
        let mut deleted = 0;
        if is_shorter {
            clamp(&tx, stream, end).await.map_err(&doing)?;
            deleted = delete_letters(&tx, stream, end).await.map_err(&doing)?;
        }
        tx.commit().await.map_err(&doing)?;
        if deleted > 0 {
            warn!(
                dead_letters = deleted,
                "{deleted} pending dead letters are deleted: {EVENTS_STREAM} has lost their events"
            );
        }
        Ok(true)
    };
    store.uncancelled(record).await
}

/// Moves the positions behind the stream's end to it. Removals have none.
async fn clamp(tx: &Transaction, stream: StreamId, end: u64) -> Result<(), DbErr> {
    let position = stream.position(end).cast_signed();
    question::Entity::update_many()
        .col_expr(question::Column::StreamSequence, Expr::value(position))
        .filter(question::Column::StreamSequence.gt(position))
        .filter(question::Column::Kind.ne(Kind::Removal.as_str()))
        .exec(tx)
        .await?;
    let end = end.cast_signed();
    replay::Entity::update_many()
        .col_expr(replay::Column::LastSequence, Expr::value(end))
        .filter(replay::Column::StreamCreated.eq(stream.to_column()))
        .filter(replay::Column::LastSequence.gt(end))
        .exec(tx)
        .await?;
    Ok(())
}

/// Deletes the pending dead letters behind the stream's end. Returns how many. Else they would be
/// stored with the bodies of the events that get their sequences.
async fn delete_letters(tx: &Transaction, stream: StreamId, end: u64) -> Result<u64, DbErr> {
    let deleted = dead_letter::Entity::delete_many()
        .filter(dead_letter::Column::StreamCreated.eq(stream.to_column()))
        .filter(dead_letter::Column::Sequence.gt(end.cast_signed()))
        .exec(tx)
        .await?;
    Ok(deleted.rows_affected)
}
