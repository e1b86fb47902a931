//! `orphaned_payment`: payments that belong to no known user. The only table with an email.

use sea_orm::entity::prelude::*;

/// One payment that has, or had, no known user.
#[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "orphaned_payment")]
pub struct Model {
    /// The subscription's id, else the Checkout Session's.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub id: String,
    #[sea_orm(column_type = "Text", nullable)]
    pub checkout_session_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_customer_id: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub stripe_subscription_id: Option<String>,
    /// An address to contact the customer. Erased on resolution.
    #[sea_orm(column_type = "Text", nullable)]
    pub customer_email: Option<String>,
    /// `missing_client_reference_id`, `unknown_client_reference_id` or `no_checkout_session`.
    #[sea_orm(column_type = "Text")]
    pub reason: String,
    #[sea_orm(column_type = "Text")]
    pub event_id: String,
    pub livemode: bool,
    /// When a user was found. Null while the orphan is open.
    pub resolved_at: Option<TimeDateTimeWithTimeZone>,
    #[sea_orm(column_type = "Text", nullable)]
    pub resolved_client_reference_id: Option<String>,
    /// `operator` if an operator resolved it. Null if a session or the user lookup did, or while it
    /// is open.
    #[sea_orm(column_type = "Text", nullable)]
    pub resolved_by: Option<String>,
    /// While the signal that it was created or resolved is unsent: `created`, type and id of the
    /// event that led to it. Usually null.
    #[sea_orm(column_type = "Text", nullable)]
    pub unsent_event: Option<String>,
    pub dt_created: TimeDateTimeWithTimeZone,
    pub dt_last_updated: TimeDateTimeWithTimeZone,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// Leaves the email out, because a row may end up in a log line.
impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("orphaned_payment::Model")
            .field("id", &self.id)
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}
