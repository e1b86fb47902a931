//! The configuration of the streams, and their creation.
//!
//! Owns how large they are, so that together they fit what the account and the server have: a
//! stream without a size takes the room that others have reserved. Invariant: a missing stream is
//! created; an existing one stays as the operator made it and is never shrunk, trimmed or deleted.

use std::time::Duration;

use async_nats::jetstream::context::{
    CreateStreamError, CreateStreamErrorKind, GetStreamErrorKind,
};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use serde::Serialize;
use tracing::{info, warn};

use crate::exit;
use crate::settings::{EVENTS_MAX_BYTES, EventsSettings, Setting, StreamSettings};
use crate::subject;

/// How long a stream remembers message ids. It filters out retries; correctness does not rely on
/// it.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(5 * 60);

/// The size below which the default size of the events stream is not halved any more, in bytes.
const EVENTS_MAX_BYTES_MIN: i64 = 256 << 20;

/// The size below which the default size of another stream is not halved any more, in bytes: a few
/// messages of the usual `max_payload`.
const OTHERS_MAX_BYTES_MIN: i64 = 4 << 20;

/// By default the stream of signals has a fifth of the events' size, that of dead letters a tenth.
const SIGNALS_PART: i64 = 5;
const DEAD_LETTERS_PART: i64 = 10;

/// The size of the KV bucket, in bytes. It holds a few short values.
pub const BUCKET_MAX_BYTES: i64 = 1 << 20;

/// Returns the configuration of the stream of raw events.
///
/// When it is full it refuses new events, so that Stripe keeps them. It accepts atomic batches, so
/// that events that arrive together share one sync of the server's disk.
pub fn events(settings: &EventsSettings) -> Config {
    let subjects = vec![format!("{}>", subject::EVENTS_PREFIX)];
    Config {
        allow_atomic_publish: true,
        ..stream(
            subject::EVENTS_STREAM,
            subjects,
            DiscardPolicy::New,
            settings.replicas,
            settings.max_age,
            settings.max_bytes,
        )
    }
}

/// Returns the configuration of the stream of signals, beside an events stream of `events_bytes`.
/// When it is full it drops the oldest. It accepts atomic batches, so that the signals of a round of
/// the relay share one sync.
pub fn signals(replicas: usize, settings: StreamSettings, events_bytes: i64) -> Config {
    let subjects = [
        subject::SUBSCRIPTION_CHANGED,
        subject::ORPHAN_CREATED,
        subject::ORPHAN_RESOLVED,
    ];
    let subjects = subjects.map(String::from).to_vec();
    Config {
        allow_atomic_publish: true,
        ..stream(
            subject::SIGNALS_STREAM,
            subjects,
            DiscardPolicy::Old,
            replicas,
            settings.max_age,
            settings.max_bytes.unwrap_or(signals_bytes(events_bytes)),
        )
    }
}

/// Returns the configuration of the stream of dead letters, beside an events stream of
/// `events_bytes`. When it is full it refuses new ones.
pub fn dead_letters(replicas: usize, settings: StreamSettings, events_bytes: i64) -> Config {
    let subjects = vec![format!("{}>", subject::DEAD_LETTERS_PREFIX)];
    stream(
        subject::DEAD_LETTERS_STREAM,
        subjects,
        DiscardPolicy::New,
        replicas,
        settings.max_age,
        settings
            .max_bytes
            .unwrap_or(dead_letters_bytes(events_bytes)),
    )
}

fn stream(
    name: &str,
    subjects: Vec<String>,
    discard: DiscardPolicy,
    replicas: usize,
    max_age: Duration,
    max_bytes: i64,
) -> Config {
    Config {
        name: name.to_owned(),
        subjects,
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard,
        num_replicas: replicas,
        max_age,
        max_bytes,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        ..Config::default()
    }
}

/// Why a stream could not be created. A caller that waits for the broker retries.
#[derive(Debug, thiserror::Error)]
#[error("cannot provide stream {name}{}", hint(source, setting))]
pub struct ProvisionError {
    name: String,
    /// The setting of the stream's size.
    setting: &'static str,
    source: CreateStreamError,
}

impl ProvisionError {
    /// Whether the server refused the stream, so that it is not a matter of an outage.
    pub fn is_refusal(&self) -> bool {
        code(&self.source).is_some()
    }
}

/// Creates the events stream if it is missing. Returns its size in bytes, on which the sizes of the
/// other streams depend.
///
/// If the operator did not set the size and the server has less room, the size is halved until it
/// fits. If the server refuses atomic batches, the stream is created without them.
pub async fn provide_events(
    jetstream: &jetstream::Context,
    settings: &EventsSettings,
) -> Result<i64, ProvisionError> {
    let smallest = (!settings.max_bytes_is_set).then_some(EVENTS_MAX_BYTES_MIN);
    match provide(jetstream, events(settings), &EVENTS_MAX_BYTES, smallest).await? {
        Provided::Created(config) if !settings.max_bytes_is_set => {
            Ok(make_room(jetstream, config).await)
        }
        Provided::Found(config) if config.max_bytes <= 0 => Ok(settings.max_bytes),
        Provided::Created(config) | Provided::Found(config) => Ok(config.max_bytes),
    }
}

/// Creates another stream if it is missing. `setting` names its size.
///
/// If the operator did not set the size and the server has less room, the size is halved until it
/// fits.
pub async fn provide_other(
    jetstream: &jetstream::Context,
    config: Config,
    settings: StreamSettings,
    setting: &Setting,
) -> Result<(), ProvisionError> {
    let smallest = settings.max_bytes.is_none().then_some(OTHERS_MAX_BYTES_MIN);
    provide(jetstream, config, setting, smallest).await?;
    Ok(())
}

/// A stream as it was created, or as it was found.
enum Provided {
    Created(Config),
    Found(Config),
}

/// Creates the stream if it is missing. If the server has no room for it, its size is halved down
/// to `smallest`, unless that is `None` because the operator set the size.
async fn provide(
    jetstream: &jetstream::Context,
    mut config: Config,
    setting: &Setting,
    smallest: Option<i64>,
) -> Result<Provided, ProvisionError> {
    let is_missing = match jetstream.get_stream(&config.name).await {
        Ok(stream) => return Ok(Provided::Found(stream.cached_info().config.clone())),
        Err(error) => matches!(
            error.kind(),
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND
        ),
    };
    let wanted = config.max_bytes;
    let stream = loop {
        let source = match jetstream.create_stream(config.clone()).await {
            Ok(stream) => break stream,
            // It exists with other settings. A server may refuse it for lack of room before it says
            // so: the halved size is not the stream's.
            Err(error) if code(&error) == Some(ErrorCode::STREAM_NAME_EXIST) => {
                config.max_bytes = wanted;
                return Ok(Provided::Found(config));
            }
            Err(error) => error,
        };
        let smaller = smallest.filter(|smallest| config.max_bytes > *smallest);
        if let (true, Some(smallest)) = (lacks_room(&source), smaller) {
            config.max_bytes = (config.max_bytes / 2).max(smallest);
        } else if code(&source).is_some() && !lacks_room(&source) && config.allow_atomic_publish {
            // A server before 2.12 ignores unknown options, but refuses them in strict mode.
            config.allow_atomic_publish = false;
        } else {
            return Err(ProvisionError {
                name: config.name,
                setting: setting.name,
                source,
            });
        }
    };
    let info = stream.cached_info();
    if !is_missing || info.state.messages > 0 {
        return Ok(Provided::Found(info.config.clone()));
    }
    let (name, max_bytes) = (&config.name, config.max_bytes);
    if max_bytes == wanted {
        info!(stream = name, max_bytes, "created stream {name}");
    } else {
        warn!(
            stream = name,
            max_bytes,
            "created stream {name} with {} MiB: the NATS server has no room for {} MiB ({} sets its size)",
            max_bytes >> 20,
            wanted >> 20,
            setting.name
        );
    }
    Ok(Provided::Created(config))
}

/// Makes the events stream, which was created just now, smaller if the others would not fit beside
/// it. Returns its size.
///
/// A server says how much room it has only by refusing more: so the stream first asks for the room
/// of all. Without the right to update it, the stream stays as it is.
async fn make_room(jetstream: &jetstream::Context, config: Config) -> i64 {
    let max_bytes = config.max_bytes;
    let resize = async |max_bytes| {
        let config = Config {
            max_bytes,
            ..config.clone()
        };
        jetstream.update_stream(config).await
    };
    let left_as_is = |error| {
        warn!(
            "cannot find out whether the other streams fit beside {} (set {}): {}",
            config.name,
            EVENTS_MAX_BYTES.name,
            exit::chain(&error)
        );
        max_bytes
    };
    let others = signals_bytes(max_bytes) + dead_letters_bytes(max_bytes) + BUCKET_MAX_BYTES;
    let fitting = match resize(max_bytes + others).await {
        Ok(_) => max_bytes,
        Err(error) if lacks_room(&error) => {
            let fitting = max_bytes / 4 * 3;
            warn!(
                max_bytes = fitting,
                "made stream {} smaller, {} MiB, to leave room for the other streams ({} sets its size)",
                config.name,
                fitting >> 20,
                EVENTS_MAX_BYTES.name
            );
            fitting
        }
        Err(error) => return left_as_is(error),
    };
    match resize(fitting).await {
        Ok(_) => fitting,
        Err(error) => left_as_is(error),
    }
}

fn signals_bytes(events_bytes: i64) -> i64 {
    (events_bytes / SIGNALS_PART).max(OTHERS_MAX_BYTES_MIN)
}

fn dead_letters_bytes(events_bytes: i64) -> i64 {
    (events_bytes / DEAD_LETTERS_PART).max(OTHERS_MAX_BYTES_MIN)
}

/// Something at the broker that an operator should change, because the programs change nothing
/// there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub what: String,
    /// The command or setting that mends it.
    pub mend: String,
}

/// Returns what is wrong with a stream without a size.
pub fn unbounded(config: &Config) -> Option<Finding> {
    let name = &config.name;
    (config.max_bytes <= 0).then(|| Finding {
        what: format!("stream {name} has no limit in bytes and can take the room of the others"),
        mend: format!("nats stream edit {name} --max-bytes=SIZE"),
    })
}

/// Whether the server or the account has less room than the stream asks for.
fn lacks_room(error: &CreateStreamError) -> bool {
    match error.kind() {
        CreateStreamErrorKind::JetStream(error) => match error.error_code() {
            ErrorCode::STORAGE_RESOURCES_EXCEEDED | ErrorCode::STREAM_MAX_STREAM_BYTES_EXCEEDED => {
                true
            }
            // A cluster has several reasons to place a stream nowhere; only their text differs.
            ErrorCode::CLUSTER_NO_PEERS => error.to_string().contains("insufficient storage"),
            _ => false,
        },
        _ => false,
    }
}

fn code(error: &CreateStreamError) -> Option<ErrorCode> {
    match error.kind() {
        CreateStreamErrorKind::JetStream(error) => Some(error.error_code()),
        _ => None,
    }
}

fn hint(error: &CreateStreamError, setting: &str) -> String {
    if lacks_room(error) {
        return format!(
            " (the NATS server or the account has no room for it beside the other streams: set {setting} to less, or raise the limit there)"
        );
    }
    match error.kind() {
        CreateStreamErrorKind::JetStreamUnavailable => {
            " (is JetStream enabled on the NATS server?)".to_owned()
        }
        _ => String::new(),
    }
}
