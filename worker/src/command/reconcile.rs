//! `reconcile`: compare the rows with Stripe's subscriptions, and repair them.

use clap::Args;
use litestripe_contract::shutdown;
use serde_json::json;

use super::Failure;
use super::print::{self, Output};
use super::progress::Progress;
use crate::installation::Membership;
use crate::recover::lost_rows;
use crate::recover::reconcile::{
    self, Finding, Problem, ReconcileError, Report, STATUSES, Sources,
};
use crate::settings::Settings;
use crate::start::broker;
use crate::start::consume::while_consuming;
use crate::start::database::Schema;
use crate::start::parts::Parts;

/// Most lines of the table. `--json` prints all.
const LINES_MAX: usize = 1000;

const AFTER_HELP: &str = "\
Without --repair it changes nothing, prints the differences and exits with 3 if there are any. With --repair on an empty \
table it imports the account's subscriptions. Running it again, beside running workers, is safe. It makes one call to Stripe \
for 100 subscriptions and one for each subscription without a known user, within LITESTRIPE_MAX_REQUESTS_PER_MINUTE.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Reconcile {
    /// Compare only Stripe's subscriptions of this status; rows that Stripe does not know are found
    /// only with `all`
    #[arg(long, value_parser = STATUSES, default_value = "all")]
    status: String,
    /// Repair the differences: store Stripe's objects as events in STRIPE_EVENTS and apply them
    #[arg(long)]
    repair: bool,
    /// Allow a live mode key on a database with only test mode rows, or the reverse
    #[arg(long)]
    any_mode: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, thiserror::Error)]
#[error("stopped after {compared} subscriptions{repaired}; running it again is safe")]
struct Incomplete {
    compared: u64,
    repaired: String,
    #[source]
    source: ReconcileError,
}

impl Reconcile {
    pub(crate) async fn execute(self, settings: Settings) -> Result<(), Failure> {
        super::require_stripe(&settings)?;
        // A repair may be the first command on an empty database, which imports the account.
        let (schema, membership) = if self.repair {
            (Schema::Migrated, Membership::Join)
        } else {
            (Schema::Current, Membership::MayBeNew)
        };
        let parts = super::start(&settings, "reconcile", schema, membership).await?;
        let Parts {
            store,
            nats,
            jetstream,
            erasures,
            ..
        } = &parts;
        let stripe = super::stripe_api(&settings, &parts, self.any_mode).await?;
        if self.repair {
            super::check_rules(&settings, store).await?;
            broker::prepare(nats, &settings).await;
            lost_rows::record_if_lost(store, jetstream).await?;
        }
        // Handled only from here on: until here there is nothing that a stop signal would have to
        // finish.
        let stop = shutdown::token()?;
        let sources = Sources {
            store,
            stripe: &stripe,
            metadata_keys: &settings.metadata_keys,
            repair: self.repair.then_some(jetstream),
            erasures,
            stop: &stop,
        };
        let walk = self.walk(sources);
        let (report, outcome) = if self.repair {
            parts
                .while_relaying(&settings, while_consuming(&settings, &parts, walk))
                .await
        } else {
            walk.await
        };
        self.print(&report, outcome.is_ok())?;
        match outcome {
            Err(source) => {
                let count = report.findings.len() - report.remaining();
                let repaired = if self.repair {
                    format!(", {count} rows repaired")
                } else {
                    String::new()
                };
                Err(Incomplete {
                    compared: report.compared,
                    repaired,
                    source,
                }
                .into())
            }
            Ok(()) if report.remaining() == 0 => Ok(()),
            Ok(()) => {
                let hint = ": `litestripe-worker reconcile --repair` repairs them where possible";
                let hint = if self.repair { "" } else { hint };
                Err(Failure::differences(format!(
                    "{} rows differ from Stripe{hint}",
                    report.remaining()
                )))
            }
        }
    }

    async fn walk(&self, sources: Sources<'_>) -> (Report, Result<(), ReconcileError>) {
        let mut progress = Progress::start("reconcile", "subscriptions", None);
        let mut walk = reconcile::Reconcile::new(sources, |count| progress.advance(count));
        let outcome = walk.run(&self.status).await;
        let report = std::mem::take(&mut walk.report);
        drop(walk);
        progress.finish();
        (report, outcome)
    }

    fn print(&self, report: &Report, is_complete: bool) -> Result<(), Failure> {
        let different = report.findings.len();
        let remaining = report.remaining();
        let unknown = report.count(Problem::UnknownToStripe);
        let equal = report.compared.saturating_sub((different - unknown) as u64);
        let summary = json!({
            "complete": is_complete,
            "compared": report.compared,
            "equal": equal,
            "different": different,
            "repaired": different - remaining,
            "remaining": remaining,
            "unknown_to_stripe": unknown,
            "calls": report.calls,
            "differences": report.findings,
        });
        self.output.print(&summary, || {
            if different > 0 {
                let mut lines = report.findings.iter().flat_map(|finding| self.lines(finding));
                let header = ["subscription", "field", "row", "stripe", "outcome"];
                print::table(header, lines.by_ref().take(LINES_MAX));
                if lines.next().is_some() {
                    print::line(&format!("only the first {LINES_MAX} lines are shown: --json prints all"));
                }
                print::line("");
            }
            let repaired = if self.repair { format!("{} repaired, ", different - remaining) } else { String::new() };
            print::line(&format!(
                "{} subscriptions compared in {} calls: {equal} equal, {different} different, {repaired}{remaining} \
                 remain, {unknown} unknown to Stripe",
                report.compared, report.calls
            ));
        })
    }

    /// Formats a finding as lines of the table, one per field.
    fn lines(&self, finding: &Finding) -> Vec<[String; 5]> {
        let outcome = match (finding.repaired, &finding.note) {
            (true, _) => "repaired",
            (false, Some(note)) => note,
            (false, None) if self.repair => "remains",
            (false, None) => "-",
        };
        let id = &finding.stripe_subscription_id;
        let line = |field: &str, row, stripe| {
            [
                id.clone(),
                field.to_owned(),
                row,
                stripe,
                outcome.to_owned(),
            ]
        };
        let whole = match finding.problem {
            Problem::Different => None,
            Problem::Missing => Some(("missing", "exists")),
            Problem::Unreadable => Some(("unreadable", "-")),
            Problem::UnknownToStripe => Some(("exists", "unknown")),
            Problem::CannotBeKept => Some(("-", "cannot be stored")),
        };
        let whole = whole.map(|(row, stripe)| line("-", row.to_owned(), stripe.to_owned()));
        let fields = finding.differences.iter();
        let fields =
            fields.map(|one| line(&one.field, print::cell(&one.row), print::cell(&one.stripe)));
        whole.into_iter().chain(fields).collect()
    }
}
