//! The clock by which workers compare times that another worker may have written: when a question
//! is due, when a replay showed a sign of life.
//!
//! On PostgreSQL it is the server's, so that workers agree on it, however wrong their own clocks
//! are. The processes that share a SQLite file share a host and its clock.

use sea_orm::{ConnectionTrait, DbBackend, Statement};
use time::OffsetDateTime;

use crate::error::StoreError;

/// Returns the time.
pub async fn now<C: ConnectionTrait>(db: &C) -> Result<OffsetDateTime, StoreError> {
    const NOW: &str = "SELECT clock_timestamp() AS now";
    if db.get_database_backend() != DbBackend::Postgres {
        return Ok(OffsetDateTime::now_utc());
    }
    let doing = StoreError::doing("read the database's clock");
    let now = Statement::from_string(DbBackend::Postgres, NOW);
    match db.query_one_raw(now).await.map_err(&doing)? {
        Some(row) => row.try_get("", "now").map_err(&doing),
        None => Ok(OffsetDateTime::now_utc()),
    }
}
