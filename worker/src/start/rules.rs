//! The rules by which events are applied, so that workers and commands apply them in the same way.
//!
//! Owns which settings decide what becomes of an event. Workers record theirs in the database. A
//! command that applies events refuses to run with other rules than the workers', because it also
//! applies live events. A worker only warns, because an operator replaces workers one by one.

use std::collections::BTreeMap;
use std::time::Duration;

use litestripe_contract::exit;
use litestripe_domain::event::MetadataKeys;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::error::StoreError;
use crate::settings::{self, LookupSettings, Settings};
use crate::store::worker::{self, Recorded};
use crate::store::{Store, detached};
use crate::wait::pause;

/// How often a worker records that it runs.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);

/// How long a stopping worker tries to record that it stops.
const RECORD_END_MAX: Duration = Duration::from_secs(1);

/// The settings that decide what becomes of an event, by name. No value is a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rules(BTreeMap<String, String>);

/// Why a command does not apply events.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RulesError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "this command applies events, but not as the workers do: {differences}. Give it the workers' settings, or first \
         start the workers with these; nothing was changed"
    )]
    Different { differences: String },
}

impl Rules {
    pub(crate) fn new(settings: &Settings) -> Self {
        let orphans = &settings.orphans;
        let rules = [
            (settings::METADATA_KEYS.name, keys(&settings.metadata_keys)),
            (settings::USER_LOOKUP.name, lookup(&settings.lookup)),
            (settings::ORPHAN_GRACE.name, format!("{:?}", orphans.grace)),
            (
                settings::ORPHAN_WITHOUT_SESSION.name,
                orphans.without_session.to_string(),
            ),
            (
                settings::ERASE_ON_CUSTOMER_DELETED.name,
                settings.erase_on_customer_deleted.to_string(),
            ),
        ];
        Self(rules.map(|(name, value)| (name.to_owned(), value)).into())
    }

    /// Returns the settings that differ, with both values. `None` if none does.
    fn differences(&self, workers: &Self) -> Option<String> {
        let differs = |(name, here): (&String, &String)| {
            // A worker of another version may not record it.
            let there = workers.0.get(name)?;
            (here != there).then(|| format!("{name} is {here} here and {there} there"))
        };
        let differences: Vec<_> = self.0.iter().filter_map(differs).collect();
        (!differences.is_empty()).then(|| differences.join(", "))
    }

    /// Fails if the rules of the running workers are others; if none runs, those of the worker that
    /// ran last.
    pub(crate) async fn check(&self, store: &Store) -> Result<(), RulesError> {
        let recorded = worker::all(store.connection()).await?;
        let running = recorded.iter().filter(|worker| worker.is_running).count();
        let workers = recorded.iter().take(running.max(1));
        match workers.filter_map(|worker| self.compare(worker)).next() {
            Some(differences) => Err(RulesError::Different { differences }),
            None => Ok(()),
        }
    }

    fn compare(&self, worker: &Recorded) -> Option<String> {
        self.differences(&serde_json::from_str(&worker.rules).ok()?)
    }

    /// Records the rules of the worker `name`, which starts. Warns if another one that runs has
    /// others.
    pub(crate) async fn record_start(&self, store: &Store, name: &str) -> Result<(), StoreError> {
        let others = worker::all(store.connection()).await?;
        let running = others.iter().filter(|worker| worker.is_running);
        if let Some(differences) = running.filter_map(|worker| self.compare(worker)).next() {
            warn!(
                "another worker applies events by other settings, unless it is about to be replaced: {differences}"
            );
        }
        worker::remove_ended(store.connection()).await?;
        self.record(store, name).await
    }

    async fn record(&self, store: &Store, name: &str) -> Result<(), StoreError> {
        let rules = serde_json::to_string(self).expect("a map of texts can be written as JSON");
        worker::record(store.connection(), name, &rules).await
    }

    /// Records heartbeats until `shutdown`.
    pub(crate) async fn keep_recorded(
        self,
        store: Store,
        name: String,
        shutdown: CancellationToken,
    ) {
        while pause(HEARTBEAT_EVERY, &shutdown).await.is_some() {
            if let Err(error) = self.record(&store, &name).await {
                debug!("cannot record the rules: {}", exit::chain(&error));
            }
        }
    }
}

/// Records that the worker `name` has stopped. Without it, it counts as running for a while.
pub(crate) async fn record_end(store: &Store, name: String) {
    let store = store.clone();
    let recording = detached(async move { worker::record_end(store.connection(), &name).await });
    if let Ok(Err(error)) = tokio::time::timeout(RECORD_END_MAX, recording).await {
        debug!("{}", exit::chain(&error));
    }
}

fn keys(keys: &MetadataKeys) -> String {
    match keys {
        MetadataKeys::All => "*".to_owned(),
        MetadataKeys::Only(keys) if keys.is_empty() => "none".to_owned(),
        MetadataKeys::Only(keys) => Vec::from_iter(keys.iter().map(String::as_str)).join(","),
    }
}

/// Returns the kind of lookup, with a hash of the rest: a query may hold a secret.
fn lookup(lookup: &LookupSettings) -> String {
    let (kind, rest) = match lookup {
        LookupSettings::None => return "none".to_owned(),
        LookupSettings::Sql { query, .. } => ("sql", query),
        LookupSettings::Nats { subject } => ("nats", subject),
    };
    let hash: [u8; 32] = Sha256::digest(rest).into();
    let hash = u64::from_be_bytes(hash.first_chunk().copied().unwrap_or_default());
    format!("{kind}: (hash {hash:016x})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(values: &[(&str, &str)]) -> Rules {
        let values = values.iter();
        Rules(
            values
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    #[test]
    fn only_settings_that_both_know_are_compared() {
        let here = rules(&[("A", "1"), ("B", "2"), ("NEW", "3")]);
        let there = rules(&[("A", "1"), ("B", "5"), ("OLD", "4")]);
        assert_eq!(
            here.differences(&there).as_deref(),
            Some("B is 2 here and 5 there")
        );
        assert_eq!(here.differences(&rules(&[])), None);
    }

    #[test]
    fn lookup_shows_neither_query_nor_subject() {
        let shown = |subject: &str| {
            lookup(&LookupSettings::Nats {
                subject: subject.to_owned(),
            })
        };
        assert!(shown("app.users").starts_with("nats: (hash "));
        assert!(!shown("app.users").contains("users"));
        assert_ne!(shown("app.users"), shown("app.others"));
    }
}
