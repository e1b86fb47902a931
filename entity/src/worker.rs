//! `litestripe_worker`: the rules by which each worker applies events.

use sea_orm::entity::prelude::*;

/// A worker's process.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_worker")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub name: String,
    /// A JSON object: by the name of a setting, its value or a hash of it.
    #[sea_orm(column_type = "Text")]
    pub rules: String,
    /// When it was last seen running, by the database's clock: seconds since the Unix epoch.
    pub heartbeat: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
