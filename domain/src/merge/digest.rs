//! Identifies a state of a subscription: a digest of the fields we keep.
//!
//! Owns the canonical form that is digested: the snapshot's own JSON, with fields in a fixed order
//! and sorted maps. Half of SHA-256 is kept: a collision among the 32 states of a second is out of
//! reach, and the column stays short.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Digest as _;

use crate::event::Snapshot;

const BYTES: usize = 16;

/// Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Digest([u8; BYTES]);

impl Digest {
    pub(super) fn from_snapshot(snapshot: &Snapshot) -> Self {
        let json = serde_json::to_vec(snapshot)
            .expect("a snapshot is text, numbers, lists and maps with text as keys");
        let sha256: [u8; 32] = sha2::Sha256::digest(json).into();
        let mut half = [0; BYTES];
        half.copy_from_slice(&sha256[..BYTES]);
        Self(half)
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
