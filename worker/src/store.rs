//! The database: a connection, a transaction, the schema.
//!
//! Owns all SQL on our tables, here and in the modules below. May not know messages or Stripe.
//! Every write of a row is guarded by the `version` that was read. Every function fails if the
//! database is unreachable, takes too long or refuses the data: see [`StoreError::disposition`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use litestripe_migration::{Migrator, MigratorTrait as _};
use sea_orm::sea_query::extension::postgres::PgExpr as _;
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoColumnRef, ValueType};
use sea_orm::sqlx::Connection as _;
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, Database, DbBackend, DbErr, RuntimeErr,
    SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait as _, Value,
};
use secrecy::ExposeSecret as _;

use crate::error::{Cause, StoreError};
use crate::settings::{DatabaseKind, DatabaseSettings, SchemaName};

pub mod backfill;
pub mod erasure;
pub mod lease;
pub mod orphan;
pub mod outbox;
pub mod question;
pub mod raw;
pub mod replay;
mod rows;
pub mod subscription;

/// Connections to PostgreSQL, at most: for batches, the relay, the questions task, health, and some
/// in reserve in case one of them hangs on a dead link.
const POSTGRES_CONNECTIONS: u32 = 10;

/// How long to wait for a connection before the database counts as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one statement may take. A batch of 500 takes some 10 ms.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long SQLite waits for another writer, and PostgreSQL for a row lock. Less than
/// `ACQUIRE_TIMEOUT`, so that opening a locked SQLite file fails with the lock as the reason.
const LOCK_TIMEOUT: Duration = Duration::from_secs(4);

/// SQLite's page cache in KiB, which is what a negative number means. Its default of 2 MB does not
/// hold the upper parts of the trees of a large table.
const SQLITE_CACHE: &str = "-8192";

/// After how many pages of 4 KiB SQLite copies its log into the database. With its default of
/// 1,000, every batch of rows scattered over a large table would cause that.
const SQLITE_CHECKPOINT: &str = "10000";

/// How long a connection to PostgreSQL may be idle before it is tested. A test costs a transaction
/// a round trip.
const FRESH: Duration = Duration::from_secs(1);

/// The advisory lock that lets one migration at a time run on a PostgreSQL database.
const MIGRATION_LOCK: i64 = 0x6c69_7465_7374_7270;

/// Runs single statements.
pub type Connection = sea_orm::DatabaseConnection;

/// Runs the statements of one transaction.
pub type Transaction = sea_orm::DatabaseTransaction;

#[derive(Clone)]
pub struct Store {
    db: Connection,
    kind: DatabaseKind,
    schema: Option<SchemaName>,
    relay_lock_path: Option<PathBuf>,
}

impl Store {
    /// Opens the database. Does not contact a PostgreSQL server yet.
    pub async fn open(settings: &DatabaseSettings) -> Result<Self, StoreError> {
        let mut options = options(settings);
        match settings.kind {
            DatabaseKind::Sqlite => configure_sqlite(&mut options),
            DatabaseKind::Postgres => configure_postgres(&mut options, settings),
        }
        let db = Database::connect(options)
            .await
            .map_err(StoreError::doing("open the database (DATABASE_URL)"))?;
        let relay_lock_path = relay_lock_path(settings)?;
        Ok(Self {
            db,
            kind: settings.kind,
            schema: settings.schema.clone(),
            relay_lock_path,
        })
    }

    /// Opens another application's database for reading. Changes nothing in it, not even its
    /// journal mode.
    pub async fn open_to_read(settings: &DatabaseSettings) -> Result<Self, StoreError> {
        let mut options = options(settings);
        match settings.kind {
            DatabaseKind::Sqlite => {
                options
                    .max_connections(1)
                    .map_sqlx_sqlite_opts(|sqlite| sqlite.busy_timeout(LOCK_TIMEOUT));
            }
            DatabaseKind::Postgres => configure_postgres(&mut options, settings),
        }
        let opening = StoreError::doing("open the users' database (LITESTRIPE_USER_DATABASE_URL)");
        let db = Database::connect(options).await.map_err(opening)?;
        Ok(Self {
            db,
            kind: settings.kind,
            schema: settings.schema.clone(),
            relay_lock_path: None,
        })
    }

    /// The connection, for single statements.
    pub fn connection(&self) -> &Connection {
        &self.db
    }

    pub fn kind(&self) -> DatabaseKind {
        self.kind
    }

    /// The file beside a SQLite database that is locked in place of the outbox's shards. `None` on
    /// PostgreSQL, which has row locks.
    pub fn relay_lock_path(&self) -> Option<PathBuf> {
        self.relay_lock_path.clone()
    }

    /// Runs `work` in a write transaction, in a task that is never cancelled: a cancelled
    /// transaction would leave a connection in the pool that is still inside it (sqlx #4393).
    /// `work` commits; a transaction that it only drops is rolled back.
    pub async fn uncancelled<T, E, F>(
        &self,
        work: impl FnOnce(Transaction) -> F + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        let store = self.clone();
        detached(async move { work(store.begin().await?).await }).await
    }

    /// Begins a write transaction.
    ///
    /// On SQLite it takes the write lock at once: a transaction that reads first and writes after
    /// another one's commit fails with `SQLITE_BUSY_SNAPSHOT`, in spite of any busy timeout.
    ///
    /// # Cancel safety
    /// Not cancel safe: see [`Store::uncancelled`].
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where transactions begin"
    )]
    async fn begin(&self) -> Result<Transaction, StoreError> {
        let options = TransactionOptions {
            sqlite_transaction_mode: (self.kind == DatabaseKind::Sqlite)
                .then_some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        self.db
            .begin_with_options(options)
            .await
            .map_err(StoreError::doing("begin a transaction"))
    }

    pub async fn ping(&self) -> Result<(), StoreError> {
        self.db
            .execute_unprepared("SELECT 1")
            .await
            .map(|_| ())
            .map_err(StoreError::doing("reach the database"))
    }

    /// Empties SQLite's log, as far as no connection still reads it: otherwise deleted data would
    /// stay in it until it is overwritten. PostgreSQL recycles its log by itself.
    pub async fn truncate_log(&self) -> Result<(), StoreError> {
        if self.kind == DatabaseKind::Sqlite {
            let truncated = self
                .db
                .execute_unprepared("PRAGMA wal_checkpoint(TRUNCATE)")
                .await;
            truncated.map_err(StoreError::doing("truncate the database's log"))?;
        }
        Ok(())
    }

    /// Returns all known migrations, and whether each is applied.
    pub async fn migrations(&self) -> Result<Vec<Step>, StoreError> {
        let applied = litestripe_migration::applied(&self.db).await;
        let applied =
            applied.map_err(StoreError::doing("read the schema version (DATABASE_URL)"))?;
        let step = |name: &str| Step {
            name: name.to_owned(),
            applied: applied.iter().any(|other| other == name),
        };
        Ok(Migrator::get_migration_files()
            .iter()
            .map(|known| step(known.name()))
            .collect())
    }

    /// Applies the pending migrations. If several workers call it at once, one applies them and the
    /// others wait for it. A failure changes nothing. Fails if a table or an index of another
    /// application has a name that a migration needs.
    pub async fn migrate_up(&self) -> Result<(), StoreError> {
        let transaction = self.begin_migration().await?;
        self.create_schema(&transaction).await?;
        Migrator::up(&transaction, None)
            .await
            .map_err(Cause::of_migration)
            .map_err(StoreError::doing("migrate the database up"))?;
        transaction
            .commit()
            .await
            .map_err(StoreError::doing("commit the migrations"))
    }

    /// Reverts `steps` migrations. Drops their tables with all rows. A failure changes nothing.
    pub async fn migrate_down(&self, steps: u32) -> Result<(), StoreError> {
        let transaction = self.begin_migration().await?;
        Migrator::down(&transaction, Some(steps))
            .await
            .map_err(StoreError::doing("migrate the database down"))?;
        transaction
            .commit()
            .await
            .map_err(StoreError::doing("commit the migrations"))
    }

    async fn begin_migration(&self) -> Result<Transaction, StoreError> {
        let transaction = self.begin().await?;
        if self.kind == DatabaseKind::Postgres {
            // A migration may take longer than a batch, and so may another worker's that this one
            // waits for.
            const NO_TIMEOUTS: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; \
                SET LOCAL idle_in_transaction_session_timeout = 0";
            let doing = StoreError::doing("wait for another migration");
            transaction
                .execute_unprepared(NO_TIMEOUTS)
                .await
                .map_err(&doing)?;
            let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
            transaction
                .execute_unprepared(&lock)
                .await
                .map_err(&doing)?;
            // A table that is missing must not be found, and dropped, in another schema.
            const ONLY_OURS: &str = "SELECT set_config('search_path', quote_ident(current_schema()), true) \
                WHERE current_schema() IS NOT NULL";
            transaction
                .execute_unprepared(ONLY_OURS)
                .await
                .map_err(&doing)?;
        }
        Ok(transaction)
    }

    /// Creates the schema of the settings. If it exists, no right to create schemas is needed.
    async fn create_schema(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let Some(schema) = &self.schema else {
            return Ok(());
        };
        let doing = StoreError::doing("create the schema LITESTRIPE_DATABASE_SCHEMA");
        let find = format!("SELECT 1 FROM pg_namespace WHERE nspname = '{}'", schema.0);
        let find = Statement::from_string(DbBackend::Postgres, find);
        if transaction
            .query_one_raw(find)
            .await
            .map_err(&doing)?
            .is_none()
        {
            let create = format!("CREATE SCHEMA {}", schema.quoted());
            transaction
                .execute_unprepared(&create)
                .await
                .map_err(&doing)?;
        }
        Ok(())
    }
}

/// Runs `work` in its own task, which continues if the caller is dropped: a cancelled query may
/// leave its connection in the middle of an answer.
pub async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

/// Returns the condition that `column` is one of `values`. PostgreSQL gets them as one array: the
/// text of the statement does not depend on their number, so that one prepared statement serves
/// all.
fn among<V>(
    backend: DbBackend,
    column: impl IntoColumnRef,
    values: impl IntoIterator<Item = V>,
) -> Expr
where
    V: Into<Value> + ValueType,
{
    let column = Expr::col(column);
    match backend {
        DbBackend::Postgres => column.eq_any(values),
        _ => column.is_in(values),
    }
}

/// [`among`] for ids.
fn among_ids(backend: DbBackend, column: impl IntoColumnRef, ids: &[&str]) -> Expr {
    among(backend, column, ids.iter().copied().map(str::to_owned))
}

/// One migration.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    pub name: String,
    pub applied: bool,
}

fn options(settings: &DatabaseSettings) -> ConnectOptions {
    let mut options = ConnectOptions::new(settings.url.expose_secret());
    options
        .sqlx_logging(false)
        .record_stmt_in_spans(false)
        .acquire_timeout(ACQUIRE_TIMEOUT);
    options
}

fn relay_lock_path(settings: &DatabaseSettings) -> Result<Option<PathBuf>, StoreError> {
    if settings.kind == DatabaseKind::Postgres {
        return Ok(None);
    }
    let options: SqliteConnectOptions = settings
        .url
        .expose_secret()
        .parse()
        .map_err(|error| DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error))))
        .map_err(StoreError::doing("read DATABASE_URL"))?;
    let mut path = options.get_filename().as_os_str().to_owned();
    path.push(".relay-lock");
    Ok(Some(PathBuf::from(path)))
}

fn configure_sqlite(options: &mut ConnectOptions) {
    // One connection: SQLite has one writer, and a second one would only wait for the first.
    options.max_connections(1).map_sqlx_sqlite_opts(|sqlite| {
        sqlite
            .journal_mode(SqliteJournalMode::Wal)
            // An acked event must survive a power cut, because it is not redelivered.
            .synchronous(SqliteSynchronous::Full)
            // Otherwise deleted and overwritten values, such as an erased email, would stay in the
            // file.
            .pragma("secure_delete", "ON")
            .pragma("cache_size", SQLITE_CACHE)
            .pragma("wal_autocheckpoint", SQLITE_CHECKPOINT)
            .busy_timeout(LOCK_TIMEOUT)
    });
    // A COMMIT that fails (disk full, I/O error) ends the transaction in SQLite but not in sqlx,
    // which from then on only nests: later "commits" commit nothing. Such a connection is closed.
    options.map_sqlx_sqlite_pool_opts(|pool| {
        pool.before_acquire(|connection, _| {
            Box::pin(async move { Ok(!connection.is_in_transaction()) })
        })
    });
}

fn configure_postgres(options: &mut ConnectOptions, settings: &DatabaseSettings) {
    let lock_timeout = LOCK_TIMEOUT.as_millis().to_string();
    let search_path = settings.schema.as_ref().map(SchemaName::quoted);
    options
        .max_connections(POSTGRES_CONNECTIONS)
        .connect_lazy(true)
        .test_before_acquire_if_idle_for(FRESH)
        .set_application_name("litestripe-worker")
        .statement_timeout(STATEMENT_TIMEOUT)
        .map_sqlx_postgres_opts(move |postgres| {
            let postgres = postgres.options([
                ("lock_timeout", lock_timeout.as_str()),
                ("idle_in_transaction_session_timeout", "30000"),
            ]);
            match &search_path {
                Some(schema) => postgres.options([("search_path", schema)]),
                None => postgres,
            }
        });
}
