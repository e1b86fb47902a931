//! Adds `resolved_by` to `orphaned_payment`: whether an operator resolved it, so that the
//! resolution can be stored again when the stream has lost it. Adds an index of rows with an unsent
//! signal that leaves out withheld rows: these may stay for long, and the index is searched every
//! few seconds.
//!
//! The index of all rows with an unsent or withheld signal stays, because the previous program
//! version uses it.

use sea_orm_migration::prelude::*;

const UP: [&str; 2] = [
    "ALTER TABLE orphaned_payment ADD COLUMN resolved_by text",
    "CREATE INDEX stripe_subscription_unsent ON stripe_subscription (stripe_subscription_id) \
     WHERE last_sent NOT IN ('\"withheld\"', '\"silent\"')",
];

/// The previous program version does not know withheld rows. It would send what is withheld.
const DOWN: [&str; 3] = [
    "DROP INDEX stripe_subscription_unsent",
    "UPDATE stripe_subscription SET last_sent = NULL WHERE last_sent IN ('\"withheld\"', '\"silent\"')",
    "ALTER TABLE orphaned_payment DROP COLUMN resolved_by",
];

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        execute(manager, &UP).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        execute(manager, &DOWN).await
    }
}

async fn execute(manager: &SchemaManager<'_>, statements: &[&str]) -> Result<(), DbErr> {
    for statement in statements {
        manager
            .get_connection()
            .execute_unprepared(statement)
            .await?;
    }
    Ok(())
}
