//! `signal_due`: signals that are due when a replay reaches its end. Rows go with their signal.

use sea_orm::entity::prelude::*;

/// One signal that waits for the end of a replay.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "signal_due")]
pub struct Model {
    /// The subscription's or orphan's id.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub entity_id: String,
    /// Where it will be published.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub subject: String,
    /// The replay whose end it waits for.
    #[sea_orm(column_type = "Text")]
    pub replay: String,
    /// Of a subscription: what subscribers were told last, as JSON; null if nothing yet.
    #[sea_orm(column_type = "Text", nullable)]
    pub told: Option<String>,
    /// Whether it is sent even if nothing changed, under the existing revision.
    pub unchanged: bool,
    /// The event that led to it.
    #[sea_orm(column_type = "Text")]
    pub event_id: String,
    /// Its type.
    #[sea_orm(column_type = "Text")]
    pub event_type: String,
    /// Its `created`, in seconds since the Unix epoch.
    pub event_created: i64,
    /// When it became due.
    pub dt_created: TimeDateTimeWithTimeZone,
}

/// None: rows stand alone.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
