//! The process: settings, listener, signals, exit code.

use std::process::ExitCode;

use clap::Command;
use litestripe_contract::settings::{Given, SHARED, declare, dotenv};
use litestripe_contract::{exit, shutdown, telemetry};
use litestripe_ingress::RunError;
use litestripe_ingress::secret;
use litestripe_ingress::settings::{self, SETTINGS, Settings};
use tokio::net::TcpListener;
use tokio::runtime::Builder;

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    if let Err(problems) = dotenv::load(&[SETTINGS, SHARED]) {
        return exit::fail(exit::CONFIGURATION, problems);
    }
    let matches = command().get_matches();
    let given = Given::from_matches(&matches, &[SETTINGS, SHARED]);
    let settings = match settings::read(given, secret::is_in) {
        Ok(settings) => settings,
        Err(problems) => return exit::fail(exit::CONFIGURATION, problems),
    };
    let traces = settings.traces.as_ref();
    let _telemetry = match telemetry::init(&settings.log, traces, env!("CARGO_PKG_NAME")) {
        Ok(telemetry) => telemetry,
        Err(error) => return exit::fail(exit::FAILURE, exit::chain(&error)),
    };
    // One thread with a first-in-first-out queue. `connection::threads` says why, and starts the
    // others.
    match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(settings)),
        Err(error) => exit::fail(exit::FAILURE, format!("cannot start: {error}")),
    }
}

fn command() -> Command {
    let command = Command::new(env!("CARGO_PKG_NAME"))
        .version(env!("CARGO_PKG_VERSION"))
        .about("Verifies Stripe's webhooks and stores them in JetStream")
        .after_help("Every setting is also an environment variable, which may be set in .env.");
    declare(declare(command, SETTINGS), SHARED)
}

async fn serve(settings: Settings) -> ExitCode {
    let address = settings.listen.clone();
    let listener = match TcpListener::bind(address.as_str()).await {
        Ok(listener) => listener,
        Err(error) => {
            return exit::fail(
                exit::FAILURE,
                format!("cannot listen on {address} (LITESTRIPE_LISTEN): {error}"),
            );
        }
    };
    let token = match shutdown::token() {
        Ok(token) => token,
        Err(error) => {
            return exit::fail(exit::FAILURE, format!("cannot listen for signals: {error}"));
        }
    };
    match litestripe_ingress::run(settings, listener, token).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Panicked) => exit::fail(exit::FAILURE, exit::chain(&error)),
        Err(error) => exit::fail(exit::CONFIGURATION, exit::chain(&error)),
    }
}
