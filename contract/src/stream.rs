//! The streams, as values, and how they come to exist.
//!
//! Invariant: what is missing is created, what exists is left as the operator made it: never
//! shrunk, trimmed or deleted.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamError, CreateStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use tracing::{info, warn};

use crate::settings::EventsSettings;
use crate::subject;

/// How long a stream remembers message ids: a filter for retries, never the idempotency.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(5 * 60);

/// The smallest size to which an events stream whose size nobody set is halved.
const EVENTS_MAX_BYTES_MIN: i64 = 256 << 20;

/// The stream of raw events. Full, it refuses new events, so that Stripe keeps them. It takes atomic
/// batches, so that events that come together can share one sync of the server's disk.
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

/// The stream of signals. What is older than `max_age` goes.
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

/// The stream of dead letters.
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

/// Why a stream could not be created. Whoever waits for the broker tries again.
#[derive(Debug, thiserror::Error)]
#[error("cannot provide stream {name}{}", hint(source))]
pub struct ProvisionError {
    name: String,
    source: CreateStreamError,
}

/// Creates the events stream if it is missing. Where its size is nobody's wish and the server has
/// less storage, the size is halved until it fits; where the server refuses batches, it goes without.
pub async fn provide_events(
    jetstream: &jetstream::Context,
    settings: &EventsSettings,
) -> Result<(), ProvisionError> {
    let mut config = events(settings);
    loop {
        let refused = match provide(jetstream, config.clone()).await {
            Err(refused) if refused.lacks_storage() && !settings.max_bytes_is_set => refused,
            // A server before 2.12 ignores what it does not know, unless it is told to be strict.
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
        // Another program created it meanwhile, with other settings.
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
