//! `replay`: which replays were asked for, and which of them have not reached their end.

use std::time::Duration;

use litestripe_entity::replay::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, EntityTrait as _, QueryFilter as _, QueryOrder as _,
};
use time::OffsetDateTime;

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
    let open = unfinished.iter().filter(|replay| now - replay.beat < CUT_OFF_MAX);
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

/// Says that `name` reached its end and owes no signal.
///
/// # Errors
/// When the database is away.
pub async fn finish<C: ConnectionTrait>(db: &C, name: &str, now: OffsetDateTime) -> Result<(), StoreError> {
    set(db, name, Column::DtFinished, now).await
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
