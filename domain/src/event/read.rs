//! Turning the text of a field into a value that can be kept, or into the reason why not.
//!
//! Owns what may be kept: text that is Unicode, without NUL and of bounded length; times that
//! RFC 3339 can write; whole numbers. May not know what any field means. Invariant: an error names a
//! field and never shows what it held.

use std::borrow::Cow;

use litestripe_contract::signal::Timestamp;

use super::json::{Entries, Leaf, Nested, Object, parse, parse_borrowed};
use super::{DecodeError, MetadataKeys, Problem};

/// Where the fields being read stand; what their names in errors begin with.
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

    /// Unicode text of at most `bytes_max` bytes without NUL, which PostgreSQL cannot store.
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
        Ok(Some(text))
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

    /// Seconds since the Unix epoch that make a [`Timestamp`].
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

    pub(super) fn flag(
        self,
        leaf: Leaf<'_>,
        name: &'static str,
    ) -> Result<Option<bool>, DecodeError> {
        let flag = |json| parse(json).ok_or_else(|| self.fault(name, Problem::NotBoolean));
        leaf.value().map(flag).transpose()
    }

    /// An object of which `T` reads some fields; null and absent are none.
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

    /// Lays the metadata in `leaf` over `map`, key by key: a null takes its key away.
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

    /// Checks that `map`, read from `leaf`, may be kept.
    pub(super) fn check_metadata_size(
        self,
        map: &Metadata,
        leaf: Leaf<'_>,
    ) -> Result<(), DecodeError> {
        // Written by us it may be longer than it was: a number by its quotes, and in a list `1e15`,
        // which becomes 1000000000000000.0. Five times is beyond all of it.
        let near = leaf
            .value()
            .is_some_and(|json| json.len() > METADATA_BYTES_MAX / 5);
        if near && json_bytes(map) > METADATA_BYTES_MAX {
            return Err(self.fault("metadata", Problem::TooLong(METADATA_BYTES_MAX)));
        }
        Ok(())
    }
}

pub(super) type Metadata = std::collections::BTreeMap<String, String>;

/// The largest metadata we keep of one object, as JSON. Stripe's own limit (50 keys of 40 characters
/// with values of 500) stays below it whatever the characters.
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

/// Text as it is; anything else, which Stripe does not document, as its compact JSON.
fn metadata_value(json: &str) -> Result<String, Problem> {
    match json.as_bytes().first() {
        Some(b'"') => match parse::<String>(json) {
            Some(text) if text.contains('\0') => Err(Problem::Nul),
            Some(text) => Ok(text),
            None => Err(Problem::NotText),
        },
        Some(b'{' | b'[') => {
            // serde_json bounds the depth of what it builds, and so do we.
            let value: serde_json::Value = parse(json).ok_or(Problem::NotText)?;
            Ok(value.to_string())
        }
        _ => Ok(json.to_owned()),
    }
}
