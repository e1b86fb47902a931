//! `replay`: which replays were asked for, and which of them have not reached their end.

use std::time::Duration;

use litestripe_domain::row::Rebuilding;
use litestripe_entity::replay::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, LockType, OnConflict, SelectStatement};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait as _,
    QueryFilter as _, QueryOrder as _, QueryResult, QuerySelect as _, QueryTrait as _,
};
use time::OffsetDateTime;

use super::Store;
use crate::error::StoreError;

/// How often whoever is at a replay says so.
pub const BEAT_EVERY: Duration = Duration::from_secs(5);

/// A replay of which nobody said so for this long was cut off.
const BEAT_MAX: Duration = Duration::from_secs(30);

/// For this long after it was cut off, a replay still counts as one that somebody will finish: rows may
/// be half rebuilt, and nothing is concluded from them.
const CUT_OFF_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Which events a replay applies again, and who is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Its name; empty for the one without.
    pub name: String,
    /// Who is told: `changed`, `all` or `none`.
    pub signals: String,
    /// The first sequence of `STRIPE_EVENTS`.
    pub first_sequence: u64,
    /// The last one.
    pub last_sequence: u64,
    /// The event types; none for all.
    pub event_types: Vec<String>,
    /// The one subscription it is about, if it is about one.
    pub stripe_subscription_id: Option<String>,
    /// When it was started first.
    pub started: OffsetDateTime,
    /// When a process last said that it is at it.
    pub beat: OffsetDateTime,
}

impl Replay {
    /// Whether a process is at it.
    #[must_use]
    pub fn is_running(&self, now: OffsetDateTime) -> bool {
        now - self.beat < BEAT_MAX
    }

    /// Whether somebody is at it or will finish it.
    #[must_use]
    pub fn is_open(&self, now: OffsetDateTime) -> bool {
        now - self.beat < CUT_OFF_MAX
    }
}

/// What [`rebuilding`] reads: the latest replay that is rebuilding, if there is one.
pub(super) fn latest_unfinished() -> SelectStatement {
    Entity::find()
        .select_only()
        .columns([Column::Name, Column::DtStarted, Column::DtBeat])
        .filter(Column::DtFinished.is_null())
        .filter(Column::Signals.ne("none"))
        .order_by_desc(Column::DtBeat)
        .limit(1)
        .into_query()
}

pub(super) fn rebuilding(row: &QueryResult, now: OffsetDateTime) -> Result<Option<Rebuilding>, DbErr> {
    let Some(replay) = row.try_get("", "name")? else { return Ok(None) };
    let (started, beat): (OffsetDateTime, OffsetDateTime) =
        (row.try_get("", "dt_started")?, row.try_get("", "dt_beat")?);
    Ok((now - beat < CUT_OFF_MAX).then_some(Rebuilding { replay, started }))
}

/// Sees that `name` does not end before `tx`, which leaves a signal to its end. Returns whether it has
/// not ended yet.
///
/// # Errors
/// When the database is away.
pub async fn hold(tx: &DatabaseTransaction, name: &str) -> Result<bool, StoreError> {
    let unfinished = Entity::find_by_id(name).filter(Column::DtFinished.is_null());
    // Beats write no key, and so do not wait for this.
    let held = unfinished.lock(LockType::KeyShare).one(tx).await;
    held.map(|held| held.is_some()).map_err(StoreError::doing("look whether a replay is over"))
}

/// The replays that have not reached their end.
///
/// # Errors
/// When the database is away.
pub async fn unfinished<C: ConnectionTrait>(db: &C) -> Result<Vec<Replay>, StoreError> {
    let rows = Entity::find().filter(Column::DtFinished.is_null()).order_by_asc(Column::Name).all(db).await;
    Ok(rows.map_err(StoreError::doing("look for replays"))?.into_iter().map(replay).collect())
}

/// The last sequence that a replay still has to reach, if there is one: until then rows may be half
/// rebuilt, and no question about an event up to it is to be asked.
///
/// # Errors
/// When the database is away.
pub async fn rebuilding_until<C: ConnectionTrait>(db: &C, now: OffsetDateTime) -> Result<Option<u64>, StoreError> {
    let unfinished = unfinished(db).await?;
    let open = unfinished.iter().filter(|replay| replay.is_open(now));
    Ok(open.map(|replay| replay.last_sequence).max())
}

/// Notes `replay`, in place of an earlier one of its name.
///
/// # Errors
/// When the database is away.
pub async fn start<C: ConnectionTrait>(db: &C, replay: &Replay) -> Result<(), StoreError> {
    let model = ActiveModel {
        name: Set(replay.name.clone()),
        signals: Set(replay.signals.clone()),
        first_sequence: Set(replay.first_sequence.cast_signed()),
        last_sequence: Set(replay.last_sequence.cast_signed()),
        event_types: Set(replay.event_types.join(",")),
        stripe_subscription_id: Set(replay.stripe_subscription_id.clone()),
        dt_started: Set(replay.started),
        dt_beat: Set(replay.beat),
        dt_finished: Set(None),
    };
    let anew = OnConflict::column(Column::Name)
        .update_columns([
            Column::Signals,
            Column::FirstSequence,
            Column::LastSequence,
            Column::EventTypes,
            Column::StripeSubscriptionId,
            Column::DtStarted,
            Column::DtBeat,
            Column::DtFinished,
        ])
        .to_owned();
    let noted = Entity::insert_many([model]).on_conflict(anew).exec_without_returning(db).await;
    noted.map(|_| ()).map_err(StoreError::doing("note a replay"))
}

/// Says that a process is at `name` now, or with an older time that it is no more.
///
/// # Errors
/// When the database is away.
pub async fn beat<C: ConnectionTrait>(db: &C, name: &str, at: OffsetDateTime) -> Result<(), StoreError> {
    set(db, name, Column::DtBeat, at).await
}

/// Says that `name` reached its end, unless it owes a signal. Returns whether it owes none.
///
/// # Cancel safety
/// None, as of [`Store::begin`].
///
/// # Errors
/// When the database is away.
pub async fn finish(store: &Store, name: &str, now: OffsetDateTime) -> Result<bool, StoreError> {
    let tx = store.begin().await?;
    // Behind those that hold it, and before it is counted what they left to it.
    let locked = Entity::find_by_id(name).lock(LockType::Update).one(&tx).await;
    locked.map_err(StoreError::doing("end a replay"))?;
    let owes_none = super::signal_due::count(&tx, name).await? == 0;
    if owes_none {
        set(&tx, name, Column::DtFinished, now).await?;
    }
    tx.commit().await.map_err(StoreError::doing("commit a replay's end"))?;
    Ok(owes_none)
}

async fn set<C: ConnectionTrait>(db: &C, name: &str, column: Column, at: OffsetDateTime) -> Result<(), StoreError> {
    let those = Entity::update_many().col_expr(column, Expr::value(at)).filter(Column::Name.eq(name));
    those.exec(db).await.map(|_| ()).map_err(StoreError::doing("note how far a replay is"))
}

fn replay(row: Model) -> Replay {
    Replay {
        name: row.name,
        signals: row.signals,
        first_sequence: row.first_sequence.cast_unsigned(),
        last_sequence: row.last_sequence.cast_unsigned(),
        event_types: row.event_types.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        stripe_subscription_id: row.stripe_subscription_id,
        started: row.dt_started,
        beat: row.dt_beat,
    }
}
