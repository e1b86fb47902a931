//! `migrate up | down | status`.

use clap::Subcommand;
use tracing::warn;

use super::Failure;
use super::print::{self, Output};
use crate::settings::Settings;
use crate::start::database::{self, Schema};

pub(super) const AFTER_HELP: &str = "\
With LITESTRIPE_AUTO_MIGRATE=true (the default on SQLite) `run` migrates at its start. On PostgreSQL, run `migrate up` \
before you start workers of a new version; workers of the old version run on the new schema. On a schema of a newer \
version it changes nothing, warns, and exits with 0.";

#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply all pending migrations
    Up,
    /// Revert the newest migrations; this drops their tables with all rows
    Down {
        /// Number of migrations to revert
        #[arg(long, default_value_t = 1)]
        steps: u32,
    },
    /// List migrations and whether they are applied
    Status(Output),
}

impl Migrate {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let store = database::open(&settings.database, Schema::Any).await?;
        let mut output = Output::default();
        match self {
            Self::Up => store.migrate_up().await?,
            Self::Down { steps } => store.migrate_down(steps).await?,
            Self::Status(asked) => output = asked,
        }
        let steps = store.migrations().await?;
        if let Some(newer) = steps.iter().rfind(|step| !step.known) {
            warn!(
                "a newer version has migrated the schema (to {}): this version runs on it, unless the changelog of the \
                 newer one says otherwise",
                newer.name
            );
        }
        let rows = steps.iter().map(|step| {
            let applied = match (step.applied, step.known) {
                (true, true) => "yes",
                (true, false) => "yes, by a newer version",
                (false, _) => "no",
            };
            [step.name.clone(), applied.to_owned()]
        });
        output.print(&steps, || print::table(["migration", "applied"], rows))
    }
}
