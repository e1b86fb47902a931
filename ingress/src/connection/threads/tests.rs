use std::collections::HashSet;

use tokio::sync::mpsc;

use super::{Arc, CancellationToken, TOGETHER, Threads, start, thread};

#[tokio::test]
async fn a_thread_that_is_not_to_be_had_is_an_error() {
    let larger_than_memory_can_be = thread::Builder::new().stack_size(1 << 47);
    assert!(start(larger_than_memory_can_be, CancellationToken::new()).is_err());
}

#[tokio::test]
async fn few_are_together_and_many_are_spread() {
    let threads = Threads::of(2);
    let (sender, mut places) = mpsc::channel(TOGETHER);
    let release = CancellationToken::new();
    let mut places_of = async |tasks: usize| {
        for _ in 0..tasks {
            let (sender, release) = (sender.clone(), release.clone());
            threads.spawn(async move {
                let _ = sender.send(thread::current().id()).await;
                release.cancelled().await;
            });
        }
        let mut seen = HashSet::new();
        for _ in 0..tasks {
            seen.extend(places.recv().await);
        }
        seen
    };
    let own = HashSet::from([thread::current().id()]);
    assert_eq!(places_of(TOGETHER).await, own);
    let other = places_of(TOGETHER).await;
    assert_eq!(other.len(), 1);
    assert!(other.is_disjoint(&own));
    assert_eq!(places_of(TOGETHER).await, own);
    // Those that ended do not count.
    release.cancel();
    while threads
        .all
        .iter()
        .any(|thread| Arc::strong_count(&thread.load) > 1)
    {
        tokio::task::yield_now().await;
    }
    assert_eq!(places_of(TOGETHER).await, own);
}
