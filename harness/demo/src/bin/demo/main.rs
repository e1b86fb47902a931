//! The program behind `scripts/demo`: runs the whole bridge on this machine and sends it a
//! subscription's life.
//!
//! Owns the order of the steps and the shutdown. Invariant: when it has ended, none of its
//! processes runs and the only files left are those that it names. (After `SIGKILL` its folder
//! stays; its child processes still end, provided that util-linux's `setpriv` is installed.)

mod instance;
mod rows;
mod screen;
mod signals;
mod story;
mod thin;

use std::future::Future;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use litestripe_contract::exit;
use litestripe_demo::stripe::api::Api;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::instance::Instance;
use crate::screen::Screen;
use crate::signals::Signals;

/// Runs a NATS server, ingress and a worker with SQLite, sends them the webhooks of one
/// subscription's life as Stripe would, and prints the signals and rows that result. Runs until
/// Ctrl-C.
#[derive(Parser)]
#[command(name = "demo", version)]
struct Arguments {
    /// Exit after the last webhook: with 0 if the rows and signals are as expected, else with 1.
    #[arg(long)]
    once: bool,
    /// Send thin events, which hold no data: the worker fetches what changed from a stub of
    /// Stripe's API, which the demo starts too.
    #[arg(long)]
    thin: bool,
    /// Keep the folder with the database, the streams and the logs, and print its path.
    #[arg(long)]
    keep: bool,
    /// Seconds between two deliveries.
    #[arg(long, value_name = "SECONDS", default_value = "0.8", value_parser = seconds)]
    pace: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|problem| problem.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|problem| problem.to_string())
}

/// Why the program ends early.
enum End {
    /// It received a stop signal.
    Stopped(StopSignal),
    /// Something failed.
    Failed(String),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    match run(&arguments, &Screen { coloured }).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(End::Stopped(signal)) => ExitCode::from(signal.code()),
        Err(End::Failed(problem)) => {
            print_error(&problem);
            ExitCode::from(exit::FAILURE)
        }
    }
}

async fn run(arguments: &Arguments, screen: &Screen) -> Result<(), End> {
    let mut stop_signals = StopSignals::new().map_err(End::Failed)?;
    let mut instance = Instance::prepare(arguments.keep).map_err(End::Failed)?;
    if arguments.thin {
        instance.use_stripe(Api::start().await);
    }
    let ended = run_steps(arguments, screen, &mut instance, &mut stop_signals).await;
    // A second signal ends the children at once: dropping the instance kills what still runs.
    let stopped = tokio::select! {
        biased;
        _ = stop_signals.next() => Ok(()),
        stopped = instance.stop() => stopped,
    };
    let files = instance.end().map_or_else(
        || "no file is left".to_owned(),
        |folder| format!("files kept in {}", folder.display()),
    );
    // Fails if stdout is closed, which does not matter any more.
    let _ = screen.line(format_args!("\nstopped: all processes have ended, {files}"));
    match (ended, stopped) {
        (Ok(()), Err(problem)) => Err(End::Failed(problem)),
        (Err(End::Failed(problem)), Err(another)) => {
            Err(End::Failed(format!("{problem}\n{another}")))
        }
        (ended, _) => ended,
    }
}

async fn run_steps(
    arguments: &Arguments,
    screen: &Screen,
    instance: &mut Instance,
    stop_signals: &mut StopSignals,
) -> Result<(), End> {
    until_stopped(stop_signals, instance.start(screen)).await?;
    let story = story::run(instance, screen, arguments.pace);
    let (signals, outcome) = until_stopped(stop_signals, instance.watch(story)).await?;
    if !arguments.once {
        screen.line(instance.next_commands()).map_err(End::Failed)?;
        match until_stopped(stop_signals, instance.watch(follow(signals, screen))).await {
            Err(End::Stopped(_)) => {}
            ended => return ended,
        }
    }
    outcome.map_err(End::Failed)
}

/// Shows every signal that arrives; ends only with an error.
async fn follow(mut signals: Signals, screen: &Screen) -> Result<(), String> {
    loop {
        signals.show_next(screen).await?;
    }
}

/// Runs `work` until it is done or a stop signal arrives.
async fn until_stopped<T>(
    stop_signals: &mut StopSignals,
    work: impl Future<Output = Result<T, String>>,
) -> Result<T, End> {
    tokio::select! {
        biased;
        signal = stop_signals.next() => Err(End::Stopped(signal)),
        done = work => done.map_err(End::Failed),
    }
}

/// The stop signals, which by default end a program before it can clean up.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

#[derive(Clone, Copy)]
enum StopSignal {
    Hangup = 1,
    Interrupt = 2,
    Quit = 3,
    Terminate = 15,
}

impl StopSignal {
    /// The exit code that a shell reports for a program ended by this signal.
    fn code(self) -> u8 {
        128 + self as u8
    }
}

impl StopSignals {
    fn new() -> Result<Self, String> {
        let listen =
            |kind| signal(kind).map_err(|problem| format!("cannot listen for signals: {problem}"));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> StopSignal {
        tokio::select! {
            _ = self.interrupt.recv() => StopSignal::Interrupt,
            _ = self.terminate.recv() => StopSignal::Terminate,
            _ = self.hangup.recv() => StopSignal::Hangup,
            _ = self.quit.recv() => StopSignal::Quit,
        }
    }
}

/// Prints why the demo failed; ignores a closed stderr.
fn print_error(problem: &str) {
    let _ = writeln!(std::io::stderr(), "demo: {problem}");
}
