//! From a verified body to JetStream's PubAck, within a deadline.
//!
//! Owns the retries and the state of the broker as requests see it. May not know HTTP. Invariant:
//! `store` is `Ok` only after a PubAck, and a retry carries the same message id, so that JetStream
//! drops what it stored before.

mod batch;
mod choice;
mod company;
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
pub(crate) use self::message::Delivery;
use self::outcome::AttemptError;
pub(crate) use self::outcome::{StoreError, Stored, Trouble};
use self::report::Report;
use crate::fail_point::fail_point;
use crate::settings::Settings;

pub(crate) const CONNECTION_NAME: &str = env!("CARGO_PKG_NAME");

/// How long an event may take to be stored: the 8 s of DESIGN less a margin for the answer itself.
const STORE_WITHIN: Duration = Duration::from_millis(7500);

/// How long a request waits for a lost connection. A restarted broker is back sooner.
const CONNECTION_GRACE: Duration = Duration::from_secs(1);

/// How often the state of the connection is looked at. async-nats has no way to wait for it.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Waits between attempts to publish: a leader election is over in a few seconds.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(50);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(1);

/// Waits between attempts to provide the stream.
const PROVIDE_AFTER_MIN: Duration = Duration::from_millis(250);
const PROVIDE_AFTER_MAX: Duration = Duration::from_secs(5);

/// How much of the server's `max_payload` is left to headers, in bytes.
const HEADERS_BYTES: usize = 16 << 10;

pub(crate) struct Publisher {
    client: Client,
    jetstream: jetstream::Context,
    group: Group,
    batches: tokio::sync::Mutex<Batches>,
    nats: NatsSettings,
    events: EventsSettings,
    /// Since when there is no connection.
    lost_since: watch::Sender<Option<Instant>>,
    /// How many connections broke. A broken one is replaced so soon that nobody may see it missing.
    broken: watch::Sender<u64>,
    /// Whether the stream was there when we looked, and nothing has spoken against it since.
    is_provided: watch::Sender<bool>,
    too_large: Notify,
    report: Report,
}

impl Publisher {
    /// A publisher over `client`. Nothing is published until [`Publisher::tend`] runs.
    pub(crate) fn new(client: Client, settings: &Settings) -> Self {
        let jetstream = connect::jetstream(client.clone());
        let broken = watch::Sender::new(0);
        let (group, batches) = Group::new(
            client.clone(),
            jetstream.clone(),
            settings.group_commit,
            broken.subscribe(),
        );
        Self {
            group,
            batches: tokio::sync::Mutex::new(batches),
            jetstream,
            client,
            broken,
            nats: settings.nats.clone(),
            events: settings.events.clone(),
            lost_since: watch::Sender::new(Some(Instant::now())),
            is_provided: watch::Sender::new(false),
            too_large: Notify::new(),
            report: Report::new(),
        }
    }

    pub(crate) fn body_bytes_max(&self) -> usize {
        self.client.max_payload().saturating_sub(HEADERS_BYTES)
    }

    pub(crate) fn doubt_body_bytes_max(&self) {
        self.too_large.notify_one();
    }

    /// Whether deliveries can be stored, or why not.
    pub(crate) fn readiness(&self) -> Result<(), Trouble> {
        if self.lost_since.borrow().is_some() {
            Err(Trouble::NotConnected)
        } else if !*self.is_provided.borrow() {
            Err(Trouble::NoStream)
        } else {
            Ok(())
        }
    }

    /// Stores a delivery, or fails: at once if the connection has been lost for a second or JetStream
    /// refuses, else after 7.5 s.
    pub(crate) async fn store(&self, delivery: Delivery) -> Result<Stored, StoreError> {
        let delivery = Arc::new(delivery);
        let outcome = tokio::select! {
            () = self.connection_is_given_up() => Err(StoreError::Unavailable(Trouble::NotConnected)),
            outcome = self.attempts(&delivery) => outcome,
        };
        match &outcome {
            Ok(_) => self.report.stored(),
            Err(StoreError::TooLarge) => {}
            Err(StoreError::Unavailable(trouble)) => {
                debug!(event_id = %delivery.id, "cannot store {}: {trouble}", delivery.id);
                self.report.failed(trouble);
            }
        }
        outcome
    }

    async fn attempts(&self, delivery: &Arc<Delivery>) -> Result<Stored, StoreError> {
        let deadline = Instant::now() + STORE_WITHIN;
        let mut delays = None;
        loop {
            self.connection().await;
            let attempt = timeout_at(deadline, self.group.publish(delivery)).await;
            let trouble = match attempt.unwrap_or(Err(AttemptError::Again(Trouble::NoAck))) {
                Ok(stored) => return Ok(stored),
                Err(AttemptError::TooLarge) => return Err(StoreError::TooLarge),
                Err(AttemptError::Never(trouble)) => return Err(StoreError::Unavailable(trouble)),
                Err(AttemptError::Again(trouble)) => trouble,
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

    /// Returns once there is a connection. Without one a message would wait in the client's queue.
    async fn connection(&self) {
        if self.lost_since.borrow().is_none() {
            return;
        }
        // The sender is ours, so the channel is open.
        let _ = self.lost_since.subscribe().wait_for(Option::is_none).await;
    }

    /// Returns once the connection has been lost for too long. async-nats neither fails nor resends
    /// what was in flight when a connection broke.
    async fn connection_is_given_up(&self) {
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

    /// Watches the connection and provides the stream, again whenever it turns out to be missing.
    /// Never ends.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn tend(&self) {
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
            self.too_large.notified().await;
            connect::reconnect_if_max_payload_grew(&self.client, &self.nats, CONNECTION_NAME).await;
            sleep(connect::MAX_PAYLOAD_CHECK_INTERVAL).await;
        }
    }

    async fn watch_connection(&self) {
        let statistics = self.client.statistics();
        let mut connects = 0;
        loop {
            fail_point!("ingress::tending");
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
                self.broken.send_modify(|broken| *broken += 1);
            }
            if changed && !is_connected {
                // The broker that comes back may be another one.
                self.is_provided.send_replace(false);
            }
            sleep(LOOK_AGAIN_AFTER).await;
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
        let takes_batches = loop {
            let problem = match self.try_provide_stream().await {
                Ok(takes_batches) => break takes_batches,
                Err(problem) => problem,
            };
            if logged.as_ref() != Some(&problem) {
                warn!("{problem}; trying again until it works");
                logged = Some(problem);
            }
            sleep(delays.next().unwrap_or(PROVIDE_AFTER_MAX)).await;
        };
        self.group.allow(takes_batches);
        info!("ready: stream {} is there", subject::EVENTS_STREAM);
    }

    /// Sees that the stream is there, and returns whether it takes atomic batches as it is. A server that
    /// knows none does not say so, whatever the stream was created with.
    async fn try_provide_stream(&self) -> Result<bool, String> {
        let provided = stream::provide_events(&self.jetstream, &self.events).await;
        provided.map_err(|error| exit::chain(&error))?;
        let stream = self.jetstream.get_stream(subject::EVENTS_STREAM).await;
        let stream = stream.map_err(|error| exit::chain(&error))?;
        Ok(stream.cached_info().config.allow_atomic_publish)
    }

    /// Sends what is still in the client's buffers. Without a connection there is nobody to send to.
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
