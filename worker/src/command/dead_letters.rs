//! `dead-letters list | show | retry | drop`: inspect, retry or remove events that cannot be
//! applied.

use std::sync::Arc;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use clap::{Args, Subcommand};
use litestripe_contract::signal::Timestamp;
use litestripe_contract::subject::{DEAD_LETTERS_PREFIX, DEAD_LETTERS_STREAM};
use litestripe_contract::telemetry::traces;
use litestripe_contract::{connect, header, subject};
use litestripe_domain::arrival::{Arrival, StreamId};
use litestripe_domain::event;
use serde_json::{Value, json};

use super::Failure;
use super::print::{self, Output};
use crate::apply;
use crate::installation::Membership;
use crate::settings::Settings;
use crate::start::database::{self, Schema};
use crate::start::parts::Parts;
use crate::store::{self, Store};
use crate::stream::{dead_letter, progress};

/// Pending dead letters read at a time.
const PENDING_BATCH: u64 = 500;

pub(super) const AFTER_HELP: &str = "\
A dead letter is an event that can never be applied, for example because a field has an unexpected type; `show` prints the \
reason. Fix the cause, usually with a newer version of Litestripe, then `retry`. A dead letter is deleted after \
LITESTRIPE_DEAD_LETTERS_MAX_AGE. One that STRIPE_DEAD_LETTERS cannot take, because it is full or the event is too large, is \
listed as pending: a worker keeps trying, and the event stays in STRIPE_EVENTS.";

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// List dead letters, oldest first
    List(Output),
    /// Show one dead letter
    Show {
        /// Sequence of the dead letter in STRIPE_DEAD_LETTERS, as `list` shows it
        sequence: u64,
        /// Show the event's body too; it holds personal data
        #[arg(long)]
        body: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Apply dead letters once the cause is fixed, and remove the applied ones
    Retry(Retry),
    /// Remove one dead letter for good without applying it; its body is overwritten on disk
    Drop {
        /// Sequence of the dead letter in STRIPE_DEAD_LETTERS, as `list` shows it
        sequence: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Retry {
    /// Sequence of the dead letter in STRIPE_DEAD_LETTERS, as `list` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    sequence: Option<u64>,
    /// Retry all dead letters
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: Output,
}

impl DeadLetters {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let nats = super::connect(settings, "dead-letters").await?;
        let jetstream = connect::jetstream(nats.clone());
        let stream = jetstream.get_stream(DEAD_LETTERS_STREAM).await;
        let stream = stream.map_err(|_| {
            Failure::new(
                "cannot open the stream STRIPE_DEAD_LETTERS: `litestripe-worker run` creates it",
            )
        })?;
        match self {
            Self::List(output) => list(settings, &stream, output).await,
            Self::Show {
                sequence,
                body,
                output,
            } => {
                let letter = find(&stream, sequence).await?;
                let mut shown = as_json(&letter);
                if body {
                    shown["body"] = String::from_utf8_lossy(&letter.payload).into();
                }
                output.fields(&shown)
            }
            Self::Retry(retry) => {
                let store = database::open(&settings.database, Schema::Current).await?;
                super::check_rules(settings, &store).await?;
                let membership = Membership::Required;
                let installation = membership.check(settings, &store, &jetstream).await?;
                let parts = Parts::assemble(store, nats, installation).await?;
                retry.execute(settings, &stream, &parts).await
            }
            Self::Drop { sequence } => {
                find(&stream, sequence).await?;
                remove(&stream, sequence).await?;
                print::line(&format!("dead letter {sequence} is removed"));
                Ok(())
            }
        }
    }
}

async fn list(settings: &Settings, stream: &Stream, output: Output) -> Result<(), Failure> {
    let mut listed = Vec::new();
    let mut after = 0;
    while let Some(letter) = next(stream, after).await? {
        after = letter.sequence;
        listed.push(as_json(&letter));
    }
    listed.extend(pending(settings).await?);
    let fields = [
        "sequence",
        "stream_sequence",
        "event_type",
        "since",
        "reason",
    ];
    let header = ["sequence", "event sequence", "type", "since", "reason"];
    print(output, &listed, header, |letter| {
        let mut row = fields.map(|field| print::cell(&letter[field]));
        if letter["pending"] == true {
            let error = print::cell(&letter["error"]);
            row[0] = "pending".to_owned();
            row[4] = format!("{}; cannot be stored yet: {error}", row[4]);
        }
        row
    })
}

/// Returns the dead letters that cannot be stored yet. Their bodies are in STRIPE_EVENTS.
async fn pending(settings: &Settings) -> Result<Vec<Value>, Failure> {
    let store = Store::open(&settings.database).await?;
    // Without the tables there are none.
    if store.migrations().await?.iter().any(|step| !step.applied) {
        return Ok(Vec::new());
    }
    let mut listed = Vec::new();
    let mut last = None;
    loop {
        let some =
            store::dead_letter::list(store.connection(), last.as_ref(), PENDING_BATCH).await?;
        listed.extend(some.iter().map(|letter| {
            json!({
                "sequence": null,
                "stream_sequence": letter.sequence,
                "event_type": letter.event_type,
                "reason": letter.reason,
                "since": Timestamp::from(letter.since.truncate_to_second()),
                "pending": true,
                "attempts": letter.attempts,
                "error": letter.error,
            })
        }));
        last = some.into_iter().last();
        if last.is_none() {
            return Ok(listed);
        }
    }
}

/// Prints a row for each dead letter, or that there are none.
fn print<const N: usize>(
    output: Output,
    letters: &[Value],
    header: [&str; N],
    row: impl Fn(&Value) -> [String; N],
) -> Result<(), Failure> {
    output.print(&letters, || match letters {
        [] => print::line("no dead letters"),
        letters => print::table(header, letters.iter().map(row)),
    })
}

impl Retry {
    async fn execute(
        self,
        settings: &Settings,
        stream: &Stream,
        parts: &Parts,
    ) -> Result<(), Failure> {
        let dead_letters =
            dead_letter::DeadLetters::new(&parts.store, &parts.erasures, &parts.jetstream);
        let applier = parts.applier(settings, &dead_letters, &Arc::default());
        let (events_stream, _) = progress::begin(&parts.jetstream).await?;
        let (mut report, mut failed) = (Vec::new(), 0);
        let mut letter = match self.sequence {
            Some(sequence) => Some(find(stream, sequence).await?),
            None => next(stream, 0).await?,
        };
        while let Some(one) = &letter {
            let decoded = apply::decode_one(&one.subject, &one.payload, &settings.metadata_keys);
            let outcome = match decoded {
                Ok(Some(event)) => {
                    let arrival = arrival(one, event, events_stream);
                    apply::apply_one(&applier, arrival).await?
                }
                Ok(None) => Some("the worker does not handle this event type".to_owned()),
                Err(reason) => Some(reason),
            };
            // Applied first, then removed: a crash in between only leads to applying it again,
            // without effect.
            match outcome {
                None => remove(stream, one.sequence).await?,
                Some(_) => failed += 1,
            }
            report.push(json!({ "sequence": one.sequence, "applied": outcome.is_none(), "reason": outcome }));
            letter = if self.all {
                next(stream, one.sequence).await?
            } else {
                None
            };
        }
        print(self.output, &report, ["sequence", "outcome"], |letter| {
            let outcome = letter["reason"].as_str().unwrap_or("applied and removed");
            [print::cell(&letter["sequence"]), outcome.to_owned()]
        })?;
        if failed > 0 {
            return Err(Failure::new(format!(
                "{failed} of {} dead letters still cannot be applied",
                report.len()
            )));
        }
        Ok(())
    }
}

fn arrival(letter: &StreamMessage, event: event::Event, stream: StreamId) -> Arrival {
    Arrival {
        index: 0,
        event,
        trace: traces::from_headers(&letter.headers),
        // How long it took is a matter of the operator.
        received: None,
        // An older letter may be of an earlier stream, whose events are gone.
        stream,
        stream_sequence: stream_sequence(letter).unwrap_or(0),
    }
}

/// Returns the next dead letter after the sequence `after`, if it was stored before the command
/// began. One at a time, because each may be as large as the server's largest message.
async fn next(stream: &Stream, after: u64) -> Result<Option<StreamMessage>, Failure> {
    match stream
        .get_first_raw_message_by_subject(format!("{DEAD_LETTERS_PREFIX}>"), after + 1)
        .await
    {
        Ok(letter) => {
            Ok((letter.sequence <= stream.cached_info().state.last_sequence).then_some(letter))
        }
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn find(stream: &Stream, sequence: u64) -> Result<StreamMessage, Failure> {
    match stream.get_raw_message(sequence).await {
        Ok(letter) => Ok(letter),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
            Err(Failure::new(format!(
                "there is no dead letter {sequence}: `litestripe-worker dead-letters list` lists them all"
            )))
        }
        Err(error) => Err(error.into()),
    }
}

/// Removes a dead letter. JetStream's delete overwrites the message on disk.
async fn remove(stream: &Stream, sequence: u64) -> Result<(), Failure> {
    stream.delete_message(sequence).await?;
    Ok(())
}

fn header_value(letter: &StreamMessage, name: &str) -> Option<String> {
    letter
        .headers
        .get(name)
        .map(|value| value.as_str().to_owned())
}

/// Returns the event's sequence in STRIPE_EVENTS.
fn stream_sequence(letter: &StreamMessage) -> Option<u64> {
    header_value(letter, header::STREAM_SEQUENCE)?.parse().ok()
}

fn as_json(letter: &StreamMessage) -> Value {
    json!({
        "sequence": letter.sequence,
        "stream_sequence": stream_sequence(letter),
        "event_type": subject::event_type(&letter.subject).map_or_else(|| "-".to_owned(), String::from),
        "reason": header_value(letter, header::REASON),
        "since": Timestamp::from(letter.time.truncate_to_second()),
        "body_bytes": letter.payload.len(),
        "pending": false,
    })
}
