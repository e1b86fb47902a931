//! `reconcile`: compare the rows with Stripe's subscriptions, and mend them.

use std::sync::atomic::AtomicU64;

use clap::Args;
use litestripe_contract::shutdown;
use serde_json::json;

use super::Failure;
use super::print::{self, Output};
use super::progress::Progress;
use crate::recover::reconcile::{
    self, Finding, Problem, ReconcileError, Report, STATUSES, Sources,
};
use crate::settings::Settings;
use crate::start::broker;
use crate::start::consume::while_consuming;
use crate::start::database::Schema;
use crate::start::parts::Parts;

/// Lines of the table, at most: nobody reads more, and `--json` has all.
const LINES_MAX: usize = 1000;

#[derive(Debug, Args)]
pub(crate) struct Reconcile {
    /// Which of Stripe's subscriptions; only with all of them are rows looked for that Stripe does not know
    #[arg(long, value_parser = STATUSES, default_value = "all")]
    status: String,
    /// Mend what is different: store what Stripe says as events and apply them
    #[arg(long)]
    repair: bool,
    /// Also if the key is of one mode and every row of the other
    #[arg(long)]
    any_mode: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, thiserror::Error)]
#[error("broke off after {compared} subscriptions{mended}; running it again is safe")]
struct BrokenOff {
    compared: u64,
    mended: String,
    #[source]
    source: ReconcileError,
}

impl Reconcile {
    pub(crate) async fn execute(self, settings: Settings) -> Result<(), Failure> {
        super::key(&settings)?;
        // It may be the import on the first day.
        let schema = if self.repair {
            Schema::Migrated
        } else {
            Schema::Current
        };
        let parts = super::start(&settings, "reconcile", schema).await?;
        let Parts {
            store,
            nats,
            jetstream,
            erasures,
        } = &parts;
        let stripe = super::stripe(&settings, &parts, self.any_mode).await?;
        if self.repair {
            broker::prepare(nats, &settings).await;
        }
        // Until here nothing was done that would have to be finished.
        let stop = shutdown::token()?;
        let sources = Sources {
            store,
            stripe: &stripe,
            metadata_keys: &settings.metadata_keys,
            repair: self.repair.then_some(jetstream),
            erasures,
            stop: &stop,
            calls: AtomicU64::new(0),
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
                let repaired = report.findings.len() - report.remaining();
                let mended = if self.repair {
                    format!(", {repaired} rows repaired")
                } else {
                    String::new()
                };
                Err(BrokenOff {
                    compared: report.compared,
                    mended,
                    source,
                }
                .into())
            }
            Ok(()) if report.remaining() == 0 => Ok(()),
            Ok(()) => {
                let hint = ": `litestripe-worker reconcile --repair` mends what can be mended";
                let hint = if self.repair { "" } else { hint };
                Err(Failure::differences(format!(
                    "{} rows are not as Stripe has them{hint}",
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
                    print::line(&format!("only the first {LINES_MAX} lines: --json shows all"));
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

    /// A finding as lines of the table: one for each field.
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
            Problem::Missing => Some(("missing", "there")),
            Problem::Unreadable => Some(("unreadable", "-")),
            Problem::UnknownToStripe => Some(("there", "unknown")),
            Problem::CannotBeKept => Some(("-", "cannot be kept")),
        };
        let whole = whole.map(|(row, stripe)| line("-", row.to_owned(), stripe.to_owned()));
        let fields = finding.differences.iter();
        let fields =
            fields.map(|one| line(&one.field, print::cell(&one.row), print::cell(&one.stripe)));
        whole.into_iter().chain(fields).collect()
    }
}
