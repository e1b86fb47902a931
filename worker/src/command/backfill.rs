//! `backfill`: fetch events from Stripe that never arrived.

use clap::Args;
use litestripe_contract::shutdown;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use super::print::{self, Output};
use super::progress::Progress;
use super::{Failure, moment};
use crate::installation::Membership;
use crate::recover::backfill::record::{self, Record};
use crate::recover::backfill::{self, BackfillError, End, Summary, Wanted};
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::start::parts::Parts;

const AFTER_HELP: &str = "\
A backfill lists events with Stripe's Events API, publishes into STRIPE_EVENTS those that the stream lacks, and leaves \
applying them to the workers. Use it after ingress was unreachable. With a key, the workers do the same every \
LITESTRIPE_BACKFILL_INTERVAL. Running it again is safe.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Backfill {
    /// How far to go back: an age (72h) or a time (2026-11-24T02:30:00Z), at most 30d [default: 2h
    /// before the start of the last complete backfill, or 72h if there was none]
    #[arg(long, value_name = "SINCE", value_parser = since)]
    since: Option<OffsetDateTime>,
    /// Fetch only events that at least one of your endpoints at Stripe has not accepted
    #[arg(long)]
    undelivered_only: bool,
    /// Allow a live mode key on a database with only test mode rows, or the reverse
    #[arg(long)]
    any_mode: bool,
    #[command(flatten)]
    output: Output,
}

/// The output of `backfill --json`.
#[derive(Debug, Serialize)]
struct Report {
    /// The time from which events were listed, RFC 3339.
    since: String,
    /// Whether all events since then were listed.
    complete: bool,
    #[serde(flatten)]
    summary: Summary,
}

/// The backfill ended before all events were compared.
#[derive(Debug, thiserror::Error)]
enum Incomplete {
    #[error(
        "the backfill failed halfway; published events stay, and running it again publishes the rest"
    )]
    Failed(#[source] BackfillError),
    #[error(
        "the backfill was stopped halfway; published events stay, and running it again publishes the rest"
    )]
    Stopped,
}

impl Backfill {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let shutdown = shutdown::token()?;
        let key = super::require_stripe(settings)?;
        let parts =
            super::start(settings, "backfill", Schema::Migrated, Membership::MayBeNew).await?;
        let stripe = super::stripe_api(settings, &parts, self.any_mode).await?;
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
            // It left events out, so the next backfill must not start from here.
            Ok(End::Complete) if self.undelivered_only => Ok(()),
            Ok(End::Complete) => Ok(record.record_complete(since, began).await?),
            Ok(End::Stopped) => Err(Incomplete::Stopped.into()),
            Err(error) => Err(Incomplete::Failed(error).into()),
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
    let not_all = if report.complete {
        ""
    } else {
        "incomplete: run it again"
    };
    let since = ["since".to_owned(), report.since.clone(), not_all.to_owned()];
    let counts = [
        ("listed", listed, "events at Stripe since then"),
        ("already there", already_there, "in STRIPE_EVENTS"),
        ("published", published, "events that had not arrived"),
        (
            "duplicates",
            duplicates,
            "of the published events: they arrived meanwhile",
        ),
        (
            "skipped",
            skipped,
            "events that cannot or must not be stored",
        ),
    ];
    let counts =
        counts.map(|(what, count, note)| [what.to_owned(), count.to_string(), note.to_owned()]);
    print::table(["what", "value", "note"], [since].into_iter().chain(counts));
}

/// Parses an age such as `72h`, or a time.
fn since(text: &str) -> Result<OffsetDateTime, String> {
    let is_date = text.as_bytes().get(4) == Some(&b'-');
    let since = if is_date {
        moment::at(text)
    } else {
        moment::ago(text)
    }?;
    // `30d` was computed a moment ago and must still be accepted.
    if since < record::oldest(OffsetDateTime::now_utc()) - time::Duration::MINUTE {
        return Err("lies too far back: Stripe keeps events for 30 days".to_owned());
    }
    Ok(since.truncate_to_second())
}
