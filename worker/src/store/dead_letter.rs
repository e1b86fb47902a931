//! `litestripe_dead_letter`: events that can never be applied, and that could not be stored in
//! `STRIPE_DEAD_LETTERS` yet. Their bodies are in `STRIPE_EVENTS`.

use litestripe_domain::arrival::StreamId;
use litestripe_entity::dead_letter::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, DbErr, EntityTrait as _,
    PaginatorTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;

use crate::error::StoreError;

/// A dead letter that is not stored yet.
#[derive(Debug, Clone)]
pub struct Pending {
    pub stream: StreamId,
    /// The event's sequence in that stream.
    pub sequence: u64,
    pub event_type: String,
    /// Why the event can never be applied.
    pub reason: String,
    /// Why it could not be stored.
    pub error: String,
    /// How many attempts to store it have failed.
    pub attempts: i32,
    pub since: OffsetDateTime,
}

/// Records a dead letter, unless it is recorded already. It is tried again at `due_at`.
pub async fn insert<C: ConnectionTrait>(
    db: &C,
    letter: Pending,
    due_at: OffsetDateTime,
) -> Result<(), StoreError> {
    let model = ActiveModel {
        stream_created: Set(letter.stream.to_column()),
        sequence: Set(letter.sequence.cast_signed()),
        event_type: Set(letter.event_type),
        reason: Set(letter.reason),
        error: Set(letter.error),
        attempts: Set(letter.attempts),
        due_at: Set(due_at),
        dt_created: Set(letter.since),
    };
    let once = OnConflict::columns([Column::StreamCreated, Column::Sequence])
        .do_nothing()
        .to_owned();
    let inserted = Entity::insert_many([model])
        .on_conflict(once)
        .exec_without_returning(db)
        .await;
    match inserted {
        Ok(_) | Err(DbErr::RecordNotInserted) => Ok(()),
        Err(error) => Err(StoreError::doing("record a dead letter")(error)),
    }
}

/// Returns up to `limit` dead letters that are due, the oldest first.
pub async fn due<C: ConnectionTrait>(
    db: &C,
    now: OffsetDateTime,
    limit: u64,
) -> Result<Vec<Pending>, StoreError> {
    let due = Entity::find()
        .filter(Column::DueAt.lte(now))
        .order_by_asc(Column::DueAt)
        .limit(limit)
        .all(db)
        .await;
    let due = due.map_err(StoreError::doing("read pending dead letters"))?;
    Ok(due.into_iter().map(pending).collect())
}

/// Returns up to `limit` dead letters behind `after`, in the order of their events.
pub async fn list<C: ConnectionTrait>(
    db: &C,
    after: Option<&Pending>,
    limit: u64,
) -> Result<Vec<Pending>, StoreError> {
    let mut letters = Entity::find()
        .order_by_asc(Column::StreamCreated)
        .order_by_asc(Column::Sequence)
        .limit(limit);
    if let Some(after) = after {
        let stream = after.stream.to_column();
        let later = Column::StreamCreated
            .eq(stream)
            .and(Column::Sequence.gt(after.sequence.cast_signed()));
        letters = letters.filter(Column::StreamCreated.gt(stream).or(later));
    }
    let letters = letters.all(db).await;
    let letters = letters.map_err(StoreError::doing("list pending dead letters"))?;
    Ok(letters.into_iter().map(pending).collect())
}

pub async fn count<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let count = Entity::find().count(db).await;
    count.map_err(StoreError::doing("count pending dead letters"))
}

/// Returns the lowest sequence of `stream` among the dead letters.
pub async fn lowest<C: ConnectionTrait>(
    db: &C,
    stream: StreamId,
) -> Result<Option<u64>, StoreError> {
    let lowest = Entity::find()
        .filter(Column::StreamCreated.eq(stream.to_column()))
        .order_by_asc(Column::Sequence)
        .one(db)
        .await;
    let lowest = lowest.map_err(StoreError::doing("read pending dead letters"))?;
    Ok(lowest.map(|row| row.sequence.cast_unsigned()))
}

/// Records a failed attempt to store the dead letter. It is tried again at `due_at`.
pub async fn postpone<C: ConnectionTrait>(
    db: &C,
    letter: &Pending,
    error: &str,
    due_at: OffsetDateTime,
) -> Result<(), StoreError> {
    let attempts = letter.attempts.saturating_add(1);
    let postponed = Entity::update_many()
        .col_expr(Column::Error, Expr::value(error))
        .col_expr(Column::Attempts, Expr::value(attempts))
        .col_expr(Column::DueAt, Expr::value(due_at))
        .filter(Column::StreamCreated.eq(letter.stream.to_column()))
        .filter(Column::Sequence.eq(letter.sequence.cast_signed()))
        .exec(db)
        .await;
    postponed
        .map(drop)
        .map_err(StoreError::doing("postpone a dead letter"))
}

/// Removes a dead letter, which is stored, or whose event is gone.
pub async fn remove<C: ConnectionTrait>(db: &C, letter: &Pending) -> Result<(), StoreError> {
    let key = (letter.stream.to_column(), letter.sequence.cast_signed());
    let removed = Entity::delete_by_id(key).exec(db).await;
    removed
        .map(drop)
        .map_err(StoreError::doing("remove a pending dead letter"))
}

fn pending(row: Model) -> Pending {
    Pending {
        stream: StreamId::from_column(row.stream_created),
        sequence: row.sequence.cast_unsigned(),
        event_type: row.event_type,
        reason: row.reason,
        error: row.error,
        attempts: row.attempts,
        since: row.dt_created,
    }
}
