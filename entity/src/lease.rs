//! `litestripe_lease`: what only one worker does at a time, and whether one is doing it.

use sea_orm::entity::prelude::*;

/// One lease.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_lease")]
pub struct Model {
    /// What it is for.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub name: String,
    /// Whether a worker holds it.
    pub is_held: bool,
    /// Grows whenever the lease is taken, renewed or released.
    pub renewed: i64,
}

/// None: rows stand alone.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
