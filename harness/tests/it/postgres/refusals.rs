//! The server refuses, and will refuse again: a command ends with the reason.

use litestripe_harness::pgbouncer::{Mode, PgBouncer};

use super::{DEADLINE, servers, url_at};

#[tokio::test]
async fn command_ends_with_the_reason_if_the_database_refuses_for_good() {
    let mut bridge = servers().await;
    let port = bridge.database.server().port();
    bridge
        .database
        .query("CREATE ROLE reader LOGIN")
        .await
        .expect("it is running");
    let pooler = PgBouncer::start(port, Mode::Session, &[]).await;
    let cases = [
        (
            format!("{}?sslmode=require", bridge.database.url()),
            "server does not support TLS",
        ),
        (
            format!(
                "{}?sslmode=verify-full&sslrootcert=/missing",
                bridge.database.url()
            ),
            "TLS",
        ),
        (
            format!("postgres://postgres@127.0.0.1:{port}/missing"),
            "database \"missing\" does not exist",
        ),
        (
            format!("postgres://missing@127.0.0.1:{port}/postgres"),
            "role \"missing\" does not exist",
        ),
        (
            format!(
                "postgres://reader@127.0.0.1:{port}/postgres?options=-c%20search_path%3Dmissing"
            ),
            "schema",
        ),
        (pooler.url("missing"), "database \"missing\" does not exist"),
        // What listens there speaks another protocol.
        (url_at(&bridge, bridge.broker.port()), "SSLRequest"),
    ];
    for (url, reason) in cases {
        let command = bridge.worker().env("DATABASE_URL", &url);
        let finished = command.args(["migrate", "up"]).run(DEADLINE).await;
        let text = &finished.stderr;
        assert_eq!(finished.status.code(), Some(1), "{url}: {text}");
        assert!(text.contains(reason), "{url}: {text}");
    }
}
