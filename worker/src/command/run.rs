//! `run`: apply events and send signals until stopped.

use std::error::Error;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use litestripe_contract::{connect, shutdown};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::Failure;
use crate::apply::{Applier, Refusals};
use crate::clocks;
use crate::error::is_of_database;
use crate::figures;
use crate::health::{self, Readiness};
use crate::installation::{Installation, InstallationError, Split};
use crate::metrics;
use crate::questions::lookup::Lookup;
use crate::questions::open::OpenQuestions;
use crate::questions::{Failures, Questions};
use crate::recover::backfill::record::Record;
use crate::recover::backfill::schedule::Schedule;
use crate::recover::backfill::{self, Backfill};
use crate::recover::resolutions::Resolutions;
use crate::recover::{lost_rows, unsent};
use crate::retention;
use crate::settings::{Settings, StripeSettings};
use crate::start::consume::{FINISH_MAX, consume};
use crate::start::database::{self, Schema};
use crate::start::rules::{self, Rules};
use crate::start::{broker, parts::Parts};
use crate::store::Store;
use crate::store::lease::Lease;
use crate::stream::dead_letter::{DeadLetters, Pending};
use crate::stream::findings;
use crate::stripe::api::StripeApi;
use crate::wait::{self, DATABASE, JETSTREAM, Wait};

/// How long a stopping worker may take, after the last batch. Unfinished events are delivered
/// again.
const STOP_MAX: Duration = Duration::from_secs(15);

/// How long a stopping worker waits for answers from lookups and Stripe.
const ANSWERS_MAX: Duration = Duration::from_secs(5);

/// How long a stopping worker waits until its acks are sent.
const FLUSH_MAX: Duration = Duration::from_secs(2);

pub(super) const AFTER_HELP: &str = "\
It waits for the database and NATS, at its start and whenever they are unreachable later. LITESTRIPE_WORKER_LISTEN serves \
/healthz, /readyz and /metrics. After SIGTERM or Ctrl-C it finishes the work in flight for up to 25 s; a second signal ends \
it at once. Several workers share the events.";

pub(crate) async fn run(settings: Settings) -> Result<(), Failure> {
    let started = OffsetDateTime::now_utc();
    let supervisor = Supervisor {
        shutdown: shutdown::token()?,
        panicked: CancellationToken::new(),
        split: Arc::default(),
    };
    metrics::install();
    let listener = health::listen(&settings.listen).await?;
    let nats = connect::connect(&settings.nats, "litestripe-worker")
        .await
        .map_err(Failure::configuration)?;
    let readiness = Arc::new(Readiness::default());
    // Tasks that run until the process ends; the shutdown does not wait for them.
    let unwaited = TaskTracker::new();
    supervisor.spawn(
        &unwaited,
        "the report of the start to systemd",
        health::tell_started(nats.clone(), Arc::clone(&readiness)),
    );
    supervisor.spawn(
        &unwaited,
        "health",
        health::serve(listener, nats.clone(), Arc::clone(&readiness)),
    );
    // Also while the database is away: deliveries need the streams.
    let streams = findings::watch(
        connect::jetstream(nats.clone()),
        Arc::clone(&readiness),
        supervisor.shutdown.clone(),
    );
    supervisor.spawn(&unwaited, "the watch over the streams", streams);

    let (rules, name) = (Rules::new(&settings), nats.new_inbox());
    let prepared = tokio::select! {
        prepared = prepare(&settings, &readiness, nats, (&rules, &name)) => prepared,
        () = supervisor.shutdown.cancelled() => return supervisor.outcome(),
    };
    let parts = prepared?;
    let shutdown = supervisor.shutdown.clone();
    let rules = rules.keep_recorded(parts.store.clone(), name.clone(), shutdown);
    supervisor.spawn(&unwaited, "the heartbeat", rules);
    let worker = Worker::spawn(&settings, &parts, &supervisor, &readiness, started)?;
    let streams = broker::recreate_streams(settings.clone(), parts.jetstream.clone());
    supervisor.spawn(&unwaited, "the task that recreates streams", streams);
    worker
        .consume(&settings, &parts, &readiness, &supervisor.shutdown)
        .await;
    if tokio::time::timeout(STOP_MAX, worker.stop(&parts))
        .await
        .is_err()
    {
        warn!(
            "work is still unfinished after {} s: stopping, its events will be delivered again",
            STOP_MAX.as_secs()
        );
    }
    rules::record_end(&parts.store, name).await;
    info!("stopped");
    supervisor.outcome()
}

/// Waits for the database and the broker, migrates the schema if allowed, creates missing streams,
/// and records the rules of this worker, whose name is unique.
async fn prepare(
    settings: &Settings,
    readiness: &Readiness,
    nats: async_nats::Client,
    (rules, name): (&Rules, &str),
) -> Result<Parts, Failure> {
    let store = database::open(&settings.database, Schema::Migrated).await?;
    let _ = readiness.store.set(store.clone());
    broker::prepare(&nats, settings).await;
    let installation = join(settings, &store, &nats).await?;
    let parts = until_both(async || {
        Parts::assemble(store.clone(), nats.clone(), Some(installation.clone())).await
    })
    .await;
    until_both(async || lost_rows::record_if_lost(&store, &parts.jetstream).await).await;
    wait::until_ok(DATABASE, async || rules.record_start(&store, name).await).await;
    Ok(parts)
}

/// Makes database and broker one installation. Fails if they belong to different ones, and waits
/// while one of them does not answer.
async fn join(
    settings: &Settings,
    store: &Store,
    nats: &async_nats::Client,
) -> Result<Installation, Failure> {
    let jetstream = connect::jetstream(nats.clone());
    until_both(
        async || match Installation::join(settings, store, &jetstream).await {
            Err(split @ InstallationError::Split(_)) => Ok(Err(split.into())),
            joined => joined.map(Ok),
        },
    )
    .await
}

/// Retries what needs both the database and JetStream, until it succeeds.
async fn until_both<T, E: Error + 'static>(mut attempt: impl AsyncFnMut() -> Result<T, E>) -> T {
    let (mut database, mut jetstream) = (Wait::new(DATABASE), Wait::new(JETSTREAM));
    loop {
        let error = match attempt().await {
            Err(error) => error,
            Ok(value) => {
                database.succeeded();
                jetstream.succeeded();
                return value;
            }
        };
        let pause = if is_of_database(&error) {
            jetstream = Wait::new(JETSTREAM);
            database.failed(&error)
        } else {
            database = Wait::new(DATABASE);
            jetstream.failed(&error)
        };
        tokio::time::sleep(pause).await;
    }
}

/// Watches the tasks without which the worker does only a part of its work.
struct Supervisor {
    shutdown: CancellationToken,
    panicked: CancellationToken,
    /// Why database and broker do not belong together any more.
    split: Arc<OnceLock<Split>>,
}

impl Supervisor {
    /// Spawns a task. If it panics, the worker logs it, shuts down as after a stop signal, and
    /// exits with a failure.
    fn spawn(
        &self,
        tracker: &TaskTracker,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let (work, panicked, shutdown) = (
            tokio::spawn(work),
            self.panicked.clone(),
            self.shutdown.clone(),
        );
        tracker.spawn(async move {
            if work.await.is_err_and(|error| error.is_panic()) {
                error!(
                    "{name} panicked, which is a bug: the worker stops and has to be started again"
                );
                panicked.cancel();
                shutdown.cancel();
            }
        });
    }

    /// Watches whether database and broker still belong together. If not, the worker stops and
    /// exits with a failure.
    fn watch(&self, tracker: &TaskTracker, installation: Installation) {
        let (split, shutdown) = (Arc::clone(&self.split), self.shutdown.clone());
        let watch = async move {
            if let Some(found) = installation.watch(shutdown.clone()).await {
                error!("{found}");
                let _ = split.set(found);
                shutdown.cancel();
            }
        };
        self.spawn(tracker, "the watch over the installation", watch);
    }

    fn outcome(&self) -> Result<(), Failure> {
        if self.panicked.is_cancelled() {
            let bug = "a task of the worker panicked, which is a bug (the log names it): unfinished events will be delivered again";
            return Err(Failure::new(bug));
        }
        match self.split.get() {
            Some(split) => Err(Failure::new(split.clone())),
            None => Ok(()),
        }
    }
}

/// The tasks of a running worker, grouped by when they stop.
struct Worker {
    applier: Applier,
    dead_letters: DeadLetters,
    /// The backfill, the questions, the unsent signals and the retention: they stop at the
    /// shutdown.
    background: TaskTracker,
    /// The relay: it stops last, because the others put signals into the outbox.
    relaying: TaskTracker,
    relay_stop: CancellationToken,
}

impl Worker {
    fn spawn(
        settings: &Settings,
        parts: &Parts,
        supervisor: &Supervisor,
        readiness: &Readiness,
        started: OffsetDateTime,
    ) -> Result<Self, Failure> {
        let (background, relaying) = <(TaskTracker, TaskTracker)>::default();
        let relay_stop = CancellationToken::new();
        let wake = Arc::new(Notify::new());
        let dead_letters = DeadLetters::new(&parts.store, &parts.erasures, &parts.jetstream);
        let applier = Applier {
            refusals: Arc::new(Refusals::new(readiness.problems.clone())),
            ..parts.applier(settings, &dead_letters, &wake)
        };
        let stripe = parts.stripe(settings)?;
        supervisor.spawn(
            &relaying,
            "the relay",
            parts.relay(settings, &wake).run(relay_stop.clone()),
        );
        let shutdown = &supervisor.shutdown;
        let backfills = stripe
            .clone()
            .and_then(|stripe| backfills(settings, parts, stripe, started));
        if let Some(schedule) = backfills {
            supervisor.spawn(&background, "the backfill", schedule.run(shutdown.clone()));
        }
        let Parts {
            store,
            jetstream,
            erasures,
            ..
        } = parts.clone();
        let failures = Failures::new(settings.stripe.as_ref().map(|stripe| &stripe.budget));
        let failures = Arc::new(failures);
        let key = settings.stripe.as_ref().map(StripeSettings::is_live);
        let open = OpenQuestions::new(Arc::clone(&failures), key);
        let questions = Questions {
            store: store.clone(),
            jetstream: jetstream.clone(),
            lookup: Lookup::new(&settings.lookup, &parts.nats),
            stripe,
            orphans: settings.orphans.clone(),
            erasures,
            erase_on_customer_deleted: settings.erase_on_customer_deleted,
            wake: Arc::clone(&applier.questions),
            relay: Arc::clone(&wake),
            waiting: Arc::default(),
            failures,
        };
        supervisor.spawn(
            &background,
            "the questions",
            questions.run(shutdown.clone()),
        );
        let unsent = unsent::run(store.clone(), wake, shutdown.clone());
        supervisor.spawn(&background, "the sender of unsent signals", unsent);
        let resolutions = Resolutions {
            store: store.clone(),
            jetstream: jetstream.clone(),
            erasures: parts.erasures.clone(),
        };
        let clocks = clocks::watch(store.clone(), jetstream.clone(), shutdown.clone());
        supervisor.spawn(&background, "the watch on the clocks", clocks);
        let resolutions = resolutions.run(shutdown.clone());
        supervisor.spawn(&background, "the keeper of resolutions", resolutions);
        let pending = Pending::new(&store, &parts.erasures, &jetstream);
        let pending = pending.run(shutdown.clone());
        supervisor.spawn(&background, "the storing of pending dead letters", pending);
        if let Some(installation) = parts.installation.clone() {
            supervisor.watch(&background, installation);
        }
        let figures = figures::watch(store.clone(), open, shutdown.clone());
        supervisor.spawn(&background, "the reading of figures", figures);
        let retention = retention::run(store, jetstream, shutdown.clone());
        supervisor.spawn(&background, "the retention", retention);
        Ok(Self {
            applier,
            dead_letters,
            background,
            relaying,
            relay_stop,
        })
    }

    /// Applies events until `shutdown`, then finishes the batches in flight.
    async fn consume(
        &self,
        settings: &Settings,
        parts: &Parts,
        readiness: &Readiness,
        shutdown: &CancellationToken,
    ) {
        let deadline = async {
            shutdown.cancelled().await;
            tokio::time::sleep(FINISH_MAX).await;
        };
        tokio::select! {
            () = consume(settings, &parts.jetstream, &self.applier, readiness, shutdown) => {}
            () = deadline => {
                warn!("a batch is still unfinished {} s after the stop signal: its events will be delivered again", FINISH_MAX.as_secs());
            }
        }
    }

    /// Waits for the tasks in this order: dead letters, background tasks, the relay, acks.
    async fn stop(self, parts: &Parts) {
        self.dead_letters.finish().await;
        self.background.close();
        // A lookup may be slow to answer. An unanswered question stays stored and is asked again
        // later.
        let _ = tokio::time::timeout(ANSWERS_MAX, self.background.wait()).await;
        self.relay_stop.cancel();
        self.relaying.close();
        self.relaying.wait().await;
        let _ = tokio::time::timeout(FLUSH_MAX, parts.nats.flush()).await;
    }
}

/// Returns the schedule of backfills. `None` without a key or if LITESTRIPE_BACKFILL_INTERVAL is
/// `off`.
fn backfills(
    settings: &Settings,
    parts: &Parts,
    stripe: StripeApi,
    started: OffsetDateTime,
) -> Option<Schedule> {
    let key = settings.stripe.clone()?;
    let Parts {
        store,
        jetstream,
        erasures,
        ..
    } = parts.clone();
    let types = backfill::types(settings);
    Some(Schedule {
        interval: key.backfill_interval?,
        started,
        record: Record::new(store.clone(), key.is_live()),
        lease: Lease::new(store.clone(), "backfill"),
        store: store.clone(),
        backfill: Backfill {
            stripe,
            jetstream,
            store,
            erasures,
            types,
        },
        stripe: key,
    })
}
