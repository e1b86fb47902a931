//! What the worker's metrics need: indexes by which they are read at any size of the tables, and when
//! ingress received the event of a signal.

use sea_orm_migration::prelude::*;

use crate::{columns, indexes};

const OUTBOX: &str = "litestripe_signal_outbox";

/// Each index's name and what it is on. All are partial: few rows are open, failing or uncertain.
/// By the first, failing questions are counted by kind, and the oldest of a kind is found. Its name is
/// a new one: another connection to SQLite that still knows the old index would refuse to make it.
const NEW: [(&str, &str); 3] = [
    (
        "litestripe_question_failing_since",
        "litestripe_question (kind, dt_created) WHERE last_error IS NOT NULL",
    ),
    (
        "orphaned_payment_open_reason",
        "orphaned_payment (reason, id) WHERE resolved_at IS NULL",
    ),
    (
        "stripe_subscription_uncertain",
        "stripe_subscription (stripe_subscription_id) WHERE uncertain",
    ),
];

const OLD: [(&str, &str); 1] = [(
    "litestripe_question_failing",
    "litestripe_question (kind, livemode) WHERE last_error IS NOT NULL",
)];

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

/// In milliseconds since the Unix epoch. Null if the event was not received by ingress, and in the signals of the previous program version.
fn received_at_ms() -> ColumnDef {
    ColumnDef::new("received_at_ms").big_integer().take()
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, OUTBOX, [received_at_ms()]).await?;
        indexes::replace(manager, &OLD, &NEW).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        indexes::replace(manager, &NEW, &OLD).await?;
        columns::drop(manager, OUTBOX, [received_at_ms()]).await
    }
}
