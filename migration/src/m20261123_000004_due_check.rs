//! Creates `litestripe_question`, which was `due_check` once: the open questions, each with the
//! time at which it is due.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
enum Question {
    #[sea_orm(iden = "litestripe_question")]
    Table,
    EntityId,
    Kind,
    DueAt,
    Attempts,
    CheckoutSessionId,
    StripeCustomerId,
    StripeSubscriptionId,
    StripeAccountId,
    ClientReferenceId,
    IsPaid,
    Livemode,
    EventId,
    EventType,
    EventCreated,
    StreamSequence,
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use Question as Column;
        let text = |column| ColumnDef::new(column).text().take();
        let number = |column| ColumnDef::new(column).big_integer().not_null().take();
        let boolean = |column| ColumnDef::new(column).boolean().not_null().take();
        let table = Table::create()
            .table(Column::Table)
            .col(text(Column::EntityId).not_null())
            .col(text(Column::Kind).not_null())
            .col(
                ColumnDef::new(Column::DueAt)
                    .timestamp_with_time_zone()
                    .not_null(),
            )
            .col(ColumnDef::new(Column::Attempts).integer().not_null())
            .col(text(Column::CheckoutSessionId))
            .col(text(Column::StripeCustomerId))
            .col(text(Column::StripeSubscriptionId))
            .col(text(Column::StripeAccountId))
            .col(text(Column::ClientReferenceId))
            .col(boolean(Column::IsPaid))
            .col(boolean(Column::Livemode))
            .col(text(Column::EventId).not_null())
            .col(text(Column::EventType).not_null())
            .col(number(Column::EventCreated))
            .col(number(Column::StreamSequence))
            .primary_key(Index::create().col(Column::EntityId).col(Column::Kind))
            .take();
        manager.create_table(table).await?;
        let by_due = Index::create()
            .name("litestripe_question_due_at")
            .table(Column::Table)
            .col(Column::DueAt)
            .take();
        manager.create_index(by_due).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table(Question::Table).take())
            .await
    }
}
