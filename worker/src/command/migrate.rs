//! `migrate up | down | status`.

use clap::Subcommand;

use super::Failure;
use super::print::{self, Output};
use crate::settings::Settings;
use crate::start::database::{self, Schema};

#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply the migrations that wait
    Up,
    /// Take migrations back; their tables and all rows in them are dropped
    Down {
        /// How many to take back
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
        let yes_or_no = |applied| if applied { "yes" } else { "no" };
        let rows = steps
            .iter()
            .map(|step| [step.name.clone(), yes_or_no(step.applied).to_owned()]);
        output.print(&steps, || print::table(["migration", "applied"], rows))
    }
}
