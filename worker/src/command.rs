//! What operators call: the command line, and a module for each command.
//!
//! Owns arguments, output and exit codes. No rules live here.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use clap::{FromArgMatches as _, Subcommand};
use litestripe_contract::settings::{self, Given, SHARED};
use litestripe_contract::{connect, exit, telemetry};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::relay::Relay;
use crate::settings::{SETTINGS, Settings};
use crate::store::Store;
use crate::stripe::mode::Mismatch;

mod backfill;
mod dead_letters;
mod erase;
mod migrate;
mod moment;
mod orphans;
mod progress;
mod reconcile;
mod replay;
mod resend;
mod run;
mod schema;
mod status;

/// Why a command failed.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Subcommand)]
enum Command {
    /// Apply events and send signals until stopped (the default)
    Run,
    /// Change or show the database's schema
    #[command(subcommand)]
    Migrate(migrate::Migrate),
    /// Show lag, outbox, dead letters, open orphans and schema version
    Status(status::Status),
    /// Apply events that the stream still holds again
    Replay(Box<replay::Replay>),
    /// Publish current rows once more, under their revision
    Resend(resend::Resend),
    /// Fetch from Stripe what never arrived
    Backfill(backfill::Backfill),
    /// List, show and resolve payments that belong to no known user
    #[command(subcommand)]
    Orphans(orphans::Orphans),
    /// List, show, retry and drop events that could not be applied
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLetters),
    /// Remove what is stored of one customer, for good
    Erase(erase::Erase),
    /// Compare the rows with Stripe's subscriptions, and mend them
    Reconcile(reconcile::Reconcile),
    /// Print the JSON Schemas of the signals, or the AsyncAPI document
    Schema(schema::Schema),
}

/// Parses the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    if let Err(problems) = settings::dotenv() {
        return exit::fail(exit::CONFIGURATION, problems);
    }
    let matches = command_line().get_matches();
    let command = match Command::from_arg_matches(&matches) {
        Ok(command) => command,
        // No command at all, which clap reports as a missing one.
        Err(_) if matches.subcommand_name().is_none() => Command::Run,
        Err(error) => error.exit(),
    };
    if let Command::Schema(schema) = command {
        return schema.print();
    }
    let given = Given::from_matches(&matches, &[SETTINGS, SHARED]);
    let settings = match crate::settings::read(given) {
        Ok(settings) => settings,
        Err(problems) => return exit::fail(exit::CONFIGURATION, problems),
    };
    let log = settings.log.clone();
    telemetry::init(&if matches!(command, Command::Run) { log } else { log.quiet() });
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return exit::fail(exit::FAILURE, error),
    };
    match runtime.block_on(execute(command, settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::fail(code_of(error.as_ref()), exit::chain(error.as_ref())),
    }
}

/// A command that asks Stripe was called without a key.
#[derive(Debug, thiserror::Error)]
#[error("STRIPE_SECRET_KEY is missing: set it to a secret or restricted key; this command asks Stripe's API")]
struct NoKey;

/// A file that a setting names and that cannot be used is a matter of configuration, as is a key that
/// is missing or of the wrong mode, and what cannot be asked for.
fn code_of(error: &(dyn std::error::Error + 'static)) -> u8 {
    let is_configuration = error.is::<connect::ConnectError>()
        || error.is::<NoKey>()
        || error.is::<Mismatch>()
        || replay::is_misuse(error);
    if is_configuration {
        exit::CONFIGURATION
    } else if error.is::<reconcile::Remaining>() {
        exit::DIFFERENCES
    } else {
        exit::FAILURE
    }
}

async fn execute(command: Command, settings: Settings) -> Result<(), Failure> {
    match command {
        Command::Run => run::run(settings).await,
        Command::Migrate(migrate) => migrate.execute(&settings).await,
        Command::Status(status) => status.execute(&settings).await,
        Command::Replay(replay) => replay.execute(&settings).await,
        Command::Resend(resend) => resend.execute(&settings).await,
        Command::Backfill(backfill) => backfill.execute(&settings).await,
        Command::Orphans(orphans) => orphans.execute(&settings).await,
        Command::DeadLetters(dead_letters) => dead_letters.execute(&settings).await,
        Command::Erase(erase) => erase.execute(&settings).await,
        Command::Reconcile(reconcile) => reconcile.execute(settings).await,
        Command::Schema(_) => Ok(()),
    }
}

/// The command line, with every setting as a flag and an environment variable.
#[must_use]
pub fn command_line() -> clap::Command {
    let command = clap::Command::new("litestripe-worker")
        .about("Applies Stripe's events to the database and signals what changed")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(
            "Every setting may be given as a flag or as the environment variable of the same name; .env is read.",
        );
    let command = settings::declare(settings::declare(command, SETTINGS), SHARED);
    Command::augment_subcommands(command).subcommand_required(false).arg_required_else_help(false)
}

/// Prints what a command was asked for: stdout belongs to that, logs go to stderr. A reader that has
/// seen enough (`| head`) is no failure.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints the fields of a JSON object, a line each.
fn print_fields(object: &serde_json::Value) {
    use serde_json::Value;
    let rows = object.as_object().into_iter().flatten().map(|(name, value)| {
        let text = match value {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        [name.clone(), text]
    });
    print_table(["field", "value"], rows);
}

/// Waits a little for NATS: an operator at a terminal wants an answer.
async fn reach_nats(nats: &async_nats::Client, settings: &Settings) -> Result<(), Failure> {
    const ANSWER_MAX: Duration = Duration::from_secs(5);
    let connected = tokio::time::timeout(ANSWER_MAX, connect::connected(nats, &settings.nats)).await;
    connected.map_err(|_| {
        format!("NATS at {} does not answer (NATS_URL); nothing was changed", settings.nats.hosts()).into()
    })
}

/// Sends signals while `work` runs, and those that it leaves when it is done: a command must not
/// depend on a worker being up.
async fn while_relaying<T>(
    settings: &Settings,
    store: &Store,
    jetstream: &jetstream::Context,
    work: impl Future<Output = T>,
) -> T {
    let stop = CancellationToken::new();
    let relay = Relay::new(store.clone(), jetstream.clone(), settings.nats.clone(), Arc::new(Notify::new()));
    let relay = tokio::spawn(relay.run(stop.clone()));
    let outcome = work.await;
    stop.cancel();
    // What cannot be sent now stays in the outbox, for any worker.
    let _ = relay.await;
    outcome
}

/// Prints a table that people read and `awk` can take apart.
fn print_table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    print(&table.to_string());
}
