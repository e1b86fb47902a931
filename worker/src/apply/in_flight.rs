//! Batches of live events in flight.
//!
//! Owns which batches are applied at the same time; `gather` decides when a small one waits for more
//! messages. `apply` decides what is done with one batch, and `recover::replay` when a replay's
//! batches start.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{self, Applier, Decoded};
use crate::fail_point::fail_point;
use crate::stream::consumer::Batches;

mod gather;

use gather::Gather;

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
    let mut gather = Gather::new(limit, Instant::now());
    loop {
        fail_point!("worker::consuming");
        let now = Instant::now();
        // Behind a batch that is held up, `next` stops growing, so that other workers get the rest.
        let may_fetch = next.is_none() || gather.is_open(now);
        let are_synced = applier.signal_costs.are_synced();
        let may_start = |next: &mut Decoded| {
            !gather.waits(next.count(), !busy.is_empty(), are_synced, now)
                && busy.iter().all(|busy| busy.is_disjoint(next.entity_ids()))
        };
        if let Some(decoded) = next.take_if(may_start) {
            gather.record_start(now);
            let entity_ids = Arc::new(decoded.entity_ids().clone());
            busy.push(Arc::clone(&entity_ids));
            applying.push(async move {
                apply::apply(applier, decoded, shutdown).await;
                (entity_ids, now.elapsed())
            });
        }
        let room = limit - next.as_ref().map_or(0, Decoded::count);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some((applied, took)) = applying.next() => {
                busy.retain(|other| !Arc::ptr_eq(other, &applied));
                gather.record_end(took);
            }
            () = tokio::time::sleep_until(gather.until(!busy.is_empty())), if next.is_some() && gather.is_open(now) => {}
            batch = batches.next_at_most(room), if room > 0 && may_fetch && applying.len() < apply::IN_FLIGHT => {
                let Some(batch) = batch else { break };
                gather.record_arrival(batch.count(), next.is_none(), Instant::now());
                let decoded = Decoded::new(batch, &applier.metadata_keys);
                match &mut next {
                    Some(next) => next.append(decoded),
                    None => next = Some(decoded),
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
