//! `status`: how far the workers are, at a glance.

use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, ErrorCode, consumer};
use clap::Args;
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_contract::{connect, exit};
use serde::Serialize;
use time::OffsetDateTime;

use super::Failure;
use super::print;
use crate::recover::owed;
use crate::settings::Settings;
use crate::store::{self, Store};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `status --json` prints. A null is something that is not there yet.
#[derive(Debug, Serialize)]
struct Report {
    /// Events in the stream that were not delivered to any worker yet.
    lag: Option<u64>,
    /// Events that were delivered and not acked yet.
    pending_acks: Option<usize>,
    /// Of these, events delivered more than once.
    redelivered: Option<usize>,
    /// Every event up to this sequence is applied.
    ack_floor: Option<u64>,
    /// Events in `STRIPE_EVENTS`.
    events: Option<u64>,
    /// Bytes in `STRIPE_EVENTS`.
    events_bytes: Option<u64>,
    /// Signals committed and not yet acknowledged by JetStream.
    outbox: Option<u64>,
    /// How long the oldest of them has waited, in seconds.
    outbox_oldest_age_s: Option<i64>,
    /// Events in `STRIPE_DEAD_LETTERS`.
    dead_letters: Option<u64>,
    /// Payments whose user is not known.
    open_orphans: Option<u64>,
    /// The replay that has not reached its end.
    replay: Option<ReplayReport>,
    /// Signals that wait for the end of a replay.
    signals_owed: Option<u64>,
    /// The last migration that was applied.
    schema_version: Option<String>,
    /// Whether no known migration waits.
    schema_current: bool,
}

/// A replay that has not reached its end.
#[derive(Debug, Serialize)]
struct ReplayReport {
    /// Whether a process runs it; else it was cut off, and somebody has to run it again.
    running: bool,
    /// The first sequence of `STRIPE_EVENTS` that it applies again.
    first_sequence: u64,
    /// The last one.
    last_sequence: u64,
}

impl Status {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let nats = super::connect(settings, "status").await?;
        let store = Store::open(&settings.database).await?;
        let report = report(&connect::jetstream(nats), &store).await?;
        if self.json {
            print::json(&report)?;
        } else {
            print(report);
        }
        Ok(())
    }
}

async fn report(jetstream: &jetstream::Context, store: &Store) -> Result<Report, Failure> {
    let events = stream(jetstream, EVENTS_STREAM).await?;
    let consumer = match &events {
        Some(stream) => consumer(stream).await?,
        None => None,
    };
    let state = events.as_ref().map(|stream| &stream.cached_info().state);
    let dead_letters = stream(jetstream, DEAD_LETTERS_STREAM).await?;
    let steps = store.migrations().await?;
    let schema_current = steps.iter().all(|step| step.applied);
    let schema_version = steps.iter().rev().find(|step| step.applied).map(|step| step.name.clone());
    // Before the first migration there are no tables to count.
    let (outbox, oldest, open_orphans, replay, signals_owed) = if schema_current {
        let (outbox, oldest) = store::outbox::backlog(store.connection()).await?;
        let open_orphans = store::orphan::count_open(store.connection()).await?;
        (Some(outbox), oldest, Some(open_orphans), replay(store).await?, Some(owed::count(store).await?))
    } else {
        (None, None, None, None, None)
    };
    Ok(Report {
        lag: consumer.as_ref().map(|consumer| consumer.num_pending),
        pending_acks: consumer.as_ref().map(|consumer| consumer.num_ack_pending),
        redelivered: consumer.as_ref().map(|consumer| consumer.num_redelivered),
        ack_floor: consumer.as_ref().map(|consumer| consumer.ack_floor.stream_sequence),
        events: state.map(|state| state.messages),
        events_bytes: state.map(|state| state.bytes),
        outbox,
        outbox_oldest_age_s: oldest.map(|at| (OffsetDateTime::now_utc() - at).whole_seconds()),
        dead_letters: dead_letters.map(|stream| stream.cached_info().state.messages),
        open_orphans,
        replay,
        signals_owed,
        schema_version,
        schema_current,
    })
}

/// A stream that is not there yet is none. Anything else that goes wrong must not look like that.
async fn stream(jetstream: &jetstream::Context, name: &str) -> Result<Option<Stream>, Failure> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            _ => Err(Failure::new(format!("cannot ask JetStream about {name}: {}", exit::chain(&error)))),
        },
    }
}

async fn consumer(events: &Stream) -> Result<Option<consumer::Info>, Failure> {
    match events.consumer_info(WORKER_CONSUMER).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(Failure::new(format!("cannot ask JetStream about {WORKER_CONSUMER}: {}", exit::chain(&error))))
        }
    }
}

async fn replay(store: &Store) -> Result<Option<ReplayReport>, Failure> {
    let now = OffsetDateTime::now_utc();
    let replay = store::replay::unfinished(store.connection()).await?.into_iter().next();
    Ok(replay.map(|replay| ReplayReport {
        running: replay.is_running(now),
        first_sequence: replay.first_sequence,
        last_sequence: replay.last_sequence,
    }))
}

fn print(report: Report) {
    let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    let count = |value: Option<usize>| number(value.map(|value| value as u64));
    let age = report.outbox_oldest_age_s.map_or_else(String::new, |age| format!("the oldest has waited {age} s"));
    let schema = report.schema_version.unwrap_or_else(|| "none".to_owned());
    let current = if report.schema_current { "current" } else { "behind: run `litestripe-worker migrate up`" };
    let mut rows: Vec<[String; 3]> = vec![
        [
            "events".to_owned(),
            number(report.events),
            format!("{} bytes in {EVENTS_STREAM}", number(report.events_bytes)),
        ],
        ["lag".to_owned(), number(report.lag), "events not delivered to any worker yet".to_owned()],
        ["pending acks".to_owned(), count(report.pending_acks), format!("redelivered: {}", count(report.redelivered))],
        ["ack floor".to_owned(), number(report.ack_floor), "every event up to this sequence is applied".to_owned()],
        ["outbox".to_owned(), number(report.outbox), age],
        ["signals owed".to_owned(), number(report.signals_owed), "they wait for the end of a replay".to_owned()],
        ["dead letters".to_owned(), number(report.dead_letters), format!("in {DEAD_LETTERS_STREAM}")],
        ["open orphans".to_owned(), number(report.open_orphans), String::new()],
        ["schema".to_owned(), schema, current.to_owned()],
    ];
    if let Some(replay) = report.replay {
        let state = if replay.running { "running" } else { "cut off: run it again" };
        let span = format!("events {} to {}, {state}", replay.first_sequence, replay.last_sequence);
        rows.push(["replay".to_owned(), String::new(), span]);
    }
    print::table(["what", "value", ""], rows.into_iter());
}
