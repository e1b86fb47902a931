//! What stands between a program and its database: standbys, poolers, and links that swallow
//! packets.

use std::time::Duration;

use litestripe_harness::{eventually, pgbouncer, postgres, proxy};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbErr, QueryResult, Statement,
};

use super::DEADLINE;

#[tokio::test]
async fn standby_follows_is_promoted_and_the_old_primary_follows_it() {
    let mut one = postgres::Server::start().await;
    let mut two = postgres::Server::prepare(postgres::Options::default()).expect("it is found");
    execute(&one, "CREATE TABLE kept (n integer)")
        .await
        .expect("it can write");
    two.follow(&one).await;
    one.set_synchronous(true).await;
    execute(&one, "INSERT INTO kept VALUES (1)")
        .await
        .expect("it can write");

    one.kill().await;
    two.promote().await;
    two.set_synchronous(false).await;
    execute(&two, "INSERT INTO kept VALUES (2)")
        .await
        .expect("it can write");
    one.follow(&two).await;
    two.set_synchronous(true).await;
    execute(&two, "INSERT INTO kept VALUES (3)")
        .await
        .expect("it can write");

    let refusal = execute(&one, "INSERT INTO kept VALUES (4)").await;
    let refusal = refusal.expect_err("a standby is read-only").to_string();
    assert!(refusal.contains("read-only transaction"), "{refusal}");
    eventually(
        "the standby to have every row",
        DEADLINE,
        async || match execute(&one, "SELECT n FROM kept").await {
            Ok(3) => Ok(()),
            found => Err(format!("{found:?}")),
        },
    )
    .await;
}

#[tokio::test]
async fn pooler_shares_a_connection_between_clients_only_in_transaction_mode() {
    let server = postgres::Server::start().await;
    let settings = [
        ("default_pool_size", "1"),
        ("query_wait_timeout", "1"),
        // What the test's own client needs.
        ("ignore_startup_parameters", "extra_float_digits"),
    ];
    for (mode, is_shared) in [
        (pgbouncer::Mode::Session, false),
        (pgbouncer::Mode::Transaction, true),
    ] {
        let mut pooler = pgbouncer::PgBouncer::start(server.port(), mode, &settings).await;
        pooler.restart().await;
        let url = pooler.url("postgres");
        let (one, two) = (connect(&url).await, connect(&url).await);
        // A simple query, which needs no prepared statement.
        let first = one.execute_unprepared("SELECT 1").await;
        first.expect("a connection is free");
        let second = two.execute_unprepared("SELECT 1").await;
        assert_eq!(second.is_ok(), is_shared, "{mode:?}: {second:?}");
    }
}

#[tokio::test]
async fn blackhole_swallows_everything_and_closes_nothing() {
    let server = postgres::Server::start().await;
    let proxy = proxy::Proxy::start(server.port()).await;
    let url = server
        .url("postgres")
        .replace(&server.port().to_string(), &proxy.port().to_string());
    let old = [connect(&url).await, connect(&url).await];
    for client in &old {
        rows(client, "SELECT 1").await.expect("it is passed");
    }
    let is_silent = async |client: &DatabaseConnection| {
        let answer = rows(client, "SELECT 1");
        tokio::time::timeout(Duration::from_millis(200), answer)
            .await
            .is_err()
    };

    proxy.set(proxy::Mode::Blackhole);
    assert!(is_silent(&old[0]).await);
    proxy.set(proxy::Mode::Pass);

    assert!(is_silent(&old[1]).await, "an old connection stays silent");
    rows(&connect(&url).await, "SELECT 1")
        .await
        .expect("a new one is passed");
}

/// Runs a statement and returns the number of rows.
async fn execute(server: &postgres::Server, sql: &str) -> Result<usize, DbErr> {
    let client = connect(&server.url("postgres")).await;
    rows(&client, sql).await.map(|rows| rows.len())
}

async fn connect(url: &str) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(1)
        .connect_lazy(true)
        .sqlx_logging(false);
    Database::connect(options)
        .await
        .expect("it accepts a client")
}

async fn rows(client: &DatabaseConnection, sql: &str) -> Result<Vec<QueryResult>, DbErr> {
    let statement = Statement::from_string(client.get_database_backend(), sql);
    client.query_all_raw(statement).await
}
