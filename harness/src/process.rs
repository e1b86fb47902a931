//! A child process that this process owns: its output is kept, and it is killed and reaped when its
//! owner lets go, or by the kernel when the owner is killed.
//!
//! Only the pid of a child that has not been reaped is ever signalled, so nobody else's process can
//! be hit. May not know which program it runs.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::eventually;

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
    /// `SIGKILL`: gone at once.
    Kill,
    /// `SIGSTOP`: frozen until [`Signal::Cont`].
    Stop,
    /// `SIGCONT`: thawed.
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

/// A running child, or one whose end has been seen.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Mutex<Child>,
    output: Arc<Mutex<Output>>,
    readers: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Vec<Line>,
    copy: Option<File>,
}

#[derive(Debug)]
struct Line {
    source: Source,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Stdout,
    Stderr,
}

/// A command that runs `program` and gets `signal` when this process dies without dropping it.
///
/// The caller adds arguments and environment. Where util-linux's `setpriv` is missing, the command
/// is the plain program, and only dropping its [`Process`] ends it.
pub(crate) fn command(program: &Path, signal: Signal) -> Command {
    let Some(setpriv) = setpriv() else { return Command::new(program) };
    let mut command = Command::new(setpriv);
    // It replaces itself by the program, so the pid is the program's.
    command.args(["--pdeathsig", signal.name(), "--"]).arg(program);
    // A Ctrl-C in the terminal goes to its whole process group. The child's end is its owner's to
    // decide, and it comes with the owner's in any case.
    command.process_group(0);
    command
}

/// The path of a `setpriv` that can set a parent-death signal: code of our own would be `unsafe`.
fn setpriv() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|folder| folder.join("setpriv")).find(|setpriv| {
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
    /// `name` heads its log when a test fails.
    ///
    /// # Errors
    /// When the program cannot be started at all.
    pub(crate) fn spawn(name: &str, mut command: Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn_from_lasting_thread(command)?;
        let output = Arc::<Mutex<Output>>::default();
        let stdout = child.stdout.take().expect("stdout is piped above");
        let stderr = child.stderr.take().expect("stderr is piped above");
        let readers = vec![read_lines(stdout, Source::Stdout, &output), read_lines(stderr, Source::Stderr, &output)];
        Ok(Self { name: name.to_owned(), child: Mutex::new(child), output, readers: Mutex::new(readers) })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child().id()
    }

    /// Whether it has not ended yet; a stopped (frozen) process is running.
    pub fn is_running(&self) -> bool {
        self.try_wait().is_none()
    }

    /// Everything it has written so far, stdout and stderr as they came.
    pub fn log(&self) -> String {
        self.text(|_| true)
    }

    /// Writes its output, what there is and what will come, to that new file as well.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn copy_log_to(&self, path: &Path) -> io::Result<()> {
        let mut file = File::create(path)?;
        let mut output = self.output();
        for line in &output.lines {
            writeln!(file, "{}", line.text)?;
        }
        output.copy = Some(file);
        Ok(())
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        self.text(|source| source == Source::Stdout)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        self.text(|source| source == Source::Stderr)
    }

    /// Waits for a line that contains `text`, also one written before the call, and returns it.
    ///
    /// # Panics
    /// When `deadline` has passed, or the process ended without writing it.
    pub async fn wait_for_log(&self, text: &str, deadline: Duration) -> String {
        let what = format!("{} to log {text:?}", self.name);
        eventually(&what, deadline, async || {
            let ended = self.try_wait();
            if ended.is_some() {
                self.read_to_the_end().await;
            }
            let output = self.output();
            if let Some(line) = output.lines.iter().find(|line| line.text.contains(text)) {
                return Ok(line.text.clone());
            }
            let last = output.lines.last().map_or("", |line| line.text.as_str()).to_owned();
            drop(output);
            if let Some(status) = ended {
                panic!("waited for {what}, but it ended ({status}):\n{}", self.log());
            }
            Err(last)
        })
        .await
    }

    /// Sends a signal; does nothing when the process has ended.
    ///
    /// # Panics
    /// When the signal cannot be sent.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // Not reaped before this function ends, because the lock is held: the pid is still its own.
        if child.try_wait().expect("a child of ours can be waited for").is_some() {
            return;
        }
        // The shell's own `kill`: the program of that name is not on every machine.
        let kill = format!("kill -s {} {}", signal.name(), child.id());
        let status = Command::new("sh").args(["-c", &kill]).status().expect("every Unix has sh");
        assert!(status.success(), "`{kill}` failed");
    }

    /// Waits for its end and for the last of its output.
    ///
    /// # Panics
    /// When it is still running after `deadline`.
    pub async fn wait(&self, deadline: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        let status = eventually(&what, deadline, async || {
            self.try_wait().ok_or_else(|| format!("it runs; its log:\n{}", self.log()))
        })
        .await;
        self.read_to_the_end().await;
        status
    }

    /// Sends `signal` and gives the process `bound` to end, without an executor: for `Drop`.
    pub(crate) fn end(&self, signal: Signal, bound: Duration) {
        self.signal(signal);
        let end = Instant::now() + bound;
        while self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The readers end with the pipes, unless a grandchild keeps those open: hence a bound.
    async fn read_to_the_end(&self) {
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end && !self.readers.lock().expect(LOCK).iter().all(JoinHandle::is_finished) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn try_wait(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("a child of ours can be waited for")
    }

    fn text(&self, wanted: impl Fn(Source) -> bool) -> String {
        self.output().lines.iter().filter(|line| wanted(line.source)).fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "{}", line.text);
            text
        })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect(LOCK)
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().expect(LOCK)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}---", self.name, self.log());
        }
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Both fail only for a child that has been reaped.
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
                // The asker waits for the answer, so there is one to send it to.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, answer) = mpsc::channel();
    spawner.send((command, reply)).expect("the spawner ends with the process");
    answer.recv().expect("the spawner answers every request")
}

fn read_lines(pipe: impl Read + Send + 'static, source: Source, output: &Arc<Mutex<Output>>) -> JoinHandle<()> {
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { return };
            let text = String::from_utf8_lossy(&line).into_owned();
            let mut output = output.lock().expect(LOCK);
            if let Some(copy) = &mut output.copy {
                // A full disk must not stop the reading, or the child would hang on its pipe.
                let _ = writeln!(copy, "{text}");
            }
            output.lines.push(Line { source, text });
        }
    })
}
