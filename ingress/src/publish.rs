//! Stores a verified delivery in JetStream, within a deadline.
//!
//! Owns the retries and the state of the broker as requests see it. May not know HTTP. Invariant:
//! `store` returns `Ok` only after a PubAck. A retry carries the same message id, so that JetStream
//! drops it if an earlier attempt was stored.

mod batch;
mod choice;
mod fill_wait;
mod group;
mod message;
mod outcome;
mod report;
mod single;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use async_nats::jetstream;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::future::OptionFuture;
use litestripe_contract::settings::{EventsSettings, NatsSettings};
use litestripe_contract::{connect, exit, stream, subject};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use self::batch::Batches;
use self::group::Group;
pub(crate) use self::group::GroupState;
pub(crate) use self::message::Delivery;
use self::outcome::AttemptError;
pub(crate) use self::outcome::{StoreError, Stored, Trouble};
use self::report::Report;
use crate::fail_point::fail_point;
use crate::settings::Settings;

pub(crate) const CONNECTION_NAME: &str = env!("CARGO_PKG_NAME");

/// How long storing an event may take: DESIGN's 8 s for the answer, less a margin for sending it.
const STORE_WITHIN: Duration = Duration::from_millis(7500);

/// How long a request waits for a lost connection. A restarted broker needs less.
const CONNECTION_GRACE: Duration = Duration::from_secs(1);

/// How often the state of the connection is checked. async-nats has no way to wait for it.
const CONNECTION_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Delays between attempts to publish: a leader election is over in a few seconds.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(50);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(1);

/// Delays between attempts to provide the stream.
const PROVIDE_AFTER_MIN: Duration = Duration::from_millis(250);
const PROVIDE_AFTER_MAX: Duration = Duration::from_secs(5);

/// How much of the server's `max_payload` is reserved for headers, in bytes.
const HEADERS_BYTES: usize = 16 << 10;

pub(crate) struct Publisher {
    client: Client,
    jetstream: jetstream::Context,
    group: Group,
    batches: tokio::sync::Mutex<Batches>,
    nats: NatsSettings,
    events: EventsSettings,
    /// When the connection was lost; `None` while there is one.
    lost_since: watch::Sender<Option<Instant>>,
    /// Changes whenever a connection was lost or made: messages in flight on an older one get no
    /// answer. async-nats may replace a connection before the next check of its state.
    connections_lost: watch::Sender<u64>,
    /// Whether the stream existed at the last check, and since then the connection was not lost and
    /// no attempt to publish found the stream missing.
    is_provided: watch::Sender<bool>,
    max_payload_check: Notify,
    report: Report,
}

impl Publisher {
    /// Makes a publisher. It publishes nothing until [`Publisher::run`] runs.
    pub(crate) fn new(client: Client, settings: &Settings) -> Self {
        let jetstream = connect::jetstream(client.clone());
        let connections_lost = watch::Sender::new(0);
        let (group, batches) = Group::new(
            client.clone(),
            jetstream.clone(),
            settings.group_commit,
            connections_lost.subscribe(),
        );
        Self {
            group,
            batches: tokio::sync::Mutex::new(batches),
            jetstream,
            client,
            connections_lost,
            nats: settings.nats.clone(),
            events: settings.events.clone(),
            lost_since: watch::Sender::new(Some(Instant::now())),
            is_provided: watch::Sender::new(false),
            max_payload_check: Notify::new(),
            report: Report::new(),
        }
    }

    pub(crate) fn body_bytes_max(&self) -> usize {
        self.client.max_payload().saturating_sub(HEADERS_BYTES)
    }

    /// Requests a check whether the server now accepts larger messages.
    pub(crate) fn request_max_payload_check(&self) {
        self.max_payload_check.notify_one();
    }

    /// Returns why deliveries cannot be stored now, if they cannot.
    pub(crate) fn readiness(&self) -> Result<(), Trouble> {
        if self.lost_since.borrow().is_some() {
            Err(Trouble::NotConnected)
        } else if !*self.is_provided.borrow() {
            Err(Trouble::NoStream)
        } else {
            let lasting = self.report.lasting_trouble(std::time::Instant::now());
            lasting.map_or(Ok(()), Err)
        }
    }

    /// Returns how events are stored now.
    pub(crate) fn group_commit(&self) -> GroupState {
        self.group.state()
    }

    /// Stores a delivery. Fails at once if the connection has been lost for a second or if
    /// JetStream refuses the event, otherwise after 7.5 s.
    pub(crate) async fn store(&self, delivery: Delivery) -> Result<Stored, StoreError> {
        let delivery = Arc::new(delivery);
        let outcome = tokio::select! {
            () = self.until_connection_is_given_up() => Err(StoreError::Unavailable(Trouble::NotConnected)),
            outcome = self.store_with_retries(&delivery) => outcome,
        };
        match &outcome {
            Ok(_) => self.report.record_stored(),
            Err(StoreError::TooLarge) => {}
            Err(StoreError::Unavailable(trouble)) => {
                debug!(event_id = %delivery.id, "cannot store {}: {trouble}", delivery.id);
                self.report
                    .record_failure(trouble, std::time::Instant::now());
            }
        }
        outcome
    }

    async fn store_with_retries(&self, delivery: &Arc<Delivery>) -> Result<Stored, StoreError> {
        let deadline = Instant::now() + STORE_WITHIN;
        let mut delays = None;
        loop {
            self.until_connected().await;
            let attempt = timeout_at(deadline, self.group.publish(delivery)).await;
            let trouble = match attempt.unwrap_or(Err(AttemptError::Retry(Trouble::NoAck))) {
                Ok(stored) => return Ok(stored),
                Err(AttemptError::TooLarge) => return Err(StoreError::TooLarge),
                Err(AttemptError::GiveUp(trouble)) => return Err(StoreError::Unavailable(trouble)),
                Err(AttemptError::Retry(trouble)) => trouble,
            };
            if trouble == Trouble::NoStream {
                self.is_provided.send_if_modified(std::mem::take);
            }
            let delays = delays.get_or_insert_with(|| backoff(RETRY_AFTER_MIN, RETRY_AFTER_MAX));
            let next = Instant::now() + delays.next().unwrap_or(RETRY_AFTER_MAX);
            if next >= deadline {
                return Err(StoreError::Unavailable(trouble));
            }
            sleep_until(next).await;
        }
    }

    /// Waits for a connection. Without one a message would wait in the client's queue.
    async fn until_connected(&self) {
        if self.lost_since.borrow().is_none() {
            return;
        }
        // `self` holds the sender, so the channel is open.
        let _ = self.lost_since.subscribe().wait_for(Option::is_none).await;
    }

    /// Waits until the connection has been lost for too long. async-nats neither fails nor resends
    /// the messages that were in flight when a connection broke.
    async fn until_connection_is_given_up(&self) {
        let mut lost_since = self.lost_since.subscribe();
        loop {
            let given_up_at = lost_since
                .borrow_and_update()
                .map(|since| since + CONNECTION_GRACE);
            tokio::select! {
                Some(()) = OptionFuture::from(given_up_at.map(sleep_until)) => return,
                _ = lost_since.changed() => {}
            }
        }
    }

    /// Watches the connection, makes batches, and provides the stream whenever it is missing. Never
    /// ends.
    ///
    /// # Cancel safety
    /// No event is lost.
    pub(crate) async fn run(&self) {
        let make_batches = async { self.batches.lock().await.run().await };
        tokio::join!(
            self.watch_connection(),
            self.keep_stream(),
            make_batches,
            self.follow_max_payload()
        );
    }

    async fn follow_max_payload(&self) {
        loop {
            self.max_payload_check.notified().await;
            connect::reconnect_if_max_payload_grew(&self.client, &self.nats, CONNECTION_NAME).await;
            sleep(connect::MAX_PAYLOAD_CHECK_INTERVAL).await;
        }
    }

    async fn watch_connection(&self) {
        let statistics = self.client.statistics();
        let mut connects = 0;
        loop {
            fail_point!("ingress::watching_connection");
            let is_connected = self.client.connection_state() == State::Connected;
            let changed = self.lost_since.send_if_modified(|since| {
                let changed = since.is_none() != is_connected;
                if changed {
                    *since = (!is_connected).then(Instant::now);
                }
                changed
            });
            let connects_before =
                std::mem::replace(&mut connects, statistics.connects.load(Ordering::Relaxed));
            if (changed && !is_connected) || connects != connects_before {
                self.connections_lost.send_modify(|count| *count += 1);
            }
            if changed && !is_connected {
                // The next connection may be to another broker.
                self.is_provided.send_replace(false);
            }
            sleep(CONNECTION_CHECK_INTERVAL).await;
        }
    }

    async fn keep_stream(&self) {
        let mut is_provided = self.is_provided.subscribe();
        loop {
            connect::connected(&self.client, &self.nats).await;
            self.provide_stream().await;
            self.is_provided.send_replace(true);
            let _ = is_provided.wait_for(|is_provided| !is_provided).await;
            sleep(PROVIDE_AFTER_MIN).await;
        }
    }

    async fn provide_stream(&self) {
        let mut delays = backoff(PROVIDE_AFTER_MIN, PROVIDE_AFTER_MAX);
        let mut logged = None;
        let accepts_batches = loop {
            let problem = match self.try_provide_stream().await {
                Ok(accepts_batches) => break accepts_batches,
                Err(problem) => problem,
            };
            if logged.as_ref() != Some(&problem) {
                warn!("{problem}; retrying until it works");
                logged = Some(problem);
            }
            sleep(delays.next().unwrap_or(PROVIDE_AFTER_MAX)).await;
        };
        self.group.allow_batches(accepts_batches);
        info!("ready: stream {} exists", subject::EVENTS_STREAM);
    }

    /// Creates the stream if it is missing. Returns whether it accepts atomic batches, as the
    /// server reports it afterwards: a server before 2.12 silently ignores the setting.
    async fn try_provide_stream(&self) -> Result<bool, String> {
        let provided = stream::provide_events(&self.jetstream, &self.events).await;
        provided.map_err(|error| exit::chain(&error))?;
        let stream = self.jetstream.get_stream(subject::EVENTS_STREAM).await;
        let stream = stream.map_err(|error| exit::chain(&error))?;
        Ok(stream.cached_info().config.allow_atomic_publish)
    }

    /// Sends the bytes in the client's buffers. Does nothing without a connection.
    pub(crate) async fn flush(&self) {
        if self.client.connection_state() != State::Connected {
            return;
        }
        if let Err(error) = self.client.flush().await {
            debug!(
                "cannot flush the connection to NATS: {}",
                exit::chain(&error)
            );
        }
    }
}

fn backoff(min: Duration, max: Duration) -> impl Iterator<Item = Duration> {
    let builder = ExponentialBuilder::new()
        .with_min_delay(min)
        .with_max_delay(max);
    builder.without_max_times().with_jitter().build()
}

#[cfg(test)]
mod tests;
