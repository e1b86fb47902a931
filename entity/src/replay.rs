//! `litestripe_replay`: the replay that was requested last, and its progress.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_replay")]
pub struct Model {
    /// Empty. The previous version gave replays names.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub name: String,
    /// Which rows are signalled: `changed` or `none`; in the previous version also `all`.
    #[sea_orm(column_type = "Text")]
    pub signals: String,
    /// The first sequence of `STRIPE_EVENTS` that it reapplies.
    pub first_sequence: i64,
    pub last_sequence: i64,
    /// When the stream that these sequences are about was created: microseconds since the Unix
    /// epoch. Null in a replay of the previous version.
    pub stream_created: Option<i64>,
    /// The event types it applies, comma-separated; empty for all.
    #[sea_orm(column_type = "Text")]
    pub event_types: String,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_subscription_id: Option<String>,
    pub dt_started: TimeDateTimeWithTimeZone,
    /// The last heartbeat of its process.
    pub dt_heartbeat: TimeDateTimeWithTimeZone,
    pub dt_finished: Option<TimeDateTimeWithTimeZone>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
