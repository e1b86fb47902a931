//! `replay`: apply events again that the stream still holds.

use std::sync::Arc;

use clap::Args;
use litestripe_contract::event::EventType;
use litestripe_contract::shutdown;
use serde_json::json;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::Failure;
use super::moment;
use super::print::{self, Output};
use super::progress::Progress;
use crate::installation::Membership;
use crate::recover::replay::{
    self, Bound, DryRun, ReplayError, Replayer, Request, Signals, Summary,
};
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::start::parts::policy;
use crate::store::replay::Replay as PlannedReplay;
use crate::stream::dead_letter::DeadLetters;

/// Most rows that a dry run lists; `--json` lists all.
const LIST_MAX: usize = 100;

const AFTER_HELP: &str = "\
A replay merges old events like live ones, beside running workers: rows that are right already do not change. Run it into \
an empty database to rebuild the rows, or after a bug was fixed. It prints its progress; if it is interrupted, run the same \
command again to continue. Only one replay runs at a time. Until it ends, the rows that it changes send no signals, unless \
a live event changes them. A row whose user is not in the stream is not signalled; the last line names such rows.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Replay {
    /// Begin at this sequence of STRIPE_EVENTS [default: the first one in the stream]
    #[arg(long, value_name = "N", group = "begin")]
    from_sequence: Option<u64>,
    /// Begin with the first event stored at or after this time, such as 2026-11-24T02:30:00Z (RFC
    /// 3339)
    #[arg(long, value_name = "TIME", group = "begin", value_parser = moment::at)]
    from_time: Option<OffsetDateTime>,
    /// Begin with the first event that is not older than this, such as 2h or 7d
    #[arg(long, value_name = "AGE", group = "begin", value_parser = moment::ago)]
    since: Option<OffsetDateTime>,
    /// End at this sequence, or before this time (RFC 3339) or age (2h) [default: the newest event
    /// in the stream]
    #[arg(long, value_name = "N|TIME|AGE", value_parser = until)]
    until: Option<Bound>,
    /// Replay only events of this type; may be given several times
    #[arg(long = "type", value_name = "TYPE", value_parser = event_type)]
    event_types: Vec<EventType>,
    /// Replay only events of this subscription
    #[arg(long, value_name = "SUB")]
    subscription: Option<String>,
    /// Which signals to send at the end
    #[arg(long, value_enum, default_value_t = Signals::Changed)]
    signals: Signals,
    /// Show which rows would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

impl Replay {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        // A replay may be the first command on an empty database, so it may migrate.
        let schema = if self.dry_run {
            Schema::Current
        } else {
            Schema::Migrated
        };
        let parts = super::start(settings, "replay", schema, Membership::MayBeNew).await?;
        super::check_rules(settings, &parts.store).await?;
        let dead_letters = DeadLetters::new(&parts.store, &parts.erasures, &parts.jetstream);
        let applier = parts.applier(settings, &dead_letters, &Arc::default());
        let mut replayer = Replayer {
            applier,
            jetstream: parts.jetstream.clone(),
            batch: settings.batch,
        };

        // Handled only from here on: before, a stop signal ends the process at once, and nothing
        // has begun.
        let shutdown = shutdown::token()?;
        if self.dry_run {
            let planned = replayer
                .resolve(&self.request(), OffsetDateTime::now_utc())
                .await
                .map_err(failure)?;
            let Some(planned) = planned else {
                return self.print_nothing();
            };
            replayer.applier.policy = replay::policy(policy(settings), &planned);
            return self.dry_run(&replayer, &planned, &shutdown).await;
        }
        let begun = replayer.begin(&self.request()).await.map_err(failure)?;
        let Some(begun) = begun else {
            return self.print_nothing();
        };
        let replay = &begun.replay;
        replayer.applier.policy = replay::policy(policy(settings), replay);
        // A resumed replay has applied a part already.
        let done = begun
            .consumer
            .progress(&parts.jetstream)
            .await
            .ok()
            .flatten()
            .map_or(0, |progress| progress.ack_floor);
        let mut progress = Progress::through(
            "replay",
            done.max(replay.first_sequence - 1),
            replay.last_sequence,
        );
        let work = replayer.run(&begun, &shutdown, |sequence| progress.reached(sequence));
        let summary = parts.while_relaying(settings, work).await;
        progress.finish();
        self.report(&summary.map_err(failure)?)
    }

    fn request(&self) -> Request {
        let time = self.from_time.or(self.since).map(Bound::Time);
        Request {
            from: self.from_sequence.map(Bound::Sequence).or(time),
            until: self.until,
            event_types: self.event_types.clone(),
            stripe_subscription_id: self.subscription.clone(),
            signals: self.signals,
        }
    }

    fn print_nothing(&self) -> Result<(), Failure> {
        self.output.print(
            &Summary {
                finished: true,
                ..Summary::default()
            },
            || {
                let applied = if self.signals == Signals::None {
                    " that is already applied"
                } else {
                    ""
                };
                print::line(&format!(
                    "nothing to replay: STRIPE_EVENTS holds no such event{applied}"
                ));
            },
        )
    }

    fn report(&self, summary: &Summary) -> Result<(), Failure> {
        let Summary {
            first_sequence,
            last_sequence,
            events,
            poisoned,
            signals,
            withheld,
            finished,
        } = summary;
        let span = format!("events {first_sequence} to {last_sequence}");
        if *finished || self.output.json {
            self.output.print(summary, || {
                print::line(&format!(
                    "replayed {span}: {events} applied again, {poisoned} poisoned, {signals} signals sent"
                ));
                withheld.advice().iter().for_each(|line| print::line(line));
            })?;
        }
        if *finished {
            return Ok(());
        }
        Err(Failure::new(format!(
            "stopped after {events} events: run the same command again to continue from there; signals for \
             changed rows are sent only at the end"
        )))
    }

    async fn dry_run(
        &self,
        replayer: &Replayer,
        planned: &PlannedReplay,
        shutdown: &CancellationToken,
    ) -> Result<(), Failure> {
        let mut progress = Progress::through(
            "replay (dry run)",
            planned.first_sequence - 1,
            planned.last_sequence,
        );
        let dry = replayer
            .dry_run(planned, shutdown, |sequence| progress.reached(sequence))
            .await;
        progress.finish();
        let dry = dry?;
        if !dry.finished {
            return Err(Failure::new(
                "stopped before the end of the dry run; no row was changed",
            ));
        }
        self.print_dry(&dry, planned)
    }

    fn print_dry(&self, dry: &DryRun, planned: &PlannedReplay) -> Result<(), Failure> {
        let (first, last) = (planned.first_sequence, planned.last_sequence);
        let changes = dry.changes();
        let rows: Vec<_> = changes
            .iter()
            .map(|(id, is_new, fields)| json!({ "stripe_subscription_id": id, "new": is_new, "changed": fields }))
            .collect();
        let report = json!({
            "first_sequence": first, "last_sequence": last, "events": dry.events, "poisoned": dry.poisoned,
            "rows": rows, "orphans": dry.orphans,
        });
        self.output.print(&report, || {
            let row = |(id, is_new, fields): &(&str, bool, Vec<String>)| {
                [(*id).to_owned(), if *is_new { "new" } else { "changed" }.to_owned(), fields.join(", ")]
            };
            if !changes.is_empty() {
                print::table(["subscription", "row", "fields"], changes.iter().take(LIST_MAX).map(row));
            }
            if changes.len() > LIST_MAX {
                print::line(&format!("and {} more (--json lists all)", changes.len() - LIST_MAX));
            }
            let created = changes.iter().filter(|(_, is_new, _)| *is_new).count();
            let (changed, orphans) = (changes.len() - created, dry.orphans.len());
            print::line(&format!(
                "a replay of events {first} to {last} would create {created} rows, change {changed}, and create \
                 {orphans} orphans; no row was changed"
            ));
        })
    }
}

fn until(text: &str) -> Result<Bound, String> {
    if let Ok(sequence) = text.parse() {
        return Ok(Bound::Sequence(sequence));
    }
    let time = if text.contains('T') {
        moment::at(text)
    } else {
        moment::ago(text)
    };
    time.map(Bound::Time)
}

fn event_type(text: &str) -> Result<EventType, String> {
    EventType::parse(text).map_err(|error| error.to_string())
}

/// A range that cannot be replayed is an error of the command line.
fn failure(error: ReplayError) -> Failure {
    match error {
        ReplayError::NoSuchSequence { .. } | ReplayError::Backwards { .. } => {
            Failure::configuration(error)
        }
        error => error.into(),
    }
}
