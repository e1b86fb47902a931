//! Connecting to NATS, creating missing streams, and finding those that an operator should change.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, ErrorCode};
use litestripe_contract::stream::{Finding, ProvisionError};
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM};
use litestripe_contract::{connect, exit, stream};
use tracing::warn;

use crate::settings::{DEAD_LETTERS_MAX_BYTES, SIGNALS_MAX_BYTES, Settings};
use crate::wait::{self, JETSTREAM};

/// All streams, with that of the KV bucket `litestripe`.
pub(crate) const STREAMS: [&str; 4] = [
    EVENTS_STREAM,
    SIGNALS_STREAM,
    DEAD_LETTERS_STREAM,
    "KV_litestripe",
];

/// How long a command waits for NATS. An operator at a terminal should not wait longer for an
/// error.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How often a worker checks that the streams still exist.
const RECREATE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[error("cannot reach NATS at {hosts} within 5 s ({reason}): {REACHABLE_IF}; nothing was changed")]
pub(crate) struct Unreachable {
    hosts: String,
    reason: String,
}

const REACHABLE_IF: &str = "check that it runs, and that NATS_URL and the credentials are right";

impl From<Unreachable> for Finding {
    fn from(Unreachable { hosts, reason }: Unreachable) -> Self {
        Self {
            what: format!("cannot reach NATS at {hosts} within 5 s ({reason})"),
            mend: REACHABLE_IF.to_owned(),
        }
    }
}

/// Returns once `nats` is connected, or fails after 5 s.
pub(crate) async fn reach(
    nats: &async_nats::Client,
    settings: &Settings,
) -> Result<(), Unreachable> {
    let connected = connect::connected(nats, &settings.nats);
    if tokio::time::timeout(ANSWER_MAX, connected).await.is_ok() {
        return Ok(());
    }
    let reason = connect::refusal(&settings.nats, "litestripe-worker").await;
    Err(Unreachable {
        hosts: settings.nats.hosts(),
        reason: reason.unwrap_or_else(|| "it answers now".to_owned()),
    })
}

/// Waits for the broker and creates its missing streams. Warns of those that an operator should
/// change.
pub(crate) async fn prepare(nats: &async_nats::Client, settings: &Settings) {
    connect::connected(nats, &settings.nats).await;
    let jetstream = connect::jetstream(nats.clone());
    let mut logged = BTreeSet::new();
    wait::until_ok(JETSTREAM, async || {
        let provided = provide(settings, &jetstream).await;
        // `wait` logs the first reason.
        if let Some(refusals) = new_refusals(&provided, &mut logged)
            && logged.len() > 1
        {
            warn!("still waiting for JetStream: {refusals}");
        }
        provided
    })
    .await;
    for name in STREAMS {
        let stream = get_stream(&jetstream, name).await.ok().flatten();
        let configs = stream.iter().map(|stream| &stream.cached_info().config);
        for Finding { what, mend } in configs.flat_map(findings) {
            warn!("{what}: {mend}");
        }
    }
}

/// Returns what an operator should change in a stream that exists.
pub(crate) fn findings(config: &Config) -> impl Iterator<Item = Finding> {
    stream::unbounded(config).into_iter()
}

/// Returns `None` if the stream does not exist. Any other problem is an error, so that it does not
/// look like a missing stream.
pub(crate) async fn get_stream(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Option<Stream>, GetStreamError> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(None)
            }
            _ => Err(error),
        },
    }
}

/// Creates the streams that are missing. A stream that cannot be created does not hold up the
/// others.
pub(crate) async fn provide(
    settings: &Settings,
    jetstream: &jetstream::Context,
) -> Result<(), NotProvided> {
    let replicas = settings.events.replicas;
    let events = stream::provide_events(jetstream, &settings.events).await;
    let bytes = *events.as_ref().unwrap_or(&settings.events.max_bytes);
    let config = stream::signals(replicas, settings.signals, bytes);
    let signals =
        stream::provide_other(jetstream, config, settings.signals, &SIGNALS_MAX_BYTES).await;
    let config = stream::dead_letters(replicas, settings.dead_letters, bytes);
    let dead_letters = stream::provide_other(
        jetstream,
        config,
        settings.dead_letters,
        &DEAD_LETTERS_MAX_BYTES,
    )
    .await;
    let outcomes = [events.map(drop), signals, dead_letters];
    let problems: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(NotProvided(problems))
    }
}

/// The streams that could not be created, each with its reason.
#[derive(Debug)]
pub(crate) struct NotProvided(Vec<ProvisionError>);

impl std::error::Error for NotProvided {}

impl fmt::Display for NotProvided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problems: Vec<_> = self.0.iter().map(|problem| exit::chain(problem)).collect();
        f.write_str(&problems.join("; "))
    }
}

/// Returns what the server refused, if that is not in `logged` yet, and adds it.
fn new_refusals(
    provided: &Result<(), NotProvided>,
    logged: &mut BTreeSet<String>,
) -> Option<String> {
    let problems = provided.as_ref().err()?.0.iter();
    let refusals: Vec<_> = problems
        .filter(|problem| problem.is_refusal())
        .map(|problem| exit::chain(problem))
        .collect();
    let refusals = refusals.join("; ");
    (!refusals.is_empty() && logged.insert(refusals.clone())).then_some(refusals)
}

/// Recreates deleted streams, for as long as the process runs.
pub(crate) async fn recreate_streams(settings: Settings, jetstream: jetstream::Context) {
    let mut logged = BTreeSet::new();
    loop {
        tokio::time::sleep(RECREATE_EVERY).await;
        let provided = provide(&settings, &jetstream).await;
        if let Some(refusals) = new_refusals(&provided, &mut logged) {
            warn!("cannot create the streams: {refusals}");
        }
        if provided.is_ok() {
            logged.clear();
        }
    }
}
