//! How long connections are kept, and for whom they are closed.

use std::process::Command;

use litestripe_harness::eventually;
use litestripe_harness::program::Program;
use reqwest::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{DEADLINE, Ingress, SECRET, Setup, read_to_end};

/// Usual proxies keep a connection for 60 s and lose the request that meets its end.
#[tokio::test]
async fn a_connection_may_be_idle_for_longer_than_a_head_may_take() {
    let setup = Setup::new().await;
    let mut idle = connect(&setup.ingress).await;
    assert!(is_served(&mut idle).await);
    // Ends because its head takes too long.
    let mut silent = connect(&setup.ingress).await;
    read_to_end(&mut silent).await;
    assert!(is_served(&mut idle).await);
}

#[tokio::test]
async fn a_head_after_an_idle_time_has_its_own_deadline() {
    let setup = Setup::new().await;
    let mut slow = connect(&setup.ingress).await;
    assert!(is_served(&mut slow).await);
    slow.write_all(b"GET /healthz HTTP/1.1\r\n")
        .await
        .expect("ingress reads");
    assert_eq!(read_to_end(&mut slow).await, "");
}

#[tokio::test]
async fn the_longest_idle_connections_are_closed_for_new_clients() {
    // Ingress keeps 1,024 connections, or fewer if the system gives it fewer sockets.
    const CLIENTS: usize = 1_100;
    set_limit_of_files(std::process::id(), 4_096);
    let setup = Setup::new().await;
    let mut first = connect(&setup.ingress).await;
    assert!(is_served(&mut first).await);
    let mut others = Vec::new();
    for _ in 1..CLIENTS {
        let mut other = connect(&setup.ingress).await;
        assert!(is_served(&mut other).await, "client {}", others.len());
        others.push(other);
    }
    assert_eq!(read_to_end(&mut first).await, "");
    assert!(is_served(others.last_mut().expect("there are many")).await);
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
}

#[tokio::test]
async fn idle_connections_are_closed_when_the_system_has_no_more_sockets() {
    let setup = Setup::new().await;
    set_limit_of_files(setup.ingress.program.id(), 60);
    let mut idle = Vec::new();
    for _ in 0..100 {
        let mut next = connect(&setup.ingress).await;
        assert!(is_served(&mut next).await, "client {}", idle.len());
        idle.push(next);
    }
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
}

#[tokio::test]
async fn the_address_to_listen_on_may_be_a_host_name() {
    let broker = litestripe_harness::nats::Server::start().await;
    let port = litestripe_harness::port::free();
    let ingress = Ingress::start(&broker, |launch| {
        launch
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("LITESTRIPE_LISTEN", format!("localhost:{port}"))
    });
    let worker = Program::named("litestripe-worker")
        .env("NATS_URL", broker.url())
        .env("LITESTRIPE_WORKER_LISTEN", "localhost:0")
        .start();
    worker
        .wait_for_log("consuming STRIPE_EVENTS", DEADLINE)
        .await;
    eventually("ingress to answer", DEADLINE, async || {
        let answer = ingress
            .client
            .get(format!("http://localhost:{port}/healthz"))
            .send()
            .await;
        answer.map(drop).map_err(|error| error.to_string())
    })
    .await;

    let unknown = Program::named("litestripe-worker")
        .env("NATS_URL", broker.url())
        .env("LITESTRIPE_WORKER_LISTEN", "no-such-host.invalid:9090")
        .run(DEADLINE)
        .await;
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    assert!(
        unknown.stderr.contains("no-such-host.invalid:9090"),
        "{unknown:?}"
    );
    assert!(
        unknown.stderr.contains("LITESTRIPE_WORKER_LISTEN"),
        "{unknown:?}"
    );
}

#[tokio::test]
async fn event_types_that_no_worker_handles_are_told_at_the_start() {
    let broker = litestripe_harness::nats::Server::start().await;
    let types = "customer.subscription.*, customer.subscription.update, invoice.paid";
    let ingress = Ingress::start(&broker, |launch| {
        launch
            .env("STRIPE_WEBHOOK_SECRET", SECRET)
            .env("LITESTRIPE_EVENT_TYPES", types)
    });
    ingress.until_ready().await;
    let log = ingress.program.log();
    let warnings: Vec<_> = log
        .lines()
        .filter(|line| line.contains("LITESTRIPE_EVENT_TYPES"))
        .collect();
    assert_eq!(warnings.len(), 2, "{log}");
    assert!(
        warnings[0].contains("did you mean customer.subscription.updated?"),
        "{log}"
    );
    assert!(
        warnings[1].contains("invoice.paid is stored, but no worker handles it"),
        "{log}"
    );
}

async fn connect(ingress: &Ingress) -> TcpStream {
    TcpStream::connect(ingress.address)
        .await
        .expect("ingress listens")
}

/// Asks for a page and leaves the connection open. Returns whether it was answered.
async fn is_served(stream: &mut TcpStream) -> bool {
    let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request).await.expect("ingress reads");
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        let read = tokio::time::timeout(DEADLINE, stream.read_buf(&mut answer)).await;
        if read.expect("it answers in time").expect("it is not reset") == 0 {
            return false;
        }
    }
    answer.starts_with(b"HTTP/1.1 200 ")
}

/// Sets the limit of open files of a running process, as far as the system allows.
fn set_limit_of_files(process: u32, count: u32) {
    let limit = Command::new("prlimit")
        .args(["--pid", &process.to_string(), &format!("--nofile={count}:")])
        .output();
    limit.expect("this test needs `prlimit` of util-linux");
}
