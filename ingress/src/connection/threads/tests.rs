use std::collections::HashSet;

use tokio::sync::mpsc;

use super::{Arc, CONNECTIONS_TOGETHER, CancellationToken, Threads, start, thread};

#[tokio::test]
async fn a_thread_that_cannot_be_started_is_an_error() {
    let larger_than_memory_can_be = thread::Builder::new().stack_size(1 << 47);
    assert!(start(larger_than_memory_can_be, CancellationToken::new()).is_err());
}

#[tokio::test]
async fn few_connections_share_a_thread_and_many_are_spread() {
    let threads = Threads::with_count(2);
    let (sender, mut thread_ids) = mpsc::channel(CONNECTIONS_TOGETHER);
    let release = CancellationToken::new();
    let mut threads_that_get = async |tasks: usize| {
        for _ in 0..tasks {
            let (sender, release) = (sender.clone(), release.clone());
            threads.spawn(async move {
                let _ = sender.send(thread::current().id()).await;
                release.cancelled().await;
            });
        }
        let mut seen = HashSet::new();
        for _ in 0..tasks {
            seen.extend(thread_ids.recv().await);
        }
        seen
    };
    let own = HashSet::from([thread::current().id()]);
    assert_eq!(threads_that_get(CONNECTIONS_TOGETHER).await, own);
    let other = threads_that_get(CONNECTIONS_TOGETHER).await;
    assert_eq!(other.len(), 1);
    assert!(other.is_disjoint(&own));
    assert_eq!(threads_that_get(CONNECTIONS_TOGETHER).await, own);
    // Connections that ended do not count.
    release.cancel();
    while threads
        .all
        .iter()
        .any(|thread| Arc::strong_count(&thread.load) > 1)
    {
        tokio::task::yield_now().await;
    }
    assert_eq!(threads_that_get(CONNECTIONS_TOGETHER).await, own);
}
