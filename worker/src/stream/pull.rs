//! Messages of a pull consumer, asked for as they are used up.
//!
//! Owns what was asked for and has not come. async-nats has a stream that does this, but it cannot be told to
//! stop asking: under load, whoever ends could not hand back all that is on its way.
//!
//! Requests, and the statuses that answer them: ADR-13 of the NATS architecture and design documents, "Pull
//! Subscribe internals".

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, Message};
use async_nats::{Client, HeaderMap, StatusCode, Subject, SubscribeError, Subscriber};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::Instant;
use tracing::{debug, warn};

/// Bytes of one request, at most: bounds memory when bodies are large. A message that is larger than this
/// would never be delivered, so a server that takes larger ones raises it.
const BYTES_MAX: usize = 8 << 20;

/// How long a request stays open, and how often the server shows that it still has it.
const EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(5);

/// After which a server that shows nothing has forgotten the request.
const SILENCE_MAX: Duration = HEARTBEAT.saturating_mul(2);

/// How often it is looked whether the client has another connection: its server knows of no request.
const LOOK: Duration = Duration::from_millis(250);

/// How long nothing is asked for after a request that came to nothing.
const PAUSE: Duration = Duration::from_millis(250);

pub(super) struct Pull {
    consumer: Consumer<pull::Config>,
    jetstream: jetstream::Context,
    client: Client,
    inbox: Subject,
    subscriber: Subscriber,
    /// Messages of one request, at most.
    batch: usize,
    /// Messages that were asked for and have not come.
    open: usize,
    /// When the server last sent anything, or was last asked.
    heard: Instant,
    /// Nothing is asked for until then.
    paused_until: Instant,
    /// Which of the client's connections was asked.
    connection: u64,
    /// Whether it was told that requests are refused.
    is_refused: bool,
    /// Whether a request came to nothing, so that the consumer should be looked for.
    pub(super) is_doubted: bool,
}

impl Pull {
    /// Messages of `consumer`: `batch` at a time are asked for when half as many are on their way.
    pub(super) async fn new(
        consumer: Consumer<pull::Config>,
        jetstream: jetstream::Context,
        batch: usize,
    ) -> Result<Self, SubscribeError> {
        let client = jetstream.client();
        let inbox = Subject::from(client.new_inbox());
        let subscriber = client.subscribe(inbox.clone()).await?;
        let connection = connection(&client);
        let now = Instant::now();
        Ok(Self {
            consumer,
            jetstream,
            client,
            inbox,
            subscriber,
            batch,
            open: 0,
            heard: now,
            paused_until: now,
            connection,
            is_refused: false,
            is_doubted: false,
        })
    }

    /// The messages that are there, up to `limit`: none when the consumer has become doubtful. None when the
    /// client was closed.
    ///
    /// # Cancel safety
    /// A cancelled wait loses no message.
    pub(super) async fn next(&mut self, limit: usize) -> Option<Vec<Message>> {
        loop {
            self.ask();
            let silent = self.heard + SILENCE_MAX;
            match tokio::time::timeout_at(silent.min(Instant::now() + LOOK), self.arrived(limit))
                .await
            {
                Ok(arrived) => {
                    let messages = self.sorted(arrived?);
                    // Whoever gets these may be busy with them for a while.
                    self.ask();
                    if !messages.is_empty() || self.is_doubted {
                        return Some(messages);
                    }
                }
                Err(_) if Instant::now() >= silent => {
                    debug!("the server shows no sign of what was asked for");
                    self.came_to_nothing();
                    return Some(Vec::new());
                }
                Err(_) => {}
            }
        }
    }

    /// What is there, and what still comes of what was asked for; none when all of it has come, or nothing for as
    /// long as `quiet`.
    pub(super) async fn rest(&mut self, quiet: Duration) -> Option<Vec<Message>> {
        let begin = Instant::now();
        loop {
            // A request that was given up may have brought some all the same.
            let end = if self.open > 0 { begin + quiet } else { begin };
            let arrived = tokio::time::timeout_at(end, self.arrived(self.batch))
                .await
                .ok()?;
            let messages = self.sorted(arrived?);
            if !messages.is_empty() {
                return Some(messages);
            }
        }
    }

    /// Asks for more when it is time to. Not without a connection: all that was asked meanwhile would be
    /// answered at once.
    fn ask(&mut self) {
        let connection = connection(&self.client);
        if self.connection != connection {
            self.connection = connection;
            self.open = 0;
        }
        let is_connected = self.client.connection_state() == State::Connected;
        if self.open > self.batch / 2 || !is_connected || Instant::now() < self.paused_until {
            return;
        }
        let request = pull::BatchConfig {
            batch: self.batch,
            expires: Some(EXPIRES),
            max_bytes: BYTES_MAX.max(2 * self.client.max_payload()),
            idle_heartbeat: HEARTBEAT,
            ..pull::BatchConfig::default()
        };
        // Waits only where the client has much to send, and then the next look will do.
        let asking = self.consumer.request_batch(request, self.inbox.clone());
        match tokio::task::unconstrained(asking).now_or_never() {
            Some(Ok(())) => {
                self.open += self.batch;
                self.heard = Instant::now();
            }
            Some(Err(error)) => {
                debug!("asking for messages: {error}");
                self.came_to_nothing();
            }
            None => {}
        }
    }

    async fn arrived(&mut self, limit: usize) -> Option<Vec<async_nats::Message>> {
        let mut ready = self.subscriber.by_ref().ready_chunks(limit);
        // Tokio would have us pause after some sixty messages, and a batch end there.
        tokio::task::unconstrained(ready.next()).await
    }

    /// Those of the stream among what arrived. The others are the server's words on what was asked for.
    fn sorted(&mut self, arrived: Vec<async_nats::Message>) -> Vec<Message> {
        self.heard = Instant::now();
        let mut messages = Vec::with_capacity(arrived.len());
        for message in arrived {
            match message.status {
                None | Some(StatusCode::OK) => {
                    self.open = self.open.saturating_sub(1);
                    self.is_refused = false;
                    messages.push(Message {
                        message,
                        context: self.jetstream.clone(),
                    });
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                Some(status) => {
                    let why = message.description.as_deref().unwrap_or_default();
                    debug!("of what was asked for: {status} {why}");
                    self.tell_of_refusal(why);
                    self.ended(status, message.headers.as_ref());
                }
            }
        }
        messages
    }

    /// A consumer that somebody made with limits of its own is left as it is, and may never deliver.
    fn tell_of_refusal(&mut self, why: &str) {
        if why.starts_with("Exceeded") && !std::mem::replace(&mut self.is_refused, true) {
            warn!(
                "the consumer {} refuses requests for messages ({why}): raise that limit of the consumer, or if it is \
                 MaxRequestBatch, lower LITESTRIPE_BATCH",
                self.consumer.cached_info().name
            );
        }
    }

    /// A request has expired, has brought as many bytes as it may, or was refused.
    fn ended(&mut self, status: StatusCode, headers: Option<&HeaderMap>) {
        let rest =
            headers.and_then(|headers| headers.get("Nats-Pending-Messages")?.as_str().parse().ok());
        match rest {
            Some(rest) if rest < self.batch || status == StatusCode::TIMEOUT => {
                self.open = self.open.saturating_sub(rest);
            }
            // The consumer may be gone, have another leader, or be asked by too many.
            _ => self.came_to_nothing(),
        }
    }

    fn came_to_nothing(&mut self) {
        self.open = 0;
        self.heard = Instant::now();
        self.paused_until = self.heard + PAUSE;
        self.is_doubted = true;
    }
}

/// The client's connections are counted.
fn connection(client: &Client) -> u64 {
    client.statistics().connects.load(Ordering::Relaxed)
}
