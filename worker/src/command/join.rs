//! `join`: make database and broker one installation on purpose.

use clap::Args;
use litestripe_contract::connect;
use serde_json::json;

use super::Failure;
use super::print::{self, Output};
use crate::installation;
use crate::settings::Settings;
use crate::start::database::{self, Schema};

const AFTER_HELP: &str = "\
Database and broker hold the same installation id. If a worker finds different ones it stops, because events would be \
acknowledged that only another database has. Use this command after one of them was replaced on purpose: the broker gets \
the database's id. Workers that still use another database stop. Events that were applied to another database are not in \
this one: afterwards run `replay`, then `reconcile --repair`.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Join {
    #[command(flatten)]
    output: Output,
}

impl Join {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let jetstream = connect::jetstream(super::connect(settings, "join").await?);
        let store = database::open(&settings.database, Schema::Current).await?;
        let (id, before) = installation::join_on_purpose(settings, &store, &jetstream).await?;
        let joined = json!({ "installation": id, "broker_before": before });
        self.output.print(&joined, || {
            print::line(&match before {
                None => format!("database and broker are installation {id}"),
                Some(before) => format!(
                    "database and broker are installation {id} now; the broker belonged to {before} before"
                ),
            });
        })
    }
}
