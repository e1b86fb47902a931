//! Adds to `stripe_subscription` what applications ask for and cannot derive: `trial_start`,
//! `collection_method`, `cancellation_reason` and `pause_collection`.
//!
//! All are nullable. They stay null until the row's next event, a replay or a reconcile.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "stripe_subscription";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, TABLE, columns()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, TABLE, columns()).await
    }
}

fn columns() -> [ColumnDef; 4] {
    [
        ColumnDef::new("trial_start")
            .timestamp_with_time_zone()
            .take(),
        ColumnDef::new("collection_method").text().take(),
        ColumnDef::new("cancellation_reason").text().take(),
        ColumnDef::new("pause_collection").json_binary().take(),
    ]
}
