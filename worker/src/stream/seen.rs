//! Streams and the durable consumer as the broker describes them.

use std::time::Duration;

use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::{self, consumer, stream};
use litestripe_contract::subject::{
    DEAD_LETTERS_STREAM, EVENTS_STREAM, KV_STREAM, SIGNALS_STREAM, WORKER_CONSUMER,
};

use super::{progress, scan};

/// What the broker holds. What does not exist is left out.
pub(crate) struct Seen {
    streams: Vec<stream::Info>,
    pub(crate) consumer: Option<consumer::Info>,
    /// How long ago the broker stored the oldest event that is not applied, by its clock; zero if all
    /// are applied. `None` without the consumer.
    pub(crate) oldest_unapplied: Option<Duration>,
}

impl Seen {
    /// Asks the broker.
    pub(crate) async fn read(
        jetstream: &jetstream::Context,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let mut seen = Self {
            streams: Vec::new(),
            consumer: None,
            oldest_unapplied: None,
        };
        if let Some(events) = scan::find(jetstream, EVENTS_STREAM).await? {
            match events.consumer_info(WORKER_CONSUMER).await {
                Ok(info) => {
                    seen.oldest_unapplied =
                        Some(progress::oldest_unapplied(jetstream, &info).await?);
                    seen.consumer = Some(info);
                }
                Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
            // After the consumer, which may not be ahead of its stream.
            seen.streams.push(events.get_info().await?);
        }
        for name in [SIGNALS_STREAM, DEAD_LETTERS_STREAM, KV_STREAM] {
            let stream = scan::find(jetstream, name).await?;
            seen.streams
                .extend(stream.map(|stream| stream.cached_info().clone()));
        }
        Ok(seen)
    }

    pub(crate) fn stream(&self, name: &str) -> Option<&stream::Info> {
        self.streams.iter().find(|info| info.config.name == name)
    }
}
