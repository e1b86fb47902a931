//! `erase`: remove one customer's personal data, and print a receipt.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use litestripe_contract::event::ID_BYTES_MAX;

use super::Failure;
use super::print::{self, Output};
use super::progress::Progress;
use crate::erasure::{Erasure, Outcome, Receipt, Target};
use crate::installation::Membership;
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::start::parts::Parts;

const AFTER_HELP: &str = "\
It records the erasure and then removes the customer's messages from all three streams, their orphans' emails, and the metadata \
of their rows; ids, states and dates stay. Erase the customer at Stripe first: later events are stored again. If it \
fails halfway, run it again; this is harmless. It cannot remove what is in logs, backups and your subscribers' data. Keep the \
printed receipt: if both the database and NATS lose their data, erase the customer again after restoring a backup.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Erase {
    #[command(flatten)]
    selection: Selection,
    /// Erase even if an event of the customer is not applied yet; its content is lost
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Selection {
    /// Stripe's customer id, or the customer's account (acct_…)
    #[arg(long, value_name = "cus_…", value_parser = id)]
    customer: Option<String>,
    /// Id of an orphan, for a payment without a customer; if the orphan has a customer, that
    /// customer is erased
    #[arg(long, value_name = "ID", value_parser = id)]
    orphan: Option<String>,
}

/// Parses an id of Stripe: printable ASCII. Stripe does not promise the prefix.
fn id(text: &str) -> Result<String, &'static str> {
    let is_id = (1..=ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    if is_id {
        Ok(text.to_owned())
    } else {
        Err("must be an id as Stripe writes it, such as cus_123")
    }
}

impl Erase {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let target = match (self.selection.customer, self.selection.orphan) {
            (Some(customer), _) => Target::Customer(customer),
            (None, Some(orphan)) => Target::Orphan(orphan),
            (None, None) => {
                return Err(Failure::new(
                    "name the customer to erase: --customer or --orphan",
                ));
            }
        };
        let parts = super::start(settings, "erase", Schema::Current, Membership::Required).await?;
        let Parts {
            store,
            jetstream,
            erasures,
            ..
        } = &parts;
        let progress = Mutex::new(Progress::start("erase", "messages", None));
        let on_message = || {
            progress
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .advance(1)
        };
        let erasure = Erasure {
            store,
            jetstream,
            erasures,
            force: self.force,
            on_message: &on_message,
        };
        let erased = parts.while_relaying(settings, erasure.run(&[target])).await;
        progress
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .finish();
        let Outcome { receipt, waiting } = erased?;
        match (receipt, waiting.into_iter().next()) {
            (_, Some((_, error))) => Err(error.into()),
            (receipt, None) => self
                .output
                .print(&receipt, || receipt.iter().for_each(print)),
        }
    }
}

fn print(receipt: &Receipt) {
    let rows = [
        ("messages in STRIPE_EVENTS", receipt.events),
        ("of these, not applied yet", receipt.unapplied),
        ("messages in STRIPE_DEAD_LETTERS", receipt.dead_letters),
        ("messages in LITESTRIPE_SIGNALS", receipt.signals),
        ("subscriptions with metadata", receipt.subscriptions),
        ("orphans with an email", receipt.orphans),
    ];
    print::table(
        ["erased", "count"],
        rows.map(|(what, count)| [what.to_owned(), count.to_string()]),
    );
    print::line(&format!(
        "recorded at {} for {}",
        receipt.recorded_at,
        receipt.ids.join(", ")
    ));
}
