//! Applying live events, for as long as a worker runs or a command works.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::exit;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::broker;
use super::parts::Parts;
use crate::apply::{Applier, in_flight};
use crate::health::Readiness;
use crate::settings::Settings;
use crate::stream::consumer;
use crate::stream::dead_letter::DeadLetters;
use crate::wait::{JETSTREAM, Wait, pause};

/// How long a stopping program waits for the batch in flight, which usually takes milliseconds.
pub(crate) const FINISH_MAX: Duration = Duration::from_secs(10);

/// Applies batches until `shutdown`. Reopens the consumer if it is lost.
pub(crate) async fn consume(
    settings: &Settings,
    jetstream: &jetstream::Context,
    applier: &Applier,
    readiness: &Readiness,
    shutdown: &CancellationToken,
) {
    let mut wait = Wait::new(JETSTREAM);
    while !shutdown.is_cancelled() {
        match consumer::open(jetstream, settings.batch).await {
            Ok(batches) => {
                info!("consuming STRIPE_EVENTS");
                readiness.consuming.store(true, Ordering::Relaxed);
                wait.succeeded();
                in_flight::apply_all(batches, settings.batch, applier, shutdown).await;
                readiness.consuming.store(false, Ordering::Relaxed);
            }
            Err(error) => {
                let _ = pause(wait.failed(&error), shutdown).await;
                // The consumer needs its stream now, not when `recreate_streams` checks next.
                if let Err(error) = broker::provide(settings, jetstream).await {
                    tracing::debug!("cannot create the streams: {}", exit::chain(&error));
                }
            }
        }
    }
}

/// Consumes events while `work` runs, beside other workers, so that a command also works without a
/// worker.
pub(crate) async fn while_consuming<T>(
    settings: &Settings,
    parts: &Parts,
    work: impl Future<Output = T>,
) -> T {
    let stop = CancellationToken::new();
    let dead_letters = DeadLetters::new(&parts.store, &parts.erasures, &parts.jetstream);
    // The relay polls the outbox anyway, so nothing wakes it; questions are left to the workers.
    let applier = parts.applier(settings, &dead_letters, &Arc::new(Notify::new()));
    let consuming = tokio::spawn({
        let (settings, jetstream, stop) = (settings.clone(), parts.jetstream.clone(), stop.clone());
        async move {
            consume(
                &settings,
                &jetstream,
                &applier,
                &Readiness::default(),
                &stop,
            )
            .await
        }
    });
    let outcome = work.await;
    stop.cancel();
    // An unfinished batch is delivered again.
    let finish = async {
        let _ = consuming.await;
        dead_letters.finish().await;
    };
    let _ = tokio::time::timeout(FINISH_MAX, finish).await;
    outcome
}
