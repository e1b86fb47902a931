//! Opening a SQLite database.

use std::path::PathBuf;
use std::sync::Arc;

use sea_orm::sqlx::Connection as _;
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sea_orm::{ConnectOptions, Database, DatabaseConnection, DbErr, RuntimeErr};
use secrecy::ExposeSecret as _;

use super::{ACQUIRE_TIMEOUT, LOCK_TIMEOUT};
use crate::settings::DatabaseSettings;

/// SQLite's page cache in KiB, which is what a negative number means. Its default of 2 MB does not
/// hold the upper parts of the trees of a large table.
const CACHE: &str = "-8192";

/// After how many pages of 4 KiB SQLite copies its log into the database. With its default of
/// 1,000, every batch of rows scattered over a large table would cause that.
const CHECKPOINT: &str = "10000";

/// Opens our database.
pub(super) async fn open(settings: &DatabaseSettings) -> Result<DatabaseConnection, DbErr> {
    let mut options = options(settings);
    options.map_sqlx_sqlite_opts(|sqlite| {
        sqlite
            .journal_mode(SqliteJournalMode::Wal)
            // An acked event must survive a power cut, because it is not redelivered.
            .synchronous(SqliteSynchronous::Full)
            // Otherwise deleted and overwritten values, such as an erased email, would stay in the
            // file.
            .pragma("secure_delete", "ON")
            .pragma("cache_size", CACHE)
            .pragma("wal_autocheckpoint", CHECKPOINT)
            .busy_timeout(LOCK_TIMEOUT)
    });
    // A COMMIT that fails (disk full, I/O error) ends the transaction in SQLite but not in sqlx,
    // which from then on only nests: later "commits" commit nothing. Such a connection is closed.
    options.map_sqlx_sqlite_pool_opts(|pool| {
        pool.before_acquire(|connection, _| {
            Box::pin(async move { Ok(!connection.is_in_transaction()) })
        })
    });
    Database::connect(options).await
}

/// Opens a database to read from it, without changing its journal mode. Creates no file, whatever
/// the URL says.
pub(super) async fn open_to_read(settings: &DatabaseSettings) -> Result<DatabaseConnection, DbErr> {
    let mut options = options(settings);
    options
        .map_sqlx_sqlite_opts(|sqlite| sqlite.create_if_missing(false).busy_timeout(LOCK_TIMEOUT));
    Database::connect(options).await
}

/// Returns the file beside the database that is locked in place of the outbox's shards.
pub(super) fn relay_lock_path(settings: &DatabaseSettings) -> Result<PathBuf, DbErr> {
    let options: SqliteConnectOptions = settings
        .url
        .at_start()
        .expose_secret()
        .parse()
        .map_err(|error| DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error))))?;
    let mut path = options.get_filename().as_os_str().to_owned();
    path.push(".relay-lock");
    Ok(PathBuf::from(path))
}

fn options(settings: &DatabaseSettings) -> ConnectOptions {
    let mut options = ConnectOptions::new(settings.url.at_start().expose_secret());
    options
        .sqlx_logging(false)
        .record_stmt_in_spans(false)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // SQLite has one writer, and a second connection would only wait for the first.
        .max_connections(1);
    options
}
