//! Whether the database lets a worker write.

use sea_orm::{ConnectionTrait as _, DbBackend, QueryResult, Statement};

use super::Connection;
use crate::error::StoreError;

/// Why no worker can write.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it is a standby, which is read-only")]
    Standby,
    #[error("its transactions are read-only (default_transaction_read_only)")]
    ReadOnly,
    /// The tables, sequences and schemas.
    #[error("its user lacks rights to {0}")]
    Rights(String),
}

/// Returns what we use and the user has not all rights to. A schema without the right to use it
/// would look like one without tables.
const LACKING: &str = "\
    SELECT DISTINCT (CASE WHEN has_schema_privilege(n.oid, 'USAGE') THEN c.relname::text \
      ELSE 'the schema ' || n.nspname END) AS name \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE (c.relname LIKE 'litestripe\\_%' OR c.relname IN ('stripe_subscription', 'orphaned_payment')) \
    AND CASE \
      WHEN NOT has_schema_privilege(n.oid, 'USAGE') THEN n.nspname = ANY (string_to_array(translate( \
        replace(current_setting('search_path'), '$user', current_user), '\" ', ''), ',')) \
        AND NOT EXISTS (SELECT FROM pg_class m JOIN pg_namespace s ON s.oid = m.relnamespace \
          WHERE m.relname = 'litestripe_migrations' AND s.nspname = current_schema()) \
      WHEN n.nspname IS DISTINCT FROM current_schema() THEN false \
      WHEN c.relname = 'litestripe_migrations' THEN NOT has_table_privilege(c.oid, 'SELECT') \
      WHEN c.relkind = 'r' THEN NOT (has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT') \
        AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE')) \
      WHEN c.relkind = 'S' THEN NOT has_sequence_privilege(c.oid, 'USAGE') AND NOT EXISTS \
        (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'i') \
    END ORDER BY name";

/// Fails if a SQLite database cannot be written to. SQLite silently opens a file read-only if it may
/// not write to it, and the connection stays so. Takes the write lock and changes nothing.
pub(crate) async fn try_write(db: &Connection) -> Result<(), StoreError> {
    // It frees a page only if the database was made with auto_vacuum, which ours is not.
    const NOTHING: &str = "PRAGMA incremental_vacuum(1)";
    let tried = db.execute_unprepared(NOTHING).await;
    tried
        .map(drop)
        .map_err(StoreError::doing("write to the database (DATABASE_URL)"))
}

/// Returns why nothing can be written to PostgreSQL. Tries nothing, which would fire triggers.
pub(crate) async fn refusal(db: &Connection) -> Result<Option<Refusal>, StoreError> {
    const STATE: &str = "SELECT pg_is_in_recovery() AS standby, current_setting('transaction_read_only') = 'on' AS read_only";
    let doing = StoreError::doing("read the rights of the user of DATABASE_URL");
    let query = |sql| db.query_all_raw(Statement::from_string(DbBackend::Postgres, sql));
    for row in query(STATE).await.map_err(&doing)? {
        if row.try_get("", "standby").map_err(&doing)? {
            return Ok(Some(Refusal::Standby));
        }
        if row.try_get("", "read_only").map_err(&doing)? {
            return Ok(Some(Refusal::ReadOnly));
        }
    }
    let lacking = query(LACKING).await.map_err(&doing)?;
    let name = |row: &QueryResult| row.try_get("", "name");
    let lacking: Result<Vec<String>, _> = lacking.iter().map(name).collect();
    let lacking = lacking.map_err(&doing)?.join(", ");
    Ok((!lacking.is_empty()).then_some(Refusal::Rights(lacking)))
}
