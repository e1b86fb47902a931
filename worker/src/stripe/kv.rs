//! The JetStream KV bucket `litestripe`, in which workers share the API budget and the id of the
//! installation.
//!
//! Owns creating the bucket, reading a key, and writing it by compare-and-set. May not know what
//! the values mean. Invariant: a key is only written over the revision that was read.

use async_nats::jetstream::kv::{Config, Operation, Store, UpdateErrorKind};
use async_nats::jetstream::stream::StorageType;
use async_nats::jetstream::{self};
use bytes::Bytes;
use litestripe_contract::stream::BUCKET_MAX_BYTES;
use litestripe_contract::subject::{KV_BUCKET, KV_STREAM};
use time::OffsetDateTime;
use tracing::info;

use crate::stream::scan;

/// Whether `text` is a valid key. NATS: ADR-8, "JetStream based Key-Value Stores".
pub(crate) fn is_key(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte);
    !text.is_empty()
        && text.bytes().all(allowed)
        && !text.starts_with('.')
        && !text.ends_with('.')
        && !text.contains("..")
}

/// Why a key was not read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvError {
    #[error("cannot open the KV bucket {KV_BUCKET}")]
    Open(#[source] BrokerError),
    /// The key's revision is not the one that was read.
    #[error("another process wrote {0} meanwhile")]
    Conflict(String),
    /// After this error a write may still have taken effect.
    #[error("cannot {doing} in the KV bucket {KV_BUCKET}")]
    Broker { doing: String, source: BrokerError },
}

/// The broker's error.
type BrokerError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the bucket, and creates it if it is missing.
async fn open(jetstream: &jetstream::Context, replicas: usize) -> Result<Store, KvError> {
    if let Ok(store) = jetstream.get_key_value(KV_BUCKET).await {
        return Ok(store);
    }
    let config = Config {
        bucket: KV_BUCKET.to_owned(),
        description: "What Litestripe's workers share: the budget of calls to Stripe's API, the installation's id"
            .to_owned(),
        history: 1,
        max_bytes: BUCKET_MAX_BYTES,
        storage: StorageType::File,
        num_replicas: replicas,
        ..Config::default()
    };
    match jetstream.create_key_value(config).await {
        Ok(store) => {
            info!("created the KV bucket {KV_BUCKET}");
            Ok(store)
        }
        // Either another process created it meanwhile with other settings, or it cannot be created.
        Err(error) => jetstream
            .get_key_value(KV_BUCKET)
            .await
            .map_err(|_| KvError::Open(error.into())),
    }
}

/// A key's value, revision and time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// `None` if the key was never written, or was deleted.
    pub value: Option<Bytes>,
    /// Grows with each write. The next write has to name it; 0 if the key was never written.
    pub revision: u64,
    /// When the key was written, by the server's clock.
    pub written: Option<OffsetDateTime>,
}

/// The bucket. It is opened when it is first needed, and created with `replicas` if it is missing.
pub(crate) struct Bucket {
    jetstream: jetstream::Context,
    replicas: usize,
    open: Option<Store>,
}

impl Bucket {
    pub(crate) fn new(jetstream: jetstream::Context, replicas: usize) -> Self {
        Self {
            jetstream,
            replicas,
            open: None,
        }
    }

    /// Reads a key as text, and never creates the bucket. `None` if there is none of either.
    pub(crate) async fn existing(
        jetstream: jetstream::Context,
        key: &str,
    ) -> Result<Option<String>, KvError> {
        let stream = scan::find(&jetstream, KV_STREAM).await;
        if stream
            .map_err(|error| KvError::Open(error.into()))?
            .is_none()
        {
            return Ok(None);
        }
        let open = jetstream.get_key_value(KV_BUCKET).await;
        let mut bucket = Self {
            open: Some(open.map_err(|error| KvError::Open(error.into()))?),
            ..Self::new(jetstream, 1)
        };
        let entry = bucket.read(key).await?;
        Ok(entry
            .value
            .map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    pub(crate) async fn read(&mut self, key: &str) -> Result<Entry, KvError> {
        let entry = self.store().await?.entry(key).await;
        Ok(
            match entry.map_err(|error| self.failed(format!("read {key}"), error))? {
                None => Entry {
                    value: None,
                    revision: 0,
                    written: None,
                },
                Some(entry) => Entry {
                    value: (entry.operation == Operation::Put).then_some(entry.value),
                    revision: entry.revision,
                    written: Some(entry.created),
                },
            },
        )
    }

    /// Writes `key` if it still has `revision` (0 if it was never written). Returns the new
    /// revision.
    pub(crate) async fn write(
        &mut self,
        key: &str,
        value: impl Into<Bytes>,
        revision: u64,
    ) -> Result<u64, KvError> {
        let written = self
            .store()
            .await?
            .update(key, value.into(), revision)
            .await;
        written.map_err(|error| match error.kind() {
            UpdateErrorKind::WrongLastRevision => KvError::Conflict(key.to_owned()),
            _ => self.failed(format!("write {key}"), error),
        })
    }

    async fn store(&mut self) -> Result<&Store, KvError> {
        let store = match self.open.take() {
            Some(store) => store,
            None => open(&self.jetstream, self.replicas).await?,
        };
        Ok(self.open.insert(store))
    }

    /// Forgets the open bucket: it may be gone, and has to be opened or created again.
    fn failed(&mut self, doing: String, error: impl Into<BrokerError>) -> KvError {
        self.open = None;
        KvError::Broker {
            doing,
            source: error.into(),
        }
    }
}
