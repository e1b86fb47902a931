//! Creates `litestripe_signal_outbox` and `litestripe_signal_shard`. Relays lock a row of the
//! latter, so that only one relay at a time works on a shard of the outbox (on PostgreSQL; on
//! SQLite they lock a file instead).

use sea_orm_migration::prelude::*;

/// Equal to the worker's `store::outbox::SHARDS`, which a migration may not import.
const SHARDS: i32 = 16;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
enum SignalOutbox {
    #[sea_orm(iden = "litestripe_signal_outbox")]
    Table,
    Id,
    Shard,
    EntityId,
    Subject,
    MessageId,
    EventCreated,
    Traceparent,
    Body,
    DtCreated,
}

#[derive(DeriveIden)]
enum SignalShard {
    #[sea_orm(iden = "litestripe_signal_shard")]
    Table,
    Shard,
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use SignalOutbox as Column;
        let text = |column| ColumnDef::new(column).text().take();
        let table = Table::create()
            .table(Column::Table)
            .col(
                ColumnDef::new(Column::Id)
                    .big_integer()
                    .not_null()
                    .auto_increment()
                    .primary_key(),
            )
            .col(ColumnDef::new(Column::Shard).integer().not_null())
            .col(text(Column::EntityId).not_null())
            .col(text(Column::Subject).not_null())
            .col(text(Column::MessageId).not_null())
            .col(
                ColumnDef::new(Column::EventCreated)
                    .big_integer()
                    .not_null(),
            )
            .col(text(Column::Traceparent))
            .col(text(Column::Body).not_null())
            .col(
                ColumnDef::new(Column::DtCreated)
                    .timestamp_with_time_zone()
                    .not_null(),
            )
            .take();
        manager.create_table(table).await?;
        let by_shard = Index::create()
            .name("litestripe_signal_outbox_shard_id")
            .table(Column::Table)
            .col(Column::Shard)
            .col(Column::Id)
            .take();
        manager.create_index(by_shard).await?;

        let shards = Table::create()
            .table(SignalShard::Table)
            .col(
                ColumnDef::new(SignalShard::Shard)
                    .integer()
                    .not_null()
                    .primary_key(),
            )
            .take();
        manager.create_table(shards).await?;
        let mut rows = Query::insert()
            .into_table(SignalShard::Table)
            .columns([SignalShard::Shard])
            .take();
        for shard in 0..SHARDS {
            rows.values_panic([shard.into()]);
        }
        manager.exec_stmt(rows).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table(SignalShard::Table).take())
            .await?;
        manager
            .drop_table(Table::drop().table(SignalOutbox::Table).take())
            .await
    }
}
