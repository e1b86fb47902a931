//! The connections and data that `run` and the commands work with, and what is built from them.

use std::sync::Arc;

use async_nats::jetstream;
use litestripe_contract::connect::{self, ConnectError};
use litestripe_domain::orphan::Rules;
use litestripe_domain::plan::{Policy, Signalling};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::broker::{self, Unreachable};
use super::database::{self, OpenError, Schema};
use crate::apply::Applier;
use crate::erasure::Erasures;
use crate::erasure::copy::{self, CopyError};
use crate::error::StoreError;
use crate::installation::{Installation, InstallationError, Membership};
use crate::relay::{Relay, SignalCosts};
use crate::settings::{LookupSettings, Settings};
use crate::store::Store;
use crate::stream::dead_letter::DeadLetters;
use crate::stripe::api::{ApiError, StripeApi};
use crate::stripe::budget::Budget;
use crate::upgrade::{self, UpgradeError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Installation(#[from] InstallationError),
}

/// The database, the broker and the erasures. Events may be applied only with the erasures loaded.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) nats: async_nats::Client,
    pub(crate) jetstream: jetstream::Context,
    /// The ids whose personal data must not come back.
    pub(crate) erasures: Erasures,
    /// The installation that this process has joined. A command that acks nothing joins none.
    pub(crate) installation: Option<Installation>,
    pub(crate) signal_costs: Arc<SignalCosts>,
}

impl Parts {
    /// Connects to NATS within 5 s, opens the database and reads the erasures. `name` is the
    /// connection's name at the NATS server. Fails if database and broker do not belong together.
    pub(crate) async fn start(
        settings: &Settings,
        name: &str,
        schema: Schema,
        membership: Membership,
    ) -> Result<Self, StartError> {
        let nats = connect_within(settings, name).await?;
        let store = database::open(&settings.database, schema).await?;
        let jetstream = connect::jetstream(nats.clone());
        let installation = membership.check(settings, &store, &jetstream).await?;
        Self::assemble(store, nats, installation).await
    }

    /// Puts the parts together and reads the erasures, also those that the database does not know
    /// because it was restored. First moves the data that the previous version kept in NATS into
    /// the database. The caller has checked that database and broker belong together.
    pub(crate) async fn assemble(
        store: Store,
        nats: async_nats::Client,
        installation: Option<Installation>,
    ) -> Result<Self, StartError> {
        let jetstream = connect::jetstream(nats.clone());
        upgrade::import_kv_bucket(&store, &jetstream).await?;
        let erasures = Erasures::load(&store).await?;
        copy::restore(&store, &jetstream, &erasures).await?;
        Ok(Self {
            store,
            nats,
            jetstream,
            erasures,
            installation,
            signal_costs: Arc::default(),
        })
    }

    pub(crate) fn applier(
        &self,
        settings: &Settings,
        dead_letters: &DeadLetters,
        relay: &Arc<Notify>,
    ) -> Applier {
        Applier {
            store: self.store.clone(),
            metadata_keys: settings.metadata_keys.clone(),
            policy: Arc::new(policy(settings)),
            erasures: self.erasures.clone(),
            installation: self.installation.clone(),
            erase_on_customer_deleted: settings.erase_on_customer_deleted,
            dead_letters: dead_letters.clone(),
            relay: Arc::clone(relay),
            questions: Arc::new(Notify::new()),
            waiting: Arc::default(),
            refusals: Arc::default(),
            signal_costs: Arc::clone(&self.signal_costs),
        }
    }

    /// Creates a relay, which checks the outbox when `wake` is notified.
    pub(crate) fn relay(&self, settings: &Settings, wake: &Arc<Notify>) -> Relay {
        Relay::new(
            self.store.clone(),
            self.jetstream.clone(),
            settings.nats.clone(),
            Arc::clone(wake),
            Arc::clone(&self.signal_costs),
        )
    }

    /// Creates a client of Stripe's API within the budget of all workers, if there is a key.
    pub(crate) fn stripe(&self, settings: &Settings) -> Result<Option<StripeApi>, ApiError> {
        let Some(stripe) = settings.stripe.clone() else {
            return Ok(None);
        };
        let budget = Budget::new(
            &stripe.budget,
            self.jetstream.clone(),
            settings.events.replicas,
        );
        StripeApi::new(stripe, Arc::new(budget), self.jetstream.clone()).map(Some)
    }

    /// Sends signals while `work` runs and those left at its end, so that a command also works
    /// without a worker.
    pub(crate) async fn while_relaying<T>(
        &self,
        settings: &Settings,
        work: impl Future<Output = T>,
    ) -> T {
        let stop = CancellationToken::new();
        let relay = tokio::spawn(
            self.relay(settings, &Arc::new(Notify::new()))
                .run(stop.clone()),
        );
        let outcome = work.await;
        stop.cancel();
        // Signals that cannot be sent now stay in the outbox for any worker.
        let _ = relay.await;
        outcome
    }
}

/// Connects to NATS, or fails after 5 s.
pub(crate) async fn connect_within(
    settings: &Settings,
    name: &str,
) -> Result<async_nats::Client, StartError> {
    let nats = connect::connect(&settings.nats, name).await?;
    broker::reach(&nats, settings).await?;
    Ok(nats)
}

/// Returns the policy for applying live events.
pub(crate) fn policy(settings: &Settings) -> Policy {
    let rules = Rules {
        lookup: !matches!(settings.lookup, LookupSettings::None),
        without_session: settings.orphans.without_session,
        grace: settings.orphans.grace,
    };
    Policy {
        rules,
        signalling: Signalling::Now,
    }
}
