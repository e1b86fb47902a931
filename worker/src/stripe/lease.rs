//! "Only one worker does this": a lease in the KV bucket.
//!
//! Owns taking, renewing, releasing and taking over. Needs no clock that two hosts agree on: a lease
//! whose revision has not changed for as long as it lasts, watched by our own clock, has lost its
//! holder. A holder that was stopped for that long and goes on is a second one. So a lease is for work
//! that is idempotent, where two at a time are a waste and no harm.

use std::time::{Duration, Instant};

use litestripe_contract::exit;
use tracing::debug;

use crate::stripe::kv::{Bucket, KvError};

/// How long a lease lasts that is not renewed.
const LASTS: Duration = Duration::from_secs(15);

/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// What stands in the key while somebody holds the lease, and while nobody does.
const HELD: &str = "held";
const FREE: &str = "free";

/// A lease that some worker may hold.
pub struct Lease {
    bucket: Bucket,
    key: String,
    /// The revision that somebody else held it under, and when we first saw that.
    seen: Option<(u64, Instant)>,
}

impl Lease {
    /// The lease `name`.
    #[must_use]
    pub fn new(bucket: Bucket, name: &str) -> Self {
        Self { bucket, key: format!("lease.{name}"), seen: None }
    }

    /// Does `work` while nobody else does, or nothing while somebody else holds the lease: ask again.
    ///
    /// # Errors
    /// When the broker is away. `work` has not begun then.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<Option<T>, KvError> {
        let Some(revision) = self.take().await? else { return Ok(None) };
        let (outcome, revision) = self.renew_during(work, revision).await;
        if let Err(error) = self.bucket.write(&self.key, FREE, revision).await {
            debug!("{} runs out by itself: {}", self.key, exit::chain(&error));
        }
        Ok(Some(outcome))
    }

    /// Takes the lease, if it is free or its holder is gone.
    async fn take(&mut self) -> Result<Option<u64>, KvError> {
        let entry = self.bucket.read(&self.key).await?;
        let is_held = entry.value.as_deref() == Some(HELD.as_bytes());
        if is_held && !self.is_given_up(entry.revision) {
            debug!("{} is with somebody else", self.key);
            return Ok(None);
        }
        match self.bucket.write(&self.key, HELD, entry.revision).await {
            Ok(revision) => Ok(Some(revision)),
            Err(KvError::Crossed(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the holder has not renewed the lease for as long as it lasts, as far as we saw.
    fn is_given_up(&mut self, revision: u64) -> bool {
        match self.seen {
            Some((seen, since)) if seen == revision => since.elapsed() >= LASTS,
            _ => {
                self.seen = Some((revision, Instant::now()));
                false
            }
        }
    }

    async fn renew_during<T>(&self, work: impl Future<Output = T>, mut revision: u64) -> (T, u64) {
        let renew = async {
            loop {
                tokio::time::sleep(RENEW_EVERY).await;
                match self.bucket.write(&self.key, HELD, revision).await {
                    Ok(renewed) => revision = renewed,
                    // The work goes on all the same: it is idempotent.
                    Err(error) => debug!("{} is not renewed: {}", self.key, exit::chain(&error)),
                }
            }
        };
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = renew => unreachable!("renewing has no end"),
        };
        (outcome, revision)
    }
}
