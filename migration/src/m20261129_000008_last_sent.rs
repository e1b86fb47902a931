//! Adds `last_sent` to `stripe_subscription` (what subscribers were last sent about a row) and
//! `unsent_event` to `orphaned_payment` (the event behind an orphan's unsent signal). Moves the
//! unsent signals of `litestripe_signal_due` there.
//!
//! `litestripe_signal_due` stays, empty, because the previous program version reads it. A later
//! step drops it.

use sea_orm_migration::prelude::*;

/// The indexes are partial: few rows have an unsent signal, and they are searched every few
/// seconds. Then the unsent signals are moved. `--signals all` had queued unchanged rows too; they
/// are sent as if nothing had been sent about them yet. An orphan that was created and resolved
/// within a replay has no unsent signal.
const UP: [&str; 7] = [
    "ALTER TABLE stripe_subscription ADD COLUMN last_sent text",
    "ALTER TABLE orphaned_payment ADD COLUMN unsent_event text",
    "CREATE INDEX stripe_subscription_unsent_or_withheld ON stripe_subscription (stripe_subscription_id) \
     WHERE last_sent IS NOT NULL",
    "CREATE INDEX orphaned_payment_unsent ON orphaned_payment (id) WHERE unsent_event IS NOT NULL",
    "UPDATE stripe_subscription SET last_sent = ( \
        SELECT CASE WHEN unchanged OR told IS NULL THEN 'null' ELSE told END FROM litestripe_signal_due \
        WHERE entity_id = stripe_subscription_id AND subject = 'subscription.changed') \
     WHERE stripe_subscription_id IN (SELECT entity_id FROM litestripe_signal_due WHERE subject = 'subscription.changed')",
    "UPDATE orphaned_payment SET unsent_event = ( \
        SELECT event_created || ' ' || event_type || ' ' || litestripe_signal_due.event_id FROM litestripe_signal_due \
        WHERE entity_id = id AND subject = CASE WHEN resolved_at IS NULL THEN 'orphan.created' ELSE 'orphan.resolved' END) \
     WHERE (SELECT count(*) FROM litestripe_signal_due WHERE entity_id = id AND subject <> 'subscription.changed') = 1",
    "DELETE FROM litestripe_signal_due",
];

/// The event's type and time are placeholders. For a row, the previous program version takes both
/// from the merge state, and uses these only if it finds none there. For an orphan it sends them.
const DOWN: [&str; 6] = [
    "INSERT INTO litestripe_signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, dt_created) \
     SELECT stripe_subscription_id, 'subscription.changed', '', NULLIF(last_sent, 'null'), FALSE, \
        COALESCE(last_event_id, 'evt_unknown'), 'customer.subscription.updated', 0, dt_last_updated \
     FROM stripe_subscription WHERE last_sent IS NOT NULL",
    "INSERT INTO litestripe_signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, dt_created) \
     SELECT id, CASE WHEN resolved_at IS NULL THEN 'orphan.created' ELSE 'orphan.resolved' END, '', NULL, FALSE, \
        event_id, 'checkout.session.completed', 0, dt_last_updated \
     FROM orphaned_payment WHERE unsent_event IS NOT NULL",
    "DROP INDEX stripe_subscription_unsent_or_withheld",
    "DROP INDEX orphaned_payment_unsent",
    "ALTER TABLE stripe_subscription DROP COLUMN last_sent",
    "ALTER TABLE orphaned_payment DROP COLUMN unsent_event",
];

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        execute(manager, &UP).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        execute(manager, &DOWN).await
    }
}

async fn execute(manager: &SchemaManager<'_>, statements: &[&str]) -> Result<(), DbErr> {
    for statement in statements {
        manager
            .get_connection()
            .execute_unprepared(statement)
            .await?;
    }
    Ok(())
}
