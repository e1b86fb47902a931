//! Failures in a cluster of three brokers, each with a replica of every stream.

use std::time::Duration;

use async_nats::jetstream::stream::Info;
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::{eventually, nats, port};

use crate::check::{Stream, check};
use crate::load::Load;
use crate::rig::{DEADLINE, Rig};

const NODES: usize = 3;
/// Enough for elections and catching up, with three brokers on two cores.
const CLUSTER_DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test]
async fn cluster_that_loses_its_leader_and_then_a_node_with_its_disk_loses_no_event() {
    let mut cluster = Cluster::start().await;
    let rig = &mut cluster.rig;
    let settings = [
        ("NATS_URL", cluster.urls.as_str()),
        ("LITESTRIPE_STREAM_REPLICAS", "3"),
    ];
    rig.settings = settings
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    rig.start_ingress(&[]);
    rig.until_ingress_is_ready().await;
    rig.make_consumer(NODES).await;
    for index in 0..2 {
        rig.start_worker(index, &[]);
    }
    for index in 0..2 {
        rig.until_worker_is_ready(index).await;
    }
    assert_eq!(cluster.info(EVENTS_STREAM).await.config.num_replicas, NODES);
    let load = Load::start(&cluster.rig.ledger, &cluster.rig.hook(), 3);
    cluster.until_more_is_accepted().await;

    let leader = cluster.leader().await;
    cluster.node(leader).kill().await;
    cluster.until_more_is_accepted().await;
    cluster.node(leader).resume().await;
    cluster.until_all_are_current().await;

    // A node that is not the leader loses its disk and restarts with an empty one.
    let lost = (cluster.leader().await + 1) % NODES;
    cluster.node(lost).kill().await;
    cluster.until_more_is_accepted().await;
    let store = cluster.node(lost).folder().join("store");
    std::fs::remove_dir_all(store).expect("the folder is ours");
    cluster.node(lost).resume().await;
    cluster.until_all_are_current().await;

    // That node must have caught up completely: now another one fails.
    let leader = cluster.leader().await;
    cluster.node(leader).kill().await;
    cluster.until_more_is_accepted().await;
    cluster.node(leader).resume().await;
    cluster.until_all_are_current().await;

    load.stop().await;
    let found = check(&cluster.rig, Stream::Whole).await;
    eprintln!("{found:?} after {:?}", cluster.rig.ledger.figures());
}

/// A rig whose broker is one of three.
struct Cluster {
    rig: Rig,
    others: Vec<nats::Server>,
    urls: String,
}

impl Cluster {
    async fn start() -> Self {
        let routes: Vec<u16> = (0..NODES).map(|_| port::free()).collect();
        let all = routes
            .iter()
            .map(|port| format!("nats-route://127.0.0.1:{port}"))
            .collect::<Vec<_>>()
            .join(", ");
        let options = |route: &u16| nats::Options {
            config: format!(
                "cluster {{ name: litestripe-tests, listen: \"127.0.0.1:{route}\", routes: [{all}], pool_size: -1 }}"
            ),
            ..nats::Options::default()
        };
        let mut others = Vec::new();
        for route in &routes[1..] {
            others.push(nats::Server::start_with(options(route)).await);
        }
        let rig = Rig::servers(DatabaseKind::Postgres, options(&routes[0])).await;
        let urls = [&rig.bridge.broker]
            .into_iter()
            .chain(&others)
            .map(nats::Server::url)
            .collect::<Vec<_>>()
            .join(",");
        Self { rig, others, urls }
    }

    fn node(&mut self, index: usize) -> &mut nats::Server {
        match index {
            0 => &mut self.rig.bridge.broker,
            other => &mut self.others[other - 1],
        }
    }

    async fn info(&self, stream: &str) -> Info {
        self.rig.bridge.stream(stream).await.cached_info().clone()
    }

    /// The node that leads the events stream.
    async fn leader(&self) -> usize {
        let name = eventually(
            "the stream to have a leader",
            CLUSTER_DEADLINE,
            async || {
                let cluster = self.info(EVENTS_STREAM).await.cluster;
                cluster
                    .and_then(|cluster| cluster.leader)
                    .ok_or_else(|| "none".to_owned())
            },
        )
        .await;
        let ports = [&self.rig.bridge.broker]
            .into_iter()
            .chain(&self.others)
            .map(nats::Server::port);
        let mut names = ports.map(|port| format!("litestripe-{port}"));
        names
            .position(|other| other == name)
            .expect("the leader is one of them")
    }

    /// Waits until every node has all of each stream.
    async fn until_all_are_current(&self) {
        for stream in [EVENTS_STREAM, SIGNALS_STREAM, DEAD_LETTERS_STREAM] {
            let what = format!("every replica of {stream} to be current");
            eventually(&what, CLUSTER_DEADLINE, async || {
                let cluster = self.info(stream).await.cluster.ok_or("no cluster")?;
                let current = cluster
                    .replicas
                    .iter()
                    .filter(|replica| replica.current && !replica.offline)
                    .count();
                if cluster.leader.is_some() && current == NODES - 1 {
                    Ok(())
                } else {
                    Err(format!("{cluster:?}"))
                }
            })
            .await;
        }
    }

    /// Waits until deliveries are accepted again.
    async fn until_more_is_accepted(&self) {
        let before = self.rig.ledger.figures().accepted;
        eventually(
            "deliveries to be accepted again",
            DEADLINE,
            async || match self.rig.ledger.figures() {
                figures if figures.accepted >= before + 150 => Ok(()),
                figures => Err(format!("{before} before, now {figures:?}")),
            },
        )
        .await;
    }
}
