//! A child process of this process. Its output is kept. Dropping it kills and reaps the child, and
//! the kernel kills the child if this process is killed.
//!
//! Signals go only to children that have not been reaped, so no other process can be hit. May not
//! know which program it runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::eventually;

/// How long a process may take to freeze: as long as its slowest disk access.
const FREEZE_MAX: Duration = Duration::from_secs(30);

/// The signals that tests send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// `SIGTERM`: stop gracefully.
    Term,
    /// `SIGINT`: what Ctrl-C sends.
    Int,
    /// `SIGQUIT`: PostgreSQL's immediate shutdown.
    Quit,
    /// `SIGHUP`: what a closed terminal sends.
    Hup,
    /// `SIGKILL`: ends it at once.
    Kill,
    /// `SIGSTOP`: freezes it until [`Signal::Cont`].
    Stop,
    /// `SIGCONT`: lets it continue.
    Cont,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Self::Term => "TERM",
            Self::Int => "INT",
            Self::Quit => "QUIT",
            Self::Hup => "HUP",
            Self::Kill => "KILL",
            Self::Stop => "STOP",
            Self::Cont => "CONT",
        }
    }
}

/// A child that runs or has ended.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Mutex<Child>,
    // Files, not pipes: all that it wrote before it answered a request can be read after the
    // answer.
    stdout: File,
    stderr: File,
}

/// Makes a command that runs `program` and receives `signal` if this process dies without dropping
/// it.
///
/// The caller adds arguments and environment. Without util-linux's `setpriv` the command is the
/// plain program, and only dropping its [`Process`] ends it.
pub fn command(program: &Path, signal: Signal) -> Command {
    let Some(setpriv) = setpriv() else {
        return Command::new(program);
    };
    let mut command = Command::new(setpriv);
    // `setpriv` replaces itself with the program, so the pid is the program's.
    command
        .args(["--pdeathsig", signal.name(), "--"])
        .arg(program);
    // Ctrl-C in a terminal sends a signal to the whole process group. In its own group the child
    // does not receive it, so that only its owner ends it.
    command.process_group(0);
    command
}

/// Finds a `setpriv` that can set a parent-death signal; without that program it takes `unsafe`
/// code.
fn setpriv() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path)
                .map(|folder| folder.join("setpriv"))
                .find(|setpriv| {
                    Command::new(setpriv)
                        .args(["--pdeathsig", "KILL", "--", "true"])
                        .stdout(Stdio::null())
                        .stderr(Stdio::null())
                        .status()
                        .is_ok_and(|status| status.success())
                })
        })
        .as_deref()
}

impl Process {
    /// Starts `command` with its output captured and no standard input.
    ///
    /// `name` is the title of its log when a test fails. Its stderr is appended to the file `log`,
    /// or written to an unnamed file.
    pub fn spawn(name: &str, mut command: Command, log: Option<&Path>) -> io::Result<Self> {
        let stdout = tempfile::tempfile()?;
        let stderr = match log {
            Some(path) => File::options()
                .create(true)
                .read(true)
                .append(true)
                .open(path)?,
            None => tempfile::tempfile()?,
        };
        command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone()?)
            .stderr(stderr.try_clone()?);
        let child = Mutex::new(spawn_from_lasting_thread(command)?);
        Ok(Self {
            name: name.to_owned(),
            child,
            stdout,
            stderr,
        })
    }

    pub fn id(&self) -> u32 {
        self.child().id()
    }

    /// Returns whether it has not ended yet. A frozen process is running.
    pub fn is_running(&self) -> bool {
        self.try_wait().is_none()
    }

    /// Its output so far: stdout, then stderr.
    pub fn log(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// Its output to stdout so far.
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Its output to stderr so far.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Waits for a log line that contains `text`, and returns it. A line written earlier counts
    /// too.
    ///
    /// # Panics
    /// When `deadline` has passed, or the process ended without writing such a line.
    pub async fn wait_for_log(&self, text: &str, deadline: Duration) -> String {
        let what = format!("{} to log {text:?}", self.name);
        eventually(&what, deadline, async || {
            // Checked before the log is read: if it has ended, the log is complete.
            let ended = self.try_wait();
            let log = self.log();
            let is_whole = |line: &&str| line.ends_with('\n') || ended.is_some();
            let mut lines = log.split_inclusive('\n').filter(is_whole);
            if let Some(line) = lines.find(|line| line.contains(text)) {
                return Ok(line.trim_end().to_owned());
            }
            if let Some(status) = ended {
                panic!("waited for {what}, but it ended ({status}):\n{log}");
            }
            Err(log.lines().next_back().unwrap_or_default().to_owned())
        })
        .await
    }

    /// Sends a signal. Does nothing if the process has ended.
    ///
    /// For [`Signal::Stop`] it returns once all threads are frozen: `kill` itself returns as soon
    /// as the signal is pending for one thread, and the others run until that thread has handled
    /// it.
    ///
    /// # Panics
    /// When the signal cannot be sent, or the process does not freeze.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // The lock prevents that it is reaped before this function ends, so the pid stays its own.
        if child
            .try_wait()
            .expect("a child of ours can be waited for")
            .is_some()
        {
            return;
        }
        // Uses the shell's `kill`, because the program of that name is not installed everywhere.
        let kill = format!("kill -s {} {}", signal.name(), child.id());
        let status = Command::new("sh")
            .args(["-c", &kill])
            .status()
            .expect("every Unix has sh");
        assert!(status.success(), "`{kill}` failed");
        let end = Instant::now() + FREEZE_MAX;
        while signal == Signal::Stop && !is_stopped(child.id()) {
            assert!(Instant::now() < end, "{} does not freeze", self.name);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it is still running after `deadline`.
    pub async fn wait(&self, deadline: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        eventually(&what, deadline, async || {
            self.try_wait()
                .ok_or_else(|| format!("it still runs; its log:\n{}", self.log()))
        })
        .await
    }

    /// Sends `signal` and waits up to `bound` for the end. Blocks the thread, for use in `Drop`.
    pub fn end(&self, signal: Signal, bound: Duration) {
        self.signal(signal);
        let end = Instant::now() + bound;
        while self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn try_wait(&self) -> Option<ExitStatus> {
        self.child()
            .try_wait()
            .expect("a child of ours can be waited for")
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect(LOCK)
    }
}

/// Returns whether all threads of a process are frozen, or it has ended. See `proc_pid_stat(5)`.
fn is_stopped(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The state follows the name in brackets, which may hold any character. A thread that has
        // just ended has no `stat`.
        stat.rsplit_once(')')
            .is_none_or(|(_, rest)| rest.trim_start().starts_with(['T', 't', 'Z', 'X']))
    })
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}---", self.name, self.log());
        }
        let child = self
            .child
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Both fail only if the child has been reaped.
        let _ = child.kill();
        let _ = child.wait();
    }
}

const LOCK: &str = "no holder of this lock panics";

/// Starts a child from a thread that lives as long as this process.
///
/// The kernel sends the parent-death signal when the *thread* that forked ends, and an async
/// runtime's threads come and go.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Request = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, reply) in requests {
                // Cannot fail, because the requester waits for the answer.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, answer) = mpsc::channel();
    spawner
        .send((command, reply))
        .expect("the spawner ends with the process");
    answer.recv().expect("the spawner answers every request")
}

fn read(file: &File) -> String {
    let length = file.metadata().expect("an open file has a length").len();
    let mut bytes = vec![0; usize::try_from(length).expect("a log fits into memory")];
    file.read_exact_at(&mut bytes, 0)
        .expect("the log can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}
