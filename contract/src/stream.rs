//! The configuration of the streams, and their creation.
//!
//! Invariant: a missing stream is created; an existing one stays as the operator made it and is
//! never shrunk, trimmed or deleted.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamError, CreateStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use tracing::{info, warn};

use crate::settings::EventsSettings;
use crate::subject;

/// How long a stream remembers message ids. It filters out retries; correctness does not rely on
/// it.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(5 * 60);

/// The size below which the default size of the events stream is not halved any more, in bytes.
const EVENTS_MAX_BYTES_MIN: i64 = 256 << 20;

/// Returns the configuration of the stream of raw events.
///
/// When it is full it refuses new events, so that Stripe keeps them. It accepts atomic batches, so
/// that events that arrive together share one sync of the server's disk.
pub fn events(settings: &EventsSettings) -> Config {
    let subjects = vec![format!("{}>", subject::EVENTS_PREFIX)];
    Config {
        max_bytes: i64::try_from(settings.max_bytes).unwrap_or(i64::MAX),
        allow_atomic_publish: true,
        ..stream(
            subject::EVENTS_STREAM,
            subjects,
            DiscardPolicy::New,
            settings.replicas,
            settings.max_age,
        )
    }
}

/// Returns the configuration of the stream of signals. Signals older than `max_age` are dropped.
pub fn signals(replicas: usize, max_age: Duration) -> Config {
    let subjects = [
        subject::SUBSCRIPTION_CHANGED,
        subject::ORPHAN_CREATED,
        subject::ORPHAN_RESOLVED,
    ];
    let subjects = subjects.map(String::from).to_vec();
    stream(
        subject::SIGNALS_STREAM,
        subjects,
        DiscardPolicy::Old,
        replicas,
        max_age,
    )
}

/// Returns the configuration of the stream of dead letters.
pub fn dead_letters(replicas: usize, max_age: Duration) -> Config {
    let subjects = vec![format!("{}>", subject::DEAD_LETTERS_PREFIX)];
    stream(
        subject::DEAD_LETTERS_STREAM,
        subjects,
        DiscardPolicy::New,
        replicas,
        max_age,
    )
}

fn stream(
    name: &str,
    subjects: Vec<String>,
    discard: DiscardPolicy,
    replicas: usize,
    max_age: Duration,
) -> Config {
    Config {
        name: name.to_owned(),
        subjects,
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard,
        num_replicas: replicas,
        max_age,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        ..Config::default()
    }
}

/// Why a stream could not be created. A caller that waits for the broker retries.
#[derive(Debug, thiserror::Error)]
#[error("cannot provide stream {name}{}", hint(source))]
pub struct ProvisionError {
    name: String,
    source: CreateStreamError,
}

/// Creates the events stream if it is missing.
///
/// If the operator did not set its size and the server has less storage, the size is halved until
/// it fits. If the server refuses atomic batches, the stream is created without them.
pub async fn provide_events(
    jetstream: &jetstream::Context,
    settings: &EventsSettings,
) -> Result<(), ProvisionError> {
    let mut config = events(settings);
    loop {
        let refused = match provide(jetstream, config.clone()).await {
            Err(refused) if refused.lacks_storage() && !settings.max_bytes_is_set => refused,
            // A server before 2.12 ignores unknown options, but refuses them in strict mode.
            Err(refused)
                if refused.is_refusal()
                    && !refused.lacks_storage()
                    && config.allow_atomic_publish =>
            {
                config.allow_atomic_publish = false;
                continue;
            }
            outcome => return outcome,
        };
        if config.max_bytes / 2 < EVENTS_MAX_BYTES_MIN {
            return Err(refused);
        }
        config.max_bytes /= 2;
        warn!(
            max_bytes = config.max_bytes,
            "the NATS server has no room for STRIPE_EVENTS at its default size; trying {} MiB (LITESTRIPE_EVENTS_MAX_BYTES sets it)",
            config.max_bytes >> 20,
        );
    }
}

/// Creates the stream if it is missing.
pub async fn provide(jetstream: &jetstream::Context, config: Config) -> Result<(), ProvisionError> {
    let name = config.name.clone();
    if jetstream.get_stream(&name).await.is_ok() {
        return Ok(());
    }
    match jetstream.create_stream(config).await {
        Ok(_) => {
            info!(stream = name, "created stream {name}");
            Ok(())
        }
        // Another program has created it in the meantime, with other settings.
        Err(error) if code(&error) == Some(ErrorCode::STREAM_NAME_EXIST) => Ok(()),
        Err(source) => Err(ProvisionError { name, source }),
    }
}

impl ProvisionError {
    fn is_refusal(&self) -> bool {
        code(&self.source).is_some()
    }

    fn lacks_storage(&self) -> bool {
        code(&self.source) == Some(ErrorCode::STORAGE_RESOURCES_EXCEEDED)
    }
}

fn code(error: &CreateStreamError) -> Option<ErrorCode> {
    match error.kind() {
        CreateStreamErrorKind::JetStream(error) => Some(error.error_code()),
        _ => None,
    }
}

fn hint(error: &CreateStreamError) -> &'static str {
    match error.kind() {
        CreateStreamErrorKind::JetStreamUnavailable => {
            " (is JetStream enabled on the NATS server?)"
        }
        CreateStreamErrorKind::JetStream(error)
            if error.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
        {
            " (the server has less storage than LITESTRIPE_EVENTS_MAX_BYTES asks for)"
        }
        _ => "",
    }
}
