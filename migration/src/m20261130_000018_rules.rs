//! Creates `litestripe_worker`, in which each worker says by which rules it applies events.

use sea_orm_migration::prelude::*;

const WORKER: &str = "litestripe_worker";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let text = |column: &'static str| ColumnDef::new(column).text().not_null().take();
        let mut worker = Table::create().table(WORKER).take();
        worker
            .col(text("name").primary_key())
            .col(text("rules"))
            .col(ColumnDef::new("heartbeat").big_integer().not_null());
        manager.create_table(worker).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(WORKER).take()).await
    }
}
