//! `signal_due`: the signals that a replay owes when it reaches its end.
//!
//! Invariant: a row stands for what subscribers were told last of a subscription whose row has
//! changed since, or that is to be told again. It goes in the transaction that tells them.

use std::collections::HashMap;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, Timestamp};
use litestripe_contract::subject;
use litestripe_domain::row::{Due, NewDue};
use litestripe_entity::signal_due::{Column, Entity, Model};
use sea_orm::sea_query::ExprTrait as _;
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;

use super::rows::{Cell, Insert};
use crate::error::StoreError;

const INSERT: Insert<'_> = Insert {
    into: "signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, dt_created)",
    select: "UNNEST($1::text[]), UNNEST($2::text[]), UNNEST($3::text[]), UNNEST($4::text[]), UNNEST($5::boolean[]), \
        UNNEST($6::text[]), UNNEST($7::text[]), UNNEST($8::bigint[]), UNNEST($9::timestamptz[])",
    then: "ON CONFLICT (entity_id, subject) DO UPDATE SET event_id = excluded.event_id, \
        event_type = excluded.event_type, event_created = excluded.event_created, \
        unchanged = signal_due.unchanged OR excluded.unchanged",
};

/// A signal of an orphan that waits for the end of a replay.
#[derive(Debug, Clone)]
pub struct OrphanDue {
    /// The orphan's id.
    pub entity_id: String,
    /// Where it will be published.
    pub subject: String,
    /// The event that led to it.
    pub event: EventReference,
}

/// Puts `dues` in. Of one that is due already, what was told last stays.
///
/// # Errors
/// When the database is away or refuses the data.
pub async fn put(tx: &DatabaseTransaction, dues: Vec<NewDue>, now: OffsetDateTime) -> Result<(), StoreError> {
    let doing = StoreError::doing("save signals that are due");
    let cells = |NewDue { entity_id, subject, due }| -> Result<[Cell; 9], serde_json::Error> {
        Ok([
            Cell::from(entity_id),
            str::to_owned(subject).into(),
            due.replay.into(),
            due.told.map(|told| serde_json::to_string(&told)).transpose()?.into(),
            due.unchanged.into(),
            due.event.id.to_string().into(),
            due.event.event_type.to_string().into(),
            due.event.created.unix().into(),
            now.into(),
        ])
    };
    let rows: Result<Vec<_>, _> = dues.into_iter().map(cells).collect();
    let rows = rows.map_err(|error| doing(DbErr::Json(error.to_string())))?;
    super::rows::insert(tx, INSERT, rows).await.map(drop).map_err(&doing)
}

/// Up to `limit` ids after `after`, in their order, of subscriptions and orphans of which `replay` owes a
/// signal.
///
/// # Errors
/// When the database is away.
pub async fn owed_by<C: ConnectionTrait>(
    db: &C,
    replay: &str,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    let ids = Entity::find()
        .select_only()
        .column(Column::EntityId)
        .distinct()
        .filter(Column::Replay.eq(replay))
        .filter(Column::EntityId.gt(after))
        .order_by_asc(Column::EntityId)
        .limit(limit)
        .into_tuple()
        .all(db)
        .await;
    ids.map_err(StoreError::doing("look for signals that are due"))
}

/// How many signals `replay` owes.
///
/// # Errors
/// When the database is away.
pub async fn count<C: ConnectionTrait>(db: &C, replay: &str) -> Result<u64, StoreError> {
    let count = Entity::find().filter(Column::Replay.eq(replay)).count(db).await;
    count.map_err(StoreError::doing("count signals that are due"))
}

/// What `replay` owes of orphans among `ids`.
///
/// # Errors
/// When the database is away.
pub async fn of_orphans<C: ConnectionTrait>(
    db: &C,
    replay: &str,
    ids: &[&str],
) -> Result<HashMap<String, Vec<OrphanDue>>, StoreError> {
    let rows = Entity::find()
        .filter(Column::Replay.eq(replay))
        .filter(Column::EntityId.is_in(ids.iter().copied()))
        .filter(Column::Subject.ne(subject::SUBSCRIPTION_CHANGED))
        .all(db)
        .await;
    let mut dues: HashMap<String, Vec<OrphanDue>> = HashMap::new();
    for row in rows.map_err(StoreError::doing("read signals that are due"))? {
        let Some(event) = event(&row) else { continue };
        let due = OrphanDue { entity_id: row.entity_id.clone(), subject: row.subject, event };
        dues.entry(row.entity_id).or_default().push(due);
    }
    Ok(dues)
}

/// Forgets what is due about `ids` on `subjects`. Returns how many signals that were.
///
/// # Errors
/// When the database is away.
pub async fn remove<C: ConnectionTrait>(db: &C, subjects: &[&str], ids: &[&str]) -> Result<u64, StoreError> {
    if ids.is_empty() {
        return Ok(0);
    }
    let about = super::among_ids(db.get_database_backend(), Column::EntityId, ids);
    let those = Column::Subject.is_in(subjects.iter().copied()).and(about);
    let removed = Entity::delete_many().filter(those).exec(db).await;
    removed.map(|removed| removed.rows_affected).map_err(StoreError::doing("remove signals that were due"))
}

/// What a row says, or nothing if only a later program can read it.
pub(super) fn due(row: Model) -> Option<Due> {
    let event = event(&row)?;
    let told = row.told.map(|told| serde_json::from_str(&told)).transpose().ok()?;
    Some(Due { replay: row.replay, told, unchanged: row.unchanged, event })
}

fn event(row: &Model) -> Option<EventReference> {
    Some(EventReference {
        id: EventId::parse(row.event_id.as_str()).ok()?,
        event_type: EventType::parse(row.event_type.as_str()).ok()?,
        created: Timestamp::from_unix(row.event_created).ok()?,
    })
}
