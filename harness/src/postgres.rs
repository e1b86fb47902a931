//! A real PostgreSQL on 127.0.0.1 with its own port and folder, which creates empty databases on
//! request.
//!
//! `initdb` takes a second, so its result is kept in the build's folder and copied. `initdb` and
//! `postgres` refuse to run as root; then both run as an unprivileged user that owns the temporary
//! folder. Durability is PostgreSQL's default (`fsync` on) unless a test changes it. Two servers
//! can be a primary and its standby, and change roles. May not know our schema.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, QueryResult, Statement,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::process::{self, Process, Signal};
use crate::{port, program, tools};

/// A server starts in about 0.2 s; after a kill it first reads its write-ahead log.
const START_DEADLINE: Duration = Duration::from_secs(30);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Increase it with every change of `init` below, so that no older template is used.
const RECIPE: u32 = 3;

/// The differences from a plain server.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The port to listen on; `None` takes a free one.
    pub port: Option<u16>,
    /// Settings as for `postgresql.conf`, such as `("fsync", "off")`.
    pub settings: Vec<(String, String)>,
}

/// A PostgreSQL server and its data. Dropping it ends the server and removes the data.
#[derive(Debug)]
pub struct Server {
    process: Option<Process>,
    port: u16,
    settings: Vec<(String, String)>,
    owner: Option<Owner>,
    databases: AtomicU32,
    folder: TempDir,
}

impl Server {
    /// Starts a server on a free port.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// Starts a server with these options.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start_with(options: Options) -> Self {
        let mut server = Self::prepare(options).unwrap_or_else(|problem| panic!("{problem}"));
        server.resume().await;
        server
    }

    /// Makes a server that does not run before [`Self::resume`]. Its URL is known already.
    ///
    /// # Errors
    /// When PostgreSQL is missing, `initdb` fails, or the folder cannot be written.
    pub fn prepare(options: Options) -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("litestripe-postgres-")
            .tempdir()?;
        let owner = Owner::find(folder.path())?;
        let template = template(owner.as_ref())?;
        copy(&template, &folder.path().join("data"), owner.as_ref())?;
        if let Some(owner) = &owner {
            owner.take(folder.path())?;
        }
        let port = options.port.unwrap_or_else(port::free);
        let databases = AtomicU32::new(0);
        Ok(Self {
            process: None,
            port,
            settings: options.settings,
            owner,
            databases,
            folder,
        })
    }

    /// The URL of a database of that name, which need not exist. `postgres` always exists.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Creates an empty database and returns its URL.
    pub async fn database(&self) -> String {
        let name = format!(
            "litestripe_{}",
            self.databases.fetch_add(1, Ordering::Relaxed) + 1
        );
        self.run(&format!("CREATE DATABASE {name}")).await;
        self.url(&name)
    }

    /// Makes this server a standby that follows `primary` by streaming replication. Its own data is
    /// replaced by a copy of the primary's; its port stays. Ends when it answers queries.
    ///
    /// Made without `pg_basebackup` and `pg_rewind`, which not every package of PostgreSQL
    /// contains.
    ///
    /// # Panics
    /// When `primary` does not run, or this server does not start.
    pub async fn follow(&mut self, primary: &Self) {
        self.stop().await;
        let data = self.data();
        fs::remove_dir_all(&data).expect("the folder is ours");
        // One session, because the backup ends when its session does.
        let session = primary.session().await;
        // Of the write-ahead log so much is kept for a standby that is away.
        query(&session, "ALTER SYSTEM SET wal_keep_size = '256MB'").await;
        query(&session, "SELECT pg_reload_conf()").await;
        query(&session, "SELECT pg_backup_start('standby', true)").await;
        copy(&primary.data(), &data, self.owner.as_ref()).expect("the data can be copied");
        let label = query(&session, "SELECT labelfile FROM pg_backup_stop(false)").await;
        let label: String = label
            .first()
            .and_then(|row| row.try_get("", "labelfile").ok())
            .expect("a backup has a label");
        session.close().await.expect("a connection can be closed");
        let follow = format!(
            "primary_conninfo = 'host=127.0.0.1 port={} user=postgres'\n\
             wal_retrieve_retry_interval = '100ms'\n",
            primary.port
        );
        let automatic = data.join("postgresql.auto.conf");
        let settings = fs::read_to_string(&automatic).expect("every server has this file");
        // The write-ahead log was written to while it was copied. It comes by replication instead.
        for entry in fs::read_dir(data.join("pg_wal")).expect("every server has this folder") {
            // Fails for the folder in it, which stays.
            let _ = fs::remove_file(entry.expect("a folder can be read").path());
        }
        let _ = fs::remove_file(data.join("postmaster.pid"));
        for (name, text) in [
            ("backup_label", label),
            ("standby.signal", String::new()),
            ("postgresql.auto.conf", settings + &follow),
        ] {
            self.write(name, &text);
        }
        self.resume().await;
    }

    /// Makes a standby the primary. Ends when it accepts writes.
    ///
    /// # Panics
    /// When it does not run or is no standby.
    pub async fn promote(&self) {
        self.run("SELECT pg_promote()").await;
    }

    /// Whether a commit waits until a standby has it too, as long as this is the primary. Without a
    /// standby that follows, a commit then waits until there is one.
    ///
    /// # Panics
    /// When it does not run.
    pub async fn set_synchronous(&self, is_synchronous: bool) {
        let names = if is_synchronous { "*" } else { "" };
        self.run(&format!(
            "ALTER SYSTEM SET synchronous_standby_names = '{names}'"
        ))
        .await;
        self.run("SELECT pg_reload_conf()").await;
    }

    /// Runs a statement in a session of its own.
    async fn run(&self, sql: &str) {
        let session = self.session().await;
        query(&session, sql).await;
        session.close().await.expect("a connection can be closed");
    }

    async fn session(&self) -> DatabaseConnection {
        let mut options = ConnectOptions::new(self.url("postgres"));
        options.max_connections(1).sqlx_logging(false);
        Database::connect(options)
            .await
            .expect("a running server accepts a client")
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Writes a file of the data folder.
    fn write(&self, name: &str, text: &str) {
        let path = self.data().join(name);
        fs::write(&path, text).expect("the folder is ours");
        if let Some(owner) = &self.owner {
            owner.take(&path).expect("root may give files away");
        }
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

    /// Stops it, which closes every connection; the data stays.
    pub async fn stop(&mut self) {
        self.end(Signal::Int).await;
    }

    /// Kills it as a crash would; the data stays.
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

    /// Starts it with its port and data, for the first time or again. Does nothing if it runs.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn resume(&mut self) {
        self.try_resume()
            .await
            .unwrap_or_else(|problem| panic!("{problem}"));
    }

    /// Does the same as [`Self::resume`] for callers that show the error to a person.
    ///
    /// # Errors
    /// When it does not answer; the text contains its log.
    pub async fn try_resume(&mut self) -> io::Result<()> {
        if self.process.as_ref().is_some_and(Process::is_running) {
            return Ok(());
        }
        let end = Instant::now() + START_DEADLINE;
        let mut process = self.spawn()?;
        while !answers(self.port).await {
            if !process.is_running() {
                let log = process.log();
                // The child processes of a killed server need a moment to notice its end. Until
                // then they hold its shared memory, and a new server refuses to start.
                if !log.contains("shared memory block") || Instant::now() > end {
                    return Err(io::Error::other(format!("postgres does not start:\n{log}")));
                }
                process = self.spawn()?;
            } else if Instant::now() > end {
                let log = process.log();
                return Err(io::Error::other(format!(
                    "postgres does not answer:\n{log}"
                )));
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.process = Some(process);
        Ok(())
    }

    fn spawn(&self) -> io::Result<Process> {
        let postgres = tools::postgres_bin()?.join("postgres");
        let folder = self.folder.path();
        let mut command = process::command(&postgres, Signal::Quit);
        command.arg("-D").arg(self.data());
        command
            .arg("-k")
            .arg(folder)
            .arg("-p")
            .arg(self.port.to_string());
        command.args(["-c", "listen_addresses=127.0.0.1"]);
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        in_folder(&mut command, folder, self.owner.as_ref());
        Process::spawn("postgres", command, None)
    }

    async fn end(&mut self, signal: Signal) {
        if let Some(process) = self.process.take() {
            process.signal(signal);
            process.wait(STOP_DEADLINE).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            // Not killed, because a killed server leaves its System V shared memory behind.
            process.end(Signal::Quit, Duration::from_secs(5));
        }
    }
}

async fn query(session: &DatabaseConnection, sql: &str) -> Vec<QueryResult> {
    let statement = Statement::from_string(session.get_database_backend(), sql);
    session
        .query_all_raw(statement)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// The user as which PostgreSQL and PgBouncer run if this process runs as root.
#[derive(Debug)]
pub(crate) struct Owner {
    user: u32,
    group: u32,
}

impl Owner {
    /// Finds the user; `None` if this process is not root, which the owner of a new folder shows.
    pub(crate) fn find(new_folder: &Path) -> io::Result<Option<Self>> {
        if fs::metadata(new_folder)?.uid() != 0 {
            return Ok(None);
        }
        let users = fs::read_to_string("/etc/passwd")?;
        let user = ["postgres", "nobody"]
            .iter()
            .find_map(|wanted| Self::named(wanted, &users));
        let missing =
            "PostgreSQL refuses to run as root, and no user `postgres` or `nobody` exists";
        user.map(Some).ok_or_else(|| io::Error::other(missing))
    }

    /// Finds a user in the lines `name:password:user:group:…` of `/etc/passwd`.
    fn named(wanted: &str, users: &str) -> Option<Self> {
        let mut fields = users
            .lines()
            .map(|line| line.split(':'))
            .find_map(|mut fields| (fields.next() == Some(wanted)).then(|| fields.skip(1)))?;
        let user = fields.next()?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        Some(Self { user, group })
    }

    pub(crate) fn take(&self, path: &Path) -> io::Result<()> {
        chown(path, Some(self.user), Some(self.group))
    }
}

/// Makes `command` run in `folder` as the user `owner`. Of the environment only `PATH` is kept,
/// because `PG…` variables change what `initdb` and `postgres` do.
pub(crate) fn in_folder(command: &mut Command, folder: &Path, owner: Option<&Owner>) {
    command
        .current_dir(folder)
        .env_clear()
        .env("LC_ALL", "C")
        .env("TZ", "UTC");
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    if let Some(owner) = owner {
        command.uid(owner.user).gid(owner.group);
    }
}

/// Returns a folder made by `initdb`. The first test of a build that needs it makes it.
fn template(owner: Option<&Owner>) -> io::Result<PathBuf> {
    let initdb = tools::postgres_bin()?.join("initdb");
    let version = Command::new(&initdb).arg("--version").output()?.stdout;
    // `initdb (PostgreSQL) 15.18 (Debian …)`
    let version = String::from_utf8_lossy(&version);
    let version = version.split_whitespace().nth(2).unwrap_or("unknown");
    let templates = program::folder()?.join("postgres-templates");
    fs::create_dir_all(&templates)?;
    let template = templates.join(format!("{version}-{RECIPE}"));
    if template.exists() {
        return Ok(template);
    }
    let lock = File::create(templates.join("lock"))?;
    lock.lock()?;
    if !template.exists() {
        let folder = tempfile::Builder::new()
            .prefix("litestripe-initdb-")
            .tempdir()?;
        if let Some(owner) = owner {
            owner.take(folder.path())?;
        }
        let made = folder.path().join("data");
        init(&initdb, folder.path(), &made, owner)?;
        // Renamed only when complete, so that an interrupted copy is never used as a template.
        let partial = templates.join("partial");
        let _ = fs::remove_dir_all(&partial);
        copy(&made, &partial, None)?;
        fs::rename(&partial, &template)?;
    }
    Ok(template)
}

fn init(initdb: &Path, folder: &Path, data: &Path, owner: Option<&Owner>) -> io::Result<()> {
    let mut command = Command::new(initdb);
    command
        .arg("-D")
        .arg(data)
        .args(["--username=postgres", "--auth=trust"]);
    command.args(["--encoding=UTF8", "--locale=C", "--no-sync"]);
    in_folder(&mut command, folder, owner);
    let output = command.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("initdb failed:\n{text}")));
    }
    // After a kill the server first syncs its 1,300 files. By default it does so one by one, which
    // takes ten seconds on a busy disk. PostgreSQL 14 and newer can sync them all at once on Linux.
    let settings = data.join("postgresql.conf");
    let text = fs::read_to_string(&settings)?;
    if cfg!(target_os = "linux") && text.contains("recovery_init_sync_method") {
        fs::write(&settings, text + "\nrecovery_init_sync_method = syncfs\n")?;
    }
    Ok(())
}

/// Copies a folder with its permissions and gives the copy to `owner`. The folder may be that of a
/// running server in a backup: files may vanish.
fn copy(from: &Path, to: &Path, owner: Option<&Owner>) -> io::Result<()> {
    fs::create_dir(to)?;
    // PostgreSQL refuses a data folder that other users may enter.
    fs::set_permissions(to, fs::Permissions::from_mode(0o700))?;
    if let Some(owner) = owner {
        owner.take(to)?;
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target, owner)?;
            continue;
        }
        match fs::copy(entry.path(), &target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            copied => copied?,
        };
        if let Some(owner) = owner {
            owner.take(&target)?;
        }
    }
    Ok(())
}

/// Returns whether the server accepts a client: one that is starting or recovering answers with an
/// error (`E`), a ready one with an authentication request (`R`).
async fn answers(port: u16) -> bool {
    // Length, protocol 3.0, then pairs of name and value.
    const STARTUP: &[u8] = b"\0\0\0\x29\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    let first_byte = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(STARTUP).await.ok()?;
        stream.read_u8().await.ok()
    };
    timeout(Duration::from_secs(1), first_byte)
        .await
        .is_ok_and(|byte| byte == Some(b'R'))
}
