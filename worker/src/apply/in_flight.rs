//! Batches of live events in flight.
//!
//! Owns which batches are applied at the same time, and when a small one waits for more messages.
//! `apply` decides what is done with one batch, and `recover::replay` when a replay's batches
//! start.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{self, Applier, Decoded};
use crate::stream::consumer::Batches;

/// The smallest batch that is applied beside another one. A smaller one first gathers more
/// messages, because a transaction costs as much as some twenty events.
const BESIDE_ANOTHER_MIN: usize = 64;

/// How long a small batch gathers, at most: the batch that is being applied may be held up.
const GATHER_MAX: Duration = Duration::from_millis(20);

/// Applies the batches until `shutdown` or until the consumer is gone. Two are applied at the same
/// time if the second one is large enough and they have no id in common.
pub async fn apply_all(
    mut batches: Batches,
    limit: usize,
    applier: &Applier,
    shutdown: &CancellationToken,
) {
    let mut applying = FuturesUnordered::new();
    let mut busy: Vec<Arc<HashSet<String>>> = Vec::new();
    let mut next: Option<Decoded> = None;
    let mut gathered_until = Instant::now();
    loop {
        let is_gathering = Instant::now() < gathered_until;
        // Behind a batch that is held up, `next` stops growing, so that other workers get the rest.
        let may_fetch = next.is_none() || is_gathering;
        let may_start = |next: &mut Decoded| {
            let waits =
                is_gathering && !busy.is_empty() && next.count() < BESIDE_ANOTHER_MIN.min(limit);
            !waits && busy.iter().all(|busy| busy.is_disjoint(next.entity_ids()))
        };
        if let Some(decoded) = next.take_if(may_start) {
            let entity_ids = Arc::new(decoded.entity_ids().clone());
            busy.push(Arc::clone(&entity_ids));
            applying.push(async move {
                apply::apply(applier, decoded, shutdown).await;
                entity_ids
            });
        }
        let room = limit - next.as_ref().map_or(0, Decoded::count);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(applied) = applying.next() => busy.retain(|other| !Arc::ptr_eq(other, &applied)),
            () = tokio::time::sleep_until(gathered_until), if is_gathering && next.is_some() => {}
            batch = batches.next_at_most(room), if room > 0 && may_fetch && applying.len() < apply::IN_FLIGHT => {
                let Some(batch) = batch else { break };
                let decoded = Decoded::new(batch, &applier.metadata_keys);
                match &mut next {
                    Some(next) => next.append(decoded),
                    None => {
                        next = Some(decoded);
                        gathered_until = Instant::now() + GATHER_MAX;
                    }
                }
            }
        }
    }
    let handing_back = async {
        if let Some(decoded) = next {
            decoded.hand_back().await;
        }
        if shutdown.is_cancelled() {
            batches.close().await;
        }
    };
    let finishing = async { while applying.next().await.is_some() {} };
    tokio::join!(handing_back, finishing);
}
