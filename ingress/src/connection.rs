//! The HTTP server: limits on connections, their timeouts, and how they end.
//!
//! Owns the accept loop and the sockets. May not know requests or answers. warp's own server has
//! neither a limit on connections nor timeouts, so this replaces it. Invariant: every state of a
//! connection has a deadline, so that no client can hold a connection for ever.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::CONNECTION;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use litestripe_contract::systemd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::threads::Threads;
use crate::fail_point::fail_point;
use crate::throttle::Throttle;

mod threads;

/// The most open connections. For the next client the one that has been idle longest is closed; if
/// none is idle, it waits in the kernel's backlog.
const CONNECTIONS_MAX: usize = 1024;

/// How long a request's head may take, the first one counted from the beginning of the connection.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// How long a connection may be idle between two requests. Longer than the usual proxy keeps one
/// (60 s: nginx, "keepalive_timeout" of an upstream; AWS, "Connection idle timeout"), so that the
/// proxy closes it, not we while a request is on its way.
const IDLE_WITHIN: Duration = Duration::from_secs(75);

/// The largest head of a request, in bytes. Stripe's signature header takes a few hundred.
const HEAD_BYTES_MAX: usize = 32 << 10;

/// The most bytes that are read ahead for each connection.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// How long a client may leave an answer unread.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// For how long the rest of a refused body is read and dropped.
const LINGER: Duration = Duration::from_secs(5);

/// How long requests in flight may take after the program was asked to stop.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// How long to wait after a connection could not be accepted, as when the system has no more
/// sockets.
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Serves until `shutdown`, then finishes the requests in flight. Meanwhile tells systemd's watchdog
/// that the threads are alive.
pub(crate) async fn serve<S, B>(listener: TcpListener, service: S, shutdown: &CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: hyper::body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let threads = Threads::start();
    let serving = async {
        let http = http();
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let full = Arc::new(Notify::new());
        let graceful = GracefulShutdown::new();
        let failures = Throttle::new(Duration::from_secs(60));
        while let Some(accepted) = shutdown
            .run_until_cancelled(accept(&listener, &connections, &full))
            .await
        {
            match accepted {
                Ok((stream, permit)) => {
                    let (http, service, full) = (http.clone(), service.clone(), Arc::clone(&full));
                    let connection =
                        serve_connection(http, stream, service, graceful.watcher(), full);
                    threads.spawn(async move {
                        let _permit = permit;
                        connection.await;
                    });
                }
                Err(error) => {
                    full.notify_one();
                    if let Some(omitted) = failures.admit(std::time::Instant::now()) {
                        warn!(omitted, "cannot accept a connection: {error}");
                    }
                    sleep(ACCEPT_RETRY_AFTER).await;
                }
            }
        }
        drop(listener);
        if timeout(STOP_WITHIN, graceful.shutdown()).await.is_err() {
            let open = CONNECTIONS_MAX - connections.available_permits();
            warn!(
                open,
                "{open} connections are still open after {} s; exiting without waiting for them",
                STOP_WITHIN.as_secs()
            );
        }
    };
    systemd::watched(serving, async || threads.answer().await).await;
}

async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
    full: &Notify,
) -> io::Result<(std::net::TcpStream, OwnedSemaphorePermit)> {
    fail_point!("ingress::accepting");
    if connections.available_permits() == 0 {
        full.notify_one();
    }
    let permit = Arc::clone(connections)
        .acquire_owned()
        .await
        .expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream.into_std()?, permit))
}

fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    // hyper has one timeout for a head and for the idle time before it: `Socket` has two.
    http.header_read_timeout(None)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        // Answers are short: copying one behind its head is cheaper than a vectored write.
        .writev(false);
    http
}

async fn serve_connection<S, B>(
    http: http1::Builder,
    stream: std::net::TcpStream,
    service: S,
    watcher: Watcher,
    full: Arc<Notify>,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    B: hyper::body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fail_point!("ingress::connected");
    // Registers the socket with the thread that serves it.
    let stream = match TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => return debug!("connection not served: {error}"),
    };
    let request = Arc::new(CurrentRequest::default());
    let socket = Socket {
        stream,
        request: Arc::clone(&request),
        awaits: Awaits::Head,
        read_deadline: Box::pin(sleep(HEAD_WITHIN)),
        full,
        write_deadline: None,
        linger_deadline: None,
    };
    let service = service_fn(move |head| {
        request.is_served.store(true, Ordering::Relaxed);
        let response = service.call(head);
        let request = Arc::clone(&request);
        async move {
            let response = response.await?;
            request.lingers.store(closes(&response), Ordering::Relaxed);
            request.is_served.store(false, Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    if let Err(error) = watcher
        .watch(http.serve_connection(TokioIo::new(socket), service))
        .await
    {
        debug!("connection ended: {error}");
    }
}

/// Whether the answer closes its connection. If so, the request may not have been read to its end.
fn closes<B>(response: &Response<B>) -> bool {
    response
        .headers()
        .get(CONNECTION)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"))
}

/// What a socket knows of the requests on it.
#[derive(Default)]
struct CurrentRequest {
    /// Whether a head has been read whose answer is not made yet.
    is_served: AtomicBool,
    /// Whether the last answer closes the connection.
    lingers: AtomicBool,
}

/// What a client is expected to send.
enum Awaits {
    /// The rest of a head, within [`HEAD_WITHIN`].
    Head,
    /// A next request, within [`IDLE_WITHIN`]. The future is ready once room is needed for another
    /// client; of all idle connections, `Notify` wakes the one that has waited longest.
    NextRequest(Pin<Box<OwnedNotified>>),
    /// Nothing with a deadline of the socket: a body has its own.
    Nothing,
}

/// A client's socket.
///
/// It does three things that hyper leaves to its transport. It gives reading a head, idle times and
/// writing a deadline. And it closes so that the client still gets the answer: closing a socket
/// with unread bytes resets the connection, and a client that is still sending its refused body
/// would see the reset instead of the answer.
struct Socket {
    stream: TcpStream,
    request: Arc<CurrentRequest>,
    awaits: Awaits,
    /// The deadline of what is awaited.
    read_deadline: Pin<Box<Sleep>>,
    /// Notified when a client waits for room.
    full: Arc<Notify>,
    write_deadline: Option<Pin<Box<Sleep>>>,
    linger_deadline: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    fn expect(&mut self, awaits: Awaits, within: Duration) {
        self.awaits = awaits;
        self.read_deadline.as_mut().reset(Instant::now() + within);
    }

    /// Ends the connection if what is awaited has not come in time. An idle one ends like one that
    /// the client has closed.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let is_late = self.read_deadline.as_mut().poll(cx).is_ready();
        match &mut self.awaits {
            Awaits::Head if is_late => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Awaits::NextRequest(full) => match full.as_mut().poll(cx) {
                Poll::Pending if !is_late => Poll::Pending,
                _ => Poll::Ready(Ok(())),
            },
            _ => Poll::Pending,
        }
    }

    /// Fails a write that has been pending for [`WRITE_WITHIN`].
    fn with_write_deadline<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_deadline = None;
            return written;
        }
        let deadline = self
            .write_deadline
            .get_or_insert_with(|| Box::pin(sleep(WRITE_WITHIN)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.request.is_served.load(Ordering::Relaxed) {
            this.awaits = Awaits::Nothing;
            return Pin::new(&mut this.stream).poll_read(cx, buffer);
        }
        if matches!(this.awaits, Awaits::Nothing) {
            let full = Box::pin(Arc::clone(&this.full).notified_owned());
            this.expect(Awaits::NextRequest(full), IDLE_WITHIN);
        }
        if Pin::new(&mut this.stream)
            .poll_read(cx, buffer)?
            .is_pending()
        {
            return this.poll_overdue(cx);
        }
        if matches!(this.awaits, Awaits::NextRequest(_)) {
            this.expect(Awaits::Head, HEAD_WITHIN);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.with_write_deadline(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.request.lingers.load(Ordering::Relaxed) {
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.linger_deadline.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let end = Instant::now() + LINGER;
        let deadline = this
            .linger_deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        let mut dropped = [0; 8 << 10];
        loop {
            if deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::new(&mut dropped);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
