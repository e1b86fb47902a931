//! `litestripe_dead_letter`: events that can never be applied, and that could not be stored in
//! `STRIPE_DEAD_LETTERS` yet.

use sea_orm::entity::prelude::*;

/// One such event. Its body is in `STRIPE_EVENTS`.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_dead_letter")]
pub struct Model {
    /// When the stream that `sequence` is about was created: microseconds since the Unix epoch.
    #[sea_orm(primary_key, auto_increment = false)]
    pub stream_created: i64,
    /// The event's sequence in `STRIPE_EVENTS`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub sequence: i64,
    #[sea_orm(column_type = "Text")]
    pub event_type: String,
    /// Why the event can never be applied.
    #[sea_orm(column_type = "Text")]
    pub reason: String,
    /// Why it could not be stored in `STRIPE_DEAD_LETTERS`.
    #[sea_orm(column_type = "Text")]
    pub error: String,
    /// How many attempts to store it have failed.
    pub attempts: i32,
    /// When it is tried again.
    pub due_at: TimeDateTimeWithTimeZone,
    pub dt_created: TimeDateTimeWithTimeZone,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
