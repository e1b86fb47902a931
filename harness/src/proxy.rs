//! A TCP proxy on 127.0.0.1 that simulates network faults.
//!
//! Owns the faults of a connection between two healthy programs. May not know their protocol. After
//! it has dropped bytes, it passes no later bytes of that connection: when the fault ends, it
//! resets the connection, or leaves it silent for good ([`Mode::Blackhole`]).

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::port;

/// The most bytes that are passed on at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// How a proxy treats its existing and new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes everything on.
    Pass,
    /// Delays every chunk.
    Delay(Duration),
    /// Resets every connection and accepts none.
    Cut,
    /// Reads nothing in either direction, like a broken link that neither side has noticed.
    HalfOpen,
    /// Leaves existing connections half-open for good and passes new ones, like a host that
    /// vanished silently and was replaced.
    Strand,
    /// Drops everything in both directions and closes nothing, also after this mode has ended: the
    /// connections of that time stay silent until [`Self::Cut`]. Like a host or a firewall that
    /// swallows every packet.
    Blackhole,
    /// Passes requests on and drops the server's replies.
    DropReplies,
    /// Resets each connection after that many bytes, even in the middle of a message.
    ResetAfter(usize),
}

/// A listening proxy. Dropping it closes it and its connections.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    target: Arc<AtomicU16>,
    mode: watch::Sender<Mode>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy to that port of 127.0.0.1, which passes everything on.
    pub async fn start(target: u16) -> Self {
        let port = port::free();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .expect("the port is ours");
        let mode = watch::Sender::new(Mode::Pass);
        let target = Arc::new(AtomicU16::new(target));
        let task = tokio::spawn(accept(listener, Arc::clone(&target), mode.subscribe()));
        Self {
            port,
            target,
            mode,
            task,
        }
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Leads new connections to another port. Existing ones keep theirs, as after a change in DNS.
    pub fn point_to(&self, target: u16) {
        self.target.store(target, Ordering::Relaxed);
    }

    /// Changes how connections are treated from now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: Arc<AtomicU16>, mode: watch::Receiver<Mode>) {
    // Dropping it with this task closes the connections.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let target = target.load(Ordering::Relaxed);
                connections.spawn(connection(client, target, mode.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// How one direction of a connection ended.
#[derive(PartialEq, Eq)]
enum End {
    Closed,
    Reset,
}

async fn connection(mut client: TcpStream, target: u16, mut mode: watch::Receiver<Mode>) {
    let first = *mode.borrow_and_update();
    if first == Mode::Blackhole {
        // Not even the server notices this client.
        let _ = mode.wait_for(|mode| *mode == Mode::Cut).await;
    }
    if matches!(first, Mode::Blackhole | Mode::Cut) {
        let _ = client.set_zero_linger();
        return;
    }
    let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let passed = AtomicUsize::new(0);
    let is_new = first == Mode::Strand;
    let end = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::select! {
            biased;
            () = stranded(mode.clone()), if !is_new => std::future::pending().await,
            end = pass(from_client, to_server, false, mode.clone(), &passed) => end,
            end = pass(from_server, to_client, true, mode, &passed) => end,
        }
    };
    if end == End::Reset {
        // Then closing sends a reset and discards unsent bytes.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Returns when an existing connection must become half-open ([`Mode::Strand`]).
async fn stranded(mut mode: watch::Receiver<Mode>) {
    if mode.wait_for(|mode| *mode == Mode::Strand).await.is_err() {
        std::future::pending().await
    }
}

/// Passes the bytes of one direction of a connection until it ends.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    is_reply: bool,
    mut mode: watch::Receiver<Mode>,
    passed: &AtomicUsize,
) -> End {
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut has_dropped, mut is_lost) = (false, false);
    loop {
        let now = *mode.borrow_and_update();
        is_lost |= now == Mode::Blackhole;
        if now == Mode::Cut || (has_dropped && now != Mode::DropReplies) {
            return End::Reset;
        }
        let count = tokio::select! {
            biased;
            changed = mode.changed() => if changed.is_ok() { continue } else { return End::Reset },
            count = from.read(&mut chunk), if now != Mode::HalfOpen => count,
        };
        let Ok(count @ 1..) = count else {
            return End::Closed;
        };
        if is_lost {
            continue;
        }
        let mut part = &chunk[..count];
        match now {
            Mode::DropReplies if is_reply => {
                has_dropped = true;
                continue;
            }
            Mode::Delay(delay) => tokio::time::sleep(delay).await,
            Mode::ResetAfter(limit) => {
                let before = passed.fetch_add(count, Ordering::Relaxed);
                part = &chunk[..count.min(limit.saturating_sub(before))];
            }
            _ => {}
        }
        // The write may block, because the receiver may be frozen.
        let written = tokio::select! {
            written = to.write_all(part) => written,
            _ = mode.wait_for(|mode| *mode == Mode::Cut) => return End::Reset,
        };
        match written {
            Err(_) => return End::Closed,
            Ok(()) if part.len() < count => return End::Reset,
            Ok(()) => {}
        }
    }
}
