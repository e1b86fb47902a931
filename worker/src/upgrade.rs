//! What the version before kept in the KV bucket `litestripe`: the erasures, the backfills' record, a lease.
//!
//! Owns taking it over into the database, once. The keys are purged when it is committed, so doing it again
//! changes nothing. To be deleted when no installation comes from that version any more.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_nats::jetstream;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind, Stream};
use serde::Deserialize;
use time::OffsetDateTime;
use tracing::info;

use crate::error::StoreError;
use crate::store::{self, Store};
use crate::stream::scan::{self, ScanError};

/// The bucket, its stream, and what stands before a key.
const BUCKET: &str = "litestripe";
const STREAM: &str = "KV_litestripe";
const PREFIX: &str = "$KV.litestripe.";

/// What stands before an id in the key of an erasure, and the other keys.
const ERASED: &str = "erased.";
const BACKFILL_LIVE: &str = "backfill.live";
const BACKFILL_TEST: &str = "backfill.test";
const LEASE: &str = "lease.backfill";

/// Why it could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error("cannot read the KV bucket litestripe")]
    Read(#[source] RawMessageError),
    #[error(transparent)]
    Find(#[from] ScanError),
    #[error("cannot open the KV bucket litestripe")]
    Open(#[source] jetstream::context::KeyValueError),
    #[error("cannot purge a key of the KV bucket litestripe")]
    Purge(#[source] jetstream::kv::PurgeError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the bucket holds.
#[derive(Default)]
struct Kept {
    erased: BTreeMap<String, i64>,
    /// By `livemode`.
    backfills: BTreeMap<bool, OffsetDateTime>,
    keys: Vec<String>,
}

#[derive(Deserialize)]
struct Erased {
    at: i64,
}

/// Moves what the bucket holds into the database, if there is anything. If it fails, another try does the rest.
pub async fn import_kv_bucket(
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<(), UpgradeError> {
    let Some(bucket) = scan::find(jetstream, STREAM).await? else {
        return Ok(());
    };
    let Kept {
        erased,
        backfills,
        keys,
    } = read(&bucket).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let count = erased.len();
    save(store, erased, backfills).await?;
    let bucket = jetstream
        .get_key_value(BUCKET)
        .await
        .map_err(UpgradeError::Open)?;
    for key in keys {
        // Not by its sequence: a KV bucket does not let a message be deleted.
        bucket.purge(key).await.map_err(UpgradeError::Purge)?;
    }
    info!(
        "moved {count} erasures and what is known of backfills from the KV bucket litestripe into the database"
    );
    Ok(())
}

async fn read(bucket: &Stream) -> Result<Kept, UpgradeError> {
    let all = format!("{PREFIX}>");
    let (mut kept, mut last) = (Kept::default(), 0);
    loop {
        let message = match bucket
            .get_first_raw_message_by_subject(&all, last + 1)
            .await
        {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(kept),
            Err(error) => return Err(UpgradeError::Read(error)),
        };
        last = message.sequence;
        kept.add(
            message.subject.strip_prefix(PREFIX).unwrap_or_default(),
            &message.payload,
        );
    }
}

impl Kept {
    fn add(&mut self, key: &str, value: &[u8]) {
        // A key that was purged, or deleted by an operator who took an erasure back, leaves an empty message.
        if value.is_empty() {
            return;
        }
        if let Some(id) = key.strip_prefix(ERASED).and_then(id_of) {
            self.erased.extend(
                serde_json::from_slice(value)
                    .ok()
                    .map(|Erased { at }| (id, at)),
            );
        } else if key == BACKFILL_LIVE || key == BACKFILL_TEST {
            let began = std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok());
            let began = began.and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
            self.backfills
                .extend(began.map(|began| (key == BACKFILL_LIVE, began)));
        } else if key != LEASE {
            return;
        }
        self.keys.push(key.to_owned());
    }
}

async fn save(
    store: &Store,
    erased: BTreeMap<String, i64>,
    backfills: BTreeMap<bool, OffsetDateTime>,
) -> Result<(), StoreError> {
    for (livemode, began) in backfills {
        // Where this version has recorded one, that one is newer.
        store::backfill::record(store.connection(), livemode, began, None).await?;
    }
    store::erasure::record(store, Arc::new(erased), OffsetDateTime::now_utc()).await
}

/// The id in the rest of a key. One with characters that no key may have stands there in hexadecimal digits
/// after a `=`, which no plain one has.
fn id_of(rest: &str) -> Option<String> {
    let Some(digits) = rest.strip_prefix('=') else {
        return Some(rest.to_owned());
    };
    let digits = digits.as_bytes().chunks(2);
    let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_read_as_it_was_written_and_others_are_left_alone() {
        let mut kept = Kept::default();
        let keys = [
            ("erased.cus_1", r#"{"at":1000}"#),
            ("erased.=612e62", r#"{"at":1001}"#),
            ("erased.cus_2", ""),
            ("backfill.test", "1795000000"),
            ("backfill.live", "soon"),
            ("lease.backfill", "free"),
            ("litestripe_stripe_api_rate_limit", "1795000000 75"),
        ];
        for (key, value) in keys {
            kept.add(key, value.as_bytes());
        }
        assert_eq!(
            kept.erased,
            [("a.b".to_owned(), 1001), ("cus_1".to_owned(), 1000)].into()
        );
        let began = OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time");
        assert_eq!(kept.backfills, [(false, began)].into());
        assert_eq!(
            kept.keys,
            [
                "erased.cus_1",
                "erased.=612e62",
                "backfill.test",
                "backfill.live",
                "lease.backfill"
            ]
        );
    }
}
