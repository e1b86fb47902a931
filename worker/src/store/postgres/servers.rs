//! The PostgreSQL servers that a URL names, and connecting to one of them.
//!
//! Owns what sqlx's URLs lack: several hosts, and `target_session_attrs`. PostgreSQL:
//! "Connection URIs". May not know what a connection is used for.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use litestripe_contract::exit;
use litestripe_contract::settings::Secret;
use sea_orm::sqlx::postgres::{PgConnectOptions, PgConnection};
use sea_orm::sqlx::{self, ConnectOptions as _, Executor as _, Row as _};
use secrecy::ExposeSecret as _;
use tracing::warn;
use url::Url;

use super::{lock, within};
use crate::error::is_temporary;

/// How long connecting to one server may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);

const TARGET: &str = "target_session_attrs";

/// The servers of one URL. Each has the URL's user, database and parameters.
#[derive(Debug)]
pub struct Servers {
    each: Vec<PgConnectOptions>,
    /// Whether a server that is read-only, such as a standby, is passed over.
    must_accept_writes: bool,
    /// The index of the server that accepted the last connection.
    last: AtomicUsize,
}

/// The servers of a URL whose file, if it has one, is read again for each connection: others rotate
/// the password in it.
#[derive(Debug)]
pub(super) struct Rotated {
    url: Secret,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    servers: Arc<Servers>,
    /// Whether the file could not be used when it was last read.
    is_old: bool,
}

impl Rotated {
    /// `None` if the URL is malformed.
    pub(super) fn new(url: &Secret) -> Option<Self> {
        let servers = Arc::new(Servers::parse(url.at_start().expose_secret())?);
        let is_old = false;
        Some(Self {
            url: url.clone(),
            known: Mutex::new(Known { servers, is_old }),
        })
    }

    /// Returns the servers of the URL as it is now. While its file cannot be used, which is logged
    /// once, it is the last one.
    pub(super) fn current(&self) -> Arc<Servers> {
        let mut known = lock(&self.known);
        match self.url.reread("a URL of PostgreSQL", Servers::parse) {
            None => {}
            Some(Ok(servers)) => {
                let last = known.servers.last.load(Ordering::Relaxed);
                servers
                    .last
                    .store(last % servers.each.len(), Ordering::Relaxed);
                *known = Known {
                    servers: Arc::new(servers),
                    is_old: false,
                };
            }
            Some(Err(error)) => {
                if !known.is_old {
                    let error = exit::chain(&error);
                    warn!("keeping the last URL of the database: {error}");
                }
                known.is_old = true;
            }
        }
        Arc::clone(&known.servers)
    }
}

/// The server process at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Session {
    process: i32,
    /// When its server was started: two servers may have a process of the same number.
    server_start: String,
}

impl Servers {
    /// Reads a URL. Without `target_session_attrs`, one of several servers must accept writes: the
    /// first that accepts a connection may be a standby, and no batch could ever be saved.
    ///
    /// Returns `None` if sqlx cannot use the URL, or would ignore a part of it.
    pub fn parse(url: &str) -> Option<Self> {
        let rest = url
            .strip_prefix("postgres://")
            .or_else(|| url.strip_prefix("postgresql://"))?;
        let (authority, place) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (format!("{user}@"), hosts),
            // An unescaped password that begins like a port ends the host early and leaves its `@`
            // behind.
            None if place.contains('@') => return None,
            None => (String::new(), authority),
        };
        let mut target = None;
        let mut each = Vec::new();
        for host in hosts.split(',') {
            let mut url = Url::parse(&format!("postgres://{user}{host}{place}")).ok()?;
            target = take_target(&mut url);
            let options = PgConnectOptions::from_url(&url).ok()?;
            if options.get_host().contains(',') || (host.is_empty() && hosts != host) {
                return None;
            }
            each.push(configure(options));
        }
        let must_accept_writes = match target.as_deref() {
            None => each.len() > 1,
            Some("any") => false,
            Some("read-write" | "primary") => true,
            Some(_) => return None,
        };
        Some(Self {
            each,
            must_accept_writes,
            last: AtomicUsize::new(0),
        })
    }

    /// The server that accepted the last connection.
    pub(super) fn last(&self) -> PgConnectOptions {
        let last = self.each.get(self.last.load(Ordering::Relaxed));
        last.cloned().unwrap_or_default()
    }

    /// Connects to the first server that accepts it, beginning with the one that did so last.
    pub(super) async fn connect(&self) -> Result<(PgConnection, Session), sqlx::Error> {
        let mut refused = None;
        let servers = self.each.iter().enumerate().cycle();
        let first = self.last.load(Ordering::Relaxed);
        for (index, server) in servers.skip(first).take(self.each.len()) {
            match within(CONNECT_MAX, self.connect_to(server)).await {
                Ok(connected) => {
                    self.last.store(index, Ordering::Relaxed);
                    return Ok(connected);
                }
                // One server that may accept us later is a reason to try again.
                Err(error) if refused.as_ref().is_none_or(|other| !is_temporary(other)) => {
                    refused = Some(error);
                }
                Err(_) => {}
            }
        }
        Err(refused.unwrap_or(sqlx::Error::PoolClosed))
    }

    async fn connect_to(
        &self,
        server: &PgConnectOptions,
    ) -> Result<(PgConnection, Session), sqlx::Error> {
        let is_tcp = server.get_socket().is_none() && !server.get_host().starts_with('/');
        let mut connection = server.connect().await.map_err(|error| match error {
            // A certificate that is not trusted, or a file of one that does not exist.
            sqlx::Error::Io(error)
                if is_tcp
                    && matches!(
                        error.kind(),
                        io::ErrorKind::InvalidData | io::ErrorKind::NotFound
                    ) =>
            {
                sqlx::Error::Tls(error.into())
            }
            // sqlx got no answer to its first byte. A proxy accepts a connection and closes it if
            // its server is away.
            sqlx::Error::Protocol(answer) if answer.contains("0x00") => {
                io::Error::from(io::ErrorKind::UnexpectedEof).into()
            }
            error => error,
        })?;
        let (session, is_read_only) = inspect(&mut connection).await?;
        if self.must_accept_writes && is_read_only {
            let problem = "the server is read-only, perhaps a standby";
            return Err(io::Error::other(problem).into());
        }
        Ok((connection, session))
    }
}

/// Returns which process serves the connection, and whether it is read-only.
pub(super) async fn inspect(connection: &mut PgConnection) -> Result<(Session, bool), sqlx::Error> {
    const INSPECT: &str = "SELECT pg_backend_pid(), pg_postmaster_start_time()::text, \
        current_setting('transaction_read_only')::bool";
    let row = connection.fetch_one(INSPECT).await?;
    let session = Session {
        process: row.try_get(0)?,
        server_start: row.try_get(1)?,
    };
    Ok((session, row.try_get(2)?))
}

/// Removes `target_session_attrs`, which sqlx would ignore.
fn take_target(url: &mut Url) -> Option<String> {
    let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    let (targets, others): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(name, _)| name == TARGET);
    let (_, target) = targets.into_iter().next_back()?;
    url.set_query(None);
    if !others.is_empty() {
        url.query_pairs_mut().extend_pairs(others);
    }
    Some(target)
}

fn configure(options: PgConnectOptions) -> PgConnectOptions {
    let name = options
        .get_application_name()
        .unwrap_or("litestripe-worker")
        .to_owned();
    options
        .application_name(&name)
        // PgBouncer before 1.20 refuses a connection that sets it, and we store no such numbers.
        .extra_float_digits(None)
        .disable_statement_logging()
}

#[cfg(test)]
mod tests;
