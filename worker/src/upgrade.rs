//! Moves the erasures and the record of backfills of the previous version from the KV bucket
//! `litestripe` into the database, and removes its lease.
//!
//! The keys are purged after the commit, so doing it again changes nothing. To be deleted when no
//! installation upgrades from that version any more.

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

/// The bucket, its stream, and the prefix of its subjects.
const BUCKET: &str = "litestripe";
const STREAM: &str = "KV_litestripe";
const PREFIX: &str = "$KV.litestripe.";

/// The prefix of the erasures' keys, and the other keys.
const ERASED: &str = "erased.";
const BACKFILL_LIVE: &str = "backfill.live";
const BACKFILL_TEST: &str = "backfill.test";
const LEASE: &str = "lease.backfill";

/// Why the bucket could not be imported.
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

/// The content of the bucket.
#[derive(Default)]
struct Content {
    /// When each id was erased, in seconds since the Unix epoch.
    erased: BTreeMap<String, i64>,
    /// When the last complete backfill began, by `livemode`.
    backfills: BTreeMap<bool, OffsetDateTime>,
    keys: Vec<String>,
}

#[derive(Deserialize)]
struct Erased {
    at: i64,
}

/// Moves the bucket's content into the database, if there is any. After a failure, a retry does the
/// rest.
pub async fn import_kv_bucket(
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<(), UpgradeError> {
    let Some(bucket) = scan::find(jetstream, STREAM).await? else {
        return Ok(());
    };
    let Content {
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
        "moved {count} erasures and the record of backfills from the KV bucket litestripe into the database"
    );
    Ok(())
}

async fn read(bucket: &Stream) -> Result<Content, UpgradeError> {
    let all = format!("{PREFIX}>");
    let (mut content, mut last) = (Content::default(), 0);
    loop {
        let message = match bucket
            .get_first_raw_message_by_subject(&all, last + 1)
            .await
        {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
                return Ok(content);
            }
            Err(error) => return Err(UpgradeError::Read(error)),
        };
        last = message.sequence;
        content.add(
            message.subject.strip_prefix(PREFIX).unwrap_or_default(),
            &message.payload,
        );
    }
}

impl Content {
    fn add(&mut self, key: &str, value: &[u8]) {
        // A key that was purged, or that an operator deleted to take back an erasure, leaves an
        // empty message.
        if value.is_empty() {
            return;
        }
        if let Some(id) = key.strip_prefix(ERASED).and_then(decode_id) {
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
        // Does nothing if this version has already recorded a backfill, which is newer.
        store::backfill::record(store.connection(), livemode, began, None).await?;
    }
    store::erasure::record(store, Arc::new(erased), OffsetDateTime::now_utc()).await
}

/// Decodes the id in the rest of a key. An id with characters that a key cannot have is written as
/// `=` and hexadecimal digits; no plain id begins with `=`.
fn decode_id(rest: &str) -> Option<String> {
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
    fn known_keys_are_read_and_others_are_left_alone() {
        let mut content = Content::default();
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
            content.add(key, value.as_bytes());
        }
        assert_eq!(
            content.erased,
            [("a.b".to_owned(), 1001), ("cus_1".to_owned(), 1000)].into()
        );
        let began = OffsetDateTime::from_unix_timestamp(1_795_000_000).expect("a time");
        assert_eq!(content.backfills, [(false, began)].into());
        assert_eq!(
            content.keys,
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
