//! Drops `litestripe_signal_due`, which is empty since the step `last_sent`.

use sea_orm_migration::prelude::*;

use crate::m20261124_000005_replay as replay;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        replay::drop_signal_due(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        replay::create_signal_due(manager).await
    }
}
