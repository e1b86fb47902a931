//! Creates what workers share beside the rows: `litestripe_lease`, `litestripe_backfill` and
//! `litestripe_erasure`.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
enum LitestripeLease {
    Table,
    Name,
    IsHeld,
    Renewed,
}

#[derive(DeriveIden)]
enum LitestripeBackfill {
    Table,
    Livemode,
    Began,
}

#[derive(DeriveIden)]
enum LitestripeErasure {
    Table,
    StripeId,
    ErasedAt,
    Sequence,
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(lease()).await?;
        manager.create_table(backfill()).await?;
        manager.create_table(erasure()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(LitestripeErasure::Table).take()).await?;
        manager.drop_table(Table::drop().table(LitestripeBackfill::Table).take()).await?;
        manager.drop_table(Table::drop().table(LitestripeLease::Table).take()).await
    }
}

fn lease() -> TableCreateStatement {
    use LitestripeLease as Column;
    Table::create()
        .table(Column::Table)
        .if_not_exists()
        .col(ColumnDef::new(Column::Name).text().not_null().primary_key())
        .col(ColumnDef::new(Column::IsHeld).boolean().not_null())
        .col(ColumnDef::new(Column::Renewed).big_integer().not_null())
        .take()
}

fn backfill() -> TableCreateStatement {
    use LitestripeBackfill as Column;
    Table::create()
        .table(Column::Table)
        .if_not_exists()
        .col(ColumnDef::new(Column::Livemode).boolean().not_null().primary_key())
        .col(ColumnDef::new(Column::Began).big_integer().not_null())
        .take()
}

fn erasure() -> TableCreateStatement {
    use LitestripeErasure as Column;
    Table::create()
        .table(Column::Table)
        .if_not_exists()
        .col(ColumnDef::new(Column::StripeId).text().not_null().primary_key())
        .col(ColumnDef::new(Column::ErasedAt).big_integer().not_null())
        .col(ColumnDef::new(Column::Sequence).big_integer().not_null().unique_key())
        .take()
}
