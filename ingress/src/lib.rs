//! Ingress: verifies Stripe's webhooks and stores them in JetStream.
//!
//! The life of a delivery: `connection` reads a request, `route` decides its status, `body` reads
//! its body, `signature` verifies it, `envelope` finds its id and type, `publish` stores it.
//! `secret` knows the signing secrets, `settings` what the operator wants, `metrics` what is
//! counted, `throttle` how often something is logged. May not know the database.

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

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use litestripe_contract::connect::{self, ConnectError};
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

const FOLD_EVERY: Duration = Duration::from_secs(5);

/// How long NATS may take to be sent the last bytes.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// Why ingress cannot serve, or does not any more.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    NoSecret(#[from] NoSecret),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// What tends the connection, the metrics or the secret panicked. Whoever supervises ingress
    /// starts it again.
    #[error("a part of ingress panicked, which is a bug")]
    Panicked,
}

/// Serves on `listener` until `shutdown`, then finishes what is in flight. A broker that is away is
/// waited for while serving.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
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
            error!("a part of ingress panicked, which is a bug: stopping, to be started again");
            shutdown.cancel();
            serving.await;
            Err(RunError::Panicked)
        }
    };
    background.shutdown().await;
    if timeout(FLUSH_WITHIN, publisher.flush()).await.is_err() {
        warn!(
            "NATS did not take the last bytes; they belong to deliveries that were not answered 200"
        );
    }
    info!("stopped");
    outcome
}

/// Everything that runs beside the connections. None of it ends by itself.
fn background(
    publisher: &Arc<Publisher>,
    metrics: &Arc<Metrics>,
    source: SecretSource,
    secrets: watch::Sender<Arc<[SigningSecret]>>,
) -> JoinSet<()> {
    let (publisher, metrics) = (Arc::clone(publisher), Arc::clone(metrics));
    let mut background = JoinSet::new();
    background.spawn(async move { publisher.tend().await });
    background.spawn(async move {
        loop {
            sleep(FOLD_EVERY).await;
            metrics.fold();
        }
    });
    if let SecretSource::File(path) = source {
        background.spawn(async move { secret::follow(&path, &secrets).await });
    }
    background
}
