//! Adds what subscribers were sent of a row last to `stripe_subscription`, and the event behind the
//! signal that an orphan owes to `orphaned_payment`. What `signal_due` owed goes there.
//!
//! `signal_due` stays, empty: the program before this step reads it. A later step drops it.

use sea_orm_migration::prelude::*;

/// Few rows owe a signal, and they are looked for every few seconds. Then what was owed: `--signals all`
/// had rows sent again that did not change, as if nothing had been sent of them yet; an orphan that
/// came and went in a replay owes nothing.
const UP: [&str; 7] = [
    "ALTER TABLE stripe_subscription ADD COLUMN last_sent text",
    "ALTER TABLE orphaned_payment ADD COLUMN owed_event text",
    "CREATE INDEX stripe_subscription_owing ON stripe_subscription (stripe_subscription_id) \
     WHERE last_sent IS NOT NULL",
    "CREATE INDEX orphaned_payment_owing ON orphaned_payment (id) WHERE owed_event IS NOT NULL",
    "UPDATE stripe_subscription SET last_sent = ( \
        SELECT CASE WHEN unchanged OR told IS NULL THEN 'null' ELSE told END FROM signal_due \
        WHERE entity_id = stripe_subscription_id AND subject = 'subscription.changed') \
     WHERE stripe_subscription_id IN (SELECT entity_id FROM signal_due WHERE subject = 'subscription.changed')",
    "UPDATE orphaned_payment SET owed_event = ( \
        SELECT event_created || ' ' || event_type || ' ' || signal_due.event_id FROM signal_due \
        WHERE entity_id = id AND subject = CASE WHEN resolved_at IS NULL THEN 'orphan.created' ELSE 'orphan.resolved' END) \
     WHERE (SELECT count(*) FROM signal_due WHERE entity_id = id AND subject <> 'subscription.changed') = 1",
    "DELETE FROM signal_due",
];

/// The type of the event is told by the row's state, and its time by Stripe: the program before uses what
/// stands here where they are not.
const DOWN: [&str; 6] = [
    "INSERT INTO signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, dt_created) \
     SELECT stripe_subscription_id, 'subscription.changed', '', NULLIF(last_sent, 'null'), FALSE, \
        COALESCE(last_event_id, 'evt_unknown'), 'customer.subscription.updated', 0, dt_last_updated \
     FROM stripe_subscription WHERE last_sent IS NOT NULL",
    "INSERT INTO signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, dt_created) \
     SELECT id, CASE WHEN resolved_at IS NULL THEN 'orphan.created' ELSE 'orphan.resolved' END, '', NULL, FALSE, \
        event_id, 'checkout.session.completed', 0, dt_last_updated \
     FROM orphaned_payment WHERE owed_event IS NOT NULL",
    "DROP INDEX stripe_subscription_owing",
    "DROP INDEX orphaned_payment_owing",
    "ALTER TABLE stripe_subscription DROP COLUMN last_sent",
    "ALTER TABLE orphaned_payment DROP COLUMN owed_event",
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
