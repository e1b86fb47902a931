//! Connections to PostgreSQL, and transactions on them.
//!
//! Owns when a connection is opened, lent, tested and closed. A pool of our own, over sqlx's: that
//! one waits without a deadline for the connections that are given back to it, and lends one again
//! on which the server has just refused to write. May not know our tables.
//!
//! Every statement runs in a transaction that begins with our settings, because a session may be
//! shared with others (PgBouncer), and has a deadline here: the server's own timeouts do not help
//! if its packets no longer arrive. A connection on which a statement was not answered to its end
//! is closed, and no connection that is older than such a failure is used again.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use litestripe_contract::settings::Secret;
use sea_orm::prelude::async_trait;
use sea_orm::sea_query::Values;
use sea_orm::sqlx::pool::PoolOptions;
use sea_orm::sqlx::postgres::{PgConnection, PgDatabaseError, PgSeverity, Postgres};
use sea_orm::sqlx::query::Query;
use sea_orm::sqlx::{self, AssertSqlSafe, Connection as _, Executor as _};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr,
    SqlxPostgresConnector, Statement,
};
use sea_query_sqlx::SqlxValues;
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::{ACQUIRE_TIMEOUT, LOCK_TIMEOUT};
use crate::settings::SchemaName;

mod servers;

pub use servers::Servers;
use servers::{Rotated, Session};

/// Removes the named statements that clients with sqlx have left in a shared session.
pub(super) const FORGET_STATEMENTS: &str = "DO $$ DECLARE statement record; BEGIN \
    FOR statement IN SELECT name FROM pg_prepared_statements WHERE name LIKE 'sqlx\\_s\\_%' LOOP \
    EXECUTE format('DEALLOCATE %I', statement.name); END LOOP; END $$";

/// Commits without the server's timeout. That would end the wait for a synchronous standby: the
/// server then reports a commit which only it has, and a failover loses. PostgreSQL: "Synchronous
/// Replication".
const COMMIT: &str = "SET LOCAL statement_timeout = 0; COMMIT";

/// Connections, at most: for batches, the relay, the questions task, health, and some in reserve.
const CONNECTIONS_MAX: usize = 10;

/// How long the server may work on one statement. A batch of 500 takes some 10 ms.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the server lets a transaction be idle.
const IDLE_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a statement may stay without an answer. The server gives up sooner, if it is there.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// How long a connection may be idle before it is tested. A test costs a transaction a round trip.
const FRESH: Duration = Duration::from_secs(1);

/// How long the test may take.
const TEST_MAX: Duration = Duration::from_secs(2);

/// How long a connection is kept without use.
const IDLE_MAX: Duration = Duration::from_secs(10 * 60);

/// How long a connection is used, so that connections follow a name that now leads elsewhere.
const LIFETIME: Duration = Duration::from_secs(30 * 60);

/// The connections to one database.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    servers: Rotated,
    /// Begins a transaction with our settings, in one round trip.
    begin: String,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Live>>,
    /// Grows with every failure that closes a connection.
    generation: AtomicU64,
    sessions: Arc<Mutex<HashSet<Session>>>,
    /// Whether several connections share a session, as with PgBouncer's transaction mode. Named
    /// statements may then be another client's.
    are_sessions_shared: AtomicBool,
}

impl Pool {
    /// Does not connect yet. `None` if the URL is malformed.
    pub fn new(url: &Secret, schema: Option<&SchemaName>) -> Option<Self> {
        Some(Self(Arc::new(Inner {
            servers: Rotated::new(url)?,
            begin: begin_sql(schema),
            permits: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            idle: Mutex::default(),
            generation: AtomicU64::default(),
            sessions: Arc::default(),
            are_sessions_shared: AtomicBool::default(),
        })))
    }

    /// Connects, and finds out whether a pooler between us and the server shares sessions.
    pub async fn reach(&self) -> Result<(), DbErr> {
        let mut first = self.lend().await.map_err(connection_error)?;
        // While the first connection is open, the second one has another session, or they share
        // theirs. Without a second one we learn nothing, which is no reason not to work.
        let _second = self.lend().await;
        let before = first.session();
        let inspected = first
            .run(|connection| Box::pin(servers::inspect(connection)))
            .await;
        let (now, _) = inspected.map_err(statement_error)?;
        if before.is_none_or(|before| before != now) {
            self.share_sessions();
        }
        Ok(())
    }

    /// Begins a transaction.
    pub async fn begin(&self) -> Result<Transaction, DbErr> {
        let mut lent = self.lend().await.map_err(connection_error)?;
        let begin = AssertSqlSafe(self.0.begin.clone());
        lent.state = State::InTransaction;
        lent.run(|connection| connection.execute(begin))
            .await
            .map_err(statement_error)?;
        Ok(Transaction(AsyncMutex::new(lent)))
    }

    /// Whether a pooler lends the sessions of our connections to others too.
    pub fn shares_sessions(&self) -> bool {
        self.0.are_sessions_shared.load(Ordering::Relaxed)
    }

    /// Returns a connection of the library's own kind, which has none of our settings and
    /// deadlines. For migrations: the library runs them only on such a one.
    pub fn unpooled(&self) -> DatabaseConnection {
        let options = PoolOptions::new()
            .max_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT);
        let pool = options.connect_lazy_with(self.0.servers.current().last());
        SqlxPostgresConnector::from_sqlx_postgres_pool(pool)
    }

    async fn lend(&self) -> Result<Lent, sqlx::Error> {
        let permits = Arc::clone(&self.0.permits);
        let permit = timeout(ACQUIRE_TIMEOUT, permits.acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let live = match self.tested().await {
            Some(live) => live,
            None => self.open().await?,
        };
        Ok(Lent {
            live: Some(live),
            state: State::Ready,
            pool: self.clone(),
            permit: Some(permit),
        })
    }

    /// Takes an idle connection that still answers.
    async fn tested(&self) -> Option<Live> {
        loop {
            let mut live = self.0.idle().pop()?;
            if live.last_used.elapsed() < FRESH {
                return Some(live);
            }
            match within(TEST_MAX, live.raw.ping()).await {
                Ok(()) => return Some(live),
                Err(_) => self.retire(),
            }
        }
    }

    async fn open(&self) -> Result<Live, sqlx::Error> {
        let generation = self.0.generation.load(Ordering::Relaxed);
        let (raw, session) = self.0.servers.current().connect().await?;
        let sessions = Arc::clone(&self.0.sessions);
        let is_new = lock(&sessions).insert(session.clone());
        if !is_new {
            self.share_sessions();
        }
        Ok(Live {
            raw,
            generation,
            opened: Instant::now(),
            last_used: Instant::now(),
            registered: Registered { session, sessions },
        })
    }

    /// Gives a connection back. It is closed if it is older than the last failure, or has reached
    /// its end.
    fn give_back(&self, mut live: Live) {
        let is_current = live.generation == self.0.generation.load(Ordering::Relaxed);
        if !is_current || live.opened.elapsed() > LIFETIME {
            return;
        }
        live.last_used = Instant::now();
        let mut idle = self.0.idle();
        let expired: Vec<Live> = idle
            .extract_if(.., |other| other.last_used.elapsed() > IDLE_MAX)
            .collect();
        idle.push(live);
        drop(idle);
        drop(expired);
    }

    /// Closes all connections, those in use once they are given back: what broke one of them has
    /// probably broken the others.
    fn retire(&self) {
        self.0.generation.fetch_add(1, Ordering::Relaxed);
        let idle = std::mem::take(&mut *self.0.idle());
        drop(idle);
    }

    /// Does without named statements from now on.
    fn share_sessions(&self) {
        if !self.0.are_sessions_shared.swap(true, Ordering::Relaxed) {
            warn!(
                "connections to PostgreSQL share its sessions (a pooler in transaction mode): every statement is \
                 prepared anew, which is slower; a direct connection or session mode avoids it"
            );
            self.retire();
        }
    }
}

impl Inner {
    fn idle(&self) -> MutexGuard<'_, Vec<Live>> {
        lock(&self.idle)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open connection. Dropping it closes it.
struct Live {
    raw: PgConnection,
    generation: u64,
    opened: Instant,
    last_used: Instant,
    registered: Registered,
}

/// The session of an open connection, among those of all open connections.
struct Registered {
    session: Session,
    sessions: Arc<Mutex<HashSet<Session>>>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock(&self.sessions).remove(&self.session);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    InTransaction,
    /// In a transaction of which a statement failed.
    Failed,
    /// A statement was not answered to its end, or the connection is broken.
    Unknown,
}

/// A connection in use. Dropping it gives it back, after a rollback if it is in a transaction. In
/// an unknown state it is closed, so a statement may be cancelled at any time.
struct Lent {
    live: Option<Live>,
    state: State,
    pool: Pool,
    permit: Option<OwnedSemaphorePermit>,
}

impl Lent {
    fn session(&self) -> Option<Session> {
        Some(self.live.as_ref()?.registered.session.clone())
    }

    /// Runs one statement, with a deadline.
    async fn run<T>(
        &mut self,
        statement: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let state = std::mem::replace(&mut self.state, State::Unknown);
        let live = match &mut self.live {
            Some(live) if state != State::Unknown => live,
            _ => return Err(sqlx::Error::PoolClosed),
        };
        let answer = within(ANSWER_MAX, statement(&mut live.raw)).await;
        match &answer {
            Err(error) if is_of_a_shared_session(error) => {
                self.pool.share_sessions();
                self.pool.retire();
            }
            Err(error) if ends_a_connection(error) => self.pool.retire(),
            Err(_) if state == State::InTransaction => self.state = State::Failed,
            _ => self.state = state,
        }
        answer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(live) = self.live.take() else { return };
        match self.state {
            State::Ready => self.pool.give_back(live),
            State::Unknown => {}
            State::InTransaction | State::Failed => {
                let mut rolling_back = Lent {
                    live: Some(live),
                    state: State::Ready,
                    pool: self.pool.clone(),
                    permit: self.permit.take(),
                };
                tokio::spawn(async move {
                    // Otherwise the connection is closed, which rolls back too.
                    let _ = rolling_back
                        .run(|connection| connection.execute("ROLLBACK"))
                        .await;
                });
            }
        }
    }
}

/// A transaction. Dropping it rolls it back.
pub struct Transaction(AsyncMutex<Lent>);

impl Transaction {
    /// Commits it.
    ///
    /// # Errors
    /// Also if a statement of the transaction failed: PostgreSQL would answer such a COMMIT with a
    /// rollback, and no error.
    pub async fn commit(self) -> Result<(), DbErr> {
        if self.0.lock().await.state == State::Failed {
            let problem = "a statement of the transaction failed";
            return Err(DbErr::Custom(problem.to_owned()));
        }
        self.end(COMMIT).await
    }

    pub async fn rollback(self) -> Result<(), DbErr> {
        self.end("ROLLBACK").await
    }

    async fn end(self, sql: &'static str) -> Result<(), DbErr> {
        let mut lent = self.0.into_inner();
        let ended = lent.run(|connection| connection.execute(sql)).await;
        if lent.state != State::Unknown {
            lent.state = State::Ready;
        }
        ended.map(|_| ()).map_err(statement_error)
    }

    async fn run<T>(
        &self,
        statement: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        self.0.lock().await.run(statement).await
    }

    async fn query(&self, statement: Statement) -> Query<'static, Postgres, SqlxValues> {
        let pool = self.0.lock().await.pool.clone();
        let are_named = !pool.shares_sessions();
        let values = statement.values.unwrap_or(Values(Vec::new()));
        sqlx::query_with(AssertSqlSafe(statement.sql), SqlxValues(values)).persistent(are_named)
    }
}

#[async_trait::async_trait]
impl ConnectionTrait for Transaction {
    fn get_database_backend(&self) -> DbBackend {
        DbBackend::Postgres
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        let query = self.query(statement).await;
        let done = self.run(|connection| connection.execute(query)).await;
        done.map(ExecResult::from).map_err(statement_error)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        let sql = AssertSqlSafe(sql.to_owned());
        let done = self.run(|connection| connection.execute(sql)).await;
        done.map(ExecResult::from).map_err(statement_error)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let query = self.query(statement).await;
        let row = self
            .run(|connection| connection.fetch_optional(query))
            .await;
        row.map(|row| row.map(QueryResult::from))
            .map_err(statement_error)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let query = self.query(statement).await;
        let rows = self.run(|connection| connection.fetch_all(query)).await;
        rows.map(|rows| rows.into_iter().map(QueryResult::from).collect())
            .map_err(statement_error)
    }
}

/// Returns what begins a transaction. One simple query, so that the settings cost no round trip.
///
/// A commit that is acked must survive a crash of the server, whatever its `synchronous_commit`:
/// the events are not redelivered. Any other value of it is the operator's choice.
fn begin_sql(schema: Option<&SchemaName>) -> String {
    let timeouts = [
        ("statement_timeout", STATEMENT_TIMEOUT),
        ("lock_timeout", LOCK_TIMEOUT),
        (
            "idle_in_transaction_session_timeout",
            IDLE_TRANSACTION_TIMEOUT,
        ),
    ];
    let timeouts: String = timeouts
        .iter()
        .map(|(name, duration)| {
            let milliseconds = duration.as_millis();
            format!("set_config('{name}', '{milliseconds}', true), ")
        })
        .collect();
    let search_path = schema
        .map(SchemaName::quoted)
        .map_or_else(String::new, |schema| {
            format!("set_config('search_path', '{schema}', true), ")
        });
    format!(
        "BEGIN; SELECT {timeouts}{search_path}CASE current_setting('synchronous_commit') WHEN 'off' THEN \
         set_config('synchronous_commit', 'on', true) END"
    )
}

fn connection_error(error: sqlx::Error) -> DbErr {
    DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error)))
}

fn statement_error(error: sqlx::Error) -> DbErr {
    DbErr::Query(RuntimeErr::SqlxError(Arc::new(error)))
}

/// Waits for an answer of the server.
async fn within<T>(
    longest: Duration,
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(longest, answer).await.unwrap_or_else(|_| {
        let silence = format!("no answer within {} s", longest.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, silence).into())
    })
}

/// Whether a connection may not be used again after this error: its state is unknown, the server
/// has ended it, or the server is the wrong one.
///
/// PostgreSQL: "Error Codes". A read-only server (25006) is a former primary, or a standby to which
/// a name or proxy led. After 0A000 ("cached plan must not change result type") a connection fails
/// at the same statement again.
fn ends_a_connection(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else {
        return true;
    };
    let is_fatal = error
        .try_downcast_ref::<PgDatabaseError>()
        .is_none_or(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic));
    is_fatal || matches!(error.code().as_deref(), Some("25006" | "0A000"))
}

/// Whether a named statement is missing (26000) or is another client's (42P05): a pooler has given
/// the connection another session.
fn is_of_a_shared_session(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("26000" | "42P05"))
}
