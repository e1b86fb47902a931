//! The durable consumer's position, if it is ahead of its stream.
//!
//! Owns how that is seen and mended. A NATS server that loses its last events, in a crash or by the
//! restore of a backup, may still know that they were delivered. It would skip the new events that
//! get their sequences. Then the durable is made anew and delivers all that the stream holds, which
//! is harmless because merging is idempotent.

use std::error::Error;
use std::time::Duration;

use async_nats::jetstream::consumer::{Config, DeliverPolicy};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::{self};
use litestripe_contract::exit;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use tracing::{debug, warn};

use super::scan;

/// How long the server of a stream may lag behind that of a consumer, in a cluster.
const LAG_MAX: Duration = Duration::from_millis(100);

/// Makes the durable anew, as it was configured, if it is ahead of the stream. Returns whether it
/// was. A failure is left to the next attempt: a running worker looks regularly.
pub(crate) async fn mend(jetstream: &jetstream::Context) -> bool {
    try_mend(jetstream).await.unwrap_or_else(|error| {
        let error = exit::chain(error.as_ref());
        debug!("cannot compare the consumer with its stream: {error}");
        false
    })
}

async fn try_mend(jetstream: &jetstream::Context) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let Some(events) = scan::find(jetstream, EVENTS_STREAM).await? else {
        return Ok(false);
    };
    let info = match events.consumer_info(WORKER_CONSUMER).await {
        Ok(info) => info,
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // The stream's end is read after the position, so that an event that arrives in between does
    // not count as missing.
    let delivered = info.delivered.stream_sequence;
    let mut end = events.get_info().await?.state.last_sequence;
    if delivered > end {
        tokio::time::sleep(LAG_MAX).await;
        end = events.get_info().await?.state.last_sequence;
    }
    if delivered <= end {
        return Ok(false);
    }
    warn!(
        "the consumer {WORKER_CONSUMER} is ahead of its stream: it has delivered up to event {delivered}, and \
         {EVENTS_STREAM} ends at {end}. The NATS server has lost its last events or was restored from a backup. The \
         consumer is made anew, so that no new event is skipped, and applies all that the stream holds again, to the \
         same rows"
    );
    events.delete_consumer(WORKER_CONSUMER).await?;
    let anew = Config {
        deliver_policy: DeliverPolicy::All,
        ..info.config
    };
    events.create_consumer(anew).await?;
    Ok(true)
}
