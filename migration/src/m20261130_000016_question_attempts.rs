//! Adds to `litestripe_question` why the last attempt failed, and since when the question is open.
//!
//! Both are null in the questions of the previous program version.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "litestripe_question";

/// By which the failing questions are found, which are few.
const FAILING: &str = "litestripe_question_failing";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

fn columns() -> [ColumnDef; 2] {
    [
        ColumnDef::new("last_error").text().take(),
        ColumnDef::new("dt_created")
            .timestamp_with_time_zone()
            .take(),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, TABLE, columns()).await?;
        let db = manager.get_connection();
        db.execute_unprepared(&format!(
            "CREATE INDEX {FAILING} ON {TABLE} (kind, livemode) WHERE last_error IS NOT NULL"
        ))
        .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        db.execute_unprepared(&format!("DROP INDEX {FAILING}"))
            .await?;
        columns::drop(manager, TABLE, columns()).await
    }
}
