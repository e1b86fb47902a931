//! The primary changes while the worker is connected.

use litestripe_harness::postgres::{Options, Server};
use litestripe_harness::proxy::Proxy;

use super::{DEADLINE, deliver_story, servers, start, url_at};

async fn standby_of(primary: &Server) -> Server {
    let mut standby = Server::prepare(Options::default()).expect("a folder can be made");
    standby.follow(primary).await;
    primary.set_synchronous(true).await;
    standby
}

#[tokio::test]
async fn worker_leaves_a_former_primary_that_is_now_a_standby() {
    let mut bridge = servers().await;
    let mut other = standby_of(bridge.database.server()).await;
    let proxy = Proxy::start(bridge.database.server().port()).await;
    let url = url_at(&bridge, proxy.port());
    start(&mut bridge, url).await;
    deliver_story(&bridge).await;
    bridge.wait_until_applied().await;

    bridge.database.server().kill().await;
    other.promote().await;
    other.set_synchronous(false).await;
    bridge.database.exchange(&mut other).await;
    let (former, primary) = (&mut other, bridge.database.server());
    former.follow(primary).await;
    deliver_story(&bridge).await;
    // The proxy still leads to the former primary, which accepts connections but no writes.
    let worker = &bridge.workers[0];
    worker.wait_for_log("read-only transaction", DEADLINE).await;
    // New connections now lead to the new primary. The old ones stay open.
    proxy.point_to(bridge.database.server().port());

    bridge.check().await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

/// The server would end the wait for the standby by its statement timeout, and call the commit a
/// success.
#[tokio::test]
async fn event_is_not_acked_before_the_synchronous_standby_has_it() {
    let mut bridge = servers().await;
    let mut standby = standby_of(bridge.database.server()).await;
    let url = bridge.database.url();
    start(&mut bridge, url).await;
    deliver_story(&bridge).await;
    bridge.wait_until_applied().await;

    standby.stop().await;
    deliver_story(&bridge).await;
    let worker = &bridge.workers[0];
    worker
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    let log = worker.log();
    assert!(log.contains("no answer within"), "{log}");
    // Ends the wait.
    bridge.database.server().set_synchronous(false).await;

    bridge.check().await;
}

#[tokio::test]
async fn worker_takes_the_server_of_its_url_that_accepts_writes() {
    let mut bridge = servers().await;
    let mut other = standby_of(bridge.database.server()).await;
    let (primary, standby) = (bridge.database.server().port(), other.port());
    let url = format!("postgres://postgres@127.0.0.1:{standby},127.0.0.1:{primary}/postgres");
    start(&mut bridge, url).await;
    deliver_story(&bridge).await;
    bridge.wait_until_applied().await;

    bridge.database.server().kill().await;
    other.promote().await;
    other.set_synchronous(false).await;
    bridge.database.exchange(&mut other).await;
    deliver_story(&bridge).await;

    bridge.check().await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}
