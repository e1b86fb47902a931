//! Identifies a state of a subscription: a digest of the fields we keep.
//!
//! Owns the canonical form that is digested: JSON with fields in a fixed order and sorted maps. It
//! never changes, because digests are stored: fields that were added later have marks instead. Half
//! of SHA-256 is kept: a collision among the 32 states of a second is out of reach, and the column
//! stays short.

use std::collections::BTreeMap;
use std::fmt;

use litestripe_contract::signal::Item;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Digest as _;

use crate::event::Snapshot;

const BYTES: usize = 16;

/// Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Digest([u8; BYTES]);

impl Digest {
    pub(super) fn from_snapshot(snapshot: &Snapshot) -> Self {
        let json = serde_json::to_vec(&Digested::from(snapshot))
            .expect("a snapshot is text, numbers, lists and maps with text as keys");
        let sha256: [u8; 32] = sha2::Sha256::digest(json).into();
        let mut half = [0; BYTES];
        half.copy_from_slice(&sha256[..BYTES]);
        Self(half)
    }
}

/// The part of a snapshot that is digested.
#[derive(Serialize)]
struct Digested<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    customer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_date: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cancel_at: Option<i64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    cancel_at_period_end: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    canceled_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trial_end: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    current_period_start: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    current_period_end: Option<i64>,
    #[serde(skip_serializing_if = "<[Item]>::is_empty")]
    items: &'a [Item],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: &'a BTreeMap<String, String>,
}

impl<'a> From<&'a Snapshot> for Digested<'a> {
    fn from(snapshot: &'a Snapshot) -> Self {
        Self {
            customer: snapshot.customer.as_deref(),
            status: snapshot.status.as_deref(),
            created: snapshot.created,
            start_date: snapshot.start_date,
            cancel_at: snapshot.cancel_at,
            cancel_at_period_end: snapshot.cancel_at_period_end,
            canceled_at: snapshot.canceled_at,
            ended_at: snapshot.ended_at,
            trial_end: snapshot.trial_end,
            current_period_start: snapshot.current_period_start,
            current_period_end: snapshot.current_period_end,
            items: &snapshot.items,
            metadata: &snapshot.metadata,
        }
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        let number = u128::from_str_radix(&text, 16)
            .ok()
            .filter(|_| text.len() == 2 * BYTES);
        let number =
            number.ok_or_else(|| de::Error::custom("a digest is 32 hexadecimal digits"))?;
        Ok(Self(number.to_be_bytes()))
    }
}
