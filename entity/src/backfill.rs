//! `litestripe_backfill`: up to when backfills are complete.

use sea_orm::entity::prelude::*;

/// The last complete backfill of one mode, live or test.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_backfill")]
pub struct Model {
    /// The mode of Stripe's key.
    #[sea_orm(primary_key, auto_increment = false)]
    pub livemode: bool,
    /// When it began: seconds since the Unix epoch.
    pub began: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
