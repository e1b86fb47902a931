//! Indexes by which no statement reads a whole table, however many rows it has.
//!
//! Replaces the index of the outbox by shard, which no statement needed: a relay reads in the order
//! of the ids, whichever shards it holds.

use sea_orm_migration::prelude::*;

use crate::indexes;

/// Each index's name and what it is on. Questions are counted by kind and mode, without reading
/// their rows. Those about thin events of the mode without a key stay due, and are many if no key
/// is set for long.
const NEW: [(&str, &str); 12] = [
    (
        "litestripe_question_kind_due_at",
        "litestripe_question (kind, due_at, livemode)",
    ),
    (
        "litestripe_question_notification",
        "litestripe_question (livemode, due_at) WHERE kind = 'notification'",
    ),
    (
        "litestripe_signal_outbox_entity_id",
        "litestripe_signal_outbox (entity_id)",
    ),
    (
        "stripe_subscription_livemode",
        "stripe_subscription (livemode)",
    ),
    (
        "stripe_subscription_checkout_session_id",
        "stripe_subscription (checkout_session_id) WHERE checkout_session_id IS NOT NULL",
    ),
    (
        "orphaned_payment_checkout_session_id",
        "orphaned_payment (checkout_session_id)",
    ),
    (
        "orphaned_payment_stripe_customer_id",
        "orphaned_payment (stripe_customer_id)",
    ),
    (
        "orphaned_payment_stripe_subscription_id",
        "orphaned_payment (stripe_subscription_id)",
    ),
    (
        "orphaned_payment_dt_created",
        "orphaned_payment (dt_created, id)",
    ),
    (
        "orphaned_payment_open",
        "orphaned_payment (dt_created, id) WHERE resolved_at IS NULL",
    ),
    (
        "orphaned_payment_with_email",
        "orphaned_payment (dt_created) WHERE customer_email IS NOT NULL",
    ),
    (
        "orphaned_payment_resolved_by",
        "orphaned_payment (id) WHERE resolved_by IS NOT NULL",
    ),
];

const OLD: [(&str, &str); 2] = [
    ("litestripe_question_due_at", "litestripe_question (due_at)"),
    (
        "litestripe_signal_outbox_shard_id",
        "litestripe_signal_outbox (shard, id)",
    ),
];

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        indexes::replace(manager, &OLD, &NEW).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        indexes::replace(manager, &NEW, &OLD).await
    }
}
