//! PostgreSQL as people run it: standbys that are promoted, hosts that vanish, poolers in between,
//! and servers that refuse.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::stripe;
use time::OffsetDateTime;

mod failover;
mod pooler;
mod refusals;
mod settings;
mod silence;
mod transactions;

const DEADLINE: Duration = Duration::from_secs(60);

/// Makes a bridge of which broker and database run.
pub(crate) async fn servers() -> Bridge {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge
}

/// The URL of the database with another port, such as that of a proxy.
pub(crate) fn url_at(bridge: &Bridge, port: u16) -> String {
    let url = bridge.database.url();
    let (host, database) = url.rsplit_once('/').expect("a URL has a path");
    let (host, _) = host.rsplit_once(':').expect("a URL of ours has a port");
    format!("{host}:{port}/{database}")
}

/// Starts ingress and a worker that reaches its database by this URL.
pub(crate) async fn start(bridge: &mut Bridge, url: String) {
    bridge.set_worker("DATABASE_URL", url);
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
}

/// Delivers the events of some customers.
async fn deliver_story(bridge: &Bridge) {
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
}
