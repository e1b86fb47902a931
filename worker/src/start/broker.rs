//! Reaching NATS, and seeing that its streams are there.

use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream;
use litestripe_contract::{connect, exit, stream};

use crate::metrics;
use crate::settings::Settings;
use crate::wait::{self, JETSTREAM};

/// How long a command waits for NATS: an operator at a terminal wants an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How often it is checked whether the streams are still there.
const TEND_EVERY: Duration = Duration::from_secs(5);

/// NATS does not answer.
#[derive(Debug, thiserror::Error)]
#[error("NATS at {0} does not answer (NATS_URL); nothing was changed")]
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

/// Waits for the broker, and until its streams are there.
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

/// Creates streams that somebody deleted, again and again.
pub(crate) async fn tend_streams(settings: Settings, jetstream: jetstream::Context) {
    loop {
        tokio::time::sleep(TEND_EVERY).await;
        metrics::waiting_for_broker(jetstream.client().connection_state() != State::Connected);
        if let Err(error) = provide(&settings, &jetstream).await {
            tracing::debug!("cannot provide the streams: {}", exit::chain(&error));
        }
    }
}
