//! Creates `orphaned_payment`.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
enum OrphanedPayment {
    Table,
    Id,
    CheckoutSessionId,
    StripeCustomerId,
    StripeSubscriptionId,
    CustomerEmail,
    Reason,
    EventId,
    Livemode,
    ResolvedAt,
    ResolvedClientReferenceId,
    DtCreated,
    DtLastUpdated,
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use OrphanedPayment as Column;
        let text = |column| ColumnDef::new(column).text().take();
        let time = |column| ColumnDef::new(column).timestamp_with_time_zone().take();
        let table = Table::create()
            .table(Column::Table)
            .col(text(Column::Id).not_null().primary_key())
            .col(text(Column::CheckoutSessionId))
            .col(text(Column::StripeCustomerId))
            .col(text(Column::StripeSubscriptionId))
            .col(text(Column::CustomerEmail))
            .col(text(Column::Reason).not_null())
            .col(text(Column::EventId).not_null())
            .col(ColumnDef::new(Column::Livemode).boolean().not_null())
            .col(time(Column::ResolvedAt))
            .col(text(Column::ResolvedClientReferenceId))
            .col(time(Column::DtCreated).not_null())
            .col(time(Column::DtLastUpdated).not_null())
            .take();
        manager.create_table(table).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table(OrphanedPayment::Table).take())
            .await
    }
}
