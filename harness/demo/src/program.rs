//! Our own programs as child processes: an environment that holds only what the test gives, a
//! working folder of their own (so neither `.env` nor `litestripe.db` is anyone else's), and their
//! output kept for assertions.

use std::ffi::OsString;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{self, Process, Signal};

/// A graceful stop may take the programs up to 20 s; more is a fault.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How to start a program; can be started more than once.
#[derive(Clone, Debug)]
pub struct Launch {
    path: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    log: Option<PathBuf>,
}

/// A started program; it is killed and its own folder removed when it is dropped.
///
/// Dereferences to its [`Process`]: `log`, `wait_for_log`, `signal`, `wait`.
#[derive(Debug)]
pub struct Program {
    // Declared first, so that the process has ended before its folder is removed.
    process: Process,
    folder: PathBuf,
    _own_folder: Option<TempDir>,
}

/// What a program that ended by itself left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to stdout.
    pub stdout: String,
    /// All it wrote to stderr.
    pub stderr: String,
}

impl Program {
    /// One of our own programs, such as `litestripe-worker`, as built beside the running test.
    ///
    /// # Panics
    /// When it has not been built (`cargo build --workspace --bins`).
    pub fn named(name: &str) -> Launch {
        let path = folder()
            .map(|folder| folder.join(name))
            .expect("a test knows where it lies");
        assert!(
            path.exists(),
            "{name} is not built: run `cargo build --workspace --bins`"
        );
        Self::at(path)
    }

    /// Any program, such as the Python of [`crate::tools::python`].
    pub fn at(path: impl Into<PathBuf>) -> Launch {
        Launch {
            path: path.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            folder: None,
            log: None,
        }
    }

    /// Its working folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Asks it to stop (`SIGTERM`) and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn stop(&self) -> ExitStatus {
        self.process.signal(Signal::Term);
        self.process.wait(STOP_DEADLINE).await
    }

    /// Kills it as a crash would and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn kill(&self) -> ExitStatus {
        self.process.signal(Signal::Kill);
        self.process.wait(STOP_DEADLINE).await
    }
}

impl Deref for Program {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Launch {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment, which otherwise holds `PATH` alone.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Runs it in that folder, which the caller owns, instead of a temporary one.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Has it log to that file, behind what it holds, instead of one that nobody sees.
    #[must_use]
    pub fn log(mut self, log: impl Into<PathBuf>) -> Self {
        self.log = Some(log.into());
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it cannot be started; that it ends at once is seen by whoever waits for it.
    pub fn start(&self) -> Program {
        self.try_start()
            .unwrap_or_else(|problem| panic!("{}: {problem}", self.path.display()))
    }

    /// [`Self::start`] for callers that have a person to tell.
    ///
    /// # Errors
    /// When it cannot be started, or its folder cannot be made.
    pub fn try_start(&self) -> io::Result<Program> {
        let temporary = || tempfile::Builder::new().prefix("litestripe-run-").tempdir();
        let own_folder = if self.folder.is_none() {
            Some(temporary()?)
        } else {
            None
        };
        let folder = self
            .folder
            .as_deref()
            .or(own_folder.as_ref().map(TempDir::path));
        let folder = folder
            .expect("one is made above where none is given")
            .to_owned();
        let mut command = process::command(&self.path, Signal::Kill);
        command.args(&self.arguments).current_dir(&folder);
        command
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let name = self
            .path
            .file_name()
            .unwrap_or(self.path.as_os_str())
            .to_string_lossy();
        let process = Process::spawn(&name, command, self.log.as_deref())?;
        Ok(Program {
            process,
            folder,
            _own_folder: own_folder,
        })
    }

    /// Starts it and waits for its end: for commands that answer and exit.
    ///
    /// # Panics
    /// When it cannot be started or still runs after `deadline`.
    pub async fn run(&self, deadline: Duration) -> Finished {
        let program = self.start();
        let status = program.wait(deadline).await;
        Finished {
            status,
            stdout: program.stdout(),
            stderr: program.stderr(),
        }
    }
}

/// The folder that cargo puts the programs of this build into.
///
/// # Errors
/// When the running program's own path is unknown.
pub fn folder() -> io::Result<PathBuf> {
    let current = std::env::current_exe()?;
    let folder = current.parent().unwrap_or(&current);
    // Tests lie in `deps` and examples in `examples`, both beside the programs.
    let inner = folder.ends_with("deps") || folder.ends_with("examples");
    Ok(if inner {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    }
    .to_owned())
}
