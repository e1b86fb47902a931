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
use sea_orm::{
    ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, IdenStatic, SqliteTransactionMode,
    Statement, TransactionOptions, TransactionTrait as _, Value,
};
use tracing::Instrument as _;

use crate::error::{Cause, StoreError};
use crate::settings::{DatabaseKind, DatabaseSettings, SchemaName};

pub mod backfill;
pub mod clock;
mod connection;
pub mod dead_letter;
pub mod erasure;
pub mod figures;
pub(crate) mod file;
pub mod installation;
pub mod lease;
pub mod orphan;
pub mod outbox;
mod postgres;
pub mod question;
pub mod raw;
pub mod replay;
pub(crate) mod rights;
mod rows;
mod sqlite;
pub mod subscription;
pub mod worker;

pub use connection::{Connection, Transaction};
pub use postgres::Servers;

use outbox::LowWater;

/// How long to wait for a connection before the database counts as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long SQLite waits for another writer, and PostgreSQL for a row lock. Less than
/// `ACQUIRE_TIMEOUT`, so that opening a locked SQLite file fails with the lock as the reason.
const LOCK_TIMEOUT: Duration = Duration::from_secs(4);

/// The advisory lock that lets one migration at a time run on a PostgreSQL database.
const MIGRATION_LOCK: i64 = 0x6c69_7465_7374_7270;

#[derive(Clone)]
pub struct Store {
    db: Connection,
    kind: DatabaseKind,
    schema: Option<SchemaName>,
    relay_lock_path: Option<PathBuf>,
    low_water: Arc<LowWater>,
}

impl Store {
    /// Opens the database. Does not contact a PostgreSQL server yet.
    pub async fn open(settings: &DatabaseSettings) -> Result<Self, StoreError> {
        let opening = StoreError::doing("open the database (DATABASE_URL)");
        let (db, relay_lock_path) = match settings.kind {
            DatabaseKind::Sqlite => (
                Connection::Sqlite(sqlite::open(settings).await.map_err(&opening)?),
                Some(sqlite::relay_lock_path(settings).map_err(&opening)?),
            ),
            DatabaseKind::Postgres => (pool(settings).map_err(&opening)?, None),
        };
        Ok(Self {
            db,
            kind: settings.kind,
            schema: settings.schema.clone(),
            relay_lock_path,
            low_water: Arc::default(),
        })
    }

    /// Opens a database for reading. Changes nothing in it, not even its journal mode, and creates
    /// no file. `opening` says what it is for, after "cannot".
    pub async fn open_to_read(
        settings: &DatabaseSettings,
        opening: &'static str,
    ) -> Result<Self, StoreError> {
        let opening = StoreError::doing(opening);
        let db = match settings.kind {
            DatabaseKind::Sqlite => {
                Connection::Sqlite(sqlite::open_to_read(settings).await.map_err(&opening)?)
            }
            DatabaseKind::Postgres => pool(settings).map_err(&opening)?,
        };
        let store = Self {
            db,
            kind: settings.kind,
            schema: settings.schema.clone(),
            relay_lock_path: None,
            low_water: Arc::default(),
        };
        store.reach().await?;
        Ok(store)
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

    /// Where reads of the outbox begin.
    pub fn low_water(&self) -> &LowWater {
        &self.low_water
    }

    /// Runs `work` in a write transaction, in a task that is never cancelled: a cancelled
    /// transaction would leave SQLite's connection inside it (sqlx #4393), and on PostgreSQL it
    /// would cost a connection. `work` commits; a transaction that it only drops is rolled back.
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
    pub async fn begin(&self) -> Result<Transaction, StoreError> {
        let beginning = StoreError::doing("begin a transaction");
        match &self.db {
            Connection::Sqlite(db) => {
                let transaction = db.begin_with_options(immediate()).await;
                transaction.map(Transaction::Sqlite).map_err(beginning)
            }
            Connection::Postgres(pool) => {
                let transaction = pool.begin().await;
                transaction.map(Transaction::Postgres).map_err(beginning)
            }
        }
    }

    /// Connects to the database for the first time.
    pub async fn reach(&self) -> Result<(), StoreError> {
        match &self.db {
            Connection::Sqlite(_) => self.ping().await,
            Connection::Postgres(pool) => {
                let reached = pool.reach().await;
                reached.map_err(StoreError::doing("reach the database"))
            }
        }
    }

    /// # Cancel safety
    /// Cancel safe: on SQLite the statement runs to its end, on PostgreSQL its connection is
    /// closed.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let pinging = StoreError::doing("reach the database");
        let ping = |db: Connection| async move { db.execute_unprepared("SELECT 1").await };
        let answer = match &self.db {
            Connection::Sqlite(_) => detached(ping(self.db.clone())).await,
            Connection::Postgres(_) => ping(self.db.clone()).await,
        };
        answer.map(|_| ()).map_err(pinging)
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

    /// Returns all known migrations, and whether each is applied, and then the applied ones of a
    /// newer version.
    pub async fn migrations(&self) -> Result<Vec<Step>, StoreError> {
        steps(&self.db).await
    }

    /// Applies the pending migrations. If several workers call it at once, one applies them and the
    /// others wait for it. A failure changes nothing. Fails if a table or an index of another
    /// application has a name that a migration needs.
    ///
    /// Changes nothing if a newer version has migrated: this version runs on its schema. Fails if
    /// migrations of this version are pending beside those.
    pub async fn migrate_up(&self) -> Result<(), StoreError> {
        let transaction = self.begin_migration().await?;
        self.create_schema(&transaction).await?;
        let steps = steps(&transaction).await?;
        if steps.iter().any(|step| !step.known) && steps.iter().all(|step| step.applied) {
            return self.commit_migration(transaction).await;
        }
        refuse_newer(steps).map_err(StoreError::doing("migrate the database up"))?;
        Migrator::up(&transaction, None)
            .await
            .map_err(Cause::of_migration)
            .map_err(StoreError::doing("migrate the database up"))?;
        self.commit_migration(transaction).await
    }

    /// Reverts `steps` migrations. Drops their tables with all rows. A failure changes nothing.
    pub async fn migrate_down(&self, steps: u32) -> Result<(), StoreError> {
        let transaction = self.begin_migration().await?;
        refuse_newer(self::steps(&transaction).await?)
            .map_err(StoreError::doing("migrate the database down"))?;
        Migrator::down(&transaction, Some(steps))
            .await
            .map_err(StoreError::doing("migrate the database down"))?;
        self.commit_migration(transaction).await
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the library migrates only in a transaction of its own kind"
    )]
    async fn begin_migration(&self) -> Result<DatabaseTransaction, StoreError> {
        let (db, options) = match &self.db {
            Connection::Sqlite(db) => (db.clone(), immediate()),
            Connection::Postgres(pool) => (pool.unpooled(), TransactionOptions::default()),
        };
        let transaction = db
            .begin_with_options(options)
            .await
            .map_err(StoreError::doing("begin a migration"))?;
        if self.kind == DatabaseKind::Postgres {
            // A migration may take longer than a batch, and so may another worker's that this one
            // waits for.
            const NO_TIMEOUTS: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; \
                SET LOCAL idle_in_transaction_session_timeout = 0";
            let doing = StoreError::doing("wait for another migration");
            let search_path = match &self.schema {
                Some(schema) => format!("; SET LOCAL search_path = {}", schema.quoted()),
                None => String::new(),
            };
            transaction
                .execute_unprepared(&format!("{NO_TIMEOUTS}{search_path}"))
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
            self.forget_statements(&transaction).await.map_err(&doing)?;
        }
        Ok(transaction)
    }

    /// Creates the schema of the settings. If it exists, no right to create schemas is needed.
    async fn create_schema(&self, transaction: &DatabaseTransaction) -> Result<(), StoreError> {
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

    async fn commit_migration(&self, transaction: DatabaseTransaction) -> Result<(), StoreError> {
        let doing = StoreError::doing("commit the migrations");
        self.forget_statements(&transaction).await.map_err(&doing)?;
        transaction.commit().await.map_err(&doing)
    }

    /// Keeps the library's named statements out of a session that others share.
    async fn forget_statements(&self, transaction: &DatabaseTransaction) -> Result<(), DbErr> {
        match &self.db {
            Connection::Postgres(pool) if pool.shares_sessions() => {
                let forget = postgres::FORGET_STATEMENTS;
                transaction.execute_unprepared(forget).await.map(|_| ())
            }
            _ => Ok(()),
        }
    }
}

/// Runs `work` in its own task, which continues if the caller is dropped: a cancelled query may
/// leave its connection in the middle of an answer.
pub async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    tokio::spawn(work.in_current_span())
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

/// Orders by a text column as Rust orders texts, whatever the database's collation: two statements
/// that lock rows in different orders deadlock.
fn bytewise(backend: DbBackend, column: impl IdenStatic) -> Expr {
    let collate = match backend {
        DbBackend::Postgres => " COLLATE \"C\"",
        _ => "",
    };
    Expr::cust([column.as_str(), collate].concat())
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
    /// Whether this version has it. One that only a newer version has is applied.
    pub known: bool,
}

async fn steps(db: &impl ConnectionTrait) -> Result<Vec<Step>, StoreError> {
    let applied = litestripe_migration::applied(db).await;
    let applied = applied.map_err(StoreError::doing("read the schema version (DATABASE_URL)"))?;
    let files = Migrator::get_migration_files();
    let known: Vec<_> = files.iter().map(|file| file.name()).collect();
    let newer = applied
        .iter()
        .filter(|name| !known.contains(&name.as_str()));
    let newer = newer.map(|name| Step {
        name: name.clone(),
        applied: true,
        known: false,
    });
    let known = known.iter().map(|name| Step {
        name: (*name).to_owned(),
        applied: applied.iter().any(|other| other == name),
        known: true,
    });
    Ok(known.chain(newer).collect())
}

fn refuse_newer(steps: Vec<Step>) -> Result<(), Cause> {
    match steps.into_iter().find(|step| !step.known) {
        Some(newer) => Err(Cause::NewerSchema(newer.name)),
        None => Ok(()),
    }
}

fn pool(settings: &DatabaseSettings) -> Result<Connection, DbErr> {
    let pool = postgres::Pool::new(&settings.url, settings.schema.as_ref());
    let pool = pool.ok_or_else(|| DbErr::Custom("the URL is malformed".to_owned()))?;
    Ok(Connection::Postgres(pool))
}

/// SQLite's transactions take the write lock at once.
fn immediate() -> TransactionOptions {
    TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
        ..TransactionOptions::default()
    }
}
