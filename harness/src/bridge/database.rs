//! The database of a bridge, and queries on it.

use std::path::Path;
use std::time::Duration;

use litestripe_entity::{orphaned_payment, signal_outbox, stripe_subscription};
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, DatabaseConnection, DatabaseTransaction, DbBackend,
    DbErr, EntityTrait as _, PaginatorTrait as _, QueryOrder as _, Statement,
    TransactionTrait as _,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use tokio::sync::OnceCell;

use crate::process::Process;
use crate::{eventually, postgres};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    /// A file in a temporary folder.
    Sqlite,
    /// A server that the test owns.
    Postgres,
}

/// A database, initially empty. Dropping it removes it.
pub struct Database {
    place: Place,
    connection: OnceCell<DatabaseConnection>,
}

enum Place {
    Sqlite(TempDir),
    Postgres(postgres::Server),
}

impl Database {
    /// Makes a database. A PostgreSQL server does not run before [`Self::resume`], but its URL is
    /// known.
    pub fn prepare(kind: DatabaseKind) -> Self {
        let place = match kind {
            DatabaseKind::Sqlite => {
                let folder = tempfile::Builder::new()
                    .prefix("litestripe-sqlite-")
                    .tempdir();
                Place::Sqlite(folder.expect("a temporary folder can be made"))
            }
            DatabaseKind::Postgres => {
                let server = postgres::Server::prepare(postgres::Options::default());
                Place::Postgres(server.unwrap_or_else(|problem| panic!("{problem}")))
            }
        };
        Self {
            place,
            connection: OnceCell::new(),
        }
    }

    /// The value for `DATABASE_URL`.
    pub fn url(&self) -> String {
        match &self.place {
            Place::Sqlite(folder) => format!(
                "sqlite://{}?mode=rwc",
                folder.path().join("litestripe.db").display()
            ),
            Place::Postgres(server) => server.url("postgres"),
        }
    }

    /// The folder of a SQLite database and its write-ahead log; `None` for PostgreSQL.
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Sqlite(folder) => Some(folder.path()),
            Place::Postgres(_) => None,
        }
    }

    /// The PostgreSQL server.
    ///
    /// # Panics
    /// When the database is SQLite.
    pub fn server(&mut self) -> &mut postgres::Server {
        match &mut self.place {
            Place::Postgres(server) => server,
            Place::Sqlite(_) => panic!("SQLite has no server"),
        }
    }

    /// Takes another PostgreSQL server for this database from now on, such as a standby that was
    /// promoted. `other` is then the former one.
    pub async fn exchange(&mut self, other: &mut postgres::Server) {
        self.reopen().await;
        std::mem::swap(self.server(), other);
    }

    /// Starts a PostgreSQL server, for the first time or again. Does nothing for SQLite.
    pub async fn resume(&mut self) {
        if let Place::Postgres(server) = &mut self.place {
            server.resume().await;
        }
    }

    /// Kills a PostgreSQL server as a crash would; the data stays.
    ///
    /// # Panics
    /// When the database is SQLite, which has no process.
    pub async fn kill(&mut self) {
        match &mut self.place {
            Place::Postgres(server) => server.kill().await,
            Place::Sqlite(_) => panic!("SQLite cannot be killed"),
        }
    }

    /// Stops a PostgreSQL server, which closes every connection; the data stays.
    ///
    /// # Panics
    /// When the database is SQLite, which has no process.
    pub async fn stop(&mut self) {
        self.server().stop().await;
    }

    /// The process of a running PostgreSQL server.
    pub fn process(&self) -> Option<&Process> {
        match &self.place {
            Place::Sqlite(_) => None,
            Place::Postgres(server) => server.process(),
        }
    }

    /// The test's connection. It connects lazily: the first query fails if the server is
    /// unreachable.
    pub async fn connection(&self) -> Result<&DatabaseConnection, DbErr> {
        let connect = || async {
            let mut options = ConnectOptions::new(self.url());
            options
                .max_connections(2)
                .connect_lazy(true)
                .acquire_timeout(Duration::from_secs(5))
                .sqlx_logging(false);
            sea_orm::Database::connect(options).await
        };
        self.connection.get_or_try_init(connect).await
    }

    /// Connects again, because the database is another one.
    pub async fn reopen(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = connection.close().await;
        }
    }

    pub(super) async fn rows(&self) -> Result<Vec<stripe_subscription::Model>, DbErr> {
        let by_key = stripe_subscription::Column::StripeSubscriptionId;
        stripe_subscription::Entity::find()
            .order_by_asc(by_key)
            .all(self.connection().await?)
            .await
    }

    pub(super) async fn orphans(&self) -> Result<Vec<orphaned_payment::Model>, DbErr> {
        orphaned_payment::Entity::find()
            .order_by_asc(orphaned_payment::Column::Id)
            .all(self.connection().await?)
            .await
    }

    pub(super) async fn outbox(&self) -> Result<u64, DbErr> {
        signal_outbox::Entity::find()
            .count(self.connection().await?)
            .await
    }

    /// Returns every value of every table, each as a line `table.column: text`.
    pub async fn dump(&self) -> Result<Vec<String>, DbErr> {
        let columns = match self.connection().await?.get_database_backend() {
            DbBackend::Postgres => {
                "SELECT table_name::text AS t, column_name::text AS c FROM information_schema.columns \
                 WHERE table_schema = 'public' ORDER BY 1, 2"
            }
            _ => {
                "SELECT m.name AS t, c.name AS c FROM sqlite_schema m, pragma_table_info(m.name) c \
                 WHERE m.type = 'table' ORDER BY 1, 2"
            }
        };
        let mut lines = Vec::new();
        for row in self.query(columns).await? {
            let (table, column): (String, String) = (row.try_get("", "t")?, row.try_get("", "c")?);
            let texts =
                format!("SELECT CAST(\"{column}\" AS TEXT) AS v FROM \"{table}\" ORDER BY 1");
            for row in self.query(&texts).await? {
                let text: Option<String> = row.try_get("", "v")?;
                lines.extend(text.map(|text| format!("{table}.{column}: {text}")));
            }
        }
        Ok(lines)
    }

    /// Runs a query.
    pub async fn query(&self, sql: &str) -> Result<Vec<sea_orm::QueryResult>, DbErr> {
        let connection = self.connection().await?;
        connection
            .query_all_raw(Statement::from_string(
                connection.get_database_backend(),
                sql,
            ))
            .await
    }

    /// Runs statements that return nothing.
    pub async fn execute(&self, sql: &str) -> Result<(), DbErr> {
        let connection = self.connection().await?;
        connection.execute_unprepared(sql).await.map(drop)
    }

    /// Begins a transaction in another session and runs the statement `lock` in it. The locks are
    /// held until the transaction ends.
    ///
    /// # Panics
    /// When the statement fails.
    pub async fn hold_lock(&self, lock: &str) -> DatabaseTransaction {
        let other = self
            .connection()
            .await
            .expect("the database answers")
            .begin()
            .await;
        let other = other.expect("a transaction can be begun");
        other
            .execute_unprepared(lock)
            .await
            .expect("no other session holds the lock");
        other
    }

    /// Counts the workers' statements that wait for another session's lock. PostgreSQL only.
    pub async fn waiting_workers(&self) -> Result<usize, DbErr> {
        let waiting = "SELECT pid FROM pg_stat_activity \
            WHERE application_name = 'litestripe-worker' AND wait_event_type = 'Lock'";
        Ok(self.query(waiting).await?.len())
    }

    /// Waits until no worker has an open transaction: the server may still commit what a killed
    /// worker has sent. Does nothing for SQLite.
    pub async fn until_workers_are_idle(&self) {
        if self.process().is_none() {
            return;
        }
        let busy = "SELECT pid FROM pg_stat_activity \
            WHERE application_name = 'litestripe-worker' AND xact_start IS NOT NULL";
        eventually(
            "workers to be idle",
            Duration::from_secs(30),
            async || match self.query(busy).await {
                Ok(busy) if busy.is_empty() => Ok(()),
                Ok(busy) => Err(format!("{} open transactions", busy.len())),
                Err(error) => Err(error.to_string()),
            },
        )
        .await;
    }

    /// Waits until a worker's statement waits for another session's lock. PostgreSQL only.
    pub async fn until_a_worker_waits(&self) {
        eventually(
            "a worker to wait for a lock",
            Duration::from_secs(30),
            async || match self.waiting_workers().await {
                Ok(0) => Err("none does".to_owned()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
        )
        .await;
    }
}

/// Returns the statement that locks the row of a subscription.
#[must_use]
pub fn lock_row_sql(subscription: &str) -> String {
    format!(
        "SELECT 1 FROM stripe_subscription WHERE stripe_subscription_id = '{subscription}' FOR UPDATE"
    )
}

/// Returns those columns of a row that signals contain, formatted as in a signal.
#[must_use]
pub fn signal_fields(row: &stripe_subscription::Model) -> Value {
    let at = |at: Option<OffsetDateTime>| {
        let text = |at: OffsetDateTime| at.to_offset(UtcOffset::UTC).format(&Rfc3339);
        at.map(|at| text(at).expect("the worker stores only times that RFC 3339 can express"))
    };
    json!({
        "stripe_subscription_id": row.stripe_subscription_id,
        "stripe_customer_id": row.stripe_customer_id,
        "client_reference_id": row.client_reference_id,
        "status": row.status,
        "created": at(row.created),
        "start_date": at(row.start_date),
        "cancel_at": at(row.cancel_at),
        "canceled_at": at(row.canceled_at),
        "cancellation_reason": row.cancellation_reason,
        "ended_at": at(row.ended_at),
        "trial_start": at(row.trial_start),
        "trial_end": at(row.trial_end),
        "current_period_start": at(row.current_period_start),
        "current_period_end": at(row.current_period_end),
        "cancel_at_period_end": row.cancel_at_period_end,
        "collection_method": row.collection_method,
        "pause_collection": row.pause_collection,
        "items": row.items,
        "metadata": row.metadata,
        "subscription_metadata": row.subscription_metadata,
        "livemode": row.livemode,
        "stripe_account_id": row.stripe_account_id,
        "uncertain": row.uncertain,
        "revision": row.revision,
    })
}
