//! An index of the withheld rows, which the worker's metrics count. The index of unsent and withheld
//! rows is too large for that: during a replay all rows may be unsent.

use sea_orm_migration::prelude::*;

use crate::indexes;

const NEW: [(&str, &str); 1] = [(
    "stripe_subscription_withheld",
    "stripe_subscription (stripe_subscription_id) WHERE last_sent IN ('\"withheld\"', '\"silent\"')",
)];

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        indexes::replace(manager, &[], &NEW).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        indexes::replace(manager, &NEW, &[]).await
    }
}
