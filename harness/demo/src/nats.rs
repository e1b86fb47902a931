//! A real nats-server with JetStream on 127.0.0.1, with its own port and store.
//!
//! It can be stopped or killed and then resumed with the same port and store, like a server after
//! an outage. May not know streams or subjects.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::ConnectOptions;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::process::{self, Process, Signal};
use crate::{port, tools};

/// A broker starts in about 30 ms; on two busy cores it has taken a second.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// A graceful stop first writes what JetStream holds in memory.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// The differences from a plain server with JetStream.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The port to listen on; `None` takes a free one.
    pub port: Option<u16>,
    /// The folder of its configuration file and its store, owned by the caller; `None` makes a
    /// temporary one.
    pub folder: Option<PathBuf>,
    /// The file of its log; `None` uses an unnamed one.
    pub log: Option<PathBuf>,
    /// Lines for the top level of the configuration file, such as `max_payload: 64KB`.
    pub config: String,
    /// Lines for its `jetstream` block, such as `sync_interval: always` or `max_file_store: 64MB`.
    pub jetstream: String,
    /// User and password of the test's own connections ([`Server::connect`]).
    pub user: Option<(String, String)>,
    /// Whether it is of the oldest version that Litestripe supports.
    pub is_oldest: bool,
}

/// A nats-server and its store. Dropping it kills the server and removes its temporary folder.
#[derive(Debug)]
pub struct Server {
    // Declared first, so that the process has ended before its folder is removed.
    process: Option<Process>,
    port: u16,
    folder: PathBuf,
    log: Option<PathBuf>,
    user: Option<(String, String)>,
    is_oldest: bool,
    _own_folder: Option<TempDir>,
}

impl Server {
    /// Starts a server on a free port.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// Starts a server on that port.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start_on(port: u16) -> Self {
        Self::start_with(Options {
            port: Some(port),
            ..Options::default()
        })
        .await
    }

    /// Starts a server with these options.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn start_with(options: Options) -> Self {
        let mut server = Self::prepare(options).expect("a folder for nats-server can be made");
        server.resume().await;
        server
    }

    /// Makes a server that does not run before [`Self::resume`]. Its URL is known already.
    pub fn prepare(options: Options) -> io::Result<Self> {
        let temporary = || {
            tempfile::Builder::new()
                .prefix("litestripe-nats-")
                .tempdir()
        };
        let own_folder = if options.folder.is_none() {
            Some(temporary()?)
        } else {
            None
        };
        let folder = options
            .folder
            .as_deref()
            .or(own_folder.as_ref().map(TempDir::path));
        let folder = folder
            .expect("a temporary folder is made if none is given")
            .to_owned();
        let port = options.port.unwrap_or_else(port::free);
        std::fs::write(folder.join("nats.conf"), config(port, &folder, &options))?;
        Ok(Self {
            process: None,
            port,
            folder,
            log: options.log,
            user: options.user,
            is_oldest: options.is_oldest,
            _own_folder: own_folder,
        })
    }

    /// The URL for clients.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port on which it listens when it runs.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of its configuration file and its JetStream store.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The process, for sending it signals and reading its log; `None` before it is started and
    /// after it was stopped or killed.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Changes its configuration file, which it reads again at once if it runs.
    ///
    /// # Panics
    /// When the file is gone.
    pub fn reconfigure(&self, change: impl FnOnce(String) -> String) {
        let path = self.folder.join("nats.conf");
        let config = std::fs::read_to_string(&path).expect("this server wrote it");
        std::fs::write(&path, change(config)).expect("the folder is this server's");
        if let Some(process) = &self.process {
            process.signal(Signal::Hup);
        }
    }

    /// Connects a client.
    pub async fn connect(&self) -> async_nats::Client {
        let options = match self.user.clone() {
            Some((name, password)) => ConnectOptions::with_user_and_password(name, password),
            None => ConnectOptions::new(),
        };
        options
            .connect(self.url())
            .await
            .expect("a running server accepts a client")
    }

    /// Stops it gracefully; the store stays.
    pub async fn stop(&mut self) {
        self.end(Signal::Term).await;
    }

    /// Kills it as a crash would; the store stays.
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

    /// Replaces a server of the oldest version by today's, with the same store.
    ///
    /// # Panics
    /// When it does not start; the message contains its log.
    pub async fn upgrade(&mut self) {
        self.is_oldest = false;
        self.restart().await;
    }

    /// Starts it with its port and store, for the first time or again. Does nothing if it runs.
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
    /// When nats-server is missing or does not answer; the text contains its log.
    pub async fn try_resume(&mut self) -> io::Result<()> {
        if self.process.as_ref().is_some_and(Process::is_running) {
            return Ok(());
        }
        let program = if self.is_oldest {
            tools::oldest_nats_server()?
        } else {
            tools::nats_server()?
        };
        let mut command = process::command(program, Signal::Kill);
        command.arg("-c").arg(self.folder.join("nats.conf"));
        let process = Process::spawn("nats-server", command, self.log.as_deref())?;
        let end = Instant::now() + START_DEADLINE;
        while !answers(self.port).await {
            let ended = !process.is_running();
            if ended {
                // Returns at once; afterwards the log is complete.
                process.wait(STOP_DEADLINE).await;
            }
            if ended || Instant::now() > end {
                let log = process.log();
                return Err(io::Error::other(format!(
                    "nats-server does not start:\n{log}"
                )));
            }
            sleep(Duration::from_millis(5)).await;
        }
        self.process = Some(process);
        Ok(())
    }

    async fn end(&mut self, signal: Signal) {
        if let Some(process) = self.process.take() {
            process.signal(signal);
            process.wait(STOP_DEADLINE).await;
        }
    }
}

fn config(port: u16, folder: &Path, options: &Options) -> String {
    let Options {
        config, jetstream, ..
    } = options;
    let store = folder.join("store");
    format!(
        "listen: \"127.0.0.1:{port}\"\n\
         server_name: \"litestripe-{port}\"\n\
         jetstream {{\n  store_dir: {store:?}\n{jetstream}\n}}\n\
         {config}\n"
    )
}

/// Returns whether the server greets with `INFO {…}`. It listens only once JetStream is ready.
async fn answers(port: u16) -> bool {
    let greeting = async {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await.ok()?;
        line.starts_with("INFO ").then_some(())
    };
    timeout(Duration::from_secs(1), greeting)
        .await
        .is_ok_and(|greeting| greeting.is_some())
}
