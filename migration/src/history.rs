//! `litestripe_migrations`: which steps a database has.
//!
//! Owns reading and creating it, and taking over a database of an earlier state of the program.
//! There the steps stood in sea-orm's `seaql_migrations`, which an application in the same database
//! may use too, and internal tables had names that an application may use as well.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DbBackend, Statement};

use crate::Migrator;

pub(crate) const TABLE: &str = "litestripe_migrations";

const TABLE_BEFORE: &str = "seaql_migrations";

const SUBSCRIPTION: &str = "m20261123_000001_stripe_subscription";
const ORPHAN: &str = "m20261123_000002_orphaned_payment";
const OUTBOX: &str = "m20261123_000003_signal_outbox";
const QUESTION: &str = "m20261123_000004_due_check";
const REPLAY: &str = "m20261124_000005_replay";
const LAST_SENT: &str = "m20261129_000008_last_sent";

/// The tables of an earlier state: the step that made each, its name then and now, and a column
/// that shows that it is ours.
const TABLES: [(&str, &str, &str, &str); 7] = [
    (
        SUBSCRIPTION,
        "stripe_subscription",
        "stripe_subscription",
        "merge_state",
    ),
    (ORPHAN, "orphaned_payment", "orphaned_payment", "reason"),
    (
        OUTBOX,
        "signal_outbox",
        "litestripe_signal_outbox",
        "message_id",
    ),
    (OUTBOX, "signal_shard", "litestripe_signal_shard", "shard"),
    (QUESTION, "due_check", "litestripe_question", "due_at"),
    (REPLAY, "replay", "litestripe_replay", "dt_beat"),
    (REPLAY, "signal_due", "litestripe_signal_due", "told"),
];

/// The columns that were renamed: the step, the table's name now, the column's name then and now.
const COLUMNS: [(&str, &str, &str, &str); 2] = [
    (REPLAY, "litestripe_replay", "dt_beat", "dt_heartbeat"),
    (LAST_SENT, "orphaned_payment", "owed_event", "unsent_event"),
];

/// The indexes that were renamed: the step, the name then and now, and what the index is on.
const INDEXES: [(&str, &str, &str, &str); 5] = [
    (
        OUTBOX,
        "signal_outbox_shard_id",
        "litestripe_signal_outbox_shard_id",
        "litestripe_signal_outbox (shard, id)",
    ),
    (
        QUESTION,
        "due_check_due_at",
        "litestripe_question_due_at",
        "litestripe_question (due_at)",
    ),
    (
        REPLAY,
        "signal_due_replay",
        "litestripe_signal_due_replay",
        "litestripe_signal_due (replay, entity_id)",
    ),
    (
        LAST_SENT,
        "stripe_subscription_owing",
        "stripe_subscription_unsent_or_withheld",
        "stripe_subscription (stripe_subscription_id) WHERE last_sent IS NOT NULL",
    ),
    (
        LAST_SENT,
        "orphaned_payment_owing",
        "orphaned_payment_unsent",
        "orphaned_payment (id) WHERE unsent_event IS NOT NULL",
    ),
];

/// Returns the names of the steps that the database has, including steps of a later program
/// version. Creates nothing.
pub async fn applied<C: ConnectionTrait>(db: &C) -> Result<Vec<String>, DbErr> {
    if exists(db, TABLE).await? {
        let all = format!("SELECT version FROM {TABLE} ORDER BY version");
        names(db, &all).await.map_err(unless_ours(TABLE, "version"))
    } else if exists(db, TABLE_BEFORE).await? {
        names(db, &ours_of_before("SELECT version")).await
    } else {
        Ok(Vec::new())
    }
}

/// Creates the table if it does not exist, and takes over a database of an earlier state.
pub(crate) async fn install<C: ConnectionTrait>(db: &C) -> Result<(), DbErr> {
    let steps = applied(db).await?;
    if exists(db, TABLE).await? {
        return Ok(());
    }
    let create = format!(
        "CREATE TABLE {TABLE} (version varchar NOT NULL PRIMARY KEY, applied_at bigint NOT NULL)"
    );
    db.execute_unprepared(&create).await?;
    if steps.is_empty() {
        return Ok(());
    }
    let by = |step: &str| steps.iter().any(|applied| applied == step);
    for (_, before, now, column) in TABLES.into_iter().filter(|(step, ..)| by(step)) {
        rename_table(db, before, now, column).await?;
    }
    for (_, table, before, now) in COLUMNS.into_iter().filter(|(step, ..)| by(step)) {
        let rename = format!("ALTER TABLE {table} RENAME COLUMN {before} TO {now}");
        db.execute_unprepared(&rename).await?;
    }
    for (_, before, now, on) in INDEXES.into_iter().filter(|(step, ..)| by(step)) {
        rename_index(db, before, now, on).await?;
    }
    take_steps(db).await
}

/// Moves our steps here. Drops the earlier table if it had no others.
async fn take_steps<C: ConnectionTrait>(db: &C) -> Result<(), DbErr> {
    let copy = format!("INSERT INTO {TABLE} (version, applied_at) ");
    db.execute_unprepared(&(copy + &ours_of_before("SELECT version, applied_at")))
        .await?;
    db.execute_unprepared(&ours_of_before("DELETE")).await?;
    let others = format!("SELECT version FROM {TABLE_BEFORE} LIMIT 1");
    if names(db, &others).await?.is_empty() {
        db.execute_unprepared(&format!("DROP TABLE {TABLE_BEFORE}"))
            .await?;
    }
    Ok(())
}

/// Returns the statement that does `what` with our steps in the earlier table.
fn ours_of_before(what: &str) -> String {
    let ours: Vec<String> = Migrator::get_migration_files()
        .iter()
        .map(|step| format!("'{}'", step.name()))
        .collect();
    let ours = ours.join(", ");
    format!("{what} FROM {TABLE_BEFORE} WHERE version IN ({ours})")
}

async fn rename_table<C: ConnectionTrait>(
    db: &C,
    before: &str,
    now: &str,
    column: &str,
) -> Result<(), DbErr> {
    // Earlier steps took an existing table of that name for theirs.
    let is_ours = format!("SELECT {column} FROM {before} LIMIT 0");
    db.execute_unprepared(&is_ours)
        .await
        .map_err(unless_ours(before, column))?;
    if before == now {
        return Ok(());
    }
    db.execute_unprepared(&format!("ALTER TABLE {before} RENAME TO {now}"))
        .await?;
    if db.get_database_backend() == DbBackend::Postgres {
        let key = format!("ALTER TABLE {now} RENAME CONSTRAINT {before}_pkey TO {now}_pkey");
        db.execute_unprepared(&key).await?;
    }
    if before == "signal_outbox" && db.get_database_backend() == DbBackend::Postgres {
        let sequence = format!("ALTER SEQUENCE {before}_id_seq RENAME TO {now}_id_seq");
        db.execute_unprepared(&sequence).await?;
    }
    Ok(())
}

/// SQLite cannot rename an index.
async fn rename_index<C: ConnectionTrait>(
    db: &C,
    before: &str,
    now: &str,
    on: &str,
) -> Result<(), DbErr> {
    let rename = match db.get_database_backend() {
        DbBackend::Postgres => format!("ALTER INDEX {before} RENAME TO {now}"),
        _ => format!("DROP INDEX {before}; CREATE INDEX {now} ON {on}"),
    };
    db.execute_unprepared(&rename).await.map(drop)
}

/// Returns a function for `map_err` that names a table without the column by which it would be
/// ours.
fn unless_ours(table: &str, column: &str) -> impl Fn(DbErr) -> DbErr {
    move |error| {
        if !error.to_string().contains(column) {
            return error;
        }
        DbErr::Migration(format!(
            "the table {table} is not Litestripe's: it has no column `{column}`. Give Litestripe a database of its own, \
             or on PostgreSQL a schema of its own (LITESTRIPE_DATABASE_SCHEMA)"
        ))
    }
}

/// Whether there is a table of this name that can be read, in the schema in which tables are
/// created.
async fn exists<C: ConnectionTrait>(db: &C, table: &str) -> Result<bool, DbErr> {
    let look = match db.get_database_backend() {
        DbBackend::Postgres => format!(
            "SELECT c.relname::text AS version FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = current_schema() AND c.relname = '{table}' AND has_table_privilege(c.oid, 'SELECT')"
        ),
        _ => format!(
            "SELECT name AS version FROM sqlite_schema WHERE type = 'table' AND name = '{table}'"
        ),
    };
    Ok(!names(db, &look).await?.is_empty())
}

async fn names<C: ConnectionTrait>(db: &C, query: &str) -> Result<Vec<String>, DbErr> {
    let query = Statement::from_string(db.get_database_backend(), query);
    db.query_all_raw(query)
        .await?
        .iter()
        .map(|row| row.try_get("", "version"))
        .collect()
}
