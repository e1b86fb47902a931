//! Gives the internal tables names of their own, so that a database can be shared with the
//! application: each begins with `litestripe_`. Renames what is "owed" to what is unsent. Drops
//! `signal_due`, which is empty since [`crate::m20261129_000008_last_sent`].
//!
//! The previous program version does not run on this schema: nothing was released with it.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

use crate::m20261124_000005_replay as replay;

/// Each table's name before and after.
const TABLES: [(&str, &str); 4] = [
    ("signal_outbox", "litestripe_signal_outbox"),
    ("signal_shard", "litestripe_signal_shard"),
    ("due_check", "litestripe_question"),
    ("replay", "litestripe_replay"),
];

/// Each column's table, and its name before and after.
const COLUMNS: [(&str, &str, &str); 2] = [
    ("litestripe_replay", "dt_beat", "dt_heartbeat"),
    ("orphaned_payment", "owed_event", "unsent_event"),
];

/// Each index's name before and after, and what it is on.
const INDEXES: [(&str, &str, &str); 4] = [
    (
        "signal_outbox_shard_id",
        "litestripe_signal_outbox_shard_id",
        "litestripe_signal_outbox (shard, id)",
    ),
    (
        "due_check_due_at",
        "litestripe_question_due_at",
        "litestripe_question (due_at)",
    ),
    (
        "stripe_subscription_owing",
        "stripe_subscription_unsent_or_withheld",
        "stripe_subscription (stripe_subscription_id) WHERE last_sent IS NOT NULL",
    ),
    (
        "orphaned_payment_owing",
        "orphaned_payment_unsent",
        "orphaned_payment (id) WHERE unsent_event IS NOT NULL",
    ),
];

const SEQUENCE: (&str, &str) = ("signal_outbox_id_seq", "litestripe_signal_outbox_id_seq");

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (before, after) in TABLES {
            rename_table(manager, before, after).await?;
        }
        for (table, before, after) in COLUMNS {
            rename_column(manager, table, before, after).await?;
        }
        for (before, after, on) in INDEXES {
            rename_index(manager, before, after, on).await?;
        }
        let (before, after) = SEQUENCE;
        rename_sequence(manager, before, after).await?;
        replay::drop_signal_due(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        replay::create_signal_due(manager).await?;
        let (before, after) = SEQUENCE;
        rename_sequence(manager, after, before).await?;
        for (before, after, on) in INDEXES {
            rename_index(manager, after, before, on).await?;
        }
        for (table, before, after) in COLUMNS {
            rename_column(manager, table, after, before).await?;
        }
        for (before, after) in TABLES {
            rename_table(manager, after, before).await?;
        }
        Ok(())
    }
}

async fn rename_table(manager: &SchemaManager<'_>, from: &str, to: &str) -> Result<(), DbErr> {
    execute(manager, &format!("ALTER TABLE {from} RENAME TO {to}")).await?;
    if is_postgres(manager) {
        let key = format!("ALTER TABLE {to} RENAME CONSTRAINT {from}_pkey TO {to}_pkey");
        execute(manager, &key).await?;
    }
    Ok(())
}

async fn rename_column(
    manager: &SchemaManager<'_>,
    table: &str,
    from: &str,
    to: &str,
) -> Result<(), DbErr> {
    let rename = format!("ALTER TABLE {table} RENAME COLUMN {from} TO {to}");
    execute(manager, &rename).await
}

/// SQLite cannot rename an index, and makes it anew `on` what it was on.
async fn rename_index(
    manager: &SchemaManager<'_>,
    from: &str,
    to: &str,
    on: &str,
) -> Result<(), DbErr> {
    if is_postgres(manager) {
        return execute(manager, &format!("ALTER INDEX {from} RENAME TO {to}")).await;
    }
    execute(manager, &format!("DROP INDEX {from}")).await?;
    execute(manager, &format!("CREATE INDEX {to} ON {on}")).await
}

/// SQLite has no sequences of their own.
async fn rename_sequence(manager: &SchemaManager<'_>, from: &str, to: &str) -> Result<(), DbErr> {
    if !is_postgres(manager) {
        return Ok(());
    }
    execute(manager, &format!("ALTER SEQUENCE {from} RENAME TO {to}")).await
}

fn is_postgres(manager: &SchemaManager<'_>) -> bool {
    manager.get_database_backend() == DbBackend::Postgres
}

async fn execute(manager: &SchemaManager<'_>, statement: &str) -> Result<(), DbErr> {
    manager
        .get_connection()
        .execute_unprepared(statement)
        .await
        .map(drop)
}
