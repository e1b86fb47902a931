//! The server vanishes, and what stands in front of it does not say so.

use litestripe_harness::eventually;
use litestripe_harness::proxy::{Mode, Proxy};

use super::{DEADLINE, deliver_story, servers, start, url_at};

#[tokio::test]
async fn starting_worker_waits_behind_a_proxy_whose_server_is_away() {
    let mut bridge = servers().await;
    let proxy = Proxy::start(bridge.database.server().port()).await;
    bridge.database.server().stop().await;
    let url = url_at(&bridge, proxy.port());
    bridge.set_worker("DATABASE_URL", url);
    // The proxy accepts the connection and closes it.
    bridge
        .start_worker()
        .wait_for_log("waiting for the database", DEADLINE)
        .await;

    bridge.database.resume().await;

    bridge.workers[0].wait_until_ready().await;
}

#[tokio::test]
async fn worker_replaces_connections_that_have_fallen_silent() {
    let mut bridge = servers().await;
    let proxy = Proxy::start(bridge.database.server().port()).await;
    let url = url_at(&bridge, proxy.port());
    start(&mut bridge, url).await;
    deliver_story(&bridge).await;
    bridge.wait_until_applied().await;

    proxy.set(Mode::Blackhole);
    deliver_story(&bridge).await;
    let worker = &bridge.workers[0];
    // More looks than the worker has connections.
    for _ in 0..12 {
        let (status, why) = worker.page("/readyz").await.expect("it answers");
        assert_eq!((status, why.contains("database")), (503, true), "{why}");
    }
    worker
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    proxy.set(Mode::Pass);

    bridge.check().await;
    worker.wait_until_ready().await;
    // The server ends the sessions that it waits for only after hours. The worker has left them.
    eventually("a new connection", DEADLINE, async || {
        match worker.count_in_log("the database is back") {
            0 => Err(worker.log()),
            _ => Ok(()),
        }
    })
    .await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}
