//! `backfill`: fetch from Stripe what never arrived.

use clap::Args;
use litestripe_contract::shutdown;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use super::print::{self, Output};
use super::progress::Progress;
use super::{Failure, moment};
use crate::recover::backfill::record::{self, Record};
use crate::recover::backfill::{self, BackfillError, End, Summary, Wanted};
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::start::parts::Parts;

#[derive(Debug, Args)]
pub(crate) struct Backfill {
    /// How far to go back: 72h, or a time such as 2026-11-24T02:30:00Z; at most 30d [default: since
    /// the last complete backfill began, less 2h; 72h where none is known]
    #[arg(long, value_name = "SINCE", value_parser = since)]
    since: Option<OffsetDateTime>,
    /// Leave out events that all your endpoints have accepted
    #[arg(long)]
    undelivered_only: bool,
    /// Go on although the key is of another mode than all rows
    #[arg(long)]
    any_mode: bool,
    #[command(flatten)]
    output: Output,
}

/// What `backfill --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// From when on events were listed, RFC 3339.
    since: String,
    /// Whether all of them were.
    complete: bool,
    #[serde(flatten)]
    summary: Summary,
}

/// It ended before all events were looked at.
#[derive(Debug, thiserror::Error)]
enum Halfway {
    #[error("the backfill ended halfway; what was published stays, and running it again goes on")]
    Failed(#[source] BackfillError),
    #[error("the backfill was stopped; what was published stays, and running it again goes on")]
    Stopped,
}

impl Backfill {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let shutdown = shutdown::token()?;
        let key = super::key(settings)?;
        let parts = super::start(settings, "backfill", Schema::Migrated).await?;
        let stripe = super::stripe(settings, &parts, self.any_mode).await?;
        let Parts {
            store,
            jetstream,
            erasures,
            ..
        } = parts;
        let record = Record::new(store.clone(), key.is_live());
        let types = backfill::types(settings);
        let backfill = backfill::Backfill {
            stripe,
            jetstream,
            store,
            erasures,
            types,
        };
        self.backfill(&backfill, &record, &shutdown).await
    }

    async fn backfill(
        self,
        backfill: &backfill::Backfill,
        record: &Record,
        shutdown: &CancellationToken,
    ) -> Result<(), Failure> {
        let began = OffsetDateTime::now_utc();
        let since = match self.since {
            Some(since) => since,
            None => record::next_since(record.last_complete().await?, began),
        };
        let wanted = Wanted {
            since,
            undelivered_only: self.undelivered_only,
        };
        let mut progress = Progress::start("backfill", "events", None);
        let mut summary = Summary::default();
        let mut shown = 0;
        let show = |summary: &Summary| {
            progress.advance(summary.listed - shown);
            shown = summary.listed;
        };
        let outcome = backfill.run(wanted, &mut summary, show, shutdown).await;
        progress.finish();
        if let Err(error @ BackfillError::NoStream) = outcome {
            return Err(error.into());
        }
        let complete = matches!(outcome, Ok(End::Complete));
        let report = Report {
            since: since.format(&Rfc3339)?,
            complete,
            summary,
        };
        self.output.print(&report, || print(&report))?;
        match outcome {
            // It has not looked at all there is.
            Ok(End::Complete) if self.undelivered_only => Ok(()),
            Ok(End::Complete) => Ok(record.record_complete(since, began).await?),
            Ok(End::Stopped) => Err(Halfway::Stopped.into()),
            Err(error) => Err(Halfway::Failed(error).into()),
        }
    }
}

fn print(report: &Report) {
    let Summary {
        listed,
        already_there,
        published,
        duplicates,
        skipped,
    } = report.summary;
    let not_all = if report.complete { "" } else { "not all of it" };
    let since = ["since".to_owned(), report.since.clone(), not_all.to_owned()];
    let counts = [
        ("listed", listed, "by Stripe"),
        ("already there", already_there, "in STRIPE_EVENTS"),
        ("published", published, "had not arrived"),
        (
            "duplicates",
            duplicates,
            "of the published ones, arrived meanwhile",
        ),
        ("skipped", skipped, "cannot be stored"),
    ];
    let counts =
        counts.map(|(what, count, note)| [what.to_owned(), count.to_string(), note.to_owned()]);
    print::table(["what", "value", ""], [since].into_iter().chain(counts));
}

/// A time that long ago, or that time.
fn since(text: &str) -> Result<OffsetDateTime, String> {
    let is_date = text.as_bytes().get(4) == Some(&b'-');
    let since = if is_date {
        moment::at(text)
    } else {
        moment::ago(text)
    }?;
    // 30d is 30 days ago also a moment later.
    if since < record::oldest(OffsetDateTime::now_utc()) - time::Duration::MINUTE {
        return Err("lies too far back: Stripe keeps events for 30 days".to_owned());
    }
    Ok(since.truncate_to_second())
}
