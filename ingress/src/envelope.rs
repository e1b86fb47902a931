//! What ingress reads of an event: its id, its type, and whether it is one.
//!
//! Owns the look into a body. The rest of it must be JSON and is passed over without being kept.

use std::fmt;

use litestripe_contract::event::EventId;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::signature::VerifiedBody;

/// `object` of a thin event. Stripe: "Thin events".
const THIN: &str = "v2.core.event";

/// A signed body is no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAnEvent {
    /// It is no JSON object.
    #[error("the body is no JSON object")]
    NotJson,
    /// Its `id` is missing, or cannot be an event's.
    #[error("the event has no usable id")]
    Id,
    /// Its `type` is missing.
    #[error("the event has no type")]
    Type,
}

/// The envelope of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Its id.
    pub id: EventId,
    /// Its type, which need not be a valid subject.
    pub event_type: String,
    /// Whether it is a thin event, which has no snapshot.
    pub is_thin: bool,
}

impl Envelope {
    /// Reads the envelope of the event in `body`.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(body: &VerifiedBody) -> Result<Self, NotAnEvent> {
        parse(body.bytes())
    }
}

fn parse(body: &[u8]) -> Result<Envelope, NotAnEvent> {
    let fields: Fields<'_> = serde_json::from_slice(body).map_err(|_| NotAnEvent::NotJson)?;
    let id = text(fields.id).and_then(|id| EventId::parse(id).ok()).ok_or(NotAnEvent::Id)?;
    let event_type = text(fields.event_type).filter(|name| !name.is_empty()).ok_or(NotAnEvent::Type)?;
    Ok(Envelope { id, event_type, is_thin: text(fields.object).as_deref() == Some(THIN) })
}

fn text(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

/// The values of an event's own fields. Of a repeated one the last counts, as for most readers.
#[derive(Default)]
struct Fields<'a> {
    id: Option<&'a RawValue>,
    event_type: Option<&'a RawValue>,
    object: Option<&'a RawValue>,
}

enum Name {
    Id,
    Type,
    Object,
    Other,
}

/// From bytes: serde's derived one refuses a key with a lone surrogate, which no one reads.
impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(NameVisitor)
    }
}

struct NameVisitor;

impl Visitor<'_> for NameVisitor {
    type Value = Name;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<Self::Value, E> {
        Ok(match key {
            b"id" => Name::Id,
            b"type" => Name::Type,
            b"object" => Name::Object,
            _ => Name::Other,
        })
    }
}

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
        let mut fields = Fields::default();
        while let Some(name) = map.next_key()? {
            match name {
                Name::Id => fields.id = Some(map.next_value()?),
                Name::Type => fields.event_type = Some(map.next_value()?),
                Name::Object => fields.object = Some(map.next_value()?),
                // All that is asked of it is that it is JSON: a verified body is UTF-8.
                Name::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests;
