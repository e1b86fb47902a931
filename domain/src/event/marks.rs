//! Marks: what a step of a subscription says about the fields that its digest leaves out.
//!
//! Owns which fields have a mark, and the form in which marks are stored. Several events of one
//! second can agree in everything that the digest covers and differ in one of these fields, so
//! marks distinguish states that the digest does not. A mark is not the value: 32 bits of a hash
//! are enough to compare the at most 32 states of a second. A field that is missing in a rendering
//! has no mark and is not compared.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Digest as _;

/// The fields with a mark. First those that a row shows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Marked {
    PauseCollection,
    CancellationReason,
    TrialStart,
    CollectionMethod,
    LatestInvoice,
    DefaultPaymentMethod,
    Schedule,
    PendingUpdate,
    BillingCycleAnchor,
}

const FIELDS: usize = 9;
/// How many of the fields, from the first, a row shows.
const SHOWN: usize = 4;

/// What is known of a field's value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mark {
    /// Nothing: the rendering lacks the field.
    #[default]
    Missing,
    Null,
    Value(u32),
}

impl Mark {
    /// Returns the mark of a value, of which `text` is the canonical form, or of null.
    pub(super) fn from_value(text: Option<&str>) -> Self {
        let Some(text) = text else {
            return Self::Null;
        };
        let sha256: [u8; 32] = sha2::Sha256::digest(text).into();
        Self::Value(u32::from_be_bytes(
            sha256.first_chunk().copied().unwrap_or_default(),
        ))
    }
}

/// The marks of all fields. Written as text: `-` for a missing field, `n` for null, 8 hexadecimal
/// digits for a value.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Marks([Mark; FIELDS]);

impl Marks {
    pub(super) fn set(&mut self, field: Marked, mark: Mark) {
        if let Some(held) = self.0.get_mut(field as usize) {
            *held = mark;
        }
    }

    /// Returns these marks, with null for each field that only `before` has: if an event changed a
    /// field that its object lacks, the rendering leaves nulls out.
    pub(super) fn after(mut self, before: &Self) -> Self {
        for (mark, before) in self.0.iter_mut().zip(before.0) {
            if *mark == Mark::Missing && before != Mark::Missing {
                *mark = Mark::Null;
            }
        }
        self
    }

    /// Returns whether no field has a mark.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns these marks without those that are missing in `other`.
    pub(crate) fn among(mut self, other: &Self) -> Self {
        for (mark, other) in self.0.iter_mut().zip(other.0) {
            if other == Mark::Missing {
                *mark = Mark::Missing;
            }
        }
        self
    }

    /// Returns only the marks of the fields that a row shows.
    pub(crate) fn shown(mut self) -> Self {
        for mark in self.0.iter_mut().skip(SHOWN) {
            *mark = Mark::Missing;
        }
        self
    }

    /// Returns how many fields have a mark.
    pub(crate) fn count(&self) -> usize {
        let known = self.0.iter().filter(|mark| **mark != Mark::Missing);
        known.count()
    }

    /// Returns the marks of both. `None` if a field has two different marks.
    pub(crate) fn join(mut self, other: &Self) -> Option<Self> {
        for (mark, other) in self.0.iter_mut().zip(other.0) {
            match (*mark, other) {
                (_, Mark::Missing) => {}
                (Mark::Missing, known) => *mark = known,
                (mark, other) if mark != other => return None,
                _ => {}
            }
        }
        Some(self)
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|mark| match mark {
            Mark::Missing => f.write_str("-"),
            Mark::Null => f.write_str("n"),
            Mark::Value(hash) => write!(f, "{hash:08x}"),
        })
    }
}

impl fmt::Debug for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The error for a text that is not marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the marks of a subscription's fields")]
pub struct InvalidMarks;

impl FromStr for Marks {
    type Err = InvalidMarks;

    /// Ignores marks of fields that only a later version knows, which follow ours.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut rest = text;
        let mut marks = Self::default();
        for mark in &mut marks.0 {
            let (read, length) = match rest.as_bytes().first() {
                None => break,
                Some(b'-') => (Mark::Missing, 1),
                Some(b'n') => (Mark::Null, 1),
                Some(_) => {
                    let hash = rest
                        .get(..8)
                        .and_then(|hex| u32::from_str_radix(hex, 16).ok());
                    (Mark::Value(hash.ok_or(InvalidMarks)?), 8)
                }
            };
            *mark = read;
            rest = rest.get(length..).ok_or(InvalidMarks)?;
        }
        Ok(marks)
    }
}

impl Serialize for Marks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Marks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}
