//! `status`: how far the workers are.

use std::collections::BTreeMap;

use async_nats::jetstream::account::Account;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::{Info, Stream};
use async_nats::jetstream::{self, consumer};
use clap::Args;
use litestripe_contract::stream::Finding;
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_contract::{connect, exit};
use litestripe_domain::question::Kind;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::Failure;
use super::print::{self, Output};
use crate::clocks;
use crate::installation::{self, InstallationError};
use crate::recover::unsent;
use crate::recover::withheld::Withheld;
use crate::settings::{Settings, StripeSettings};
use crate::start::broker::{self, STREAMS};
use crate::store::{self, Store};
use crate::stream::seen::Seen;
use crate::stream::{findings, room};

#[derive(Debug, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    output: Output,
}

/// The output of `status --json`. A null stands for a stream, consumer or table that does not exist
/// yet; in `outbox_oldest_age_s` and `replay`, that there is none. `print` explains each field.
#[derive(Debug, Default, Serialize)]
struct Report {
    lag: Option<u64>,
    pending_acks: Option<usize>,
    redelivered: Option<usize>,
    ack_floor: Option<u64>,
    events: Option<u64>,
    events_bytes: Option<u64>,
    outbox: Option<u64>,
    outbox_oldest_age_s: Option<i64>,
    dead_letters: Option<u64>,
    /// Dead letters that cannot be stored in STRIPE_DEAD_LETTERS yet.
    pending_dead_letters: Option<u64>,
    streams: Vec<StreamReport>,
    account: Option<AccountReport>,
    /// What an operator should change.
    problems: Vec<Finding>,
    open_orphans: Option<u64>,
    replay: Option<ReplayReport>,
    unsent_signals: Option<u64>,
    /// The open questions by kind.
    questions: Option<BTreeMap<&'static str, QuestionsReport>>,
    /// Subscriptions and Checkout Sessions with thin events that `STRIPE_SECRET_KEY` cannot fetch.
    waiting_for_key: Option<u64>,
    withheld: Option<u64>,
    withheld_first: Option<Vec<String>>,
    /// The newest applied migration.
    schema_version: Option<String>,
    schema_current: bool,
    /// The installation that the database belongs to.
    installation: Option<String>,
}

/// How full a stream is.
#[derive(Debug, Serialize)]
struct StreamReport {
    name: String,
    messages: u64,
    bytes: u64,
    /// `None`: no limit.
    max_bytes: Option<u64>,
    /// Of its limit, rounded down.
    percent: Option<u64>,
}

/// How much of the account's file storage is used.
#[derive(Debug, Serialize)]
struct AccountReport {
    storage: u64,
    /// `None`: no limit but the server's.
    max_storage: Option<u64>,
}

/// The open questions of a kind.
#[derive(Debug, Default, Serialize)]
struct QuestionsReport {
    open: u64,
    /// How many of them failed at the last attempt.
    failing: u64,
    /// How long the oldest failing one has been open.
    oldest_age_s: Option<i64>,
    /// Why the last attempt at one of them failed.
    last_error: Option<String>,
}

/// An unfinished replay.
#[derive(Debug, Serialize)]
struct ReplayReport {
    /// Whether a process runs it. If not, it was interrupted, and the operator has to run it again.
    running: bool,
    /// Whether it is not a replay yet: the rows were lost, and the operator has to rebuild them.
    rows_lost: bool,
    first_sequence: u64,
    last_sequence: u64,
}

impl Status {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let jetstream = connect::jetstream(super::connect(settings, "status").await?);
        let store = Store::open(&settings.database).await?;
        let mut report = Report::default();
        report.read_broker(&jetstream).await?;
        let key = settings.stripe.as_ref().map(StripeSettings::is_live);
        report.read_database(&store, key).await?;
        report.find_problems(&store, &jetstream).await?;
        let differences = clocks::differences(&store, &jetstream).await;
        report
            .problems
            .extend(differences.into_iter().map(Finding::from));
        let shown = serde_json::to_value(&report)?;
        self.output.print(&report, || print(&shown))
    }
}

impl Report {
    async fn read_broker(&mut self, jetstream: &jetstream::Context) -> Result<(), Failure> {
        for name in STREAMS {
            let stream = broker::get_stream(jetstream, name).await;
            let unreadable = |error| {
                let reason = exit::chain(&error);
                Failure::new(format!(
                    "cannot read the state of the stream {name}: {reason}"
                ))
            };
            if let Some(stream) = stream.map_err(unreadable)? {
                self.add_stream(&stream).await?;
            }
        }
        let account = jetstream.query_account().await.map_err(|error| {
            let reason = exit::chain(&error);
            Failure::new(format!(
                "cannot read the account's use of JetStream: {reason}"
            ))
        })?;
        self.account = Some(AccountReport::from(account));
        Ok(())
    }

    async fn add_stream(&mut self, stream: &Stream) -> Result<(), Failure> {
        let Info { config, state, .. } = stream.cached_info();
        if config.name == EVENTS_STREAM {
            self.events = Some(state.messages);
            self.events_bytes = Some(state.bytes);
            if let Some(consumer) = consumer(stream).await? {
                self.lag = Some(consumer.num_pending);
                self.pending_acks = Some(consumer.num_ack_pending);
                self.redelivered = Some(consumer.num_redelivered);
                self.ack_floor = Some(consumer.ack_floor.stream_sequence);
            }
        }
        if config.name == DEAD_LETTERS_STREAM {
            self.dead_letters = Some(state.messages);
        }
        let max_bytes = room::stream_max(config.max_bytes);
        self.streams.push(StreamReport {
            name: config.name.clone(),
            messages: state.messages,
            bytes: state.bytes,
            max_bytes,
            percent: max_bytes.map(|max| room::percent(state.bytes, max)),
        });
        self.problems.extend(broker::findings(config));
        Ok(())
    }

    async fn read_database(&mut self, store: &Store, key: Option<bool>) -> Result<(), Failure> {
        let steps = store.migrations().await?;
        self.schema_current = steps.iter().all(|step| step.applied);
        self.schema_version = steps
            .into_iter()
            .rfind(|step| step.applied)
            .map(|step| step.name);
        // Tables may be missing before all migrations are applied.
        if !self.schema_current {
            return Ok(());
        }
        let db = store.connection();
        let now = store::clock::now(db).await?;
        let (outbox, oldest) = store::outbox::backlog(db).await?;
        self.outbox = Some(outbox);
        self.outbox_oldest_age_s = oldest.map(|at| age_s(at, now));
        self.pending_dead_letters = Some(store::dead_letter::count(db).await?);
        let installation = store::installation::find(db).await?;
        self.installation = installation.map(|found| found.id);
        self.open_orphans = Some(store::orphan::count_open(db).await?);
        self.unsent_signals = Some(unsent::count(store).await?);
        let open = store::question::count_open(db).await?;
        let waiting = open.iter().filter(|open| open.waits_for_key(key));
        self.waiting_for_key = Some(waiting.map(|open| open.count).sum());
        let mut by_kind: BTreeMap<_, QuestionsReport> = Kind::ALL
            .map(|kind| (kind.as_str(), QuestionsReport::default()))
            .into();
        for open in open {
            let of_kind = by_kind.entry(open.kind.as_str()).or_default();
            of_kind.open += open.count;
            of_kind.failing += open.failing;
            let age = open.oldest.map(|at| age_s(at, now));
            of_kind.oldest_age_s = of_kind.oldest_age_s.max(age);
            of_kind.last_error = of_kind.last_error.take().or(open.error);
        }
        self.questions = Some(by_kind);
        let Withheld { count, first } = Withheld::find(store).await?;
        (self.withheld, self.withheld_first) = (Some(count), Some(first));
        let replay = store::replay::unfinished(db).await?.into_iter().next();
        self.replay = replay.map(|replay| ReplayReport {
            running: replay.is_running(now),
            rows_lost: replay.is_lost_rows_record(),
            first_sequence: replay.first_sequence,
            last_sequence: replay.last_sequence,
        });
        Ok(())
    }
}

impl Report {
    async fn find_problems(
        &mut self,
        store: &Store,
        jetstream: &jetstream::Context,
    ) -> Result<(), Failure> {
        let seen = Seen::read(jetstream).await.map_err(Failure::new)?;
        self.problems.extend(findings::find(&seen));
        if self.schema_current {
            match installation::check(store, jetstream).await {
                Err(InstallationError::Split(split)) => self.problems.push(split.into()),
                outcome => outcome?,
            }
        }
        Ok(())
    }
}

impl From<Account> for AccountReport {
    fn from(account: Account) -> Self {
        Self {
            storage: account.storage,
            max_storage: room::storage_max(&account),
        }
    }
}

/// Returns how long ago `at` was, not below 0: clocks differ.
fn age_s(at: OffsetDateTime, now: OffsetDateTime) -> i64 {
    (now - at).whole_seconds().max(0)
}

async fn consumer(events: &Stream) -> Result<Option<consumer::Info>, Failure> {
    match events.consumer_info(WORKER_CONSUMER).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::new(format!(
            "cannot read the state of the consumer {WORKER_CONSUMER}: {}",
            exit::chain(&error)
        ))),
    }
}

/// Says what an operator does about withheld rows.
fn withheld_note(report: &Value) -> String {
    let first = report["withheld_first"].as_array();
    let withheld = Withheld {
        count: report["withheld"].as_u64().unwrap_or_default(),
        first: first.into_iter().flatten().map(print::cell).collect(),
    };
    withheld
        .advice()
        .unwrap_or_else(|| "rows that are not signalled, because their user is unknown".to_owned())
}

/// Says how the open questions of a kind get on.
fn question_note(questions: &Value) -> String {
    match questions["failing"].as_u64() {
        None | Some(0) => "open questions".to_owned(),
        Some(failing) => {
            let [age, error] =
                ["oldest_age_s", "last_error"].map(|field| print::cell(&questions[field]));
            format!(
                "open questions; {failing} of them get no answer, the oldest for {age} s: {error}"
            )
        }
    }
}

/// Prints a [`Report`] for people.
fn print(report: &Value) {
    let cell = |field: &str| print::cell(&report[field]);
    let outbox = match &report["outbox_oldest_age_s"] {
        Value::Null => "signals not published yet".to_owned(),
        age => format!("signals not published yet; the oldest has waited {age} s"),
    };
    let redelivered = format!(
        "events in flight at the workers; {} of them redelivered",
        cell("redelivered")
    );
    let withheld = withheld_note(report);
    let rows = [
        (
            "lag",
            "lag",
            "events in STRIPE_EVENTS not delivered to a worker yet",
        ),
        ("pending acks", "pending_acks", redelivered.as_str()),
        (
            "ack floor",
            "ack_floor",
            "all events up to this sequence are applied",
        ),
        ("outbox", "outbox", outbox.as_str()),
        (
            "unsent signals",
            "unsent_signals",
            "rows and orphans whose signal waits for the end of a replay",
        ),
        ("withheld", "withheld", withheld.as_str()),
        (
            "dead letters",
            "dead_letters",
            "events that cannot be applied: see `dead-letters list`",
        ),
        (
            "open orphans",
            "open_orphans",
            "payments without a known user: see `orphans list`",
        ),
    ];
    let row =
        |(label, field, note): (&str, &str, &str)| [label.to_owned(), cell(field), note.to_owned()];
    let mut rows: Vec<_> = stream_rows(report).chain(rows.map(row)).collect();
    rows.extend(waiting_rows(report));
    let schema = report["schema_version"].as_str().unwrap_or("none");
    let current = report["schema_current"] == true;
    let current = if current {
        "current"
    } else {
        "behind: run `litestripe-worker migrate up`"
    };
    rows.push(["schema", schema, current].map(str::to_owned));
    rows.extend(replay_row(report));
    rows.extend(problem_rows(report));
    print::table(["what", "value", "note"], rows);
}

/// Rows about what waits, as far as something does.
fn waiting_rows(report: &Value) -> Vec<[String; 3]> {
    let cell = |field: &str| print::cell(&report[field]);
    let mut rows = Vec::new();
    if report["waiting_for_key"] != 0 && !report["waiting_for_key"].is_null() {
        let note = "subscriptions and Checkout Sessions with thin events that wait for STRIPE_SECRET_KEY, or for a key of the \
            other mode";
        let count = cell("waiting_for_key");
        rows.push(["thin events", &count, note].map(str::to_owned));
    }
    if report["pending_dead_letters"] != 0 && !report["pending_dead_letters"].is_null() {
        let note = "dead letters that cannot be stored in STRIPE_DEAD_LETTERS yet: see `dead-letters list`";
        let count = cell("pending_dead_letters");
        rows.push(["pending letters", &count, note].map(str::to_owned));
    }
    for (kind, questions) in report["questions"].as_object().into_iter().flatten() {
        if questions["open"] != 0 {
            let label = format!("questions: {kind}");
            rows.push([
                label,
                print::cell(&questions["open"]),
                question_note(questions),
            ]);
        }
    }
    rows
}

/// A row about the replay that is not finished.
fn replay_row(report: &Value) -> Option<[String; 3]> {
    let replay @ Value::Object(_) = &report["replay"] else {
        return None;
    };
    let state = if replay["running"] == true {
        "running"
    } else if replay["rows_lost"] == true {
        "rows lost: run `replay --signals none`, `reconcile --repair`, `resend --all`"
    } else {
        "interrupted: run the same `replay` again"
    };
    let span = format!(
        "events {} to {}, {state}",
        replay["first_sequence"], replay["last_sequence"]
    );
    Some(["replay".to_owned(), String::new(), span])
}

fn problem_rows(report: &Value) -> impl Iterator<Item = [String; 3]> {
    let problems = report["problems"].as_array().into_iter().flatten();
    problems.map(|problem| {
        let [what, mend] = ["what", "mend"].map(|field| print::cell(&problem[field]));
        let note = format!("{what}: {mend}");
        ["problem".to_owned(), String::new(), note]
    })
}

/// A row for each stream, and one for the account if it has a limit.
fn stream_rows(report: &Value) -> impl Iterator<Item = [String; 3]> {
    let streams = report["streams"].as_array().into_iter().flatten();
    let streams = streams.map(|stream| {
        let cell = |field: &str| print::cell(&stream[field]);
        let full = match &stream["max_bytes"] {
            Value::Null => format!("messages, {} bytes, no limit", cell("bytes")),
            max => format!(
                "messages, {} of {max} bytes, {} %",
                cell("bytes"),
                cell("percent")
            ),
        };
        [cell("name"), cell("messages"), full]
    });
    let account = &report["account"];
    let account = account["max_storage"].as_u64().map(|max| {
        let note = format!("bytes of the account's {max} are used");
        ["storage".to_owned(), print::cell(&account["storage"]), note]
    });
    streams.chain(account)
}
