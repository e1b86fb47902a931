//! The JetStream KV bucket `litestripe`, in which workers share the API budget.
//!
//! Owns how it comes to exist, reading a key, and writing it by compare-and-set. May not know what
//! stands in it. Invariant: no key is written but over the revision that was read.

use std::sync::{Arc, Mutex, PoisonError};

use async_nats::jetstream::kv::{Config, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::stream::StorageType;
use async_nats::jetstream::{self};
use bytes::Bytes;
use litestripe_contract::subject::KV_BUCKET;
use time::OffsetDateTime;
use tracing::info;

/// Whether this can be a key. NATS: ADR-8, "JetStream based Key-Value Stores".
#[must_use]
pub fn is_key(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte);
    !text.is_empty()
        && text.bytes().all(allowed)
        && !text.starts_with('.')
        && !text.ends_with('.')
        && !text.contains("..")
}

/// Why a key was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// There is no bucket.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Somebody else wrote the key since it was read.
    #[error("{0} was written by somebody else meanwhile")]
    Crossed(String),
    /// The broker is away, or refuses.
    #[error("cannot {doing} in the KV bucket {KV_BUCKET}")]
    Broker {
        /// What was asked, to go after "cannot".
        doing: String,
        /// What the broker said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The bucket could not be opened. Whoever waits for the broker tries again.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the KV bucket {KV_BUCKET}")]
pub struct OpenError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// Opens the bucket, and creates it if it is missing.
async fn open(jetstream: &jetstream::Context, replicas: usize) -> Result<Store, OpenError> {
    if let Ok(store) = jetstream.get_key_value(KV_BUCKET).await {
        return Ok(store);
    }
    let config = Config {
        bucket: KV_BUCKET.to_owned(),
        description: "The budget of calls to Stripe's API that Litestripe's workers share".to_owned(),
        history: 1,
        storage: StorageType::File,
        num_replicas: replicas,
        ..Config::default()
    };
    match jetstream.create_key_value(config).await {
        Ok(store) => {
            info!("created the KV bucket {KV_BUCKET}");
            Ok(store)
        }
        // Another program created it meanwhile, with other settings; or it cannot be made.
        Err(error) => jetstream.get_key_value(KV_BUCKET).await.map_err(|_| OpenError(error.into())),
    }
}

/// What stands under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value. None where nobody wrote one, or it was deleted.
    pub value: Option<Bytes>,
    /// What a write has to name: it grows with each.
    pub revision: u64,
    /// When it was written, on the server's clock.
    pub written: Option<OffsetDateTime>,
}

/// The bucket, opened when it is first needed. Clones are the same one.
#[derive(Clone)]
pub struct Bucket {
    jetstream: jetstream::Context,
    replicas: usize,
    open: Arc<Mutex<Option<Store>>>,
}

impl Bucket {
    /// The bucket on that broker; made with that many replicas where it is missing.
    #[must_use]
    pub fn new(jetstream: jetstream::Context, replicas: usize) -> Self {
        Self { jetstream, replicas, open: Arc::default() }
    }

    /// What stands under `key`.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn read(&self, key: &str) -> Result<Entry, KvError> {
        let entry = match self.store().await?.entry(key).await {
            Ok(entry) => entry,
            Err(error) => return Err(self.failed(format!("read {key}"), error)),
        };
        Ok(match entry {
            None => Entry { value: None, revision: 0, written: None },
            Some(entry) => Entry {
                value: (entry.operation == Operation::Put).then_some(entry.value),
                revision: entry.revision,
                written: Some(entry.created),
            },
        })
    }

    /// Writes `key` if it still has the revision `over` (0 where there is none). Returns the new one.
    ///
    /// # Errors
    /// [`KvError::Crossed`] when it has another revision. After any other error it may be written.
    pub async fn write(&self, key: &str, value: impl Into<Bytes>, over: u64) -> Result<u64, KvError> {
        self.store().await?.update(key, value.into(), over).await.map_err(|error| match error.kind() {
            UpdateErrorKind::WrongLastRevision => KvError::Crossed(key.to_owned()),
            _ => self.failed(format!("write {key}"), error),
        })
    }

    async fn store(&self) -> Result<Store, KvError> {
        let known = self.open.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(store) = known {
            return Ok(store);
        }
        let store = open(&self.jetstream, self.replicas).await?;
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(store.clone());
        Ok(store)
    }

    /// The bucket may be gone, so that it has to be opened, or made, again.
    fn failed(&self, doing: String, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KvError {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
        KvError::Broker { doing, source: error.into() }
    }
}
