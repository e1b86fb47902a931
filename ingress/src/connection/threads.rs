//! Threads that connections are served on.
//!
//! Owns how many there are, and which connection is whose. The first one is the caller's own, on which all
//! else of ingress runs too. Each has a queue that is first in, first out: what its connections publish
//! while it is their turn goes to NATS together. tokio's scheduler for several threads would run whoever is
//! woken at once, and move tasks from core to core.

use std::sync::{Arc, mpsc};
use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

/// Threads at most. They refuse forged deliveries by the ten thousand a second; accepted ones are the
/// broker's to bound.
const THREADS_MAX: usize = 4;

/// Connections that a thread is given before the next one gets any: few are served best side by side, next
/// to the connection to NATS.
const TOGETHER: usize = 8;

/// The threads. They end when this is dropped.
pub(super) struct Threads {
    all: Vec<Thread>,
    _stop: DropGuard,
}

struct Thread {
    runtime: Handle,
    /// Held by everything that runs on it.
    load: Arc<()>,
}

impl Threads {
    pub(super) fn start() -> Self {
        Self::of(thread::available_parallelism().map_or(1, |cores| cores.get().min(THREADS_MAX)))
    }

    /// So many, where the system has them to give.
    fn of(wanted: usize) -> Self {
        let stop = CancellationToken::new();
        let mut all = vec![Thread {
            runtime: Handle::current(),
            load: Arc::default(),
        }];
        while all.len() < wanted {
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
        let load = |thread: &&Thread| (Arc::strong_count(&thread.load) - 1) / TOGETHER;
        let Some(thread) = self.all.iter().min_by_key(load) else {
            return;
        };
        let load = Arc::clone(&thread.load);
        thread.runtime.spawn(async move {
            task.await;
            drop(load);
        });
    }
}

fn start(thread: thread::Builder, stop: CancellationToken) -> io::Result<Handle> {
    let (sender, started) = mpsc::channel();
    // Made on the thread itself: where there is none to be had, a runtime would be dropped here, on another
    // runtime's thread, and panic.
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
        .unwrap_or_else(|_| Err(io::Error::other("it ended at once")))
}

#[cfg(test)]
mod tests;
