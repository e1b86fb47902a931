//! Messages of a pull consumer, requested as they are used up.
//!
//! Owns the pull requests and the count of messages that are still outstanding. async-nats has a
//! stream that does this, but it cannot stop requesting: under load, a worker that shuts down could
//! not hand back all messages in flight.
//!
//! Requests, and the statuses that answer them: ADR-13 of the NATS architecture and design
//! documents, "Pull Subscribe internals".

use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, Message};
use async_nats::{Client, HeaderMap, StatusCode, Subject, SubscribeError, Subscriber};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::origin::connection;

/// Bytes of one request, at most: bounds memory when bodies are large. It is raised if the server
/// accepts larger messages, because a message over the limit would never be delivered.
const BYTES_MAX: usize = 8 << 20;

/// How long a request stays open, and how often the server sends a heartbeat for it.
const EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The time without a heartbeat after which a request counts as lost.
const SILENCE_MAX: Duration = HEARTBEAT.saturating_mul(2);

/// How often the client is checked for a new connection: requests of the old one are lost.
const CONNECTION_CHECK: Duration = Duration::from_millis(250);

/// The pause after a failed request.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

pub(super) struct Pull {
    consumer: Consumer<pull::Config>,
    jetstream: jetstream::Context,
    client: Client,
    inbox: Subject,
    subscriber: Subscriber,
    /// Messages of one request, at most.
    batch: usize,
    /// Messages that were requested and have not arrived.
    outstanding: usize,
    /// When the server last sent anything, or was last sent a request.
    last_activity: Instant,
    /// No request is sent before this.
    paused_until: Instant,
    /// The number of the client's connection that the requests were sent on.
    connection: u64,
    /// Whether the refusal of requests was logged.
    is_refused: bool,
    /// Whether a request failed or the client has reconnected, so that the caller should check
    /// whether the stream and the consumer exist before it uses the messages.
    pub(super) needs_check: bool,
}

impl Pull {
    /// Creates a `Pull` that requests `batch` messages when at most half as many are outstanding.
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
            outstanding: 0,
            last_activity: now,
            paused_until: now,
            connection,
            is_refused: false,
            needs_check: false,
        })
    }

    /// Waits for messages and returns those that have arrived, up to `limit`. Returns an empty list
    /// if the consumer needs a check, and `None` if the client was closed.
    ///
    /// # Cancel safety
    /// A cancelled wait loses no message.
    pub(super) async fn next(&mut self, limit: usize) -> Option<Vec<Message>> {
        loop {
            self.request_more();
            if self.needs_check {
                return Some(Vec::new());
            }
            let deadline = self.last_activity + SILENCE_MAX;
            let check = Instant::now() + CONNECTION_CHECK;
            match tokio::time::timeout_at(deadline.min(check), self.receive(limit)).await {
                Ok(received) => {
                    let messages = self.take_messages(received?);
                    // The caller may be busy with these messages for a while.
                    self.request_more();
                    if !messages.is_empty() || self.needs_check {
                        return Some(messages);
                    }
                }
                Err(_) if Instant::now() >= deadline => {
                    debug!("the server has stopped sending heartbeats for a pull request");
                    self.fail_requests();
                    return Some(Vec::new());
                }
                Err(_) => {}
            }
        }
    }

    /// Waits for outstanding messages, without requesting more, and returns those that have
    /// arrived. Returns `None` if none is outstanding, or if none arrives for `quiet`.
    pub(super) async fn remaining(&mut self, quiet: Duration) -> Option<Vec<Message>> {
        let begin = Instant::now();
        loop {
            // Messages of a request that counts as failed may have arrived nevertheless.
            let end = if self.outstanding > 0 {
                begin + quiet
            } else {
                begin
            };
            let received = tokio::time::timeout_at(end, self.receive(self.batch))
                .await
                .ok()?;
            let messages = self.take_messages(received?);
            if !messages.is_empty() {
                return Some(messages);
            }
        }
    }

    /// Requests more messages if few are outstanding. Sends nothing without a connection: the
    /// client would queue the requests, and the server would answer them all at once.
    fn request_more(&mut self) {
        let connection = connection(&self.client);
        if self.connection != connection {
            self.connection = connection;
            self.outstanding = 0;
            // It may be another broker, or one that has lost its streams.
            self.needs_check = true;
        }
        let is_connected = self.client.connection_state() == State::Connected;
        if self.outstanding > self.batch / 2 || !is_connected || Instant::now() < self.paused_until
        {
            return;
        }
        let request = pull::BatchConfig {
            batch: self.batch,
            expires: Some(EXPIRES),
            max_bytes: BYTES_MAX.max(2 * self.client.max_payload()),
            idle_heartbeat: HEARTBEAT,
            ..pull::BatchConfig::default()
        };
        // Would wait only if the client has much to send, and then the next call sends the request.
        let requesting = self.consumer.request_batch(request, self.inbox.clone());
        match tokio::task::unconstrained(requesting).now_or_never() {
            Some(Ok(())) => {
                self.outstanding += self.batch;
                self.last_activity = Instant::now();
            }
            Some(Err(error)) => {
                debug!("cannot request messages: {error}");
                self.fail_requests();
            }
            None => {}
        }
    }

    async fn receive(&mut self, limit: usize) -> Option<Vec<async_nats::Message>> {
        let mut ready = self.subscriber.by_ref().ready_chunks(limit);
        // Otherwise tokio would make the task pause after some sixty messages, and end the batch
        // there.
        tokio::task::unconstrained(ready.next()).await
    }

    /// Returns the stream's messages among the received ones, and handles the server's status
    /// messages about requests.
    fn take_messages(&mut self, received: Vec<async_nats::Message>) -> Vec<Message> {
        self.last_activity = Instant::now();
        let mut messages = Vec::with_capacity(received.len());
        for message in received {
            match message.status {
                None | Some(StatusCode::OK) => {
                    self.outstanding = self.outstanding.saturating_sub(1);
                    self.is_refused = false;
                    messages.push(Message {
                        message,
                        context: self.jetstream.clone(),
                    });
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                Some(status) => {
                    let why = message.description.as_deref().unwrap_or_default();
                    debug!("the server ended a pull request early: {status} {why}");
                    self.warn_of_refusal(why);
                    self.end_request(status, message.headers.as_ref());
                }
            }
        }
        messages
    }

    /// Warns once if the server refuses requests. An operator may have made the consumer with lower
    /// limits; the worker leaves it as it is, and may never get a message.
    fn warn_of_refusal(&mut self, why: &str) {
        if why.starts_with("Exceeded") && !std::mem::replace(&mut self.is_refused, true) {
            warn!(
                "the consumer {} refuses requests for messages ({why}): raise that limit of the consumer, or if it is \
                 MaxRequestBatch, lower LITESTRIPE_BATCH",
                self.consumer.cached_info().name
            );
        }
    }

    /// Handles the end of a request, which has expired, has reached its limit of bytes, or was
    /// refused.
    fn end_request(&mut self, status: StatusCode, headers: Option<&HeaderMap>) {
        let rest =
            headers.and_then(|headers| headers.get("Nats-Pending-Messages")?.as_str().parse().ok());
        match rest {
            Some(rest) if rest < self.batch || status == StatusCode::TIMEOUT => {
                self.outstanding = self.outstanding.saturating_sub(rest);
            }
            // The consumer may be gone, have a new leader, or have too many waiting requests.
            _ => self.fail_requests(),
        }
    }

    /// Gives up all requests.
    fn fail_requests(&mut self) {
        self.outstanding = 0;
        self.last_activity = Instant::now();
        self.paused_until = self.last_activity + RETRY_PAUSE;
        self.needs_check = true;
    }
}
