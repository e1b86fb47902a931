//! Turns the text of a field into a value that can be kept, or into an error.
//!
//! Owns which values may be kept: Unicode text of bounded length without NUL, times that RFC 3339
//! can write, whole numbers. May not know the meaning of any field. Invariant: an error names the
//! field and never shows its value.

use std::borrow::Cow;

use litestripe_contract::signal::Timestamp;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::json::{Entries, Leaf, Nested, Object, parse, parse_borrowed};
use super::{DecodeError, MetadataKeys, Problem};

/// The longest time in RFC 3339, in bytes. With nine digits of a second it has 35.
const TIME_BYTES_MAX: usize = 64;

/// The place of the fields that are read: the beginning of their names in errors.
#[derive(Clone, Copy)]
pub(super) struct Place(pub(super) &'static str);

impl Place {
    pub(super) fn fault(self, name: &'static str, problem: Problem) -> DecodeError {
        DecodeError::Field {
            place: self.0,
            name,
            problem,
        }
    }

    /// Reads Unicode text of at most `bytes_max` bytes, without NUL, which PostgreSQL cannot store.
    /// Blank text, which is empty or only white space, counts as absent: no id, state or email is
    /// blank.
    pub(super) fn text(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
        bytes_max: usize,
    ) -> Result<Option<String>, DecodeError> {
        let Some(json) = leaf.value() else {
            return Ok(None);
        };
        let text: String = parse(json).ok_or_else(|| self.fault(name, Problem::NotText))?;
        if text.len() > bytes_max {
            return Err(self.fault(name, Problem::TooLong(bytes_max)));
        }
        if text.contains('\0') {
            return Err(self.fault(name, Problem::Nul));
        }
        Ok(Some(text).filter(|text| !text.trim().is_empty()))
    }

    pub(super) fn required_text(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
        bytes_max: usize,
    ) -> Result<String, DecodeError> {
        self.text(leaf, name, bytes_max)?
            .ok_or_else(|| self.fault(name, Problem::Missing))
    }

    pub(super) fn integer(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
    ) -> Result<Option<i64>, DecodeError> {
        let number = |json| parse(json).ok_or_else(|| self.fault(name, Problem::NotInteger));
        leaf.value().map(number).transpose()
    }

    /// Reads seconds since the Unix epoch, in the range of a [`Timestamp`].
    pub(super) fn seconds(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
    ) -> Result<Option<i64>, DecodeError> {
        let seconds = self.integer(leaf, name)?;
        if let Some(Err(_)) = seconds.map(Timestamp::from_unix) {
            return Err(self.fault(name, Problem::OutOfRange));
        }
        Ok(seconds)
    }

    /// Reads a required time in RFC 3339, with or without fractions of a second. Returns whole
    /// seconds since the Unix epoch, rounded down.
    pub(super) fn rfc3339(self, leaf: Leaf<'_>, name: &'static str) -> Result<i64, DecodeError> {
        let text = self.required_text(leaf, name, TIME_BYTES_MAX)?;
        let at = OffsetDateTime::parse(&text, &Rfc3339)
            .map_err(|_| self.fault(name, Problem::NotATime))?;
        Timestamp::from_unix(at.unix_timestamp())
            .map(Timestamp::unix)
            .map_err(|_| self.fault(name, Problem::OutOfRange))
    }

    pub(super) fn flag(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
    ) -> Result<Option<bool>, DecodeError> {
        let flag = |json| parse(json).ok_or_else(|| self.fault(name, Problem::NotBoolean));
        leaf.value().map(flag).transpose()
    }

    /// Reads some fields of an object, those of `T`. Returns `None` if it is null or absent.
    pub(super) fn object<'a, T: Object<'a>>(
        self,
        leaf: Leaf<'a>,
        name: &'static str,
    ) -> Result<Option<T>, DecodeError> {
        match leaf.value().map(parse_borrowed) {
            None => Ok(None),
            Some(Some(Nested::Object(object))) => Ok(Some(object)),
            Some(_) => Err(self.fault(name, Problem::NotAnObject)),
        }
    }

    /// Applies the metadata in `leaf` over `map`, key by key. A null removes its key.
    pub(super) fn overlay_metadata(
        self,
        map: &mut Metadata,
        leaf: Leaf<'_>,
        keys: &MetadataKeys,
    ) -> Result<(), DecodeError> {
        if !leaf.is_present() {
            return Ok(());
        }
        let Some(json) = leaf.value() else {
            map.clear();
            return Ok(());
        };
        let Some(Entries(entries)) = parse_borrowed(json) else {
            return Err(self.fault("metadata", Problem::NotAnObject));
        };
        for (key, value) in entries.into_iter().filter(|(key, _)| keys.keeps(key)) {
            let fault = |problem| self.fault("metadata", problem);
            let key = metadata_key(key).map_err(fault)?;
            match value.value() {
                Some(json) => map.insert(key, metadata_value(json).map_err(fault)?),
                None => map.remove(&key),
            };
        }
        Ok(())
    }

    /// Checks that `map`, which was read from `leaf`, is not too large to be kept.
    pub(super) fn check_metadata_size(
        self,
        map: &Metadata,
        leaf: Leaf<'_>,
    ) -> Result<(), DecodeError> {
        // Serialised by us the map may be longer than its original JSON: we put numbers in quotes,
        // and `1e15` in a list becomes 1000000000000000.0. It is never five times as long, so a
        // shorter original needs no check.
        let may_be_too_long = leaf
            .value()
            .is_some_and(|json| json.len() > METADATA_BYTES_MAX / 5);
        if may_be_too_long && json_bytes(map) > METADATA_BYTES_MAX {
            return Err(self.fault("metadata", Problem::TooLong(METADATA_BYTES_MAX)));
        }
        Ok(())
    }
}

pub(super) type Metadata = std::collections::BTreeMap<String, String>;

/// The largest metadata we keep of one object, in bytes of JSON. Stripe's own limit (50 keys of 40
/// characters with values of 500) is below it, whatever the characters are.
const METADATA_BYTES_MAX: usize = 128 * 1024;

fn json_bytes(map: &Metadata) -> usize {
    serde_json::to_vec(map).map_or(usize::MAX, |json| json.len())
}

fn metadata_key(key: Cow<'_, [u8]>) -> Result<String, Problem> {
    match String::from_utf8(key.into_owned()) {
        Ok(key) if key.contains('\0') => Err(Problem::Nul),
        Ok(key) => Ok(key),
        Err(_) => Err(Problem::NotText),
    }
}

/// Returns text unchanged. Other values, which Stripe does not document, become compact JSON.
fn metadata_value(json: &str) -> Result<String, Problem> {
    match json.as_bytes().first() {
        Some(b'"') => match parse::<String>(json) {
            Some(text) if text.contains('\0') => Err(Problem::Nul),
            Some(text) => Ok(text),
            None => Err(Problem::NotText),
        },
        Some(b'{' | b'[') => {
            // serde_json limits the nesting of a value that it builds, so deeper values are
            // refused.
            let value: serde_json::Value = parse(json).ok_or(Problem::NotText)?;
            Ok(value.to_string())
        }
        _ => Ok(json.to_owned()),
    }
}
