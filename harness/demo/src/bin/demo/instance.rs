//! A broker, an ingress and a worker with their own folder and ports, so that several demos can run
//! side by side.
//!
//! Owns the three processes, the folder and, for thin events, a stub of Stripe's API; dropping it
//! ends the processes and removes the folder.

use std::fmt::Display;
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use litestripe_contract::exit;
use litestripe_demo::process::{Process, Signal};
use litestripe_demo::program::{self, Launch, Program};
use litestripe_demo::stripe::api::{API_KEY, Api};
use litestripe_demo::{nats, port, stripe, tools};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::screen::{Screen, Tone};

const INGRESS: &str = "litestripe-ingress";
const WORKER: &str = "litestripe-worker";
const SENDER: &str = "send";

/// How long a program may take until it is ready: connected, migrated, streams created. It takes
/// well under a second on an idle machine.
const READY_MAX: Duration = Duration::from_secs(30);
/// How long a program may take to stop. The programs allow themselves 20 s; here they need less
/// than one.
const STOP_MAX: Duration = Duration::from_secs(20);
/// The time between two checks of a condition.
const PAUSE: Duration = Duration::from_millis(20);
/// How long to wait, after a failure, for a child process to be seen dead: that may be the cause.
const CAUSE_MAX: Duration = Duration::from_millis(300);
/// How many lines of a dead child's log are shown.
const LAST_LINES: usize = 12;

/// One bridge.
pub(crate) struct Instance {
    // In the order in which they are dropped: the processes before the folder they write to.
    ingress: Option<Program>,
    worker: Option<Program>,
    broker: nats::Server,
    stripe: Option<Api>,
    ingress_port: u16,
    worker_port: u16,
    uuid: Uuid,
    secret: String,
    folder: TempDir,
}

impl Instance {
    /// Makes an instance that does not run yet. With `keep` its folder is not removed at the end.
    pub(crate) fn prepare(keep: bool) -> Result<Self, String> {
        let cannot = |problem: io::Error| format!("cannot create a folder for the demo: {problem}");
        let mut folder = tempfile::Builder::new()
            .prefix("litestripe-demo-")
            .tempdir()
            .map_err(cannot)?;
        folder.disable_cleanup(keep);
        let store = folder.path().join("broker");
        std::fs::create_dir(&store).map_err(cannot)?;
        let log = Some(log_file(folder.path(), "broker"));
        let broker = nats::Server::prepare(nats::Options {
            folder: Some(store),
            log,
            ..Default::default()
        });
        Ok(Self {
            ingress: None,
            worker: None,
            broker: broker.map_err(cannot)?,
            stripe: None,
            ingress_port: port::free(),
            worker_port: port::free(),
            uuid: random(),
            secret: format!("whsec_{}", random().simple()),
            folder,
        })
    }

    /// Gives the worker, once started, a key for this API.
    pub(crate) fn use_stripe(&mut self, stripe: Api) {
        self.stripe = Some(stripe);
    }

    /// The API that the worker may call.
    pub(crate) fn stripe(&self) -> Option<&Api> {
        self.stripe.as_ref()
    }

    /// Starts broker, ingress and worker and waits until they are ready.
    pub(crate) async fn start(&mut self, screen: &Screen) -> Result<(), String> {
        let title = screen.tint(Tone::Heading, "Litestripe demo");
        let folder = self.folder.path().display();
        screen.line(format_args!("{title}\n\n  {:<8} {folder}", "folder"))?;

        let begun = Instant::now();
        self.broker
            .try_resume()
            .await
            .map_err(|problem| no_broker(&problem))?;
        show_up(screen, "broker", &self.nats_url(), begun)?;

        let begun = Instant::now();
        let ingress = self.program(INGRESS)?;
        let ingress = ingress
            .log(log_file(self.folder.path(), "ingress"))
            .env(
                "LITESTRIPE_LISTEN",
                format!("127.0.0.1:{}", self.ingress_port),
            )
            .env("STRIPE_WEBHOOK_UUID", self.uuid.to_string())
            .env("STRIPE_WEBHOOK_SECRET", &self.secret);
        self.ingress = Some(launch(&ingress, INGRESS)?);
        let worker = self.program(WORKER)?;
        let mut worker = worker
            .log(log_file(self.folder.path(), "worker"))
            .env(
                "LITESTRIPE_WORKER_LISTEN",
                format!("127.0.0.1:{}", self.worker_port),
            )
            .env("DATABASE_URL", self.database_url("rwc"));
        if let Some(stripe) = &self.stripe {
            worker = worker
                .env("STRIPE_API_BASE", stripe.url())
                .env("STRIPE_SECRET_KEY", API_KEY)
                .env("LITESTRIPE_BACKFILL_INTERVAL", "off");
        }
        self.worker = Some(launch(&worker, WORKER)?);

        self.watch(ready("ingress", self.ingress_port)).await?;
        show_up(
            screen,
            "ingress",
            &format!("http://127.0.0.1:{}", self.ingress_port),
            begun,
        )?;
        self.watch(ready("worker", self.worker_port)).await?;
        show_up(
            screen,
            "worker",
            &format!("http://127.0.0.1:{}", self.worker_port),
            begun,
        )?;
        match &self.stripe {
            Some(stripe) => screen.line(format_args!(
                "  {:<8} {:<26} a stub of its API",
                "Stripe",
                stripe.url()
            )),
            None => Ok(()),
        }
    }

    /// Runs `work`, and fails if one of the processes dies before it is done.
    pub(crate) async fn watch<T>(
        &self,
        work: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        let problem = tokio::select! {
            died = self.died() => return Err(died),
            done = work => match done {
                Ok(done) => return Ok(done),
                Err(problem) => problem,
            },
        };
        // The dead process may be the cause: a failed request is often noticed before the death.
        Err(timeout(CAUSE_MAX, self.died()).await.unwrap_or(problem))
    }

    /// Asks the processes to stop and waits for them. A process that does not stop is killed on
    /// drop.
    pub(crate) async fn stop(&self) -> Result<(), String> {
        let mut problems = Vec::new();
        for (name, process) in self.processes() {
            if !process.is_running() {
                continue;
            }
            process.signal(Signal::Term);
            let end = Instant::now() + STOP_MAX;
            while process.is_running() && Instant::now() < end {
                sleep(PAUSE).await;
            }
            if process.is_running() {
                problems.push(format!(
                    "{name} did not stop within {} s and was killed",
                    STOP_MAX.as_secs()
                ));
                continue;
            }
            let status = process.wait(STOP_MAX).await;
            if !status.success() {
                problems.push(format!(
                    "{name} stopped with {status}; its last log lines:\n{}",
                    last_lines(process)
                ));
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems.join("\n"))
        }
    }

    /// Ends what still runs, and returns the folder if it was kept.
    pub(crate) fn end(self) -> Option<PathBuf> {
        let folder = self.folder.path().to_owned();
        drop(self);
        folder.exists().then_some(folder)
    }

    /// The URL to which Stripe would deliver.
    pub(crate) fn hook_url(&self) -> String {
        format!(
            "http://127.0.0.1:{}/ls/hook/{}/",
            self.ingress_port, self.uuid
        )
    }

    /// The signing secret.
    pub(crate) fn secret(&self) -> &str {
        &self.secret
    }

    pub(crate) fn nats_url(&self) -> String {
        self.broker.url()
    }

    /// The database's URL with SQLite's access mode `mode`.
    pub(crate) fn database_url(&self, mode: &str) -> String {
        format!(
            "sqlite://{}?mode={mode}",
            self.folder.path().join("litestripe.db").display()
        )
    }

    /// The shell commands that a reader can try on this instance.
    pub(crate) fn next_commands(&self) -> String {
        let folder = program::folder().unwrap_or_default();
        let program = |name| quoted(folder.join(name).display());
        let (sender, worker) = (program(SENDER), program(WORKER));
        let (hook, secret, nats) = (self.hook_url(), &self.secret, self.nats_url());
        let database = quoted(self.database_url("rw"));
        let place = self.folder.path().display();
        format!(
            "\nThe bridge runs until Ctrl-C. Meanwhile, try in another terminal:\n\n\
             send one event (options: `send event --help`)\n  \
               {sender} event \\\n    \
                 --type customer.subscription.updated \\\n    \
                 --url {hook} \\\n    \
                 --secret {secret}\n\
             show the worker's status\n  \
               NATS_URL={nats} \\\n    \
                 DATABASE_URL={database} \\\n    \
                 {worker} status\n\
             subscribe to the signals with the NATS command line tool\n  \
               nats --server {nats} \\\n    \
                 subscribe --stream LITESTRIPE_SIGNALS --all\n\
             read the logs\n  \
               tail -f {place}/*.log\n\n\
             Signals that arrive from now on:"
        )
    }

    fn program(&self, name: &str) -> Result<Launch, String> {
        let path = program::folder()
            .map_err(|problem| problem.to_string())?
            .join(name);
        if !path.exists() {
            return Err(format!(
                "{} is not built: run scripts/demo, which builds it",
                path.display()
            ));
        }
        Ok(Program::at(path)
            .folder(self.folder.path())
            .env("NATS_URL", self.nats_url()))
    }

    /// The processes in the order in which they are stopped: each before those that it needs.
    fn processes(&self) -> impl Iterator<Item = (&'static str, &Process)> {
        let ingress = self.ingress.as_deref().map(|process| ("ingress", process));
        let worker = self.worker.as_deref().map(|process| ("worker", process));
        let broker = self.broker.process().map(|process| ("broker", process));
        [ingress, worker, broker].into_iter().flatten()
    }

    /// Waits until a process ends by itself, and returns a message about it.
    async fn died(&self) -> String {
        loop {
            if let Some((name, process)) =
                self.processes().find(|(_, process)| !process.is_running())
            {
                let status = process.wait(STOP_MAX).await;
                return format!(
                    "the {name} ended ({status}); its last log lines:\n{}",
                    last_lines(process)
                );
            }
            sleep(PAUSE).await;
        }
    }
}

fn no_broker(problem: &io::Error) -> String {
    match tools::nats_server() {
        Ok(path) if path.is_absolute() && !path.exists() => {
            format!(
                "there is no nats-server at {} (LITESTRIPE_NATS_SERVER): unset it and run scripts/demo, \
                 which finds or installs one",
                path.display()
            )
        }
        Ok(_) => format!("cannot start the broker: {problem}"),
        Err(problem) => format!("cannot find nats-server: {problem}"),
    }
}

fn log_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.log"))
}

fn launch(launch: &Launch, name: &str) -> Result<Program, String> {
    launch
        .try_start()
        .map_err(|problem| format!("cannot start {name}: {problem}"))
}

/// Waits until `/readyz` on that port answers 200.
async fn ready(name: &str, port: u16) -> Result<(), String> {
    let client = stripe::client();
    let url = format!("http://127.0.0.1:{port}/readyz");
    let end = Instant::now() + READY_MAX;
    loop {
        let seen = match client.get(&url).send().await {
            Ok(answer) if answer.status() == 200 => return Ok(()),
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(problem) => exit::chain(&problem.without_url()),
        };
        if Instant::now() > end {
            let seconds = READY_MAX.as_secs();
            return Err(format!(
                "the {name} is not ready after {seconds} s; the last answer of /readyz: {}",
                seen.trim()
            ));
        }
        sleep(PAUSE).await;
    }
}

fn show_up(screen: &Screen, name: &str, address: &str, begun: Instant) -> Result<(), String> {
    let ready = screen.tint(Tone::Good, "ready");
    screen.line(format_args!(
        "  {name:<8} {address:<26} {ready} after {} ms",
        begun.elapsed().as_millis()
    ))
}

fn last_lines(process: &Process) -> String {
    let log = process.log();
    let lines: Vec<&str> = log.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(LAST_LINES)..)
        .unwrap_or_default();
    last.iter().map(|line| format!("  {line}\n")).collect()
}

/// Quotes `text` for a shell if needed: a path may hold spaces, and `?` is a pattern in some
/// shells.
fn quoted(text: impl Display) -> String {
    let text = text.to_string();
    let plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-:".contains(c));
    if plain {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A random UUID. `RandomState` is random enough for a hook on 127.0.0.1 with made-up events.
fn random() -> Uuid {
    let half = || RandomState::new().hash_one(()).to_be_bytes();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&half());
    bytes[8..].copy_from_slice(&half());
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}
