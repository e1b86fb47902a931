//! Creates `litestripe_installation`: which installation the database belongs to, and which
//! `STRIPE_EVENTS` it knows. Adds to a replay which stream its sequences are about.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "litestripe_installation";
const REPLAY: &str = "litestripe_replay";
const STREAM_CREATED: &str = "stream_created";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let text = |column: &'static str| ColumnDef::new(column).text().take();
        let table = Table::create()
            .table(TABLE)
            .col(
                ColumnDef::new("only_row")
                    .boolean()
                    .not_null()
                    .primary_key(),
            )
            .col(text("id").not_null())
            .col(text("replaces"))
            .col(stream_created())
            .col(ColumnDef::new("stream_end").big_integer())
            .take();
        manager.create_table(table).await?;
        columns::add(manager, REPLAY, [stream_created()]).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, REPLAY, [stream_created()]).await?;
        manager.drop_table(Table::drop().table(TABLE).take()).await
    }
}

fn stream_created() -> ColumnDef {
    ColumnDef::new(STREAM_CREATED).big_integer().take()
}
