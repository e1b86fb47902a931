//! Connecting to NATS and creating missing streams.

use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream;
use litestripe_contract::{connect, exit, stream};

use crate::metrics;
use crate::settings::Settings;
use crate::wait::{self, JETSTREAM};

/// How long a command waits for NATS. An operator at a terminal should not wait longer for an
/// error.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How often a worker checks that the streams still exist.
const RECREATE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[error(
    "cannot reach NATS at {0} within 5 s: check that it runs and that NATS_URL is right; nothing was changed"
)]
pub(crate) struct Unreachable(String);

/// Returns once `nats` is connected, or fails after 5 s.
pub(crate) async fn reach(
    nats: &async_nats::Client,
    settings: &Settings,
) -> Result<(), Unreachable> {
    let connected =
        tokio::time::timeout(ANSWER_MAX, connect::connected(nats, &settings.nats)).await;
    connected.map_err(|_| Unreachable(settings.nats.hosts()))
}

/// Waits for the broker and creates its missing streams.
pub(crate) async fn prepare(nats: &async_nats::Client, settings: &Settings) {
    metrics::waiting_for_broker(nats.connection_state() != State::Connected);
    connect::connected(nats, &settings.nats).await;
    metrics::waiting_for_broker(false);
    let jetstream = connect::jetstream(nats.clone());
    wait::until_ok(JETSTREAM, async || provide(settings, &jetstream).await).await;
}

/// Creates the streams that are missing.
pub(crate) async fn provide(
    settings: &Settings,
    jetstream: &jetstream::Context,
) -> Result<(), stream::ProvisionError> {
    let replicas = settings.events.replicas;
    stream::provide_events(jetstream, &settings.events).await?;
    stream::provide(
        jetstream,
        stream::signals(replicas, settings.signals_max_age),
    )
    .await?;
    stream::provide(
        jetstream,
        stream::dead_letters(replicas, settings.dead_letters_max_age),
    )
    .await
}

/// Recreates deleted streams, for as long as the process runs.
pub(crate) async fn recreate_streams(settings: Settings, jetstream: jetstream::Context) {
    loop {
        tokio::time::sleep(RECREATE_EVERY).await;
        metrics::waiting_for_broker(jetstream.client().connection_state() != State::Connected);
        if let Err(error) = provide(&settings, &jetstream).await {
            tracing::debug!("cannot create the streams: {}", exit::chain(&error));
        }
    }
}
