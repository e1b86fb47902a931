//! Adds to `litestripe_question` what asking about the object of a thin event needs.
//!
//! The questions stay when the step is reverted: the previous program version does not take them.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "litestripe_question";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

fn columns() -> [ColumnDef; 3] {
    [
        ColumnDef::new("context").text().take(),
        ColumnDef::new("notifications").text().take(),
        ColumnDef::new("ask_by").timestamp_with_time_zone().take(),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, TABLE, columns()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, TABLE, columns()).await
    }
}
