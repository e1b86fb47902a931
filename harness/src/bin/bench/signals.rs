//! Signals as a subscriber gets them, and when.

use std::time::Duration;

use futures_util::StreamExt as _;
use litestripe_contract::subject::SUBSCRIPTION_CHANGED;
use litestripe_harness::nats;
use serde::Deserialize;
use tokio::time::Instant;

/// Listens from its start on.
pub(crate) struct Listener {
    subscriber: async_nats::Subscriber,
}

/// What is read of a signal.
#[derive(Deserialize)]
struct Signal<'a> {
    #[serde(borrow)]
    event: Event<'a>,
}

#[derive(Deserialize)]
struct Event<'a> {
    id: &'a str,
}

/// The id of the event that a signal tells of.
pub(crate) fn event_id(payload: &[u8]) -> Option<String> {
    serde_json::from_slice::<Signal<'_>>(payload)
        .ok()
        .map(|signal| signal.event.id.to_owned())
}

impl Listener {
    pub(crate) async fn start(broker: &nats::Server) -> Result<Self, String> {
        Self::on(broker, SUBSCRIPTION_CHANGED).await
    }

    pub(crate) async fn on(broker: &nats::Server, subject: &'static str) -> Result<Self, String> {
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

    /// Returns once so many have come: the time from the first of them to the last.
    ///
    /// A consumer that was paused delivers up to one heartbeat late; that is not what is measured.
    pub(crate) async fn wait_for(&mut self, count: usize) -> Result<Duration, String> {
        let mut first = None;
        for received in 0..count {
            self.subscriber
                .next()
                .await
                .ok_or_else(|| format!("{received} of {count} signals came"))?;
            first.get_or_insert_with(Instant::now);
        }
        Ok(first.map_or(Duration::ZERO, |first| first.elapsed()))
    }

    /// Takes so many, and tells `number_of` each when it came.
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
                .ok_or_else(|| format!("{received} of {count} signals came"))?;
            let now = Instant::now();
            let number =
                number_of(&message.payload).ok_or("a signal of an event that nobody sent")?;
            if let Some(arrival) = arrivals.get_mut(number) {
                *arrival = Some(now);
            }
        }
        Ok(arrivals)
    }
}
