//! The command line of `litestripe-worker`, with a module for each command.
//!
//! Owns arguments, output and exit codes. The rules behind a command live in other modules.

use std::process::ExitCode;
use std::time::Duration;

use clap::{FromArgMatches as _, Subcommand};
use litestripe_contract::settings::{self, Given, SHARED};
use litestripe_contract::{systemd, telemetry};

use crate::installation::Membership;
use crate::settings::{SETTINGS, Settings, StripeSettings, WINDOW};
use crate::start::database::Schema;
use crate::start::parts::{self, Parts};
use crate::start::rules::{Rules, RulesError};
use crate::store::Store;
use crate::stripe::api::StripeApi;
use crate::stripe::mode;

mod backfill;
mod dead_letters;
mod doctor;
mod endpoint;
mod erase;
mod failure;
mod join;
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

const PROGRAM: &str = "litestripe-worker";

const NO_KEY: &str = "STRIPE_SECRET_KEY is missing: this command calls Stripe's API; set it to a secret or restricted key (sk_… or rk_…)";

/// How long the process waits at its end for threads that nothing can cancel: a host name that no
/// DNS server answers is looked up for up to half a minute.
const END_MAX: Duration = Duration::from_secs(1);

const AFTER_HELP: &str = "\
Every setting is a flag and an environment variable; the file .env in the working directory is read too. A flag wins \
over the environment, the environment over .env. An empty value counts as not set.

Exit codes: 0 done (`run`: stopped), 1 a failure or stopped before the end, 2 a wrong setting or argument, 3 \
something is left to do (`reconcile`, `doctor`, `endpoint check`, `endpoint roll`), 130 a second stop signal. Results go \
to stdout, logs and progress to stderr. All commands but `run` log only warnings unless RUST_LOG is set.

`litestripe-worker help COMMAND` explains a command.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Apply events and send signals until stopped (the default)
    #[command(after_help = run::AFTER_HELP)]
    Run,
    /// Create, update, drop or show the tables in the database
    #[command(subcommand, after_help = migrate::AFTER_HELP)]
    Migrate(migrate::Migrate),
    /// Show lag, unsent signals, dead letters, open orphans and the schema's version
    Status(status::Status),
    /// Say what is wrong with settings, clocks, database, broker and Stripe, and how to mend it
    Doctor(doctor::Doctor),
    /// Apply stored events again, for example to rebuild rows
    Replay(Box<replay::Replay>),
    /// Publish the current state of rows again, for subscribers that missed signals
    Resend(resend::Resend),
    /// Fetch events from Stripe that never arrived here (needs STRIPE_SECRET_KEY)
    Backfill(backfill::Backfill),
    /// List, show and resolve payments that belong to no known user
    #[command(subcommand, after_help = orphans::AFTER_HELP)]
    Orphans(orphans::Orphans),
    /// List, show, retry and drop events that could not be applied
    #[command(subcommand, after_help = dead_letters::AFTER_HELP)]
    DeadLetters(dead_letters::DeadLetters),
    /// Remove one customer's personal data for good: events, signals, emails, metadata
    Erase(erase::Erase),
    /// Compare the rows with Stripe and repair them (needs STRIPE_SECRET_KEY)
    Reconcile(reconcile::Reconcile),
    /// Make, check and roll the endpoint at Stripe that delivers to ingress (needs STRIPE_SECRET_KEY)
    #[command(subcommand, after_help = endpoint::AFTER_HELP)]
    Endpoint(endpoint::EndpointCommand),
    /// Make database and broker one installation, after one of them was replaced on purpose
    Join(join::Join),
    /// Print the JSON Schemas of the signals, or the AsyncAPI document
    Schema(schema::Schema),
}

/// Parses the command line and executes its command.
#[must_use]
pub fn main() -> ExitCode {
    match parse_and_execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.exit(),
    }
}

fn parse_and_execute() -> Result<(), Failure> {
    settings::dotenv::load(&[SETTINGS, SHARED]).map_err(Failure::configuration)?;
    let matches = command_line().get_matches();
    let command = match Command::from_arg_matches(&matches) {
        Ok(command) => command,
        // clap reports an error if no command is given; `run` is the default.
        Err(_) if matches.subcommand_name().is_none() => Command::Run,
        Err(error) => error.exit(),
    };
    if let Command::Schema(schema) = command {
        return schema.print();
    }
    let given = Given::from_matches(&matches, &[SETTINGS, SHARED]);
    let settings = crate::settings::read(given).map_err(Failure::configuration)?;
    let log = settings.log.clone();
    let log = if matches!(command, Command::Run) {
        log
    } else {
        log.quiet()
    };
    // Dropped last, so that it sends the last spans.
    let _telemetry = telemetry::init(&log, settings.traces.as_ref(), PROGRAM)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(execute(command, settings));
    runtime.shutdown_timeout(END_MAX);
    outcome
}

/// Connects and opens what the command `name` works with: see [`Parts::start`].
async fn start(
    settings: &Settings,
    name: &str,
    schema: Schema,
    membership: Membership,
) -> Result<Parts, Failure> {
    let name = format!("litestripe-worker {name}");
    Parts::start(settings, &name, schema, membership)
        .await
        .map_err(failure::start)
}

/// Connects to NATS for the command `name`, or fails after 5 s.
async fn connect(settings: &Settings, name: &str) -> Result<async_nats::Client, Failure> {
    parts::connect_within(settings, &format!("litestripe-worker {name}"))
        .await
        .map_err(failure::start)
}

/// Refuses to apply events by other rules than the workers'.
async fn check_rules(settings: &Settings, store: &Store) -> Result<(), Failure> {
    match Rules::new(settings).check(store).await {
        Err(error @ RulesError::Different { .. }) => Err(Failure::configuration(error)),
        checked => Ok(checked?),
    }
}

/// Returns the settings for Stripe's API, for a command that cannot work without.
fn require_stripe(settings: &Settings) -> Result<&StripeSettings, Failure> {
    settings
        .stripe
        .as_ref()
        .ok_or_else(|| Failure::configuration(NO_KEY))
}

/// Returns a client of Stripe's API. Without `any_mode` it refuses a live mode key if all rows are
/// test mode, or the reverse.
async fn stripe_api(
    settings: &Settings,
    parts: &Parts,
    any_mode: bool,
) -> Result<StripeApi, Failure> {
    let mismatch = mode::find_mismatch(&parts.store, require_stripe(settings)?).await?;
    if let Some(mismatch) = mismatch.filter(|_| !any_mode) {
        return Err(Failure::configuration(mismatch));
    }
    parts
        .stripe(settings)?
        .ok_or_else(|| Failure::configuration(NO_KEY))
}

async fn execute(command: Command, settings: Settings) -> Result<(), Failure> {
    match command {
        Command::Run => systemd::watched(run::run(settings), async || {}).await,
        Command::Migrate(migrate) => migrate.execute(&settings).await,
        Command::Status(status) => status.execute(&settings).await,
        Command::Doctor(doctor) => doctor.execute(&settings, variables()).await,
        Command::Replay(replay) => replay.execute(&settings).await,
        Command::Resend(resend) => resend.execute(&settings).await,
        Command::Backfill(backfill) => backfill.execute(&settings).await,
        Command::Orphans(orphans) => orphans.execute(&settings).await,
        Command::DeadLetters(dead_letters) => dead_letters.execute(&settings).await,
        Command::Erase(erase) => erase.execute(&settings).await,
        Command::Reconcile(reconcile) => reconcile.execute(settings).await,
        Command::Endpoint(endpoint) => endpoint.execute(&settings).await,
        Command::Join(join) => join.execute(&settings).await,
        Command::Schema(_) => Ok(()),
    }
}

/// Returns the names of the variables that have a value, with those of `.env`.
#[expect(
    clippy::disallowed_methods,
    reason = "no value is read: `doctor` looks for names that no program reads"
)]
fn variables() -> Vec<String> {
    let set = std::env::vars_os().filter(|(_, value)| !value.is_empty());
    set.filter_map(|(name, _)| name.into_string().ok())
        .collect()
}

/// Returns the command line, with a flag and an environment variable for every setting.
#[must_use]
pub fn command_line() -> clap::Command {
    let command = clap::Command::new(PROGRAM)
        .about("Applies Stripe's events to the database and publishes a signal for each change")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(AFTER_HELP);
    let command = settings::declare(settings::declare(command, SETTINGS), SHARED)
        .mut_arg(WINDOW.name, |arg| arg.hide(true));
    Command::augment_subcommands(command)
        .subcommand_required(false)
        .arg_required_else_help(false)
}
