//! Creates `litestripe_dead_letter`: events that can never be applied, and that could not be
//! stored in `STRIPE_DEAD_LETTERS` yet.

use sea_orm_migration::prelude::*;

const TABLE: &str = "litestripe_dead_letter";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let text = |column: &'static str| ColumnDef::new(column).text().not_null().take();
        let number = |column: &'static str| ColumnDef::new(column).big_integer().not_null().take();
        let time = |column: &'static str| {
            ColumnDef::new(column)
                .timestamp_with_time_zone()
                .not_null()
                .take()
        };
        let table = Table::create()
            .table(TABLE)
            .col(number("stream_created"))
            .col(number("sequence"))
            .col(text("event_type"))
            .col(text("reason"))
            .col(text("error"))
            .col(ColumnDef::new("attempts").integer().not_null())
            .col(time("due_at"))
            .col(time("dt_created"))
            .primary_key(Index::create().col("stream_created").col("sequence"))
            .take();
        manager.create_table(table).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(TABLE).take()).await
    }
}
