//! Reading a few fields out of a JSON body without validating the rest.
//!
//! Owns how tolerant that reading is. Unknown fields are skipped, whatever they hold. If a field is
//! repeated, the last one counts. A kept field is returned as JSON text, which its reader checks.
//! May not know any field's name: `event` declares those. Invariant: as long as the body is JSON,
//! nothing outside the declared fields can make it unreadable, and no recursion here is as deep as
//! the body's nesting.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// The JSON text of a field. `None` if the field is absent; an explicit null is present.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Leaf<'a>(Option<&'a str>);

impl<'de: 'a, 'a> Deserialize<'de> for Leaf<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(deserializer).map(|raw| Self(Some(raw.get())))
    }
}

impl<'a> Leaf<'a> {
    pub(super) fn is_present(self) -> bool {
        self.0.is_some()
    }

    /// Returns the text, unless the value is absent or null.
    pub(super) fn value(self) -> Option<&'a str> {
        self.0.filter(|text| *text != "null")
    }
}

/// Parses `text`, the JSON of one value. Drops the error on purpose: serde_json's would print the
/// value.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

/// Does the same as [`parse`], for a type that borrows from `text`.
pub(super) fn parse_borrowed<'a, T: Deserialize<'a>>(text: &'a str) -> Option<T> {
    serde_json::from_str(text).ok()
}

/// A field that should hold an object.
#[derive(Debug, Clone, Default)]
pub(super) enum Nested<T> {
    #[default]
    Absent,
    Null,
    /// A value of another kind.
    Other,
    Object(T),
}

impl<'de, T: Object<'de>> Deserialize<'de> for Nested<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NestedVisitor(PhantomData))
    }
}

struct NestedVisitor<T>(PhantomData<T>);

impl<'de, T: Object<'de>> Visitor<'de> for NestedVisitor<T> {
    type Value = Nested<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut object = T::default();
        while let Some(Key(key)) = map.next_key()? {
            if !object.read(&key, &mut map)? {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Nested::Object(object))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        while elements.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Nested::Other)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Nested::Null)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Nested::Other)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Nested::Other)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Nested::Other)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Nested::Other)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Nested::Other)
    }
}

/// An object of which some fields are read. Implemented by the macro [`objects`].
pub(super) trait Object<'de>: Default {
    /// Reads the value of `key` from `map` if the object has such a field. Returns whether it has.
    fn read<A: MapAccess<'de>>(&mut self, key: &[u8], map: &mut A) -> Result<bool, A::Error>;
}

/// A key, in bytes. A key that is not Unicode (a lone surrogate) counts as unknown and is no error.
struct Key<'a>(Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

struct KeyVisitor;

impl<'de> Visitor<'de> for KeyVisitor {
    type Value = Key<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_borrowed_bytes<E: Error>(self, key: &'de [u8]) -> Result<Self::Value, E> {
        Ok(Key(Cow::Borrowed(key)))
    }

    fn visit_bytes<E: Error>(self, key: &[u8]) -> Result<Self::Value, E> {
        Ok(Key(Cow::Owned(key.to_vec())))
    }
}

/// All entries of an object in their order, including repeated keys.
pub(super) struct Entries<'a>(pub(super) Vec<(Cow<'a, [u8]>, Leaf<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((Key(key), value)) = map.next_entry()? {
            entries.push((key, value));
        }
        Ok(Entries(entries))
    }
}

/// Declares objects by the fields that are read, each as `name: type = "key"`.
///
/// Replaces serde's derive, which treats a repeated field, and a key that is not Unicode, as an
/// error.
macro_rules! objects {
    ($($(#[$doc:meta])* $vis:vis struct $name:ident { $($field:ident: $type:ty = $key:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default)]
        $vis struct $name<'a> {
            $($field: $type,)*
        }

        impl<'de: 'a, 'a> json::Object<'de> for $name<'a> {
            fn read<A: serde::de::MapAccess<'de>>(
                &mut self,
                key: &[u8],
                map: &mut A,
            ) -> Result<bool, A::Error> {
                match std::str::from_utf8(key) {
                    $(Ok($key) => self.$field = map.next_value()?,)*
                    _ => return Ok(false),
                }
                Ok(true)
            }
        }
    )*};
}

pub(super) use objects;
