//! Adds `tracestate` to `litestripe_signal_outbox`, beside `traceparent`.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "litestripe_signal_outbox";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

fn columns() -> [ColumnDef; 1] {
    [ColumnDef::new("tracestate").text().take()]
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
