//! `stripe_subscription`: one row per Stripe subscription. Nothing in it identifies a person.
//!
//! "Snapshot" is the `data.object` of the event that stands. A column without a comment is of that name there.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "stripe_subscription")]
pub struct Model {
    /// Snapshot `id`, or a Checkout Session's `subscription`.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub stripe_subscription_id: String,
    /// Snapshot `customer`, or a Checkout Session's.
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_customer_id: Option<String>,
    /// The newest Checkout Session's `client_reference_id` that is not empty.
    #[sea_orm(column_type = "Text", nullable)]
    pub client_reference_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub checkout_session_id: Option<String>,
    /// Snapshot `status`. Null until an event carried the subscription.
    #[sea_orm(column_type = "Text", nullable)]
    pub status: Option<String>,
    pub created: Option<TimeDateTimeWithTimeZone>,
    pub start_date: Option<TimeDateTimeWithTimeZone>,
    pub cancel_at: Option<TimeDateTimeWithTimeZone>,
    pub canceled_at: Option<TimeDateTimeWithTimeZone>,
    pub cancel_at_period_end: bool,
    /// Snapshot `current_period_start`, or the earliest of its items'.
    pub current_period_start: Option<TimeDateTimeWithTimeZone>,
    /// Snapshot `current_period_end`, or the latest of its items'.
    pub current_period_end: Option<TimeDateTimeWithTimeZone>,
    pub trial_end: Option<TimeDateTimeWithTimeZone>,
    pub ended_at: Option<TimeDateTimeWithTimeZone>,
    /// Snapshot `items.data`, reduced to price, product, quantity and lookup key.
    #[sea_orm(column_type = "JsonBinary")]
    pub items: Json,
    /// `<event type>.<key>`: the metadata of the newest event of each type.
    #[sea_orm(column_type = "JsonBinary")]
    pub metadata: Json,
    #[sea_orm(column_type = "JsonBinary")]
    pub subscription_metadata: Json,
    pub livemode: bool,
    /// The event's `account`, for events of connected accounts.
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_account_id: Option<String>,
    /// Whether several events of one second left open which came last.
    pub uncertain: bool,
    /// Grows with every signalled change, also across a rebuild of the database.
    pub revision: i64,
    /// Grows with every write, and guards each of them.
    pub version: i64,
    /// The event whose snapshot stands.
    #[sea_orm(column_type = "Text", nullable)]
    pub last_event_id: Option<String>,
    pub last_event_created: Option<TimeDateTimeWithTimeZone>,
    /// What the columns above are a function of, as JSON.
    #[sea_orm(column_type = "Text")]
    pub merge_state: String,
    /// What subscribers were sent of the row last, as JSON (`null`: nothing yet), while that differs from
    /// what it shows: then it owes a signal. Null as a rule.
    #[sea_orm(column_type = "Text", nullable)]
    pub last_sent: Option<String>,
    pub dt_created: TimeDateTimeWithTimeZone,
    pub dt_last_updated: TimeDateTimeWithTimeZone,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
