//! `litestripe_installation`: which installation the database belongs to.

use sea_orm::entity::prelude::*;

/// The only row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_installation")]
pub struct Model {
    /// Always true: as the key, it keeps a second row out.
    #[sea_orm(primary_key, auto_increment = false)]
    pub only_row: bool,
    /// The id that the broker's KV bucket holds too.
    #[sea_orm(column_type = "Text")]
    pub id: String,
    /// The broker's id that this one replaces: that of a database before this one, if any.
    #[sea_orm(column_type = "Text", nullable)]
    pub replaces: Option<String>,
    /// When the `STRIPE_EVENTS` was created that the workers know: microseconds since the Unix
    /// epoch. Null before they have seen it.
    pub stream_created: Option<i64>,
    /// The last sequence of that stream, as seen at some time.
    pub stream_end: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
