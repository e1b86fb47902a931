//! `litestripe_lease`: leases for tasks that only one worker does at a time.

use sea_orm::entity::prelude::*;

/// The lease of one task.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_lease")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub name: String,
    pub is_held: bool,
    /// Grows whenever the lease is taken, renewed or released.
    pub renewed: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
