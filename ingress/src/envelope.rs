//! The fields of an event that ingress reads: its id, its type, and whether it is a thin event.
//!
//! Owns parsing a body. The rest of the body must be JSON; it is skipped and not kept.

use std::fmt;

use litestripe_contract::event::{EventId, THIN_OBJECT};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::signature::VerifiedBody;

/// Why a signed body is not an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAnEvent {
    #[error("the body is not a JSON object")]
    NotJson,
    /// The `id` is missing or not a valid event id.
    #[error("the event has no usable id")]
    Id,
    #[error("the event has no type")]
    Type,
}

/// The fields that decide whether and how an event is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    pub id: EventId,
    /// The event's type, which may be invalid in a subject.
    pub event_type: String,
    pub is_thin: bool,
}

impl Envelope {
    /// Reads the fields from `body`, which must be one JSON object.
    pub fn read(body: &VerifiedBody) -> Result<Self, NotAnEvent> {
        parse(body.bytes())
    }
}

fn parse(body: &[u8]) -> Result<Envelope, NotAnEvent> {
    let Fields([id, event_type, object]) =
        serde_json::from_slice(body).map_err(|_| NotAnEvent::NotJson)?;
    let id = text(id)
        .and_then(|id| EventId::parse(id).ok())
        .ok_or(NotAnEvent::Id)?;
    let event_type = text(event_type)
        .filter(|name| !name.is_empty())
        .ok_or(NotAnEvent::Type)?;
    Ok(Envelope {
        id,
        event_type,
        is_thin: text(object).as_deref() == Some(THIN_OBJECT),
    })
}

fn text(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

/// The names of the fields that are read.
const NAMES: [&[u8]; 3] = [b"id", b"type", b"object"];

/// The values of the fields in [`NAMES`]. The last one counts if a field is repeated, as in most
/// JSON readers.
struct Fields<'a>([Option<&'a RawValue>; NAMES.len()]);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = [None; NAMES.len()];
        while let Some(index) = map.next_key_seed(Name)? {
            match index {
                Some(index) => fields[index] = Some(map.next_value()?),
                // It only has to be JSON. That it is UTF-8 is known, because the body is verified.
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Fields(fields))
    }
}

/// Reads a key as its index in [`NAMES`]. It reads bytes, because serde refuses a text with a lone
/// surrogate, and such a key must not matter.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<Self::Value, E> {
        Ok(NAMES.iter().position(|name| *name == key))
    }
}

#[cfg(test)]
mod tests;
