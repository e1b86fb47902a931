//! Receives signals as a subscriber does, and records when they arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use futures_util::StreamExt as _;
use litestripe_contract::subject::{SIGNALS_STREAM, SUBSCRIPTION_CHANGED};
use litestripe_harness::nats;
use serde::Deserialize;
use tokio::time::Instant;

/// A subscriber that receives every signal sent after its start.
pub(crate) struct Listener {
    subscriber: async_nats::Subscriber,
}

/// The part of a signal that is read.
#[derive(Deserialize)]
struct Signal<'a> {
    #[serde(borrow)]
    event: Event<'a>,
}

#[derive(Deserialize)]
struct Event<'a> {
    id: &'a str,
}

/// Returns the id of the event that led to a signal.
pub(crate) fn event_id(payload: &[u8]) -> Option<String> {
    serde_json::from_slice::<Signal<'_>>(payload)
        .ok()
        .map(|signal| signal.event.id.to_owned())
}

impl Listener {
    pub(crate) async fn start(broker: &nats::Server) -> Result<Self, String> {
        Self::subscribe(broker, SUBSCRIPTION_CHANGED).await
    }

    pub(crate) async fn subscribe(
        broker: &nats::Server,
        subject: &'static str,
    ) -> Result<Self, String> {
        let client = broker.connect().await;
        let subscriber = client
            .subscribe(subject)
            .await
            .map_err(|problem| problem.to_string())?;
        client
            .flush()
            .await
            .map_err(|problem| problem.to_string())?;
        Ok(Self { subscriber })
    }

    /// Waits for `count` signals and returns the time from the first to the last.
    ///
    /// It starts with the first, because a consumer that was paused delivers up to one heartbeat
    /// late.
    pub(crate) async fn wait_for(&mut self, count: usize) -> Result<Duration, String> {
        let mut first = None;
        for received in 0..count {
            self.subscriber
                .next()
                .await
                .ok_or_else(|| format!("only {received} of {count} signals arrived"))?;
            first.get_or_insert_with(Instant::now);
        }
        Ok(first.map_or(Duration::ZERO, |first| first.elapsed()))
    }

    /// Receives `count` signals and returns when each arrived, by the number that `number_of` reads
    /// from it.
    pub(crate) async fn arrivals(
        &mut self,
        count: usize,
        number_of: impl Fn(&[u8]) -> Option<usize>,
    ) -> Result<Vec<Option<Instant>>, String> {
        let mut arrivals = vec![None; count];
        for received in 0..count {
            let message = self
                .subscriber
                .next()
                .await
                .ok_or_else(|| format!("only {received} of {count} signals arrived"))?;
            let now = Instant::now();
            let number = number_of(&message.payload)
                .ok_or("received a signal for an event that was not sent")?;
            if let Some(arrival) = arrivals.get_mut(number) {
                *arrival = Some(now);
            }
        }
        Ok(arrivals)
    }
}

/// An application that reads the stream of signals as docs/subscribing.md recommends: with a durable
/// consumer, and an ack for each signal.
pub(crate) struct Application {
    messages: pull::Stream,
    received: Arc<AtomicUsize>,
}

impl Application {
    pub(crate) async fn start(broker: &nats::Server) -> Result<Self, String> {
        let text = |problem: &dyn std::error::Error| problem.to_string();
        let jetstream = jetstream::new(broker.connect().await);
        let stream = jetstream.get_stream(SIGNALS_STREAM).await;
        let config = pull::Config {
            durable_name: Some("bench".to_owned()),
            ack_policy: AckPolicy::Explicit,
            filter_subject: SUBSCRIPTION_CHANGED.to_owned(),
            ..pull::Config::default()
        };
        let consumer = stream
            .map_err(|problem| text(&problem))?
            .create_consumer(config)
            .await
            .map_err(|problem| text(&problem))?;
        let messages = consumer
            .messages()
            .await
            .map_err(|problem| text(&problem))?;
        Ok(Self {
            messages,
            received: Arc::default(),
        })
    }

    /// How many signals it has received so far.
    pub(crate) fn received(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.received)
    }

    /// Receives `count` signals and returns when each arrived, by the number that `number_of` reads
    /// from it.
    pub(crate) async fn arrivals(
        &mut self,
        count: usize,
        number_of: impl Fn(&[u8]) -> Option<usize>,
    ) -> Result<Vec<Option<Instant>>, String> {
        let mut arrivals = vec![None; count];
        for received in 0..count {
            let message = self.messages.next().await;
            let message = message
                .ok_or_else(|| format!("only {received} of {count} signals arrived"))?
                .map_err(|problem| problem.to_string())?;
            let now = Instant::now();
            self.received.fetch_add(1, Ordering::Relaxed);
            let number = number_of(&message.payload)
                .ok_or("received a signal for an event that was not sent")?;
            let arrival = arrivals.get_mut(number);
            if arrival
                .ok_or("received a signal for an event that was not sent")?
                .replace(now)
                .is_some()
            {
                return Err(format!("received the signal of event {number} twice"));
            }
            message.ack().await.map_err(|problem| problem.to_string())?;
        }
        Ok(arrivals)
    }
}
