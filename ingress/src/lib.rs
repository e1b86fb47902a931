//! Ingress: verifies Stripe's webhooks and stores them in JetStream.
//!
//! The life of a delivery: `connection` accepts it, `route` decides its status, `body` reads its
//! body, `signature` verifies it, `envelope` finds its id and type, `publish` stores it. `secret`
//! owns the signing secrets, `settings` the operator's settings, `metrics` the counters, `throttle`
//! the limit on repeated log lines. May not know the database.

mod body;
mod connection;
pub mod envelope;
mod fail_point;
mod metrics;
mod publish;
mod route;
pub mod secret;
pub mod settings;
pub mod signature;
mod throttle;
mod trace;

use std::future::{pending, ready};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use litestripe_contract::connect::{self, ConnectError};
use litestripe_contract::systemd;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::metrics::Metrics;
use crate::publish::Publisher;
use crate::route::Ingress;
use crate::secret::{NoSecret, SecretSource};
use crate::settings::Settings;
use crate::signature::SigningSecret;

/// How often the metrics do their upkeep.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// How long sending the last bytes to NATS may take at the end.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// Why ingress cannot serve, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    NoSecret(#[from] NoSecret),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A background task panicked: the one for the connection, the metrics or the secret. A
    /// supervisor has to restart ingress.
    #[error("a background task of ingress panicked, which is a bug")]
    Panicked,
}

/// Serves on `listener` until `shutdown`, then finishes the requests in flight. Serves also while
/// the broker is unreachable, and waits for it in the background.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    for (name, nearest) in settings.event_types.unhandled() {
        let nearest =
            nearest.map_or_else(String::new, |nearest| format!(": did you mean {nearest}?"));
        warn!("LITESTRIPE_EVENT_TYPES: {name} is stored, but no worker handles it{nearest}");
    }
    let client = connect::connect(&settings.nats, publish::CONNECTION_NAME).await?;
    let Some(secrets) = shutdown
        .run_until_cancelled(secret::obtain(&settings.secrets))
        .await
    else {
        return Ok(());
    };
    let secrets = watch::Sender::new(secrets?);
    let publisher = Arc::new(Publisher::new(client, &settings));
    let metrics = Arc::new(Metrics::new());
    let receiver = secrets.subscribe();
    let mut background = background(&publisher, &metrics, settings.secrets.clone(), secrets);
    let ingress = Ingress::new(settings, receiver, Arc::clone(&publisher), metrics);
    if let Ok(address) = listener.local_addr() {
        info!(%address, "listening on http://{address}");
    }
    let mut serving = pin!(connection::serve(
        listener,
        route::service(Arc::new(ingress)),
        &shutdown
    ));
    let outcome = tokio::select! {
        () = &mut serving => Ok(()),
        _ = background.join_next() => {
            error!("a background task of ingress panicked, which is a bug: stopping, to be restarted");
            shutdown.cancel();
            serving.await;
            Err(RunError::Panicked)
        }
    };
    background.shutdown().await;
    if timeout(FLUSH_WITHIN, publisher.flush()).await.is_err() {
        warn!(
            "cannot send the last bytes to NATS; they belong to deliveries that were not answered 200"
        );
    }
    info!("stopped");
    outcome
}

/// Starts the tasks that run beside the connections. None of them ends by itself.
fn background(
    publisher: &Arc<Publisher>,
    metrics: &Arc<Metrics>,
    source: SecretSource,
    secrets: watch::Sender<Arc<[SigningSecret]>>,
) -> JoinSet<()> {
    let (publisher, metrics) = (Arc::clone(publisher), Arc::clone(metrics));
    let mut background = JoinSet::new();
    let starting = Arc::clone(&publisher);
    background.spawn(async move { publisher.run().await });
    background.spawn(async move {
        let trouble = || {
            starting
                .readiness()
                .err()
                .map(|trouble| trouble.to_string())
        };
        systemd::tell_ready(|| ready(trouble())).await;
        pending().await
    });
    background.spawn(async move {
        loop {
            sleep(UPKEEP_INTERVAL).await;
            metrics.run_upkeep();
        }
    });
    if let SecretSource::File(path) = source {
        background.spawn(async move { secret::follow(&path, &secrets).await });
    }
    background
}
