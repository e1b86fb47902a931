//! How batches of live events follow each other.
//!
//! Owns which of them are applied at the same time, and when a small one waits for more. What is done to
//! one is `batch`'s; how those of a replay follow each other, `replay/apply`'s.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{self, Applier, Decoded};
use crate::stream::consumer::Batches;

/// Messages from which a batch is applied beside another one. Fewer wait for those that come meanwhile: a
/// transaction costs as much as some twenty events.
const WORTHWHILE: usize = 64;

/// How long they wait, at most: the batch before them may be held up.
const GATHER_MAX: Duration = Duration::from_millis(20);

/// Applies a batch while the database has another one, if it is worth it and they concern nothing in common.
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
        let is_patient = Instant::now() < gathered_until;
        // What conflicts with a batch that is held up leaves the others to other workers.
        let gathers = next.is_none() || is_patient;
        let may_start = |next: &mut Decoded| {
            let waits = is_patient && !busy.is_empty() && next.count() < WORTHWHILE.min(limit);
            !waits && busy.iter().all(|busy| busy.is_disjoint(next.entity_ids()))
        };
        if let Some(decoded) = next.take_if(may_start) {
            let concerns = Arc::new(decoded.entity_ids().clone());
            busy.push(Arc::clone(&concerns));
            applying.push(async move {
                apply::apply(applier, decoded, shutdown).await;
                concerns
            });
        }
        let room = limit - next.as_ref().map_or(0, Decoded::count);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(applied) = applying.next() => busy.retain(|other| !Arc::ptr_eq(other, &applied)),
            () = tokio::time::sleep_until(gathered_until), if is_patient && next.is_some() => {}
            batch = batches.next_at_most(room), if room > 0 && gathers && applying.len() < apply::IN_FLIGHT => {
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
