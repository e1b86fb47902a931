//! A bridge for fault tests: its programs keep their addresses when they are restarted, and every
//! connection between them and the servers passes a proxy.
//!
//! Owns the set-up and the restarts. Reads the results through the harness's [`Bridge`], without
//! the proxies.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::{Bridge, DatabaseKind, HOOK, Options, SECRET};
use litestripe_harness::clock::Clock;
use litestripe_harness::pgbouncer::{self, PgBouncer};
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::proxy::Proxy;
use litestripe_harness::{eventually, nats, port, postgres, stripe};

use crate::ledger::Ledger;

/// The deadline of most conditions that tests wait for, enough for two busy cores.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The broker redelivers a killed worker's unacked messages after this time. In production it is a
/// minute.
const ACK_WAIT: Duration = Duration::from_secs(3);

/// Additional settings of a program.
pub(crate) type Settings<'a> = &'a [(&'a str, &'a str)];

/// All servers, programs and proxies. Dropping it ends and removes them.
pub(crate) struct Rig {
    // Declared first, so that the programs end before the proxies and servers.
    pub(crate) ingress: Option<Program>,
    pub(crate) workers: Vec<Option<Program>>,
    pub(crate) ingress_to_nats: Proxy,
    pub(crate) worker_to_nats: Proxy,
    /// In front of PostgreSQL, or of its pooler.
    pub(crate) worker_to_database: Option<Proxy>,
    pub(crate) pooler: Option<PgBouncer>,
    standby: Option<postgres::Server>,
    /// The clock of the workers, if it is not the machine's.
    pub(crate) clock: Option<Clock>,
    /// Broker and database, and queries on them.
    pub(crate) bridge: Bridge,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) client: reqwest::Client,
    /// Additional settings of ingress and the workers.
    pub(crate) settings: Vec<(String, String)>,
    ingress_port: u16,
    worker_ports: Vec<u16>,
}

impl Rig {
    /// Starts broker and database, without programs.
    pub(crate) async fn servers(kind: DatabaseKind, broker: nats::Options) -> Self {
        let mut bridge = Bridge::prepare(Options::new(kind));
        bridge.broker =
            nats::Server::prepare(broker).expect("a folder for nats-server can be made");
        bridge.broker.resume().await;
        bridge.database.resume().await;
        let worker_to_database = match kind {
            DatabaseKind::Sqlite => None,
            DatabaseKind::Postgres => Some(Proxy::start(database_port(&bridge)).await),
        };
        Self {
            ingress: None,
            workers: Vec::new(),
            ingress_to_nats: Proxy::start(bridge.broker.port()).await,
            worker_to_nats: Proxy::start(bridge.broker.port()).await,
            worker_to_database,
            pooler: None,
            standby: None,
            clock: None,
            bridge,
            ledger: Arc::default(),
            client: stripe::client(),
            settings: Vec::new(),
            ingress_port: port::free(),
            worker_ports: Vec::new(),
        }
    }

    /// Starts servers, ingress and `workers` workers and waits until they are ready. Unacked
    /// messages of a killed worker are redelivered after [`ACK_WAIT`].
    pub(crate) async fn start(kind: DatabaseKind, workers: usize, settings: Settings<'_>) -> Self {
        let mut rig = Self::servers(kind, nats::Options::default()).await;
        rig.start_programs(workers, settings).await;
        rig
    }

    /// Starts ingress and `workers` workers as [`Self::start`] does.
    pub(crate) async fn start_programs(&mut self, workers: usize, settings: Settings<'_>) {
        self.settings = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        self.start_ingress(&[]);
        self.until_ingress_is_ready().await;
        self.make_consumer(1).await;
        for index in 0..workers {
            self.start_worker(index, &[]);
            self.until_worker_is_ready(index).await;
        }
    }

    /// Puts a PgBouncer with its default settings between the proxy and PostgreSQL.
    pub(crate) async fn add_pooler(&mut self) {
        let server = database_port(&self.bridge);
        let pooler = PgBouncer::start(server, pgbouncer::Mode::Session, &[]).await;
        let proxy = self.worker_to_database.as_ref();
        proxy
            .expect("only PostgreSQL has a pooler")
            .point_to(pooler.port());
        self.pooler = Some(pooler);
    }

    /// Adds a standby that follows PostgreSQL. From then on every commit waits until the standby
    /// has it too.
    pub(crate) async fn add_standby(&mut self) {
        let mut standby = postgres::Server::prepare(postgres::Options::default())
            .unwrap_or_else(|problem| panic!("{problem}"));
        let primary = self.bridge.database.server();
        standby.follow(primary).await;
        primary.set_synchronous(true).await;
        self.standby = Some(standby);
    }

    /// Kills PostgreSQL and makes the standby the primary. The old primary comes back as the
    /// standby at its old port, to which the workers' connections lead until
    /// [`Self::follow_primary`].
    pub(crate) async fn fail_over(&mut self) {
        let standby = self.standby.as_mut().expect("this test added a standby");
        let primary = self.bridge.database.server();
        primary.kill().await;
        standby.promote().await;
        standby.set_synchronous(false).await;
        primary.follow(standby).await;
        standby.set_synchronous(true).await;
        self.bridge.database.exchange(standby).await;
    }

    /// Lets the workers' new connections lead to the primary of the database.
    pub(crate) fn follow_primary(&self) {
        let proxy = self.worker_to_database.as_ref();
        proxy
            .expect("only PostgreSQL has a standby")
            .point_to(database_port(&self.bridge));
    }

    /// Creates the workers' consumer with a shorter ack wait than theirs. The workers use an
    /// existing consumer as it is.
    pub(crate) async fn make_consumer(&self, replicas: usize) {
        let stream = self.bridge.stream(EVENTS_STREAM).await;
        let config = pull::Config {
            durable_name: Some(WORKER_CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: 20_000,
            num_replicas: replicas,
            ..pull::Config::default()
        };
        stream
            .create_consumer(config)
            .await
            .expect("a consumer can be made");
    }

    /// Starts ingress; each time at the same address.
    pub(crate) fn start_ingress(&mut self, more: Settings<'_>) {
        let launch = Program::named("litestripe-ingress")
            .env(
                "NATS_URL",
                format!("nats://127.0.0.1:{}", self.ingress_to_nats.port()),
            )
            .env("STRIPE_WEBHOOK_UUID", HOOK)
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env(
                "LITESTRIPE_LISTEN",
                format!("127.0.0.1:{}", self.ingress_port),
            );
        self.ingress = Some(self.with_settings(launch, more).start());
    }

    /// Starts the worker with that index; each time at the same address.
    pub(crate) fn start_worker(&mut self, index: usize, more: Settings<'_>) {
        while self.workers.len() <= index {
            self.workers.push(None);
            self.worker_ports.push(port::free());
        }
        let listen = format!("127.0.0.1:{}", self.worker_ports[index]);
        let launch = self.worker().env("LITESTRIPE_WORKER_LISTEN", listen);
        self.workers[index] = Some(with(launch, more).start());
    }

    /// `litestripe-worker` with the settings of the workers, for running commands.
    pub(crate) fn worker(&self) -> Launch {
        let url = self.bridge.database.url();
        let url = match &self.worker_to_database {
            Some(proxy) => url.replace(
                &format!(":{}/", database_port(&self.bridge)),
                &format!(":{}/", proxy.port()),
            ),
            None => url,
        };
        let launch = Program::named("litestripe-worker")
            .env(
                "NATS_URL",
                format!("nats://127.0.0.1:{}", self.worker_to_nats.port()),
            )
            .env("DATABASE_URL", url)
            .env("LITESTRIPE_AUTO_MIGRATE", "true");
        let clock = self.clock.iter().flat_map(Clock::environment);
        let launch = clock.fold(launch, |launch, (name, value)| launch.env(name, value));
        self.with_settings(launch, &[])
    }

    /// The worker with that index.
    pub(crate) fn running(&self, index: usize) -> &Program {
        self.workers[index].as_ref().expect("this test started it")
    }

    pub(crate) fn ingress(&self) -> &Program {
        self.ingress.as_ref().expect("this test started it")
    }

    /// The hook's URL, which stays the same when ingress is restarted.
    pub(crate) fn hook(&self) -> String {
        format!("http://127.0.0.1:{}/ls/hook/{HOOK}/", self.ingress_port)
    }

    /// Delivers events one after another, each until it is accepted.
    pub(crate) async fn deliver_all(&self, events: &[stripe::Event]) {
        let hook = self.hook();
        for event in events {
            self.ledger
                .deliver_until_accepted(&self.client, &hook, event)
                .await;
        }
    }

    pub(crate) async fn until_ingress_is_ready(&self) {
        let page = || self.page(self.ingress_port, "/readyz");
        until_ready(self.ingress(), page).await;
    }

    pub(crate) async fn until_worker_is_ready(&self, index: usize) {
        let page = || self.page(self.worker_ports[index], "/readyz");
        until_ready(self.running(index), page).await;
    }

    /// How many deliveries ended with `outcome`, as ingress counts them.
    pub(crate) async fn count_deliveries(&self, outcome: &str) -> usize {
        let page = self.page(self.ingress_port, "/metrics").await;
        let (_, page) = page.expect("ingress answers");
        let name = format!("litestripe_ingress_deliveries_total{{outcome=\"{outcome}\"}} ");
        let count = page.lines().find_map(|line| line.strip_prefix(&name));
        let count = count.expect("ingress shows every outcome from its start");
        count.parse().expect("a counter is a number")
    }

    /// The worker's `/metrics`.
    pub(crate) async fn worker_metrics(&self, index: usize) -> String {
        self.page(self.worker_ports[index], "/metrics")
            .await
            .map(|(_, page)| page)
            .unwrap_or_default()
    }

    async fn page(&self, port: u16, path: &str) -> Result<(u16, String), String> {
        let get = async {
            let answer = self
                .client
                .get(format!("http://127.0.0.1:{port}{path}"))
                .send()
                .await?;
            Ok((answer.status().as_u16(), answer.text().await?))
        };
        get.await.map_err(|error: reqwest::Error| error.to_string())
    }

    fn with_settings(&self, launch: Launch, more: Settings<'_>) -> Launch {
        let launch = self
            .settings
            .iter()
            .fold(launch, |launch, (name, value)| launch.env(name, value));
        with(launch, more)
    }
}

async fn until_ready<F: Future<Output = Result<(u16, String), String>>>(
    program: &Program,
    page: impl Fn() -> F,
) {
    eventually("a program to be ready", DEADLINE, async || {
        assert!(program.is_running(), "it ended:\n{}", program.log());
        match page().await? {
            (200, _) => Ok(()),
            (status, body) => Err(format!("{status} {body}")),
        }
    })
    .await;
}

fn with(launch: Launch, settings: Settings<'_>) -> Launch {
    settings
        .iter()
        .fold(launch, |launch, (name, value)| launch.env(name, value))
}

fn database_port(bridge: &Bridge) -> u16 {
    let url = bridge.database.url();
    let port = url
        .rsplit_once(':')
        .and_then(|(_, rest)| rest.split('/').next());
    port.and_then(|port| port.parse().ok())
        .expect("a PostgreSQL URL of ours names a port")
}

/// Counts the lines of a program's log that contain `text`.
pub(crate) fn count_in_log(program: &Program, text: &str) -> usize {
    program
        .log()
        .lines()
        .filter(|line| line.contains(text))
        .count()
}
