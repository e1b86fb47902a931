//! `dead-letters list | show | retry | drop`: what operators do about events that could not be applied.

use std::sync::Arc;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use clap::{Args, Subcommand};
use litestripe_contract::signal::Timestamp;
use litestripe_contract::subject::{DEAD_LETTERS_PREFIX, DEAD_LETTERS_STREAM};
use litestripe_contract::{connect, header, subject};
use litestripe_domain::arrival::Arrival;
use litestripe_domain::event;
use serde_json::{Value, json};

use super::Failure;
use super::print;
use crate::apply;
use crate::settings::Settings;
use crate::start::database::{self, Schema};
use crate::start::parts::Parts;
use crate::stream::dead_letter;

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// List dead letters, oldest first
    List(List),
    /// Show one dead letter
    Show(Show),
    /// Apply dead letters after what was wrong is mended; those applied are removed
    Retry(Retry),
    /// Remove one dead letter for good, its body overwritten
    Drop(Drop),
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Its sequence in STRIPE_DEAD_LETTERS, as `list` shows it
    sequence: u64,
    /// Show the event's body too, which holds personal data
    #[arg(long)]
    body: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Retry {
    /// Its sequence in STRIPE_DEAD_LETTERS, as `list` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    sequence: Option<u64>,
    /// Retry all of them
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Drop {
    /// Its sequence in STRIPE_DEAD_LETTERS, as `list` shows it
    sequence: u64,
}

/// Why a dead letter cannot be shown, retried or dropped.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there is no dead letter {0}: `litestripe-worker dead-letters list` shows all")]
    Unknown(u64),
    #[error("{0} of {1} dead letters are still poison")]
    StillPoison(usize, usize),
}

impl DeadLetters {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let nats = super::connect(settings, "dead-letters").await?;
        let jetstream = connect::jetstream(nats.clone());
        let stream = jetstream.get_stream(DEAD_LETTERS_STREAM).await;
        let stream =
            stream.map_err(|_| Failure::new("there is no stream STRIPE_DEAD_LETTERS yet: a worker creates it"))?;
        match self {
            Self::List(list) => list.execute(&stream).await,
            Self::Show(show) => show.execute(&stream).await,
            Self::Retry(retry) => {
                let store = database::open(&settings.database, Schema::Current).await?;
                let parts = Parts::read(store, nats).await?;
                retry.execute(settings, &stream, &parts).await
            }
            Self::Drop(dropped) => dropped.execute(&stream).await,
        }
    }
}

impl List {
    async fn execute(self, stream: &Stream) -> Result<(), Failure> {
        let mut listed = Vec::new();
        let mut after = 0;
        while let Some(letter) = next(stream, after).await? {
            after = letter.sequence;
            listed.push(as_json(&letter));
        }
        if self.json {
            print::json(&listed)?;
        } else if listed.is_empty() {
            print::line("no dead letters");
        } else {
            let rows = listed.iter().map(|letter| {
                ["sequence", "stream_sequence", "event_type", "since", "reason"].map(|field| match &letter[field] {
                    Value::Null => "-".to_owned(),
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
            });
            print::table(["sequence", "event sequence", "type", "since", "reason"], rows);
        }
        Ok(())
    }
}

impl Show {
    async fn execute(self, stream: &Stream) -> Result<(), Failure> {
        let letter = find(stream, self.sequence).await?;
        let mut shown = as_json(&letter);
        if self.body {
            shown["body"] = String::from_utf8_lossy(&letter.payload).into();
        }
        if self.json {
            print::json(&shown)?;
        } else {
            print::fields(&shown);
        }
        Ok(())
    }
}

impl Retry {
    async fn execute(self, settings: &Settings, stream: &Stream, parts: &Parts) -> Result<(), Failure> {
        let dead_letters = dead_letter::DeadLetters::new(parts.jetstream.clone());
        let applier = parts.applier(settings, &dead_letters, &Arc::default());
        let mut report = Vec::new();
        let mut letter = match self.sequence {
            Some(sequence) => Some(find(stream, sequence).await?),
            None => next(stream, 0).await?,
        };
        while let Some(one) = &letter {
            let outcome = match event::decode(&one.payload, &settings.metadata_keys) {
                Ok(Some(event)) => apply::apply_one(&applier, arrival(one, event)).await?,
                Ok(None) => Some("of a type that is not handled".to_owned()),
                Err(error) => Some(error.to_string()),
            };
            // Applied first, removed then: in between it would only be applied again, to no effect.
            if outcome.is_none() {
                remove(stream, one.sequence).await?;
            }
            report.push((one.sequence, outcome));
            letter = if self.all { next(stream, one.sequence).await? } else { None };
        }
        let retried = report.len();
        let poison = report.iter().filter(|(_, outcome)| outcome.is_some()).count();
        self.print(report)?;
        if poison > 0 { Err(Refusal::StillPoison(poison, retried).into()) } else { Ok(()) }
    }

    fn print(&self, report: Vec<(u64, Option<String>)>) -> Result<(), Failure> {
        if self.json {
            let report: Vec<Value> = report
                .into_iter()
                .map(
                    |(sequence, reason)| json!({ "sequence": sequence, "applied": reason.is_none(), "reason": reason }),
                )
                .collect();
            print::json(&report)?;
        } else if report.is_empty() {
            print::line("no dead letters");
        } else {
            let rows = report.into_iter().map(|(sequence, reason)| {
                [sequence.to_string(), reason.unwrap_or_else(|| "applied and removed".to_owned())]
            });
            print::table(["sequence", "outcome"], rows);
        }
        Ok(())
    }
}

impl Drop {
    async fn execute(self, stream: &Stream) -> Result<(), Failure> {
        let letter = find(stream, self.sequence).await?;
        remove(stream, letter.sequence).await?;
        print::line(&format!("dead letter {} is gone", letter.sequence));
        Ok(())
    }
}

fn arrival(letter: &StreamMessage, event: event::Event) -> Arrival {
    Arrival {
        index: 0,
        event,
        traceparent: labelled(letter, header::TRACEPARENT),
        stream_sequence: labelled(letter, header::STREAM_SEQUENCE).and_then(|number| number.parse().ok()).unwrap_or(0),
    }
}

/// The first dead letter after that sequence, of those that there were when the command began: one at
/// a time, because each may be as large as a message can be.
async fn next(stream: &Stream, after: u64) -> Result<Option<StreamMessage>, Failure> {
    match stream.get_first_raw_message_by_subject(format!("{DEAD_LETTERS_PREFIX}>"), after + 1).await {
        Ok(letter) => Ok((letter.sequence <= stream.cached_info().state.last_sequence).then_some(letter)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn find(stream: &Stream, sequence: u64) -> Result<StreamMessage, Failure> {
    match stream.get_raw_message(sequence).await {
        Ok(letter) => Ok(letter),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Err(Refusal::Unknown(sequence).into()),
        Err(error) => Err(error.into()),
    }
}

/// A stream's own delete overwrites the message on disk.
async fn remove(stream: &Stream, sequence: u64) -> Result<(), Failure> {
    stream.delete_message(sequence).await?;
    Ok(())
}

fn labelled(letter: &StreamMessage, name: &str) -> Option<String> {
    letter.headers.get(name).map(|value| value.as_str().to_owned())
}

fn event_type(letter: &StreamMessage) -> String {
    subject::event_type(&letter.subject).map_or_else(|| "-".to_owned(), String::from)
}

fn as_json(letter: &StreamMessage) -> Value {
    json!({
        "sequence": letter.sequence,
        "stream_sequence": labelled(letter, header::STREAM_SEQUENCE).and_then(|number| number.parse::<u64>().ok()),
        "event_type": event_type(letter),
        "reason": labelled(letter, header::REASON),
        "since": Timestamp::from(letter.time.truncate_to_second()),
        "body_bytes": letter.payload.len(),
    })
}
