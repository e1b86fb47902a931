//! `erase`: removes what is stored of one customer, and prints a receipt.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use litestripe_contract::event::ID_BYTES_MAX;

use super::Failure;
use super::print::{self, Output};
use super::progress::Progress;
use crate::erasure::{Erasure, Receipt, Target};
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::start::parts::Parts;

#[derive(Debug, Args)]
pub(crate) struct Erase {
    #[command(flatten)]
    whom: Whom,
    /// Also if an event of the customer is not applied yet: what it says is lost
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Whom {
    /// Stripe's id of the customer
    #[arg(long, value_name = "cus_…", value_parser = id)]
    customer: Option<String>,
    /// The id of an orphan, of a payment without a customer; where it has one, the customer is erased
    #[arg(long, value_name = "ID", value_parser = id)]
    orphan: Option<String>,
}

/// Stripe's ids are printable ASCII. What they begin with is not a promise.
fn id(text: &str) -> Result<String, &'static str> {
    let is_id = (1..=ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    if is_id {
        Ok(text.to_owned())
    } else {
        Err("not an id of Stripe's")
    }
}

impl Erase {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let target = match (self.whom.customer, self.whom.orphan) {
            (Some(customer), _) => Target::Customer(customer),
            (None, Some(orphan)) => Target::Orphan(orphan),
            (None, None) => return Err(Failure::new("whose data? --customer or --orphan says it")),
        };
        let parts = super::start(settings, "erase", Schema::Current).await?;
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
        let receipt = parts.while_relaying(settings, erasure.run(&target)).await;
        progress
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .finish();
        let receipt = receipt?;
        self.output.print(&receipt, || print(&receipt))
    }
}

fn print(receipt: &Receipt) {
    let rows = [
        ("messages in STRIPE_EVENTS", receipt.events),
        ("of those, not applied", receipt.unapplied),
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
