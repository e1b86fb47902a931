//! Adds to `due_check` what asking about the object of a thin event needs.
//!
//! The questions stay when the step is reverted: the previous program version does not take them.

use sea_orm_migration::prelude::*;

const TABLE: &str = "due_check";

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
        for column in columns() {
            let add = Table::alter().table(TABLE).add_column(column).take();
            manager.alter_table(add).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for column in columns() {
            let drop = Table::alter()
                .table(TABLE)
                .drop_column(column.get_column_name())
                .take();
            manager.alter_table(drop).await?;
        }
        Ok(())
    }
}
