//! Creates `stripe_subscription`.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[derive(DeriveIden)]
#[expect(
    clippy::enum_variant_names,
    reason = "a variant is a column, and the key is named after its table"
)]
enum StripeSubscription {
    Table,
    StripeSubscriptionId,
    StripeCustomerId,
    ClientReferenceId,
    CheckoutSessionId,
    Status,
    Created,
    StartDate,
    CancelAt,
    CanceledAt,
    CancelAtPeriodEnd,
    CurrentPeriodStart,
    CurrentPeriodEnd,
    TrialEnd,
    EndedAt,
    Items,
    Metadata,
    SubscriptionMetadata,
    Livemode,
    StripeAccountId,
    Uncertain,
    Revision,
    Version,
    LastEventId,
    LastEventCreated,
    MergeState,
    DtCreated,
    DtLastUpdated,
}

const CUSTOMER_INDEX: &str = "stripe_subscription_stripe_customer_id";
const CLIENT_REFERENCE_INDEX: &str = "stripe_subscription_client_reference_id";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use StripeSubscription as Column;
        let text = |column| ColumnDef::new(column).text().take();
        let time = |column| ColumnDef::new(column).timestamp_with_time_zone().take();
        let json = |column| ColumnDef::new(column).json_binary().not_null().take();
        let boolean = |column| ColumnDef::new(column).boolean().not_null().take();
        let number = |column| ColumnDef::new(column).big_integer().not_null().take();
        let table = Table::create()
            .table(Column::Table)
            .col(text(Column::StripeSubscriptionId).not_null().primary_key())
            .col(text(Column::StripeCustomerId))
            .col(text(Column::ClientReferenceId))
            .col(text(Column::CheckoutSessionId))
            .col(text(Column::Status))
            .col(time(Column::Created))
            .col(time(Column::StartDate))
            .col(time(Column::CancelAt))
            .col(time(Column::CanceledAt))
            .col(boolean(Column::CancelAtPeriodEnd))
            .col(time(Column::CurrentPeriodStart))
            .col(time(Column::CurrentPeriodEnd))
            .col(time(Column::TrialEnd))
            .col(time(Column::EndedAt))
            .col(json(Column::Items))
            .col(json(Column::Metadata))
            .col(json(Column::SubscriptionMetadata))
            .col(boolean(Column::Livemode))
            .col(text(Column::StripeAccountId))
            .col(boolean(Column::Uncertain))
            .col(number(Column::Revision))
            .col(number(Column::Version))
            .col(text(Column::LastEventId))
            .col(time(Column::LastEventCreated))
            .col(text(Column::MergeState).not_null())
            .col(time(Column::DtCreated).not_null())
            .col(time(Column::DtLastUpdated).not_null())
            .take();
        manager.create_table(table).await?;
        // Applications look rows up by their own user id and by Stripe's customer id.
        for (name, column) in [
            (CUSTOMER_INDEX, Column::StripeCustomerId),
            (CLIENT_REFERENCE_INDEX, Column::ClientReferenceId),
        ] {
            let index = Index::create()
                .name(name)
                .table(Column::Table)
                .col(column)
                .take();
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table(StripeSubscription::Table).take())
            .await
    }
}
