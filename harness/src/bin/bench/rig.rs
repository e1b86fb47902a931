//! Starts brokers, databases and programs for one run. They are new for each run, so that the data
//! of one run does not slow the next.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::{self};
use litestripe_contract::settings::{EventsSettings, Given, Reader};
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_contract::{header, stream};
use litestripe_harness::bridge::{HOOK, SECRET};
use litestripe_harness::process::Process;
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::{nats, port};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::{sleep, timeout};

use crate::load;
use crate::pool::{Events, Kind, TYPE};
use crate::report::Sample;
use crate::usage::Since;

/// The longest wait in a measurement. A longer one means that something failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);

/// How many published messages wait for their PubAck while a stream is filled.
const IN_FLIGHT: usize = 512;

/// When the broker syncs its disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    /// Every two minutes, nats-server's default.
    Default,
    /// Before every PubAck, as deployed.
    Always,
}

/// Starts an empty broker.
pub(crate) async fn broker(sync: Sync) -> nats::Server {
    let jetstream = match sync {
        Sync::Default => "",
        Sync::Always => "sync_interval: always",
    };
    nats::Server::start_with(nats::Options {
        jetstream: jetstream.to_owned(),
        ..nats::Options::default()
    })
    .await
}

pub(crate) fn pid(broker: &nats::Server) -> u32 {
    broker.process().map(Process::id).unwrap_or_default()
}

/// Starts measuring the CPU time of a PostgreSQL server.
pub(crate) fn database_usage(server: Option<&Process>) -> Option<Since> {
    server.map(|server| Since::now(server.id()))
}

/// Returns the default settings of the events stream.
pub(crate) fn events_settings() -> EventsSettings {
    EventsSettings::read(&mut Reader::new(Given::default()))
}

/// A running program and its address.
pub(crate) struct Served {
    pub(crate) program: Program,
    pub(crate) address: SocketAddr,
}

impl Served {
    /// Starts measuring the program's CPU time.
    pub(crate) fn usage(&self) -> Since {
        Since::now(self.program.id())
    }

    pub(crate) fn memory_mib(&self) -> f64 {
        crate::usage::memory_mib(self.program.id())
    }

    async fn until_ready(self) -> Result<Self, String> {
        let ready = async {
            while !load::get(self.address, "/readyz")
                .await
                .is_ok_and(|(status, _)| status == 200)
            {
                if !self.program.is_running() {
                    return Err(format!("a program ended:\n{}", self.program.log()));
                }
                sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        };
        timeout(DEADLINE, ready)
            .await
            .map_err(|_| format!("not ready:\n{}", self.program.log()))??;
        Ok(self)
    }
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port::free()))
}

/// Which build of the programs is measured.
#[derive(Clone, Copy)]
pub(crate) enum Build<'a> {
    /// The one of this bench.
    Own,
    /// The one in a folder.
    In(&'a Path),
}

impl Build<'_> {
    fn launch(self, name: &str) -> Launch {
        match self {
            Self::Own => Program::named(name),
            Self::In(folder) => Program::at(folder.join(name)),
        }
    }
}

/// Starts `litestripe-ingress` and waits until it is ready.
pub(crate) async fn ingress(
    broker: &nats::Server,
    settings: &[(&str, &str)],
) -> Result<Served, String> {
    ingress_of(Build::Own, broker, settings).await
}

/// Like [`ingress`], of this build.
pub(crate) async fn ingress_of(
    build: Build<'_>,
    broker: &nats::Server,
    settings: &[(&str, &str)],
) -> Result<Served, String> {
    let address = address();
    let launch = build
        .launch("litestripe-ingress")
        .env("NATS_URL", broker.url())
        .env("STRIPE_WEBHOOK_UUID", HOOK)
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        // The deliveries are signed once, before the first run.
        .env("STRIPE_WEBHOOK_TOLERANCE", "86400")
        .env("LITESTRIPE_LISTEN", address.to_string());
    Served {
        program: with(launch, settings).start(),
        address,
    }
    .until_ready()
    .await
}

/// Starts `litestripe-worker` and waits until it is ready.
pub(crate) async fn worker(
    broker: &nats::Server,
    database: &str,
    settings: &[(&str, &str)],
) -> Result<Served, String> {
    worker_of(Build::Own, broker, database, settings).await
}

/// Like [`worker`], of this build.
pub(crate) async fn worker_of(
    build: Build<'_>,
    broker: &nats::Server,
    database: &str,
    settings: &[(&str, &str)],
) -> Result<Served, String> {
    let address = address();
    let launch = build
        .launch("litestripe-worker")
        .env("NATS_URL", broker.url())
        .env("DATABASE_URL", database)
        .env("LITESTRIPE_AUTO_MIGRATE", "true")
        .env("LITESTRIPE_WORKER_LISTEN", address.to_string());
    Served {
        program: with(launch, settings).start(),
        address,
    }
    .until_ready()
    .await
}

/// Migrates the database.
pub(crate) async fn migrate(database: &str) -> Result<(), String> {
    let launch = Program::named("litestripe-worker")
        .args(["migrate", "up"])
        .env("DATABASE_URL", database);
    let finished = launch.run(DEADLINE).await;
    if finished.status.success() {
        Ok(())
    } else {
        Err(finished.stderr)
    }
}

/// Settings that the bench passes on from its own environment, to measure other values.
const PASSED_ON: [&str; 3] = ["LITESTRIPE_GROUP_COMMIT", "LITESTRIPE_BATCH", "RUST_LOG"];

fn with(launch: Launch, settings: &[(&str, &str)]) -> Launch {
    let passed_on = PASSED_ON
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    let launch = passed_on.fold(launch, |launch, (name, value)| launch.env(name, value));
    settings
        .iter()
        .fold(launch, |launch, (name, value)| launch.env(*name, *value))
}

/// Launches this program as a reference.
fn reference(arguments: &[String]) -> Launch {
    let path = std::env::current_exe().expect("a program knows its own path");
    Program::at(path).arg("reference").args(arguments)
}

/// Starts a reference that is an HTTP server, and waits until it listens.
pub(crate) async fn server(name: &str, broker: Option<&nats::Server>) -> Result<Served, String> {
    let address = address();
    let mut arguments = vec![name.to_owned(), address.to_string()];
    arguments.extend(broker.map(nats::Server::url));
    let served = Served {
        program: reference(&arguments).start(),
        address,
    };
    load::until_listening(address)
        .await
        .map_err(|problem| format!("{problem}:\n{}", served.program.log()))?;
    Ok(served)
}

/// Starts a reference that runs until it is dropped.
pub(crate) fn running(name: &str, broker: &nats::Server) -> Program {
    reference(&[name.to_owned(), broker.url()]).start()
}

/// Runs a reference to its end and returns the figures that it printed.
pub(crate) async fn finished(
    name: &str,
    broker: &nats::Server,
    numbers: &[usize],
) -> Result<Sample, String> {
    let mut arguments = vec![name.to_owned(), broker.url()];
    arguments.extend(numbers.iter().map(ToString::to_string));
    let finished = reference(&arguments).run(DEADLINE).await;
    let printed: Value = serde_json::from_str(finished.stdout.trim())
        .map_err(|_| format!("{name}: {finished:?}"))?;
    let figure = |name: &str| printed[name].as_f64().filter(|value| *value > 0.0);
    Ok(Sample {
        rate: figure("rate"),
        p50_us: figure("p50_us"),
        p99_us: figure("p99_us"),
        cpu_s: figure("cpu_s"),
        memory_mib: figure("memory_mib"),
        ..Sample::default()
    })
}

pub(crate) async fn jetstream(broker: &nats::Server) -> jetstream::Context {
    jetstream::new(broker.connect().await)
}

/// Publishes `count` events to the events stream, which is created if it is missing.
pub(crate) async fn fill(
    jetstream: jetstream::Context,
    count: usize,
    event: impl Fn(usize) -> (Option<String>, String),
) -> Result<(), String> {
    let text = |problem: &dyn std::error::Error| problem.to_string();
    stream::provide_events(&jetstream, &events_settings())
        .await
        .map_err(|problem| text(&problem))?;
    let mut acks = std::collections::VecDeque::new();
    for number in 0..count {
        let (id, body) = event(number);
        let mut headers = HeaderMap::new();
        if let Some(id) = id {
            headers.insert(header::MESSAGE_ID, id);
        }
        let sent = jetstream
            .publish_with_headers(format!("{EVENTS_PREFIX}{TYPE}"), headers, body.into())
            .await;
        acks.push_back(sent.map_err(|problem| text(&problem))?);
        if acks.len() == IN_FLIGHT
            && let Some(ack) = acks.pop_front()
        {
            ack.await.map_err(|problem| text(&problem))?;
        }
    }
    for ack in acks {
        ack.await.map_err(|problem| text(&problem))?;
    }
    Ok(())
}

/// Fills the events stream with the events of `count` new subscriptions.
pub(crate) async fn fill_with_new(
    jetstream: jetstream::Context,
    events: &Events,
    count: usize,
) -> Result<(), String> {
    fill(jetstream, count, |number| {
        (
            Some(events.id(Kind("w"), number)),
            events.body(Kind("w"), number),
        )
    })
    .await
}

/// Creates the workers' consumer as a worker would, but paused: workers can get ready and have
/// nothing to do yet.
pub(crate) async fn paused_consumer(broker: &nats::Server) -> Result<(), String> {
    let stream = jetstream(broker)
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .map_err(|problem| problem.to_string())?;
    let config = pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(60),
        max_deliver: -1,
        max_ack_pending: 20_000,
        pause_until: Some(OffsetDateTime::now_utc() + Duration::from_secs(3600)),
        ..pull::Config::default()
    };
    stream
        .create_consumer(config)
        .await
        .map(drop)
        .map_err(|problem| problem.to_string())
}

/// Resumes the workers' consumer, so that they begin.
pub(crate) async fn resume_consumer(broker: &nats::Server) -> Result<(), String> {
    let stream = jetstream(broker)
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .map_err(|problem| problem.to_string())?;
    stream
        .resume_consumer(WORKER_CONSUMER)
        .await
        .map(drop)
        .map_err(|problem| problem.to_string())
}

/// Waits for `future` until the deadline.
pub(crate) async fn bounded<T>(what: &str, future: impl Future<Output = T>) -> Result<T, String> {
    timeout(DEADLINE, future)
        .await
        .map_err(|_| format!("{what} took more than {} s", DEADLINE.as_secs()))
}
