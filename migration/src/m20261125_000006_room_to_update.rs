//! On PostgreSQL, leaves room for new versions of rows in the pages of `stripe_subscription`.
//!
//! A new version that fits into the page of the old one needs no new index entries. PostgreSQL:
//! "Heap-Only Tuples (HOT)". Only affects pages that are filled after this step.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        alter(
            manager,
            "ALTER TABLE stripe_subscription SET (fillfactor = 70)",
        )
        .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        alter(
            manager,
            "ALTER TABLE stripe_subscription RESET (fillfactor)",
        )
        .await
    }
}

async fn alter(manager: &SchemaManager<'_>, statement: &str) -> Result<(), DbErr> {
    if manager.get_database_backend() == DbBackend::Postgres {
        manager
            .get_connection()
            .execute_unprepared(statement)
            .await?;
    }
    Ok(())
}
