//! A real PgBouncer on 127.0.0.1 with its own port and folder, in front of one PostgreSQL server.
//!
//! Any user of any database is let through as `postgres`. It refuses to run as root; then it runs
//! as an unprivileged user that owns the temporary folder. May not know our schema.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::postgres::{Owner, in_folder};
use crate::process::{self, Process, Signal};
use crate::{port, tools};

const START_DEADLINE: Duration = Duration::from_secs(20);
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// When a client's connection to the server goes to another client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// After the client has disconnected, PgBouncer's default.
    Session,
    /// After each transaction.
    Transaction,
}

/// A PgBouncer. Dropping it kills it and removes its folder.
#[derive(Debug)]
pub struct PgBouncer {
    // Declared first, so that the process has ended before its folder is removed.
    process: Option<Process>,
    port: u16,
    owner: Option<Owner>,
    folder: TempDir,
}

impl PgBouncer {
    /// Starts it in front of the PostgreSQL on that port of 127.0.0.1.
    ///
    /// `settings` are those of the section `[pgbouncer]`, such as `("max_client_conn", "10")`; the
    /// others have PgBouncer's defaults.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start(server: u16, mode: Mode, settings: &[(&str, &str)]) -> Self {
        let mut pooler =
            Self::prepare(server, mode, settings).expect("a folder for PgBouncer can be made");
        pooler.resume().await;
        pooler
    }

    fn prepare(server: u16, mode: Mode, settings: &[(&str, &str)]) -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("litestripe-pgbouncer-")
            .tempdir()?;
        let owner = Owner::find(folder.path())?;
        if let Some(owner) = &owner {
            owner.take(folder.path())?;
        }
        let pooler = Self {
            process: None,
            port: port::free(),
            owner,
            folder,
        };
        pooler.configure(server, mode, settings)?;
        Ok(pooler)
    }

    /// The URL of a database behind it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on which it listens when it runs.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process, for sending it signals and reading its log; `None` before it is started and
    /// after it was stopped or killed.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Stops it, which closes every connection.
    pub async fn stop(&mut self) {
        self.end(Signal::Term).await;
    }

    /// Kills it as a crash would.
    pub async fn kill(&mut self) {
        self.end(Signal::Kill).await;
    }

    /// Stops and resumes it.
    ///
    /// # Panics
    /// When it does not start again; the message contains its log.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.resume().await;
    }

    /// Starts it with its port, for the first time or again. Does nothing if it runs.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn resume(&mut self) {
        if self.process.as_ref().is_some_and(Process::is_running) {
            return;
        }
        let program = tools::pgbouncer().unwrap_or_else(|problem| panic!("{problem}"));
        let mut command = process::command(program, Signal::Kill);
        command.arg("pgbouncer.ini");
        in_folder(&mut command, self.folder.path(), self.owner.as_ref());
        let process = Process::spawn("pgbouncer", command, None).expect("it can be started");
        let end = Instant::now() + START_DEADLINE;
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            assert!(
                process.is_running() && Instant::now() < end,
                "pgbouncer does not start:\n{}",
                process.log()
            );
            sleep(Duration::from_millis(10)).await;
        }
        self.process = Some(process);
    }

    /// Replaces its configuration, which takes effect when it is started the next time.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, server: u16, mode: Mode, settings: &[(&str, &str)]) -> io::Result<()> {
        let mode = match mode {
            Mode::Session => "session",
            Mode::Transaction => "transaction",
        };
        let mut text = format!(
            "[databases]\n* = host=127.0.0.1 port={server} user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {mode}\n",
            self.port
        );
        for (name, value) in settings {
            // Cannot fail for a string.
            let _ = writeln!(text, "{name} = {value}");
        }
        fs::write(self.folder.path().join("pgbouncer.ini"), text)
    }

    async fn end(&mut self, signal: Signal) {
        if let Some(process) = self.process.take() {
            process.signal(signal);
            process.wait(STOP_DEADLINE).await;
        }
    }
}
