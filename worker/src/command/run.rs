//! `run`: apply events and send signals until stopped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream;
use backon::BackoffBuilder as _;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use litestripe_contract::{connect, exit, shutdown, stream};
use litestripe_domain::orphan::Rules;
use litestripe_domain::plan::{Signalling, Terms};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::Failure;
use crate::apply::Applier;
use crate::apply::in_flight;
use crate::erasure::Erasures;
use crate::error::StoreError;
use crate::health::{self, Dependencies, Readiness};
use crate::metrics;
use crate::questions::Sweep;
use crate::questions::lookup::Lookup;
use crate::recover::backfill::record::Record;
use crate::recover::backfill::schedule::Schedule;
use crate::recover::backfill::{self, Backfill};
use crate::relay::Relay;
use crate::retention;
use crate::settings::{DatabaseSettings, LookupSettings, Settings};
use crate::store::Store;
use crate::stream::consumer;
use crate::stream::dead_letter::DeadLetters;
use crate::stripe::api::{ApiError, StripeApi};
use crate::stripe::budget::Budget;
use crate::stripe::kv::Bucket;
use crate::stripe::lease::Lease;

/// How long a stopping worker may take, at most. What is unfinished then is delivered again.
const STOP_MAX: Duration = Duration::from_secs(15);

/// How long a stopping worker waits for answers of lookups and of Stripe.
const SWEEP_MAX: Duration = Duration::from_secs(5);

/// How often it is looked whether the streams are still there.
const TEND_STREAMS_EVERY: Duration = Duration::from_secs(5);

/// How long a stopping worker waits for the batch it is at, which takes milliseconds as a rule.
const FINISH_MAX: Duration = Duration::from_secs(10);

/// How long acks may take to leave the process at the end.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// The schema is behind and we were not told to migrate it.
#[derive(Debug, thiserror::Error)]
#[error(
    "the database's schema is behind ({0} waits): run `litestripe-worker migrate up`, or `litestripe-worker run` with \
     LITESTRIPE_AUTO_MIGRATE=true"
)]
struct SchemaBehind(String);

/// A part of the worker panicked. Whoever supervises it starts it again.
#[derive(Debug, thiserror::Error)]
#[error("a part of the worker panicked, which is a bug: what is unfinished will be delivered again")]
struct Panicked;

pub(crate) async fn run(settings: Settings) -> Result<(), Failure> {
    let started = OffsetDateTime::now_utc();
    let shutdown = shutdown::token()?;
    metrics::install();
    let listener = health::listen(settings.listen).await?;
    let nats = connect::connect(&settings.nats, "litestripe-worker").await?;
    let readiness = Arc::new(Readiness::default());
    let dependencies = Dependencies { nats: nats.clone(), readiness: Arc::clone(&readiness) };
    let panicked = CancellationToken::new();
    let spawn = |name, work| spawn_watched(name, work, &panicked, &shutdown);
    let _health = spawn("health", health::serve(listener, dependencies, CancellationToken::new()).boxed());

    let prepared = tokio::select! {
        prepared = prepare(&settings, &readiness, &nats) => prepared,
        () = shutdown.cancelled() => return if panicked.is_cancelled() { Err(Panicked.into()) } else { Ok(()) },
    };
    let (store, erasures) = prepared?;
    let jetstream = connect::jetstream(nats.clone());
    let wake = Arc::new(Notify::new());
    let relay_stop = CancellationToken::new();
    let relay = Relay::new(store.clone(), jetstream.clone(), settings.nats.clone(), Arc::clone(&wake));
    let relay = spawn("the relay", relay.run(relay_stop.clone()).boxed());
    let dead_letters = DeadLetters::new(jetstream.clone());
    let applier = applier(&settings, &store, &dead_letters, &erasures, &wake);
    let stripe = stripe_api(&settings, &jetstream)?;
    let backfill = backfill_schedule(&settings, &store, &jetstream, &erasures, stripe.clone(), started);
    let sweep = Sweep {
        store: store.clone(),
        jetstream: jetstream.clone(),
        lookup: Lookup::new(&settings.lookup, &nats),
        stripe,
        orphans: settings.orphans.clone(),
        erasures: erasures.clone(),
        erase_on_customer_deleted: settings.erase_on_customer_deleted,
        wake: Arc::clone(&applier.sweep),
        relay: wake,
        complained: std::sync::Mutex::default(),
    };
    let sweep = spawn("the sweep", sweep.run(shutdown.clone()).boxed());
    let backfill = backfill.map(|schedule| spawn("the backfill", schedule.run(shutdown.clone()).boxed()));
    let erasures = spawn("the reader of erasures", erasures.follow(shutdown.clone()).boxed());
    let retention = spawn("the retention", retention::run(store, jetstream.clone(), shutdown.clone()).boxed());
    let _streams = spawn("the care of streams", tend_streams(settings.clone(), jetstream.clone()).boxed());

    tokio::select! {
        () = consume(&settings, &jetstream, &applier, &readiness, &shutdown) => {}
        () = patience_ends(&shutdown) => {
            warn!("a batch is not finished {} s after the signal: it will be delivered again", FINISH_MAX.as_secs());
        }
    }

    let stop = async {
        dead_letters.finish().await;
        // A question may wait for somebody else's answer for long: it comes due again.
        let backfill = async {
            if let Some(backfill) = backfill {
                let _ = backfill.await;
            }
        };
        let _ = tokio::time::timeout(SWEEP_MAX, async { tokio::join!(sweep, retention, backfill, erasures) }).await;
        relay_stop.cancel();
        let _ = relay.await;
        let _ = tokio::time::timeout(FLUSH_MAX, nats.flush()).await;
    };
    if tokio::time::timeout(STOP_MAX, stop).await.is_err() {
        warn!("gave up after {} s: what is unfinished will be delivered again", STOP_MAX.as_secs());
    }
    info!("stopped");
    if panicked.is_cancelled() { Err(Panicked.into()) } else { Ok(()) }
}

/// Spawns a part without which the worker does only some of its work. If it panics, the worker says
/// so, stops as if it was told to, and ends with a failure.
fn spawn_watched(
    name: &'static str,
    work: BoxFuture<'static, ()>,
    panicked: &CancellationToken,
    shutdown: &CancellationToken,
) -> JoinHandle<()> {
    let (work, panicked, shutdown) = (tokio::spawn(work), panicked.clone(), shutdown.clone());
    tokio::spawn(async move {
        if work.await.is_err_and(|error| error.is_panic()) {
            error!("{name} panicked, which is a bug: stopping, to be started again");
            panicked.cancel();
            shutdown.cancel();
        }
    })
}

/// A client of Stripe's API within the budget of all workers, if there is a key.
pub(crate) fn stripe_api(settings: &Settings, jetstream: &jetstream::Context) -> Result<Option<StripeApi>, ApiError> {
    let Some(stripe) = settings.stripe.clone() else { return Ok(None) };
    let budget = Budget::new(&stripe.budget, jetstream.clone(), settings.events.replicas);
    StripeApi::new(stripe, Arc::new(budget)).map(Some)
}

/// The backfills that this worker takes part in, if it has a key and is not told otherwise.
fn backfill_schedule(
    settings: &Settings,
    store: &Store,
    jetstream: &jetstream::Context,
    erasures: &Erasures,
    stripe: Option<StripeApi>,
    started: OffsetDateTime,
) -> Option<Schedule> {
    let (stripe, key) = stripe.zip(settings.stripe.clone())?;
    let bucket = Bucket::new(jetstream.clone(), settings.events.replicas);
    Some(Schedule {
        interval: key.backfill_interval?,
        started,
        record: Record::new(bucket.clone(), key.is_live()),
        lease: Lease::new(bucket, "backfill"),
        backfill: Backfill {
            stripe,
            jetstream: jetstream.clone(),
            erasures: erasures.clone(),
            types: backfill::types(settings),
        },
        store: store.clone(),
        stripe: key,
    })
}

/// Takes part in consuming while `work` runs: a command must not depend on a worker being up.
pub(crate) async fn while_consuming<T>(
    settings: &Settings,
    store: &Store,
    jetstream: &jetstream::Context,
    erasures: &Erasures,
    work: impl Future<Output = T>,
) -> T {
    let stop = CancellationToken::new();
    let dead_letters = DeadLetters::new(jetstream.clone());
    // Whoever relays looks by itself; questions are left to the workers' sweep.
    let applier = applier(settings, store, &dead_letters, erasures, &Arc::new(Notify::new()));
    let consuming = tokio::spawn({
        let (settings, jetstream, stop) = (settings.clone(), jetstream.clone(), stop.clone());
        async move { consume(&settings, &jetstream, &applier, &Readiness::default(), &stop).await }
    });
    let outcome = work.await;
    stop.cancel();
    // What is not finished by then is delivered again.
    let finish = async {
        let _ = consuming.await;
        dead_letters.finish().await;
    };
    let _ = tokio::time::timeout(FINISH_MAX, finish).await;
    outcome
}

/// What applies live events.
pub(crate) fn applier(
    settings: &Settings,
    store: &Store,
    dead_letters: &DeadLetters,
    erasures: &Erasures,
    relay: &Arc<Notify>,
) -> Applier {
    Applier {
        store: store.clone(),
        metadata_keys: settings.metadata_keys.clone(),
        terms: Arc::new(terms(settings)),
        erasures: erasures.clone(),
        erase_on_customer_deleted: settings.erase_on_customer_deleted,
        dead_letters: dead_letters.clone(),
        relay: Arc::clone(relay),
        sweep: Arc::new(Notify::new()),
        outage: Arc::default(),
    }
}

/// What live events are applied under.
pub(crate) fn terms(settings: &Settings) -> Terms {
    let rules = Rules {
        lookup: !matches!(settings.lookup, LookupSettings::None),
        without_session: settings.orphans.without_session,
        grace: settings.orphans.grace,
    };
    Terms { rules, signalling: Signalling::Now }
}

/// Waits for database and broker, and sees that schema and streams are there. Returns the database
/// and the erasures, without which no event may be applied.
async fn prepare(
    settings: &Settings,
    readiness: &Readiness,
    nats: &async_nats::Client,
) -> Result<(Store, Erasures), Failure> {
    let store = open_migrated(settings).await?;
    let _ = readiness.store.set(store.clone());
    Ok((store, prepare_broker(settings, nats).await?))
}

/// Waits for the broker, and sees that its streams are there. Returns the erasures.
pub(crate) async fn prepare_broker(settings: &Settings, nats: &async_nats::Client) -> Result<Erasures, Failure> {
    metrics::waiting_for_broker(nats.connection_state() != State::Connected);
    connect::connected(nats, &settings.nats).await;
    metrics::waiting_for_broker(false);
    let jetstream = connect::jetstream(nats.clone());
    let mut delays = delays();
    let mut said = false;
    loop {
        let error: Failure = match provide(settings, &jetstream).await {
            Ok(()) => match Erasures::load(jetstream.clone(), settings.events.replicas).await {
                Ok(erasures) => return Ok(erasures),
                Err(error) => error.into(),
            },
            Err(error) => error.into(),
        };
        if !said {
            warn!("waiting for JetStream: {}", exit::chain(error.as_ref()));
            said = true;
        }
        tokio::time::sleep(delays.next().unwrap_or(STOP_MAX)).await;
    }
}

/// Sees that the schema is current, for commands that are no reason to change it.
async fn require_schema(store: &Store) -> Result<(), Failure> {
    match waiting_migration(store).await? {
        Some(step) => Err(SchemaBehind(step).into()),
        None => Ok(()),
    }
}

/// Sees that the schema is current, migrating it where that is wanted.
async fn check_schema(settings: &Settings, store: &Store) -> Result<(), Failure> {
    if !settings.database.auto_migrate {
        return require_schema(store).await;
    }
    if waiting_migration(store).await?.is_none() {
        return Ok(());
    }
    store.migrate_up().await?;
    info!("migrated the database's schema");
    Ok(())
}

async fn provide(settings: &Settings, jetstream: &jetstream::Context) -> Result<(), stream::ProvisionError> {
    let replicas = settings.events.replicas;
    stream::provide_events(jetstream, &settings.events).await?;
    stream::provide(jetstream, stream::signals(replicas, settings.signals_max_age)).await?;
    stream::provide(jetstream, stream::dead_letters(replicas, settings.dead_letters_max_age)).await
}

async fn patience_ends(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    tokio::time::sleep(FINISH_MAX).await;
}

/// Provides streams that somebody deleted, again and again.
async fn tend_streams(settings: Settings, jetstream: jetstream::Context) {
    loop {
        tokio::time::sleep(TEND_STREAMS_EVERY).await;
        metrics::waiting_for_broker(jetstream.client().connection_state() != State::Connected);
        if let Err(error) = provide(&settings, &jetstream).await {
            tracing::debug!("providing streams: {}", exit::chain(&error));
        }
    }
}

async fn waiting_migration(store: &Store) -> Result<Option<String>, StoreError> {
    let steps = store.migrations().await?;
    Ok(steps.into_iter().find(|step| !step.applied).map(|step| step.name))
}

/// Opens the database and waits until it answers.
///
/// # Errors
/// When only a person can help: a URL that cannot be used, a user or database that does not exist.
pub(crate) async fn open_when_possible(settings: &DatabaseSettings) -> Result<Store, Failure> {
    when_possible(async || open(settings).await).await
}

/// The same, and sees that the schema is current, for commands that are no reason to change it.
///
/// # Errors
/// The same, and when the schema is behind.
pub(crate) async fn open_current(settings: &DatabaseSettings) -> Result<Store, Failure> {
    let attempt = async || {
        let store = open(settings).await?;
        require_schema(&store).await?;
        Ok(store)
    };
    when_possible(attempt).await
}

/// The same, and migrates it where that is wanted.
///
/// # Errors
/// The same, where it may not be migrated.
pub(crate) async fn open_migrated(settings: &Settings) -> Result<Store, Failure> {
    let attempt = async || {
        let store = open(&settings.database).await?;
        check_schema(settings, &store).await?;
        Ok(store)
    };
    when_possible(attempt).await
}

async fn open(settings: &DatabaseSettings) -> Result<Store, Failure> {
    let store = Store::open(settings).await?;
    store.ping().await?;
    Ok(store)
}

/// Tries until it succeeds, or fails for a reason that does not pass. Says once that it waits.
async fn when_possible(attempt: impl AsyncFn() -> Result<Store, Failure>) -> Result<Store, Failure> {
    let may_pass = |error: &Failure| error.downcast_ref().is_some_and(StoreError::may_pass);
    let mut delays = delays();
    let mut said = false;
    loop {
        match attempt().await {
            Err(error) if may_pass(&error) => {
                if !said {
                    metrics::waiting_for_database(true);
                    warn!("waiting for the database (DATABASE_URL): {}", exit::chain(error.as_ref()));
                    said = true;
                }
                tokio::time::sleep(delays.next().unwrap_or(STOP_MAX)).await;
            }
            outcome => {
                if said && outcome.is_ok() {
                    metrics::waiting_for_database(false);
                    info!("the database is there");
                }
                return outcome;
            }
        }
    }
}

/// Applies batches until `shutdown`. A consumer that is gone is opened again.
async fn consume(
    settings: &Settings,
    jetstream: &jetstream::Context,
    applier: &Applier,
    readiness: &Readiness,
    shutdown: &CancellationToken,
) {
    let mut delays = delays();
    let mut said = false;
    while !shutdown.is_cancelled() {
        match consumer::open(jetstream, settings.batch).await {
            Ok(batches) => {
                info!("consuming STRIPE_EVENTS");
                readiness.consuming.store(true, Ordering::Relaxed);
                (delays, said) = (self::delays(), false);
                metrics::waiting_for_broker(false);
                in_flight::apply_all(batches, settings.batch, applier, shutdown).await;
                readiness.consuming.store(false, Ordering::Relaxed);
            }
            Err(error) => {
                metrics::waiting_for_broker(true);
                if !said {
                    warn!("waiting for JetStream: {}", exit::chain(&error));
                    said = true;
                }
                let delay = delays.next().unwrap_or(STOP_MAX);
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = shutdown.cancelled() => {}
                }
                // Rather than wait for their turn: the consumer needs its stream.
                if let Err(error) = provide(settings, jetstream).await {
                    tracing::debug!("providing streams: {}", exit::chain(&error));
                }
            }
        }
    }
}

/// Waits between tries: short at first, never long, never at the same moment on all workers.
fn delays() -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(5))
        .without_max_times()
        .with_jitter()
        .build()
}
