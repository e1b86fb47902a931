//! `litestripe_erasure`: the ids of erased persons. Their personal data must not be stored again.

use sea_orm::entity::prelude::*;

/// One id of an erased person.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_erasure")]
pub struct Model {
    /// A customer, a subscription, a Checkout Session or an orphan.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub stripe_id: String,
    /// When it was erased: seconds since the Unix epoch.
    pub erased_at: i64,
    /// Grows with every write of the table, in the order of the commits.
    #[sea_orm(unique)]
    pub sequence: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
