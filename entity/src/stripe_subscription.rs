//! `stripe_subscription`: one row per Stripe subscription. Nothing in it identifies a person.
//!
//! "Snapshot" is the `data.object` of the newest subscription event, as the merge orders them. A
//! column without a comment is the snapshot's field of the same name.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "stripe_subscription")]
pub struct Model {
    /// Snapshot `id`, or a Checkout Session's `subscription`.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub stripe_subscription_id: String,
    /// Snapshot `customer`, or a Checkout Session's `customer`.
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_customer_id: Option<String>,
    /// The newest Checkout Session's `client_reference_id` that is not empty.
    #[sea_orm(column_type = "Text", nullable)]
    pub client_reference_id: Option<String>,
    /// The newest Checkout Session's `id`.
    #[sea_orm(column_type = "Text", nullable)]
    pub checkout_session_id: Option<String>,
    /// Snapshot `status`. Null until a subscription event arrived.
    #[sea_orm(column_type = "Text", nullable)]
    pub status: Option<String>,
    pub created: Option<TimeDateTimeWithTimeZone>,
    pub start_date: Option<TimeDateTimeWithTimeZone>,
    pub cancel_at: Option<TimeDateTimeWithTimeZone>,
    pub canceled_at: Option<TimeDateTimeWithTimeZone>,
    pub cancel_at_period_end: bool,
    /// Snapshot `current_period_start`, or the earliest one of its items.
    pub current_period_start: Option<TimeDateTimeWithTimeZone>,
    /// Snapshot `current_period_end`, or the latest one of its items.
    pub current_period_end: Option<TimeDateTimeWithTimeZone>,
    pub trial_end: Option<TimeDateTimeWithTimeZone>,
    pub ended_at: Option<TimeDateTimeWithTimeZone>,
    pub trial_start: Option<TimeDateTimeWithTimeZone>,
    #[sea_orm(column_type = "Text", nullable)]
    pub collection_method: Option<String>,
    /// Snapshot `cancellation_details.reason`.
    #[sea_orm(column_type = "Text", nullable)]
    pub cancellation_reason: Option<String>,
    /// Snapshot `pause_collection`, reduced to behavior and resumes_at.
    #[sea_orm(column_type = "JsonBinary", nullable)]
    pub pause_collection: Option<Json>,
    /// Snapshot `items.data`, reduced to price, product, quantity and lookup key.
    #[sea_orm(column_type = "JsonBinary")]
    pub items: Json,
    /// `<event type>.<key>`: the metadata of the newest event of each type.
    #[sea_orm(column_type = "JsonBinary")]
    pub metadata: Json,
    /// Snapshot `metadata`.
    #[sea_orm(column_type = "JsonBinary")]
    pub subscription_metadata: Json,
    pub livemode: bool,
    /// The event's `account`, for events of connected accounts.
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_account_id: Option<String>,
    /// Whether the row may not show the latest state: the order of several events with the same
    /// `created` second could not be determined, or the snapshot had only some of the items.
    pub uncertain: bool,
    /// Grows with every signalled change, also across a rebuild of the database.
    pub revision: i64,
    /// Grows with every write. A write checks that it is still the version that was read.
    pub version: i64,
    /// The event of the snapshot.
    #[sea_orm(column_type = "Text", nullable)]
    pub last_event_id: Option<String>,
    /// Its `created`.
    pub last_event_created: Option<TimeDateTimeWithTimeZone>,
    /// The merge state, as JSON. The columns above are computed from it.
    #[sea_orm(column_type = "Text")]
    pub merge_state: String,
    /// While the row has an unsent signal: what subscribers were last sent about the row, as JSON
    /// (`null`: nothing yet). Usually a SQL null.
    #[sea_orm(column_type = "Text", nullable)]
    pub last_sent: Option<String>,
    /// When the row was inserted.
    pub dt_created: TimeDateTimeWithTimeZone,
    /// When the row was last written.
    pub dt_last_updated: TimeDateTimeWithTimeZone,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
