//! `reconcile`: compare the rows with Stripe's subscriptions, and mend them.

use std::sync::atomic::AtomicU64;

use clap::Args;
use litestripe_contract::shutdown;
use serde_json::json;

use super::print;
use super::progress::Progress;
use super::{Failure, NoKey};
use crate::recover::reconcile::{self, Finding, Problem, ReconcileError, Report, STATUSES, Sources};
use crate::settings::Settings;
use crate::start::broker;
use crate::start::consume::while_consuming;
use crate::start::database::Schema;
use crate::start::parts::Parts;
use crate::stripe::mode;

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
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Some rows are still not as Stripe has them.
#[derive(Debug, thiserror::Error)]
#[error("{0} rows are not as Stripe has them{1}")]
pub(crate) struct Remaining(usize, &'static str);

/// It did not come to its end.
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
        let key = settings.stripe.as_ref().ok_or_else(|| Failure::configuration(NoKey))?;
        // It may be the import on the first day.
        let schema = if self.repair { Schema::Migrated } else { Schema::Current };
        let parts = super::start(&settings, "reconcile", schema).await?;
        let Parts { store, nats, jetstream, erasures } = &parts;
        if let Some(mismatch) = mode::mismatch(store, key).await?.filter(|_| !self.any_mode) {
            return Err(Failure::configuration(mismatch));
        }
        if self.repair {
            broker::prepare(nats, &settings).await;
        }
        let stripe = parts.stripe(&settings)?.ok_or_else(|| Failure::configuration(NoKey))?;
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
            parts.while_relaying(&settings, while_consuming(&settings, &parts, walk)).await
        } else {
            walk.await
        };
        self.print(&report, outcome.is_ok())?;
        match outcome {
            Err(source) => {
                let repaired = report.findings.len() - report.remaining();
                let mended = if self.repair { format!(", {repaired} rows repaired") } else { String::new() };
                Err(BrokenOff { compared: report.compared, mended, source }.into())
            }
            Ok(()) if report.remaining() == 0 => Ok(()),
            Ok(()) => {
                let hint =
                    if self.repair { "" } else { ": `litestripe-worker reconcile --repair` mends what can be mended" };
                Err(Failure::differences(Remaining(report.remaining(), hint)))
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
        if self.json {
            print::json(&summary)?;
            return Ok(());
        }
        if different > 0 {
            let lines = report.findings.iter().flat_map(|finding| self.lines(finding));
            print::table(["subscription", "field", "row", "stripe", "outcome"], lines.take(LINES_MAX));
            if report.findings.iter().flat_map(|finding| self.lines(finding)).nth(LINES_MAX).is_some() {
                print::line(&format!("only the first {LINES_MAX} lines: --json shows all"));
            }
            print::line("");
        }
        let repaired = if self.repair { format!("{} repaired, ", different - remaining) } else { String::new() };
        print::line(&format!(
            "{} subscriptions compared in {} calls: {equal} equal, {different} different, {repaired}{remaining} remain, \
             {unknown} unknown to Stripe",
            report.compared, report.calls
        ));
        Ok(())
    }

    /// A finding as lines of the table: one for each field.
    fn lines(&self, finding: &Finding) -> Vec<[String; 5]> {
        let outcome = match (finding.repaired, &finding.note) {
            (true, _) => "repaired",
            (false, Some(note)) => note,
            (false, None) if self.repair => "remains",
            (false, None) => "-",
        };
        let line = |field: &str, row: String, stripe: String| {
            [finding.stripe_subscription_id.clone(), field.to_owned(), row, stripe, outcome.to_owned()]
        };
        let row = match finding.problem {
            Problem::Different => None,
            Problem::Missing => Some(("missing", "there")),
            Problem::Unreadable => Some(("unreadable", "-")),
            Problem::UnknownToStripe => Some(("there", "unknown")),
            Problem::CannotBeKept => Some(("-", "cannot be kept")),
        };
        let whole = row.map(|(row, stripe)| line("-", row.to_owned(), stripe.to_owned()));
        let fields = finding
            .differences
            .iter()
            .map(|difference| line(&difference.field, print::cell(&difference.row), print::cell(&difference.stripe)));
        whole.into_iter().chain(fields).collect()
    }
}
