//! `litestripe_replay`: the last replay that was started, and whether it has reached its end.
//!
//! The table has one row: a replay's, with an empty name, or that of a table that was found empty
//! (`LOST_ROWS`). The version before the previous one also wrote rows with other names.

use std::time::Duration;

use litestripe_domain::arrival::StreamId;
use litestripe_entity::replay::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, OnConflict, SelectStatement};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, DbErr, EntityTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, QueryTrait as _,
};
use time::OffsetDateTime;

use crate::error::StoreError;

/// How often the process of a replay records a heartbeat.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// A replay without a heartbeat for this long was interrupted.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);

/// For this long after its last heartbeat, an interrupted replay is expected to be finished by the
/// operator. Until then no question about its events is asked, and none of them is purged. First
/// signals are withheld for as long as it is unfinished.
const OPEN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The name of the rebuild that begins when the table of subscriptions is found empty. No process
/// runs it: the next replay does its work.
const LOST_ROWS: &str = "lost rows";

/// The events that a replay reapplies, and the signals that it sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Empty, except for `LOST_ROWS` and a replay of an earlier version.
    pub name: String,
    /// The signals to send: `changed` or `none`; in the previous version also `all`.
    pub signals: String,
    /// The stream that its sequences are about. `None` in a replay of the previous version.
    pub stream: Option<StreamId>,
    pub first_sequence: u64,
    pub last_sequence: u64,
    /// The event types; empty for all.
    pub event_types: Vec<String>,
    pub stripe_subscription_id: Option<String>,
    pub started: OffsetDateTime,
    /// The time of the last heartbeat.
    pub heartbeat: OffsetDateTime,
}

impl Replay {
    /// Whether its sequences are about `stream`.
    pub fn is_about(&self, stream: StreamId) -> bool {
        self.stream.is_none_or(|own| own == stream)
    }

    /// Whether a process runs it.
    pub fn is_running(&self, now: OffsetDateTime) -> bool {
        // A heartbeat in the future is as little a sign of life as an old one.
        (now - self.heartbeat).abs() < HEARTBEAT_TIMEOUT
    }

    /// Whether it is not a replay, but the record of a table that was found empty.
    pub fn is_lost_rows_record(&self) -> bool {
        self.name == LOST_ROWS
    }

    /// Whether a process runs it, or the operator is expected to finish it.
    pub fn is_open(&self, now: OffsetDateTime) -> bool {
        (now - self.heartbeat).abs() < OPEN_MAX
    }
}

/// Returns the query that selects when the unfinished replay was started, if there is one.
pub(super) fn latest_unfinished() -> SelectStatement {
    Entity::find()
        .select_only()
        .column(Column::DtStarted)
        .filter(Column::DtFinished.is_null())
        .order_by_desc(Column::DtHeartbeat)
        .limit(1)
        .into_query()
}

/// Returns the replay that has not reached its end; in a database of the previous version there may
/// be several.
pub async fn unfinished<C: ConnectionTrait>(db: &C) -> Result<Vec<Replay>, StoreError> {
    let rows = Entity::find()
        .filter(Column::DtFinished.is_null())
        .order_by_asc(Column::Name)
        .all(db)
        .await;
    Ok(rows
        .map_err(StoreError::doing("find replays"))?
        .into_iter()
        .map(replay)
        .collect())
}

/// Returns the position of the open replay's last event, if there is one. Until the replay has
/// reached it, rows may be half rebuilt, and questions about events up to it must not be asked.
pub async fn rebuilding_until<C: ConnectionTrait>(
    db: &C,
    now: OffsetDateTime,
) -> Result<Option<u64>, StoreError> {
    let unfinished = unfinished(db).await?;
    let open = unfinished.iter().filter(|replay| replay.is_open(now));
    let last = |replay: &Replay| {
        let stream = replay.stream.unwrap_or_default();
        stream.position(replay.last_sequence)
    };
    Ok(open.map(last).max())
}

/// Records `replay`, and deletes all earlier ones.
pub async fn start<C: ConnectionTrait>(db: &C, replay: &Replay) -> Result<(), StoreError> {
    let model = ActiveModel {
        name: Set(String::new()),
        signals: Set(replay.signals.clone()),
        first_sequence: Set(replay.first_sequence.cast_signed()),
        last_sequence: Set(replay.last_sequence.cast_signed()),
        stream_created: Set(replay.stream.map(StreamId::to_column)),
        event_types: Set(replay.event_types.join(",")),
        stripe_subscription_id: Set(replay.stripe_subscription_id.clone()),
        dt_started: Set(replay.started),
        dt_heartbeat: Set(replay.heartbeat),
        dt_finished: Set(None),
    };
    let replaced = OnConflict::column(Column::Name)
        .update_columns([
            Column::Signals,
            Column::FirstSequence,
            Column::LastSequence,
            Column::StreamCreated,
            Column::EventTypes,
            Column::StripeSubscriptionId,
            Column::DtStarted,
            Column::DtHeartbeat,
            Column::DtFinished,
        ])
        .to_owned();
    let doing = StoreError::doing("record a replay");
    Entity::insert_many([model])
        .on_conflict(replaced)
        .exec_without_returning(db)
        .await
        .map_err(&doing)?;
    Entity::delete_many()
        .filter(Column::Name.ne(""))
        .exec(db)
        .await
        .map(drop)
        .map_err(&doing)
}

/// Whether any replay was recorded.
pub async fn is_any<C: ConnectionTrait>(db: &C) -> Result<bool, StoreError> {
    let any = Entity::find().one(db).await;
    any.map(|row| row.is_some())
        .map_err(StoreError::doing("find replays"))
}

/// Records that the table of subscriptions was found empty at `now`, while events of `stream` up to
/// `floor` were applied. If none was applied, nothing is missing. Another worker may have recorded
/// it already.
pub async fn record_lost_rows<C: ConnectionTrait>(
    db: &C,
    stream: StreamId,
    first_sequence: u64,
    floor: u64,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let model = ActiveModel {
        name: Set(LOST_ROWS.to_owned()),
        // The next replay decides whether signals are sent. The workers send those of later events,
        // so that it may be a silent one too.
        signals: Set("none".to_owned()),
        first_sequence: Set(first_sequence.min(floor).cast_signed()),
        last_sequence: Set(floor.cast_signed()),
        stream_created: Set(Some(stream.to_column())),
        event_types: Set(String::new()),
        stripe_subscription_id: Set(None),
        dt_started: Set(now),
        // No process runs it.
        dt_heartbeat: Set(now - 2 * HEARTBEAT_TIMEOUT),
        dt_finished: Set((floor == 0).then_some(now)),
    };
    let once = OnConflict::column(Column::Name).do_nothing().to_owned();
    let recorded = Entity::insert_many([model])
        .on_conflict(once)
        .exec_without_returning(db);
    match recorded.await {
        Ok(_) | Err(DbErr::RecordNotInserted) => Ok(()),
        Err(error) => Err(StoreError::doing("record lost rows")(error)),
    }
}

/// Records a heartbeat of the replay's process; an old time records that the process has stopped.
pub async fn record_heartbeat<C: ConnectionTrait>(
    db: &C,
    at: OffsetDateTime,
) -> Result<(), StoreError> {
    set(db, Column::DtHeartbeat, at).await
}

/// Records that the replay has reached its end.
pub async fn finish<C: ConnectionTrait>(db: &C, now: OffsetDateTime) -> Result<(), StoreError> {
    set(db, Column::DtFinished, now).await
}

async fn set<C: ConnectionTrait>(
    db: &C,
    column: Column,
    at: OffsetDateTime,
) -> Result<(), StoreError> {
    let unfinished = Entity::update_many()
        .col_expr(column, Expr::value(at))
        .filter(Column::DtFinished.is_null());
    unfinished
        .exec(db)
        .await
        .map(drop)
        .map_err(StoreError::doing("update a replay"))
}

fn replay(row: Model) -> Replay {
    Replay {
        name: row.name,
        signals: row.signals,
        stream: row.stream_created.map(StreamId::from_column),
        first_sequence: row.first_sequence.cast_unsigned(),
        last_sequence: row.last_sequence.cast_unsigned(),
        event_types: row
            .event_types
            .split(',')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
        stripe_subscription_id: row.stripe_subscription_id,
        started: row.dt_started,
        heartbeat: row.dt_heartbeat,
    }
}
