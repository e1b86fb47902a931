//! The threads that serve connections.
//!
//! Owns how many there are, and which thread serves a connection. The first is the caller's own
//! thread, which also runs everything else in ingress. Each thread runs its tasks first in, first
//! out, so that the messages that its connections publish in one round are written to NATS
//! together. tokio's multi-threaded scheduler would run a woken task at once and move tasks between
//! cores.

use std::sync::{Arc, mpsc};
use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

/// The most threads. These many refuse tens of thousands of forged deliveries a second; accepted
/// ones are limited by the broker.
const THREADS_MAX: usize = 4;

/// Connections that a thread gets before the next thread gets any. A few connections are served
/// fastest on one thread, the one of the connection to NATS.
const CONNECTIONS_TOGETHER: usize = 32;

/// The threads, which end when this is dropped.
pub(super) struct Threads {
    all: Vec<Thread>,
    _stop: DropGuard,
}

struct Thread {
    runtime: Handle,
    /// Counts the connections on the thread: each holds a reference.
    load: Arc<()>,
}

impl Threads {
    pub(super) fn start() -> Self {
        Self::with_count(
            thread::available_parallelism().map_or(1, |cores| cores.get().min(THREADS_MAX)),
        )
    }

    /// Starts threads up to `count`, or fewer if the system refuses.
    fn with_count(count: usize) -> Self {
        let stop = CancellationToken::new();
        let mut all = vec![Thread {
            runtime: Handle::current(),
            load: Arc::default(),
        }];
        while all.len() < count {
            match start(thread::Builder::new(), stop.clone()) {
                Ok(runtime) => all.push(Thread {
                    runtime,
                    load: Arc::default(),
                }),
                Err(error) => {
                    warn!(
                        "cannot start another thread, serving on {}: {error}",
                        all.len()
                    );
                    break;
                }
            }
        }
        Self {
            all,
            _stop: stop.drop_guard(),
        }
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let load = |thread: &&Thread| (Arc::strong_count(&thread.load) - 1) / CONNECTIONS_TOGETHER;
        let Some(thread) = self.all.iter().min_by_key(load) else {
            return;
        };
        let load = Arc::clone(&thread.load);
        thread.runtime.spawn(async move {
            task.await;
            drop(load);
        });
    }

    /// Returns once every thread has done a task, so never if one of them is stuck.
    pub(super) async fn answer(&self) {
        for thread in &self.all {
            // Fails only if the thread has ended, as it does when this is dropped.
            let _ = thread.runtime.spawn(async {}).await;
        }
    }
}

fn start(thread: thread::Builder, stop: CancellationToken) -> io::Result<Handle> {
    let (sender, started) = mpsc::channel();
    // The runtime is made on its own thread. Made here, it would be dropped here if the thread
    // cannot be started, and dropping a runtime on another runtime's thread panics.
    let serve = move || match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let _ = sender.send(Ok(runtime.handle().clone()));
            runtime.block_on(stop.cancelled());
        }
        Err(error) => {
            let _ = sender.send(Err(error));
        }
    };
    thread.name("connections".to_owned()).spawn(serve)?;
    started
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")))
}

#[cfg(test)]
mod tests;
