//! The whole bridge on this machine: a broker, a database, ingress and workers, all of them the
//! real programs.
//!
//! Owns their set-up, what tests do to them (deliver, publish) and the results that a user sees:
//! rows, orphans, signals, dead letters, HTTP pages. May not know how ingress or worker do their
//! work. Every signal that a test reads is checked against the committed schemas, and
//! [`Bridge::check`] compares rows with signals.

mod database;
mod signal;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, ErrorCode, Message};
use bytes::Bytes;
use futures_util::StreamExt as _;
use litestripe_contract::header;
use litestripe_contract::subject::{
    DEAD_LETTERS_STREAM, EVENTS_PREFIX, EVENTS_STREAM, SIGNALS_STREAM, WORKER_CONSUMER,
};
use litestripe_entity::{orphaned_payment, stripe_subscription};
use tokio::sync::OnceCell;

use crate::clock::Clock;
use crate::program::{Launch, Program};
use crate::stripe::{self, Delivery, Event, Notification};
use crate::{eventually, nats, port};

pub use database::{Database, DatabaseKind, lock_row_sql, signal_fields};
pub use signal::{Signal, filter_by_subscription};

/// The signing secret of every bridge.
pub const SECRET: &str = "whsec_onlyTheTestsKnowThis";
/// The UUID in its hook's path.
pub const HOOK: &str = "6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c";

/// A program starts in a tenth of a second; on two cores that also compile it has taken 10 s.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// Enough for elections in a cluster, with three brokers on two cores.
const LEADER_DEADLINE: Duration = Duration::from_secs(90);

/// Most tests' events are applied within a tenth of a second, one test's ten thousand within 20 s.
const APPLIED_DEADLINE: Duration = Duration::from_secs(120);

/// How long a reader of a stream waits before it checks whether there is more to come.
const SILENCE: Duration = Duration::from_secs(1);

/// How many publications may be in flight.
const IN_FLIGHT: usize = 256;

/// The parts and settings of a bridge.
#[derive(Clone, Debug)]
pub struct Options {
    pub database: DatabaseKind,
    /// How many workers [`Bridge::start`] starts.
    pub workers: usize,
    /// Additional settings of ingress.
    pub ingress: Vec<(&'static str, String)>,
    /// Additional settings of the workers.
    pub worker: Vec<(&'static str, String)>,
}

impl Options {
    /// Options with one worker and only the required settings.
    #[must_use]
    pub fn new(database: DatabaseKind) -> Self {
        Self {
            database,
            workers: 1,
            ingress: Vec::new(),
            worker: Vec::new(),
        }
    }

    /// Sets the number of workers.
    #[must_use]
    pub fn workers(self, workers: usize) -> Self {
        Self { workers, ..self }
    }

    /// Adds a setting of the workers.
    #[must_use]
    pub fn worker(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.worker.push((name, value.into()));
        self
    }

    /// Makes the workers show that clock.
    #[must_use]
    pub fn clock(self, clock: &Clock) -> Self {
        let environment = clock.environment().into_iter();
        environment.fold(self, |options, (name, value)| options.worker(name, value))
    }

    /// Adds a setting of ingress.
    #[must_use]
    pub fn ingress(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.ingress.push((name, value.into()));
        self
    }
}

/// A running ingress or worker and its HTTP address. Dereferences to its [`Program`].
#[derive(Debug)]
pub struct Node {
    program: Program,
    url: String,
}

/// A broker, a database, ingress and workers. Dropping it ends and removes all of them.
pub struct Bridge {
    // Declared first, so that the programs end before the servers to which they are connected.
    /// The ingress, if started.
    pub ingress: Option<Node>,
    /// The started workers.
    pub workers: Vec<Node>,
    pub broker: nats::Server,
    pub database: Database,
    options: Options,
    http: reqwest::Client,
    jetstream: OnceCell<jetstream::Context>,
}

/// A message of the dead letter stream.
#[derive(Debug)]
pub struct DeadLetter {
    pub subject: String,
    pub headers: BTreeMap<String, String>,
    /// The event's body.
    pub body: Bytes,
}

impl Bridge {
    /// Starts a bridge and waits until it is ready for deliveries.
    pub async fn start(options: Options) -> Self {
        let mut bridge = Self::prepare(options);
        bridge.broker.resume().await;
        bridge.database.resume().await;
        bridge.start_ingress().wait_until_ready().await;
        for _ in 0..bridge.options.workers {
            bridge.start_worker();
        }
        for worker in &bridge.workers {
            worker.wait_until_ready().await;
        }
        bridge
    }

    /// Makes a bridge of which nothing runs yet: neither broker nor database nor programs.
    pub fn prepare(options: Options) -> Self {
        Self {
            ingress: None,
            workers: Vec::new(),
            broker: nats::Server::prepare(nats::Options::default())
                .expect("a folder for nats-server can be made"),
            database: Database::prepare(options.database),
            options,
            http: stripe::client(),
            jetstream: OnceCell::new(),
        }
    }

    /// Starts ingress and does not wait until it is ready.
    pub fn start_ingress(&mut self) -> &Node {
        let address = format!("127.0.0.1:{}", port::free());
        let launch = Program::named("litestripe-ingress")
            .env("NATS_URL", self.broker.url())
            .env("STRIPE_WEBHOOK_UUID", HOOK)
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("LITESTRIPE_LISTEN", &address);
        let launch = with(launch, &self.options.ingress);
        self.ingress.insert(Node::start(&launch, &address))
    }

    /// Starts another worker and does not wait until it is ready.
    pub fn start_worker(&mut self) -> &Node {
        let address = format!("127.0.0.1:{}", port::free());
        let node = Node::start(
            &self.worker().env("LITESTRIPE_WORKER_LISTEN", &address),
            &address,
        );
        self.workers.push(node);
        self.workers.last().expect("one was pushed just now")
    }

    /// `litestripe-worker` with the settings of this bridge's workers, for running commands.
    pub fn worker(&self) -> Launch {
        let launch = Program::named("litestripe-worker")
            .env("NATS_URL", self.broker.url())
            .env("DATABASE_URL", self.database.url())
            .env("LITESTRIPE_AUTO_MIGRATE", "true");
        with(launch, &self.options.worker)
    }

    /// Sets or replaces a setting of the workers that are started later.
    pub fn set_worker(&mut self, name: &'static str, value: impl Into<String>) {
        self.options.worker.retain(|(set, _)| *set != name);
        self.options.worker.push((name, value.into()));
    }

    /// The ingress.
    ///
    /// # Panics
    /// When it was not started.
    pub fn ingress(&self) -> &Node {
        self.ingress.as_ref().expect("this test started ingress")
    }

    /// The hook's URL.
    pub fn hook(&self) -> String {
        format!("{}/ls/hook/{HOOK}/", self.ingress().url)
    }

    /// Posts a delivery to the hook.
    pub async fn post(&self, delivery: &Delivery) -> reqwest::Response {
        delivery
            .post(&self.http, &self.hook())
            .await
            .expect("ingress answers")
    }

    /// Delivers an event as Stripe does.
    ///
    /// # Panics
    /// When it is not accepted.
    pub async fn deliver(&self, event: &Event) {
        let answer = self.post(&Delivery::new(event.body(), SECRET)).await;
        let status = answer.status();
        let body = answer.text().await.unwrap_or_default();
        assert_eq!(status, 200, "{} was answered {body}", event.summary());
    }

    /// Delivers events one after another.
    ///
    /// # Panics
    /// When one is not accepted.
    pub async fn deliver_all(&self, events: &[Event]) {
        for event in events {
            self.deliver(event).await;
        }
    }

    /// Delivers thin events one after another as Stripe does.
    ///
    /// # Panics
    /// When one is not accepted.
    pub async fn notify_all(&self, notifications: &[Notification]) {
        for notification in notifications {
            let delivery = Delivery::new(notification.body(), SECRET);
            let answer = self.post(&delivery).await;
            let status = answer.status();
            let body = answer.text().await.unwrap_or_default();
            let what = notification.event_type();
            assert_eq!(status, 200, "{what} was answered {body}");
        }
    }

    /// Stores a body in the stream without ingress and returns its sequence.
    ///
    /// # Panics
    /// When it is not stored, or the broker drops it as a duplicate.
    pub async fn publish(&self, event_type: &str, body: impl Into<Bytes>, message_id: &str) -> u64 {
        let message = (event_type.to_owned(), body.into(), message_id.to_owned());
        let acks = self.publish_all(vec![message]).await;
        let [ack] = acks.as_slice() else {
            panic!("one message has one ack")
        };
        assert!(!ack.duplicate, "{message_id} was in the stream already");
        ack.sequence
    }

    /// Stores bodies, given as (event type, body, `Nats-Msg-Id`), in the stream without ingress, in
    /// that order and with many in flight.
    pub async fn publish_all(
        &self,
        messages: Vec<(String, Bytes, String)>,
    ) -> Vec<jetstream::publish::PublishAck> {
        let jetstream = self.jetstream().await;
        let mut acks = Vec::with_capacity(messages.len());
        for some in messages.chunks(IN_FLIGHT) {
            let mut sent = Vec::with_capacity(some.len());
            for (event_type, body, message_id) in some {
                let mut headers = HeaderMap::new();
                headers.insert(header::MESSAGE_ID, message_id.as_str());
                let subject = format!("{EVENTS_PREFIX}{event_type}");
                sent.push(
                    jetstream
                        .publish_with_headers(subject, headers, body.clone())
                        .await
                        .expect("it is sent"),
                );
            }
            for ack in sent {
                acks.push(ack.await.expect("it is stored"));
            }
        }
        acks
    }

    /// Waits until every event in the stream is applied and every signal is sent.
    #[track_caller]
    pub fn wait_until_applied(&self) -> impl Future<Output = ()> {
        eventually(
            "every event to be applied and every signal sent",
            APPLIED_DEADLINE,
            async || {
                let seen = |error: &dyn std::fmt::Display| error.to_string();
                let jetstream = self.jetstream().await;
                let stream = jetstream
                    .get_stream(EVENTS_STREAM)
                    .await
                    .map_err(|error| seen(&error))?;
                let consumer = stream
                    .consumer_info(WORKER_CONSUMER)
                    .await
                    .map_err(|error| seen(&error))?;
                let outbox = self.database.outbox().await.map_err(|error| seen(&error))?;
                let last = stream.cached_info().state.last_sequence;
                let delivered = consumer.delivered.stream_sequence;
                let (pending, unacked) = (consumer.num_pending, consumer.num_ack_pending);
                if delivered >= last && (pending, unacked, outbox) == (0, 0, 0) {
                    return Ok(());
                }
                Err(format!(
                    "delivered {delivered} of {last}, {pending} pending, {unacked} not acked, {outbox} in the outbox"
                ))
            },
        )
    }

    /// Waits until workers hold exactly `count` unacknowledged messages.
    #[track_caller]
    pub fn wait_until_unacknowledged(&self, count: usize) -> impl Future<Output = ()> {
        eventually(
            "workers to hold unacknowledged messages",
            APPLIED_DEADLINE,
            async move || match self.unacknowledged().await {
                held if held == count => Ok(()),
                held => Err(format!("{held} instead of {count}")),
            },
        )
    }

    /// The number of messages that were delivered to workers and are not acknowledged yet.
    pub async fn unacknowledged(&self) -> usize {
        let stream = self.stream(EVENTS_STREAM).await;
        stream
            .consumer_info(WORKER_CONSUMER)
            .await
            .expect("the consumer exists")
            .num_ack_pending
    }

    /// Waits until everything is applied, checks that rows and signals agree, and returns the
    /// signals.
    ///
    /// # Panics
    /// When a signal violates its schema, when it does not follow from the signal before it, or
    /// when the last signal of a row differs from the row.
    #[track_caller]
    pub fn check(&self) -> impl Future<Output = Vec<Signal>> {
        let applied = self.wait_until_applied();
        async move {
            applied.await;
            let signals = self.signals().await;
            signal::check_chains(&signals);
            signal::check_rows(&self.rows().await, &signals);
            signals
        }
    }

    /// All signals sent so far, in the stream's order.
    ///
    /// # Panics
    /// When one violates its schema in `docs/signals`.
    pub async fn signals(&self) -> Vec<Signal> {
        self.read(SIGNALS_STREAM)
            .await
            .iter()
            .map(Signal::read)
            .collect()
    }

    /// All rows of `stripe_subscription`, sorted by key.
    pub async fn rows(&self) -> Vec<stripe_subscription::Model> {
        self.database.rows().await.expect("the rows can be read")
    }

    /// The row of a subscription.
    ///
    /// # Panics
    /// When it does not exist.
    pub async fn row(&self, id: &str) -> stripe_subscription::Model {
        let row = self
            .rows()
            .await
            .into_iter()
            .find(|row| row.stripe_subscription_id == id);
        row.unwrap_or_else(|| panic!("{id} has no row"))
    }

    /// All orphans, sorted by key.
    pub async fn orphans(&self) -> Vec<orphaned_payment::Model> {
        self.database
            .orphans()
            .await
            .expect("the orphans can be read")
    }

    /// All dead letters, in the stream's order.
    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        let letter = |message: &Message| DeadLetter {
            subject: message.subject.to_string(),
            headers: headers(message),
            body: message.payload.clone(),
        };
        self.read(DEAD_LETTERS_STREAM)
            .await
            .iter()
            .map(letter)
            .collect()
    }

    /// The bodies of all messages of a stream, in its order.
    pub async fn bodies(&self, stream: &str) -> Vec<Bytes> {
        self.read(stream)
            .await
            .into_iter()
            .map(|message| message.payload.clone())
            .collect()
    }

    /// The number of events in `STRIPE_EVENTS`.
    pub async fn stored_events(&self) -> u64 {
        let stream = self.stream(EVENTS_STREAM).await;
        stream.cached_info().state.messages
    }

    /// A stream, with its state of this moment. Asks again while the broker does not answer: the
    /// streams of a cluster have no leader for some seconds after one was lost, and requests to a
    /// stream without a leader are dropped.
    ///
    /// # Panics
    /// When the stream does not exist, or nobody answers in time.
    #[track_caller]
    pub fn stream(&self, name: &str) -> impl Future<Output = Stream> {
        eventually(
            "the broker to show a stream",
            LEADER_DEADLINE,
            async move || {
                let asked = self.jetstream().await.get_stream(name).await;
                asked.map_err(|error| match error.kind() {
                    GetStreamErrorKind::JetStream(answer)
                        if answer.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                    {
                        panic!("there is no stream {name}")
                    }
                    _ => format!("{name}: {error}"),
                })
            },
        )
    }

    /// A JetStream connection of the test's own.
    pub async fn jetstream(&self) -> &jetstream::Context {
        self.jetstream
            .get_or_init(async || jetstream::new(self.broker.connect().await))
            .await
    }

    async fn read(&self, name: &str) -> Vec<Message> {
        let stream = self.stream(name).await;
        let count = stream.cached_info().state.messages;
        let consumer = eventually("an ordered consumer", READY_DEADLINE, async || {
            let config = pull::OrderedConfig {
                deliver_policy: DeliverPolicy::All,
                ..Default::default()
            };
            let made = stream.create_consumer(config).await;
            made.map_err(|error| error.to_string())
        })
        .await;
        let mut messages = consumer.messages().await.expect("messages can be pulled");
        let mut read = Vec::new();
        let count = usize::try_from(count).expect("a test's messages fit into memory");
        let mut pending = count > 0;
        while pending && read.len() < count {
            match tokio::time::timeout(SILENCE, messages.next()).await {
                Ok(message) => {
                    let message = message
                        .expect("the consumer exists")
                        .expect("it can be read");
                    pending = message.info().expect("it is JetStream's").pending > 0;
                    read.push(message);
                }
                // Messages that were removed meanwhile do not come.
                Err(_) => {
                    let now = self.stream(name).await;
                    let left = usize::try_from(now.cached_info().state.messages);
                    let left = left.unwrap_or(usize::MAX);
                    if read.len() >= left {
                        break;
                    }
                }
            }
        }
        read
    }
}

impl Node {
    fn start(launch: &Launch, address: &str) -> Self {
        Self {
            program: launch.start(),
            url: format!("http://{address}"),
        }
    }

    /// The URL of its HTTP address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Fetches one of its pages; returns status and body.
    pub async fn page(&self, path: &str) -> Result<(u16, String), String> {
        let get = async {
            let answer = stripe::client()
                .get(format!("{}{path}", self.url))
                .send()
                .await?;
            Ok((answer.status().as_u16(), answer.text().await?))
        };
        get.await.map_err(|error: reqwest::Error| error.to_string())
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Panics
    /// When that takes too long, or the program ends.
    #[track_caller]
    pub fn wait_until_ready(&self) -> impl Future<Output = ()> {
        eventually("a program to be ready", READY_DEADLINE, async || {
            assert!(
                self.program.is_running(),
                "it ended:\n{}",
                self.program.log()
            );
            match self.page("/readyz").await? {
                (200, _) => Ok(()),
                (status, body) => Err(format!("{status} {body}; its log:\n{}", self.program.log())),
            }
        })
    }

    /// Counts the lines of its log that contain `text`.
    pub fn count_in_log(&self, text: &str) -> usize {
        self.program
            .log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }
}

impl Deref for Node {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

fn with(launch: Launch, settings: &[(&'static str, String)]) -> Launch {
    settings
        .iter()
        .fold(launch, |launch, (name, value)| launch.env(name, value))
}

/// A message's headers; only the first value of a repeated one.
fn headers(message: &Message) -> BTreeMap<String, String> {
    let headers = message.headers.iter().flat_map(HeaderMap::iter);
    headers
        .filter_map(|(name, values)| Some((name.to_string(), values.first()?.to_string())))
        .collect()
}
