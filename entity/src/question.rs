//! `litestripe_question`: the open questions, each with the time at which it is due. No personal
//! data: an email that is needed later is read from the event in the stream.

use sea_orm::entity::prelude::*;

/// One open question.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_question")]
pub struct Model {
    /// The subscription's id, else the Checkout Session's; for thin events, the id of the object
    /// that they name. For an erasure, the customer's; for a removal, the message's stream and
    /// sequence.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub entity_id: String,
    /// `lookup`, `grace`, `fetch`, `erase`, `notification` or `removal`.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub kind: String,
    /// When to ask. A worker that takes the question moves this time, so that another one asks if
    /// the worker dies.
    pub due_at: TimeDateTimeWithTimeZone,
    /// How many attempts in a row had the same outcome: they failed, or brought no answer yet.
    pub attempts: i32,
    #[sea_orm(column_type = "Text", nullable)]
    pub checkout_session_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_customer_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_subscription_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_account_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub client_reference_id: Option<String>,
    pub is_paid: bool,
    pub livemode: bool,
    /// The event that led to the question.
    #[sea_orm(column_type = "Text")]
    pub event_id: String,
    #[sea_orm(column_type = "Text")]
    pub event_type: String,
    /// Its `created`, in seconds since the Unix epoch.
    pub event_created: i64,
    /// The trace that it belongs to: W3C's `traceparent` and `tracestate`.
    #[sea_orm(column_type = "Text", nullable)]
    pub traceparent: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub tracestate: Option<String>,
    /// Its sequence in `STRIPE_EVENTS`.
    pub stream_sequence: i64,
    /// For thin events, the account that has to be named to fetch the object.
    #[sea_orm(column_type = "Text", nullable)]
    pub context: Option<String>,
    /// The thin events, as a JSON object: by type, `created` and id of the one received last.
    #[sea_orm(column_type = "Text", nullable)]
    pub notifications: Option<String>,
    /// For thin events, when to ask at the latest, even if more of them keep coming.
    pub ask_by: Option<TimeDateTimeWithTimeZone>,
    /// Why the last attempt failed. Null if it did not fail, and while the question is asked.
    #[sea_orm(column_type = "Text", nullable)]
    pub last_error: Option<String>,
    /// When the question was first saved. The previous version did not write it.
    pub dt_created: Option<TimeDateTimeWithTimeZone>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
