//! The event types that are stored: LITESTRIPE_EVENT_TYPES.
//!
//! Owns its grammar, and which of its parts no worker handles. Pure.

use std::collections::BTreeSet;

use litestripe_contract::event::{EventType, HANDLED_THIN_TYPES, HANDLED_TYPES};

/// The types that a worker handles if LITESTRIPE_ERASE_ON_CUSTOMER_DELETED is set.
const HANDLED_ON_REQUEST: [&str; 2] = ["customer.deleted", "v1.customer.deleted"];

/// How different a type may be from a handled one that is suggested in its place, in characters.
const TYPOS_MAX: usize = 2;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EventTypes {
    All,
    Some {
        types: BTreeSet<String>,
        /// What other accepted types begin with, each with its last dot.
        prefixes: Vec<String>,
    },
}

impl EventTypes {
    pub(crate) fn contains(&self, event_type: &str) -> bool {
        match self {
            Self::All => true,
            Self::Some { types, prefixes } => {
                let begins = |prefix: &String| {
                    event_type.len() > prefix.len() && event_type.starts_with(prefix.as_str())
                };
                types.contains(event_type) || prefixes.iter().any(begins)
            }
        }
    }

    /// Returns the types that the worker handles.
    pub(crate) fn handled() -> Self {
        let handled = HANDLED_TYPES.into_iter().chain(HANDLED_THIN_TYPES);
        Self::parse_names(handled).expect("the handled types are types")
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::All);
        }
        Self::parse_names(text.split(',').map(str::trim))
    }

    fn parse_names<'a>(names: impl Iterator<Item = &'a str>) -> Option<Self> {
        let (mut types, mut prefixes) = (BTreeSet::new(), Vec::new());
        for name in names {
            match name.strip_suffix(".*") {
                Some(prefix) => prefixes.push(format!("{}.", EventType::parse(prefix).ok()?)),
                // All of Stripe's types but one have a dot. A word such as `all` matches nothing.
                None if !name.contains('.') && name != "ping" => return None,
                None => drop(types.insert(EventType::parse(name).ok()?.to_string())),
            }
        }
        Some(Self::Some { types, prefixes })
    }

    /// Returns the parts that no worker handles, each with the handled type that it may have been
    /// meant to be. They may be meant for other readers of the stream.
    pub(crate) fn unhandled(&self) -> Vec<(String, Option<&'static str>)> {
        let Self::Some { types, prefixes } = self else {
            return Vec::new();
        };
        let handled = Self::handled();
        let is_handled = |name: &&String| {
            handled.contains(name.as_str()) || HANDLED_ON_REQUEST.contains(&name.as_str())
        };
        let overlaps = |prefix: &&String| {
            let is_within = |name: &&str| name.starts_with(prefix.as_str());
            let begins = |name: &&str| {
                name.strip_suffix('*')
                    .is_some_and(|handled| prefix.starts_with(handled))
            };
            all_handled().any(|name| is_within(&name) || begins(&name))
        };
        let types = types.iter().filter(|name| !is_handled(name)).cloned();
        let prefixes = prefixes.iter().filter(|prefix| !overlaps(prefix));
        types
            .chain(prefixes.map(|prefix| format!("{prefix}*")))
            .map(|name| {
                let nearest = nearest(&name);
                (name, nearest)
            })
            .collect()
    }
}

fn all_handled() -> impl Iterator<Item = &'static str> {
    HANDLED_TYPES
        .into_iter()
        .chain(HANDLED_THIN_TYPES)
        .chain(HANDLED_ON_REQUEST)
}

fn nearest(name: &str) -> Option<&'static str> {
    all_handled()
        .map(|handled| (strsim::damerau_levenshtein(name, handled), handled))
        .filter(|(typos, _)| *typos <= TYPOS_MAX)
        .min()
        .map(|(_, handled)| handled)
}

#[cfg(test)]
mod tests;
