//! Sends requests over keep-alive connections, with as little CPU as possible, because the measured
//! programs run on the same machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};

use crate::pool::Requests;

/// How requests are sent.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) address: SocketAddr,
    pub(crate) connections: usize,
    /// How long requests are sent before they are measured.
    pub(crate) warmup: Duration,
    /// How long requests are measured.
    pub(crate) measured: Duration,
    /// The status that every answer must have.
    pub(crate) status: u16,
    /// Requests per second over all connections; `None` sends them as fast as they are answered.
    pub(crate) rate: Option<f64>,
}

/// The result of sending a load.
pub(crate) struct Answered {
    /// Requests that were answered while they were measured.
    pub(crate) count: usize,
    /// How long they were measured.
    pub(crate) took: Duration,
    /// The times from a request to its answer, in microseconds, sorted. With a rate, from the
    /// moment at which the request was due.
    pub(crate) latencies_us: Vec<u32>,
    /// How many requests were sent, the warm-up included.
    pub(crate) sent: usize,
    /// The numbers of the requests and when each was begun, unless they were repeated.
    pub(crate) begun: Vec<(usize, Instant)>,
}

impl Answered {
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 / self.took.as_secs_f64()
    }
}

/// Returns the value below which `share` of the sorted `values` lie.
pub(crate) fn percentile(values: &[u32], share: f64) -> f64 {
    let last = values.len().saturating_sub(1);
    values
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or_default()
        .into()
}

impl Load {
    /// Sends `requests`, each once, until the time is over or all are sent. With `repeat`, starts
    /// again with the first after the last.
    pub(crate) async fn send(
        &self,
        requests: &Arc<Requests>,
        repeat: bool,
    ) -> Result<Answered, String> {
        let begin = Instant::now();
        let from = begin + self.warmup;
        let next = Arc::new(AtomicUsize::new(0));
        let connections = (0..self.connections).map(|_| {
            let (load, requests, next) = (self.clone(), Arc::clone(requests), Arc::clone(&next));
            async move { load.connection(&requests, repeat, &next, begin).await }
        });
        let answered = try_join_all(connections).await?;
        let end = answered
            .iter()
            .filter_map(|one| one.last)
            .max()
            .unwrap_or(from);
        let (mut latencies_us, mut begun) = (Vec::new(), Vec::new());
        for one in answered {
            latencies_us.extend(one.latencies_us);
            begun.extend(one.begun);
        }
        latencies_us.sort_unstable();
        let sent =
            next.load(Ordering::Relaxed)
                .min(if repeat { usize::MAX } else { requests.len() });
        let took = end
            .saturating_duration_since(from)
            .max(Duration::from_millis(1));
        Ok(Answered {
            count: latencies_us.len(),
            took,
            latencies_us,
            sent,
            begun,
        })
    }

    async fn connection(
        &self,
        requests: &Requests,
        repeat: bool,
        next: &AtomicUsize,
        begin: Instant,
    ) -> Result<OfConnection, String> {
        let (from, until) = (begin + self.warmup, begin + self.warmup + self.measured);
        let failed = |problem: std::io::Error| format!("{}: {problem}", self.address);
        let mut stream = TcpStream::connect(self.address).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let mut answer = Vec::with_capacity(4096);
        let mut one = OfConnection::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let request = if repeat {
                requests.get(number % requests.len())
            } else {
                requests.get(number)
            };
            let Some(request) = request else {
                return Ok(one);
            };
            let mut due = Instant::now();
            if let Some(rate) = self.rate {
                due = begin + Duration::from_secs_f64(number as f64 / rate);
                sleep_until(due).await;
            }
            if due >= until {
                return Ok(one);
            }
            if !repeat {
                one.begun.push((number, Instant::now()));
            }
            stream.write_all(request).await.map_err(failed)?;
            let status = read_answer(&mut stream, &mut answer)
                .await
                .map_err(failed)?;
            if status != self.status {
                return Err(format!(
                    "answered {status}: {}",
                    String::from_utf8_lossy(&answer)
                ));
            }
            let now = Instant::now();
            if now >= from {
                one.latencies_us
                    .push(u32::try_from((now - due).as_micros()).unwrap_or(u32::MAX));
                one.last = Some(now);
            }
        }
    }
}

/// The result of one connection.
#[derive(Default)]
struct OfConnection {
    latencies_us: Vec<u32>,
    begun: Vec<(usize, Instant)>,
    last: Option<Instant>,
}

/// Reads one answer and returns its status.
async fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) -> std::io::Result<u16> {
    answer.clear();
    loop {
        if let Some((status, length)) = head(answer)
            && answer.len() >= length
        {
            return Ok(status);
        }
        if stream.read_buf(answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Returns the status and the length of an answer, body included, once its head is complete.
fn head(answer: &[u8]) -> Option<(u16, usize)> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.get(9..12)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    Some((status, end + length.unwrap_or(0)))
}

/// Gets a page and returns its status and body.
pub(crate) async fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes())
        .await?;
    let mut answer = Vec::new();
    let status = read_answer(&mut stream, &mut answer).await?;
    Ok((status, String::from_utf8_lossy(&answer).into_owned()))
}

/// Waits until a program listens on `address`.
pub(crate) async fn until_listening(address: SocketAddr) -> Result<(), String> {
    for _ in 0..1_000 {
        if TcpStream::connect(address).await.is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(10)).await;
    }
    Err(format!("no program listens on {address}"))
}
