//! Runs our programs as child processes. Their environment holds only `PATH` and what the test
//! sets, each has its own working folder (so it finds no other `.env` or `litestripe.db`), and
//! their output is kept for assertions.

use std::ffi::OsString;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{self, Process, Signal};

/// The programs may take up to 20 s for a graceful stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// A description of how to start a program. It can be used more than once.
#[derive(Clone, Debug)]
pub struct Launch {
    path: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    log: Option<PathBuf>,
}

/// A started program. Dropping it kills the program and removes its temporary folder.
///
/// Dereferences to its [`Process`]: `log`, `wait_for_log`, `signal`, `wait`.
#[derive(Debug)]
pub struct Program {
    // Declared first, so that the process has ended before its folder is removed.
    process: Process,
    folder: PathBuf,
    _own_folder: Option<TempDir>,
}

/// The exit status and output of a program that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Program {
    /// One of our programs, such as `litestripe-worker`, from the build of the running test.
    ///
    /// # Panics
    /// When it has not been built (`cargo build --workspace --bins`).
    pub fn named(name: &str) -> Launch {
        let path = folder()
            .map(|folder| folder.join(name))
            .expect("a test knows its own path");
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

    /// Sends `SIGTERM` and waits for its end.
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
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable. Otherwise the environment holds only `PATH`.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Sets the working folder, which the caller owns, in place of a temporary one.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Appends its log to that file, in place of an unnamed one.
    #[must_use]
    pub fn log(mut self, log: impl Into<PathBuf>) -> Self {
        self.log = Some(log.into());
        self
    }

    /// Gives it a stderr without a reader, as a log collector leaves it that has ended: each write
    /// fails.
    #[must_use]
    pub fn unread_stderr(mut self) -> Self {
        const SCRIPT: &str = r#"mkfifo log; exec 3<>log 2>log 3<&-; rm log; exec "$0" "$@""#;
        let program = std::mem::replace(&mut self.path, "/bin/sh".into());
        let shell = ["-c".into(), SCRIPT.into(), program.into()];
        self.arguments.splice(0..0, shell);
        self
    }

    /// Starts it. Does not notice if the program ends at once; waiting for it does.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self) -> Program {
        self.try_start()
            .unwrap_or_else(|problem| panic!("{}: {problem}", self.path.display()))
    }

    /// Does the same as [`Self::start`] for callers that show the error to a person.
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
            .expect("a temporary folder is made if none is given")
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

    /// Starts it and waits for its end, for commands that print something and exit.
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

/// The folder into which cargo puts the programs of this build.
pub fn folder() -> io::Result<PathBuf> {
    let current = std::env::current_exe()?;
    let folder = current.parent().unwrap_or(&current);
    // Tests are in the subfolder `deps`, examples in `examples`.
    let inner = folder.ends_with("deps") || folder.ends_with("examples");
    Ok(if inner {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    }
    .to_owned())
}
