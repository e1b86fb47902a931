//! `migrate up | down | status`.

use clap::{Args, Subcommand};

use super::Failure;
use super::print;
use crate::settings::Settings;
use crate::start::database::{self, Schema};
use crate::store::{Step, Store};

#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply the migrations that wait
    Up,
    /// Take migrations back; their tables and all rows in them are dropped
    Down(Down),
    /// List migrations and whether they are applied
    Status(Listing),
}

#[derive(Debug, Args)]
pub(crate) struct Down {
    /// How many to take back
    #[arg(long, default_value_t = 1)]
    steps: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Listing {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Migrate {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let store = database::open(&settings.database, Schema::Any).await?;
        match self {
            Self::Up => store.migrate_up().await?,
            Self::Down(down) => store.migrate_down(down.steps).await?,
            Self::Status(listing) => return print(&store, listing.json).await,
        }
        print(&store, false).await
    }
}

async fn print(store: &Store, json: bool) -> Result<(), Failure> {
    let steps = store.migrations().await?;
    if json {
        print::json(&steps)?;
    } else {
        print::table(
            ["migration", "applied"],
            steps.into_iter().map(|Step { name, applied }| [name, yes_or_no(applied).to_owned()]),
        );
    }
    Ok(())
}

fn yes_or_no(applied: bool) -> &'static str {
    if applied { "yes" } else { "no" }
}
