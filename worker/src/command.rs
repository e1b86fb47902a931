//! What operators call: the command line, and a module for each command.
//!
//! Owns arguments, output and exit codes. No rules live here.

use std::process::ExitCode;

use clap::{FromArgMatches as _, Subcommand};
use litestripe_contract::settings::{self, Given, SHARED};
use litestripe_contract::telemetry;

use crate::settings::{SETTINGS, Settings, StripeSettings, WINDOW};
use crate::start::database::Schema;
use crate::start::parts::{self, Parts};
use crate::stripe::api::StripeApi;
use crate::stripe::mode;

mod backfill;
mod dead_letters;
mod erase;
mod failure;
mod migrate;
mod moment;
mod orphans;
mod print;
mod progress;
mod reconcile;
mod replay;
mod resend;
mod run;
mod schema;
mod status;

use failure::Failure;

const NO_KEY: &str = "STRIPE_SECRET_KEY is missing: set it to a secret or restricted key; this command asks Stripe's API";

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
    match parse_and_execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.exit(),
    }
}

fn parse_and_execute() -> Result<(), Failure> {
    settings::dotenv().map_err(Failure::configuration)?;
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
    let settings = crate::settings::read(given).map_err(Failure::configuration)?;
    let log = settings.log.clone();
    telemetry::init(&if matches!(command, Command::Run) {
        log
    } else {
        log.quiet()
    });
    tokio::runtime::Runtime::new()?.block_on(execute(command, settings))
}

/// What the command `name` works with: see [`Parts::start`].
async fn start(settings: &Settings, name: &str, schema: Schema) -> Result<Parts, Failure> {
    Parts::start(settings, &format!("litestripe-worker {name}"), schema)
        .await
        .map_err(failure::start)
}

/// A connection to NATS for the command `name`, within 5 s.
async fn connect(settings: &Settings, name: &str) -> Result<async_nats::Client, Failure> {
    parts::connect_within(settings, &format!("litestripe-worker {name}"))
        .await
        .map_err(failure::start)
}

/// How to call Stripe's API, for a command that must.
fn key(settings: &Settings) -> Result<&StripeSettings, Failure> {
    settings
        .stripe
        .as_ref()
        .ok_or_else(|| Failure::configuration(NO_KEY))
}

/// A client of Stripe's API, unless its key is of another mode than all rows and that is not wanted.
async fn stripe(settings: &Settings, parts: &Parts, any_mode: bool) -> Result<StripeApi, Failure> {
    let mismatch = mode::find_mismatch(&parts.store, key(settings)?).await?;
    if let Some(mismatch) = mismatch.filter(|_| !any_mode) {
        return Err(Failure::configuration(mismatch));
    }
    parts
        .stripe(settings)?
        .ok_or_else(|| Failure::configuration(NO_KEY))
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
    let command = settings::declare(settings::declare(command, SETTINGS), SHARED)
        .mut_arg(WINDOW.name, |arg| arg.hide(true));
    Command::augment_subcommands(command)
        .subcommand_required(false)
        .arg_required_else_help(false)
}
