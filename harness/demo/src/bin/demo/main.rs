//! The program behind `scripts/demo`: the whole bridge on this machine, and a story sent through it.
//!
//! Owns the order of what happens and how the program ends. Invariant: however it ends, no process
//! of its own stays, and no file but those it names. (Killed with `SIGKILL`, it cannot remove its
//! folder; its children end with it where util-linux's `setpriv` is there.)

mod instance;
mod rows;
mod screen;
mod signals;
mod story;

use std::future::Future;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use litestripe_contract::exit;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::instance::Instance;
use crate::screen::Screen;
use crate::signals::Signals;

/// Starts broker, ingress and worker on SQLite, sends a subscription's story as Stripe would, and
/// shows the signals as they arrive and the rows they stand for. Stays up until Ctrl-C.
#[derive(Parser)]
#[command(name = "demo", version)]
struct Arguments {
    /// Stop after the story; exit 0 only if it led to the expected rows and signals.
    #[arg(long)]
    once: bool,
    /// Keep the folder with the database, the streams and the logs.
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

/// Why the program ends before its work is done.
enum End {
    /// A signal asked it to.
    Asked(Asked),
    /// Something does not work.
    Failed(String),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    match run(&arguments, &Screen { coloured }).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(End::Asked(asked)) => ExitCode::from(asked.code()),
        Err(End::Failed(problem)) => {
            complain(&problem);
            ExitCode::from(exit::FAILURE)
        }
    }
}

async fn run(arguments: &Arguments, screen: &Screen) -> Result<(), End> {
    let mut asked = AskedToStop::new().map_err(End::Failed)?;
    let mut instance = Instance::prepare(arguments.keep).map_err(End::Failed)?;
    let ended = perform(arguments, screen, &mut instance, &mut asked).await;
    // A second signal ends the children at once: dropping the instance kills what still runs.
    let stopped = tokio::select! {
        biased;
        _ = asked.next() => Ok(()),
        stopped = instance.stop() => stopped,
    };
    let left = instance.end();
    let stays = left.map_or_else(
        || "no file".to_owned(),
        |folder| folder.display().to_string(),
    );
    // Nobody may be reading any more, which is no failure at this point.
    let _ = screen.line(format_args!("\nstopped; what stays: no process, {stays}"));
    match (ended, stopped) {
        (Ok(()), Err(problem)) => Err(End::Failed(problem)),
        (Err(End::Failed(problem)), Err(another)) => {
            Err(End::Failed(format!("{problem}\n{another}")))
        }
        (ended, _) => ended,
    }
}

async fn perform(
    arguments: &Arguments,
    screen: &Screen,
    instance: &mut Instance,
    asked: &mut AskedToStop,
) -> Result<(), End> {
    unless(asked, instance.start(screen)).await?;
    let story = story::tell(instance, screen, arguments.pace);
    let (signals, outcome) = unless(asked, instance.watch(story)).await?;
    if !arguments.once {
        screen.line(instance.how_to_go_on()).map_err(End::Failed)?;
        match unless(asked, instance.watch(follow(signals, screen))).await {
            Err(End::Asked(_)) => {}
            ended => return ended,
        }
    }
    outcome.map_err(End::Failed)
}

/// Shows signals as long as they come.
async fn follow(mut signals: Signals, screen: &Screen) -> Result<(), String> {
    loop {
        signals.show_next(screen).await?;
    }
}

/// `work`, unless a signal asks to stop before it is done.
async fn unless<T>(
    asked: &mut AskedToStop,
    work: impl Future<Output = Result<T, String>>,
) -> Result<T, End> {
    tokio::select! {
        biased;
        asked = asked.next() => Err(End::Asked(asked)),
        done = work => done.map_err(End::Failed),
    }
}

/// The signals that ask to stop, which would otherwise end the program before it has cleaned up.
struct AskedToStop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

#[derive(Clone, Copy)]
enum Asked {
    Hangup = 1,
    Interrupt = 2,
    Quit = 3,
    Terminate = 15,
}

impl Asked {
    /// What a shell reports for a program that ended by this signal.
    fn code(self) -> u8 {
        128 + self as u8
    }
}

impl AskedToStop {
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

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.interrupt.recv() => Asked::Interrupt,
            _ = self.terminate.recv() => Asked::Terminate,
            _ = self.hangup.recv() => Asked::Hangup,
            _ = self.quit.recv() => Asked::Quit,
        }
    }
}

/// Says on stderr why the demo fails. Nobody may be listening any more.
fn complain(problem: &str) {
    let _ = writeln!(std::io::stderr(), "demo: {problem}");
}
