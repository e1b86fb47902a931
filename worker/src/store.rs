//! The database: a connection, a transaction, the schema.
//!
//! Owns all SQL on our tables, here and in the modules below. May not know messages or Stripe.
//! Every write of a row is guarded by the `version` that was read. Whatever is asked of the database fails
//! when it is away, takes too long or refuses the data: see [`StoreError::disposition`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use litestripe_migration::{Migrator, MigratorTrait as _};
use sea_orm::sea_query::extension::postgres::PgExpr as _;
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoColumnRef, ValueType};
use sea_orm::sqlx::Connection as _;
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DatabaseTransaction,
    DbBackend, DbErr, RuntimeErr, SqliteTransactionMode, TransactionOptions, TransactionTrait as _,
    Value,
};
use secrecy::ExposeSecret as _;

use crate::error::StoreError;
use crate::settings::{DatabaseKind, DatabaseSettings};

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

/// Connections to PostgreSQL, at most: the batch, the relay, the sweep, health, and some in reserve for
/// when one of them hangs on a link that died without a word.
const POSTGRES_CONNECTIONS: u32 = 10;

/// How long a connection is waited for before the database counts as away.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one statement may take. A batch of 500 takes some 10 ms.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long SQLite waits for another writer, and PostgreSQL for a row lock. Less than a connection is
/// waited for, so that a SQLite file that is locked while it is opened is named as the reason.
const LOCK_TIMEOUT: Duration = Duration::from_secs(4);

/// SQLite's page cache in KiB, which is what a negative number means. Its default of 2 MB does not hold the
/// upper parts of the trees of a large table.
const SQLITE_CACHE: &str = "-8192";

/// After how many pages of 4 KiB SQLite takes its log into the database. With its default of 1,000 a batch of
/// rows all over a large table would, each time.
const SQLITE_CHECKPOINT: &str = "10000";

/// How long a connection to PostgreSQL may have been idle to be taken for alive. To ask it costs every
/// transaction a round trip.
const FRESH: Duration = Duration::from_secs(1);

/// Under this number one migration at a time runs on a PostgreSQL database.
const MIGRATION_LOCK: i64 = 0x6c69_7465_7374_7270;

/// The database.
#[derive(Clone)]
pub struct Store {
    db: DatabaseConnection,
    kind: DatabaseKind,
    relay_lock_path: Option<PathBuf>,
}

impl Store {
    /// Opens the database. A PostgreSQL server is not contacted yet.
    pub async fn open(settings: &DatabaseSettings) -> Result<Self, StoreError> {
        let mut options = options(settings);
        match settings.kind {
            DatabaseKind::Sqlite => configure_sqlite(&mut options),
            DatabaseKind::Postgres => configure_postgres(&mut options),
        }
        let db = Database::connect(options)
            .await
            .map_err(StoreError::doing("open the database (DATABASE_URL)"))?;
        let relay_lock_path = relay_lock_path(settings)?;
        Ok(Self {
            db,
            kind: settings.kind,
            relay_lock_path,
        })
    }

    /// Opens a database of somebody else's, which is only read: nothing of it is changed, not even
    /// its journal mode.
    pub async fn open_to_read(settings: &DatabaseSettings) -> Result<Self, StoreError> {
        let mut options = options(settings);
        match settings.kind {
            DatabaseKind::Sqlite => {
                options
                    .max_connections(1)
                    .map_sqlx_sqlite_opts(|sqlite| sqlite.busy_timeout(LOCK_TIMEOUT));
            }
            DatabaseKind::Postgres => configure_postgres(&mut options),
        }
        let opening = StoreError::doing("open the users' database (LITESTRIPE_USER_DATABASE_URL)");
        let db = Database::connect(options).await.map_err(opening)?;
        Ok(Self {
            db,
            kind: settings.kind,
            relay_lock_path: None,
        })
    }

    /// The connection, for single statements.
    pub fn connection(&self) -> &DatabaseConnection {
        &self.db
    }

    /// Which database it is.
    pub fn kind(&self) -> DatabaseKind {
        self.kind
    }

    /// The file beside a SQLite database whose lock stands for all shards of the outbox. None on
    /// PostgreSQL, which has row locks.
    pub fn relay_lock_path(&self) -> Option<PathBuf> {
        self.relay_lock_path.clone()
    }

    /// Does `work` in a transaction that writes, in a task that nothing cancels: a transaction that is
    /// cancelled would leave a connection in the pool that is still inside it (sqlx #4393). `work`
    /// commits; what it only drops is rolled back.
    pub async fn uncancelled<T, E, F>(
        &self,
        work: impl FnOnce(DatabaseTransaction) -> F + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        let store = self.clone();
        detached(async move { work(store.begin().await?).await }).await
    }

    /// Starts a transaction that writes.
    ///
    /// On SQLite it takes the write lock at once: a transaction that reads first and writes after
    /// another one's commit fails with `SQLITE_BUSY_SNAPSHOT`, which no busy timeout helps.
    ///
    /// # Cancel safety
    /// None: see [`Store::uncancelled`].
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where transactions begin"
    )]
    async fn begin(&self) -> Result<DatabaseTransaction, StoreError> {
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

    /// Asks the database whether it is there.
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.db
            .execute_unprepared("SELECT 1")
            .await
            .map(|_| ())
            .map_err(StoreError::doing("reach the database"))
    }

    /// Takes what was deleted out of SQLite's log, as far as nobody reads it: it would stay there until
    /// the log comes round. PostgreSQL does the like in its own time.
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

    /// The migrations that were applied and those that wait.
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

    /// Applies the migrations that wait. Of several workers that call it at once, one does it and
    /// the others wait for it. A failure changes nothing.
    pub async fn migrate_up(&self) -> Result<(), StoreError> {
        let transaction = self.begin_migration().await?;
        Migrator::up(&transaction, None)
            .await
            .map_err(StoreError::doing("migrate the database up"))?;
        transaction
            .commit()
            .await
            .map_err(StoreError::doing("commit the migrations"))
    }

    /// Takes `steps` migrations back. Their tables' rows are gone. A failure changes nothing.
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

    async fn begin_migration(&self) -> Result<DatabaseTransaction, StoreError> {
        let transaction = self.begin().await?;
        if self.kind == DatabaseKind::Postgres {
            // A step may take longer than a batch, and so may the step another worker is at.
            const PATIENCE: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; \
                SET LOCAL idle_in_transaction_session_timeout = 0";
            let doing = StoreError::doing("wait for another migration");
            transaction
                .execute_unprepared(PATIENCE)
                .await
                .map_err(&doing)?;
            let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
            transaction
                .execute_unprepared(&lock)
                .await
                .map_err(&doing)?;
        }
        Ok(transaction)
    }
}

/// Runs `work` in a task of its own: dropped, it goes on, with its connection. A query that is cancelled
/// may leave its connection in the middle of an answer.
pub async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

/// Whether `column` is one of `values`. PostgreSQL gets them as one array: the text of the statement, and
/// with it what was prepared for it, does not depend on how many there are.
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

/// [`among`] of ids.
fn among_ids(backend: DbBackend, column: impl IntoColumnRef, ids: &[&str]) -> Expr {
    among(backend, column, ids.iter().copied().map(str::to_owned))
}

/// One migration.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Whether the database has it.
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
    // One connection: SQLite has one writer, and a second one of ours would only wait for the first.
    options.max_connections(1).map_sqlx_sqlite_opts(|sqlite| {
        sqlite
            .journal_mode(SqliteJournalMode::Wal)
            // An acked event must survive a power cut: it is not delivered again.
            .synchronous(SqliteSynchronous::Full)
            // What is deleted or overwritten would stay in the file, an erased email among it.
            .pragma("secure_delete", "ON")
            .pragma("cache_size", SQLITE_CACHE)
            .pragma("wal_autocheckpoint", SQLITE_CHECKPOINT)
            .busy_timeout(LOCK_TIMEOUT)
    });
    // A COMMIT that failed (disk full, I/O error) ends the transaction in SQLite and not in sqlx, which
    // from then on only nests: what it "commits" is not committed. Such a connection is closed.
    options.map_sqlx_sqlite_pool_opts(|pool| {
        pool.before_acquire(|connection, _| {
            Box::pin(async move { Ok(!connection.is_in_transaction()) })
        })
    });
}

fn configure_postgres(options: &mut ConnectOptions) {
    let lock_timeout = LOCK_TIMEOUT.as_millis().to_string();
    options
        .max_connections(POSTGRES_CONNECTIONS)
        .connect_lazy(true)
        .test_before_acquire_if_idle_for(FRESH)
        .set_application_name("litestripe-worker")
        .statement_timeout(STATEMENT_TIMEOUT)
        .map_sqlx_postgres_opts(move |postgres| {
            postgres.options([
                ("lock_timeout", lock_timeout.as_str()),
                ("idle_in_transaction_session_timeout", "30000"),
            ])
        });
}
