//! The harness itself: servers that start, keep their data and leave nothing behind, programs that
//! end with their owner, events that look like Stripe's.

mod between;

use std::path::PathBuf;
use std::time::Duration;

use litestripe_harness::process::Signal;
use litestripe_harness::program::Program;
use litestripe_harness::stripe::{self, Delivery};
use litestripe_harness::{eventually, nats, port, postgres};
use sea_orm::{ConnectionTrait, Database, DatabaseConnection, Statement};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::net::TcpListener;

const DEADLINE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn broker_keeps_its_messages_over_a_stop_and_a_kill() {
    let mut broker = nats::Server::start().await;
    let jetstream = async_nats::jetstream::new(broker.connect().await);
    jetstream
        .create_stream(async_nats::jetstream::stream::Config {
            name: "KEPT".to_owned(),
            subjects: vec!["kept.>".to_owned()],
            ..Default::default()
        })
        .await
        .expect("a stream can be made");
    let ack = jetstream
        .publish("kept.one", "1".into())
        .await
        .expect("it is sent");
    assert_eq!(ack.await.expect("it is stored").sequence, 1);

    broker.restart().await;
    broker.kill().await;
    broker.resume().await;

    let jetstream = async_nats::jetstream::new(broker.connect().await);
    let stream = jetstream
        .get_stream("KEPT")
        .await
        .expect("the stream is still there");
    assert_eq!(stream.cached_info().state.messages, 1);
}

#[tokio::test]
async fn broker_that_starts_later_has_the_announced_url() {
    let mut broker = nats::Server::prepare(nats::Options {
        config: "max_payload: 32KB".to_owned(),
        jetstream: "max_file_store: 64MB".to_owned(),
        ..Default::default()
    })
    .expect("a server can be prepared");
    assert!(
        async_nats::connect(broker.url()).await.is_err(),
        "no server answers yet"
    );

    broker.resume().await;

    assert_eq!(broker.connect().await.server_info().max_payload, 32 * 1024);
}

#[tokio::test]
async fn broker_takes_another_password_in_a_reload() {
    let config = "accounts { APP { jetstream: { max_bytes_required: true }, users: [ \
        { user: test, password: test }, { user: app, password: old } ] } }";
    let broker = nats::Server::start_with(nats::Options {
        config: config.to_owned(),
        user: Some(("test".to_owned(), "test".to_owned())),
        ..nats::Options::default()
    })
    .await;
    let test = broker.connect().await;
    assert!(accepts(&broker, "old").await && !accepts(&broker, "new").await);

    broker.reconfigure(|text| text.replace("password: old", "password: new"));

    eventually("the new password", DEADLINE, async || {
        if accepts(&broker, "new").await {
            Ok(())
        } else {
            Err("refused".to_owned())
        }
    })
    .await;
    assert!(!accepts(&broker, "old").await);
    let unbounded = async_nats::jetstream::stream::Config {
        name: "UNBOUNDED".to_owned(),
        ..Default::default()
    };
    let jetstream = async_nats::jetstream::new(test);
    let refusal = jetstream.create_stream(unbounded).await;
    let refusal = refusal.expect_err("a size is required").to_string();
    assert!(refusal.contains("10113"), "{refusal}");
}

/// Whether the user `app` may connect with that password.
async fn accepts(broker: &nats::Server, password: &str) -> bool {
    let (user, password) = ("app".to_owned(), password.to_owned());
    let options = async_nats::ConnectOptions::with_user_and_password(user, password);
    options.connect(broker.url()).await.is_ok()
}

#[tokio::test]
async fn dropped_servers_leave_neither_process_nor_folder() {
    let broker = nats::Server::start().await;
    let database = postgres::Server::start().await;
    let folder = broker.folder().to_owned();
    let ids = [broker.process(), database.process()].map(|process| process.expect("it runs").id());
    drop((broker, database));

    assert!(!folder.exists());
    for id in ids {
        assert!(
            !PathBuf::from(format!("/proc/{id}")).exists(),
            "{id} still runs"
        );
    }
}

#[tokio::test]
async fn postgres_gives_each_caller_an_empty_database_and_keeps_data_over_a_kill() {
    let mut server = postgres::Server::start().await;
    let (first, second) = (server.database().await, server.database().await);
    let connection = connect(&first).await;
    execute(&connection, "CREATE TABLE kept (id int)").await;
    execute(&connection, "INSERT INTO kept VALUES (1)").await;
    connection.close().await.expect("it can be closed");
    assert_eq!(tables(&second).await, 0);

    server.restart().await;
    server.kill().await;
    server.resume().await;

    assert_eq!(tables(&first).await, 1);
    let durable = "SELECT count(*) FROM pg_settings WHERE name = 'fsync' AND setting = 'on'";
    assert_eq!(count(&connect(&second).await, durable).await, 1);
}

#[tokio::test]
async fn eight_servers_start_at_once() {
    let brokers = futures_util::future::join_all((0..8).map(|_| nats::Server::start())).await;
    for broker in &brokers {
        broker.connect().await;
    }
}

#[tokio::test]
async fn program_has_a_clean_environment_its_own_folder_and_a_log() {
    let script = "echo out; echo err >&2; pwd; env; exit 3";
    let finished = shell(script).env("GIVEN", "yes").run(DEADLINE).await;

    assert_eq!(finished.status.code(), Some(3));
    assert_eq!(finished.stderr, "err\n");
    assert!(finished.stdout.starts_with("out\n"), "{}", finished.stdout);
    assert!(
        finished.stdout.contains("/litestripe-run-"),
        "{}",
        finished.stdout
    );
    assert!(finished.stdout.contains("GIVEN=yes"), "{}", finished.stdout);
    assert!(!finished.stdout.contains("CARGO"), "{}", finished.stdout);
}

#[tokio::test]
async fn program_can_be_frozen_thawed_and_stopped() {
    let script = "trap 'echo stopping; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    let program = shell(script).start();
    program.wait_for_log("up", DEADLINE).await;

    program.signal(Signal::Stop);
    program.signal(Signal::Term);
    let stat = format!("/proc/{}/stat", program.id());
    eventually("the program to be frozen", DEADLINE, async || {
        let state = std::fs::read_to_string(&stat).map_err(|problem| problem.to_string())?;
        if state.contains(") T ") {
            Ok(())
        } else {
            Err(state)
        }
    })
    .await;
    assert!(program.is_running());
    program.signal(Signal::Cont);

    assert!(program.wait(DEADLINE).await.success());
    assert_eq!(program.stdout(), "up\nstopping\n");
}

#[tokio::test]
#[should_panic(expected = "waited 50ms for the moon to rise; last seen: still dark")]
async fn eventually_gives_up_with_the_last_value_seen() {
    eventually("the moon to rise", Duration::from_millis(50), async || {
        Err::<(), _>("still dark".to_owned())
    })
    .await;
}

#[tokio::test]
async fn free_ports_are_distinct_and_unused() {
    let (one, other) = (port::free(), port::free());
    assert_ne!(one, other);
    for port in [one, other] {
        TcpListener::bind(("127.0.0.1", port))
            .await
            .expect("a free port can be listened on");
    }
}

/// The expected header was computed with `stripe.WebhookSignature` of stripe-python 16.1.0.
#[test]
fn signature_equals_that_of_stripes_sdk() {
    let delivery = Delivery::signed_at("{\"id\": \"evt_1\"}", "whsec_harness", 1_795_430_000);
    assert_eq!(
        delivery.signature(),
        Some("t=1795430000,v1=ecd3ce281b54f77e0a610525a1a1a089726818afd2ad64bf6d513d7ecb6e5e4e")
    );
}

#[test]
fn story_is_in_order_and_its_bodies_look_like_stripes() {
    let now = OffsetDateTime::now_utc();
    let story = stripe::story(now);
    let types: Vec<_> = story.iter().map(stripe::Event::event_type).collect();
    assert_eq!(
        types,
        [
            "checkout.session.completed",
            "customer.subscription.created",
            "customer.subscription.trial_will_end",
            "customer.subscription.updated",
            "customer.subscription.updated",
            "customer.subscription.updated",
            "customer.subscription.deleted",
            "checkout.session.completed",
        ]
    );
    assert!(story.is_sorted_by_key(stripe::Event::created));
    assert!(
        story
            .iter()
            .all(|event| event.created() < now.unix_timestamp())
    );
    for event in &story {
        let body = event.body();
        assert!(body.starts_with(b"{\n  \"id\": \"evt_1"), "{body:?}");
        assert!((3_000..8_000).contains(&body.len()), "{} bytes", body.len());
        let read: Value = serde_json::from_slice(&body).expect("a body is JSON");
        assert_eq!(read, event.value);
    }
}

fn shell(script: &str) -> litestripe_harness::program::Launch {
    Program::at("/bin/sh").args(["-c", script])
}

async fn connect(url: &str) -> DatabaseConnection {
    Database::connect(url).await.expect("the database answers")
}

async fn execute(connection: &DatabaseConnection, sql: &str) {
    connection
        .execute_unprepared(sql)
        .await
        .expect("the statement runs");
}

async fn tables(url: &str) -> i64 {
    let connection = connect(url).await;
    count(
        &connection,
        "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'",
    )
    .await
}

async fn count(connection: &DatabaseConnection, sql: &str) -> i64 {
    let statement = Statement::from_string(connection.get_database_backend(), sql);
    let row = connection
        .query_one_raw(statement)
        .await
        .expect("the query runs");
    row.expect("count has a row")
        .try_get_by_index(0)
        .expect("it is a number")
}
