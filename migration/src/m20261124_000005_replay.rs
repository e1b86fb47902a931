//! Creates `litestripe_replay`, with one row per replay name, and `litestripe_signal_due`, the
//! signals that wait for a replay's end.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
enum Replay {
    #[sea_orm(iden = "litestripe_replay")]
    Table,
    Name,
    Signals,
    FirstSequence,
    LastSequence,
    EventTypes,
    StripeSubscriptionId,
    DtStarted,
    DtHeartbeat,
    DtFinished,
}

#[derive(DeriveIden)]
enum SignalDue {
    #[sea_orm(iden = "litestripe_signal_due")]
    Table,
    EntityId,
    Subject,
    Replay,
    Told,
    Unchanged,
    EventId,
    EventType,
    EventCreated,
    DtCreated,
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(replay()).await?;
        create_signal_due(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        drop_signal_due(manager).await?;
        manager
            .drop_table(Table::drop().table(Replay::Table).take())
            .await
    }
}

pub(crate) async fn create_signal_due(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    manager.create_table(signal_due()).await?;
    let by_replay = Index::create()
        .name("litestripe_signal_due_replay")
        .table(SignalDue::Table)
        .col(SignalDue::Replay)
        .col(SignalDue::EntityId)
        .take();
    manager.create_index(by_replay).await
}

pub(crate) async fn drop_signal_due(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    manager
        .drop_table(Table::drop().table(SignalDue::Table).take())
        .await
}

fn replay() -> TableCreateStatement {
    use Replay as Column;
    let text = |column| ColumnDef::new(column).text().take();
    let number = |column| ColumnDef::new(column).big_integer().not_null().take();
    let time = |column| ColumnDef::new(column).timestamp_with_time_zone().take();
    Table::create()
        .table(Column::Table)
        .col(text(Column::Name).not_null().primary_key())
        .col(text(Column::Signals).not_null())
        .col(number(Column::FirstSequence))
        .col(number(Column::LastSequence))
        .col(text(Column::EventTypes).not_null())
        .col(text(Column::StripeSubscriptionId))
        .col(time(Column::DtStarted).not_null())
        .col(time(Column::DtHeartbeat).not_null())
        .col(time(Column::DtFinished))
        .take()
}

fn signal_due() -> TableCreateStatement {
    use SignalDue as Column;
    let text = |column| ColumnDef::new(column).text().take();
    Table::create()
        .table(Column::Table)
        .col(text(Column::EntityId).not_null())
        .col(text(Column::Subject).not_null())
        .col(text(Column::Replay).not_null())
        .col(text(Column::Told))
        .col(ColumnDef::new(Column::Unchanged).boolean().not_null())
        .col(text(Column::EventId).not_null())
        .col(text(Column::EventType).not_null())
        .col(
            ColumnDef::new(Column::EventCreated)
                .big_integer()
                .not_null(),
        )
        .col(
            ColumnDef::new(Column::DtCreated)
                .timestamp_with_time_zone()
                .not_null(),
        )
        .primary_key(Index::create().col(Column::EntityId).col(Column::Subject))
        .take()
}
