//! A healthy installation, and faults between its parts.

use async_nats::jetstream::stream::Config;
use litestripe_contract::subject::KV_BUCKET;
use litestripe_harness::bridge::{DatabaseKind, HOOK};
use litestripe_harness::clock::Clock;
use litestripe_harness::process::Signal;
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};

use super::{DEADLINE, Healthy, examine};
use crate::orphans::lookup::{Answer, Application};
use crate::orphans::{CREATED, now};

on_both_databases!(
    healthy_installation_has_nothing_to_mend_and_is_not_changed,
    database_of_another_installation_is_named,
);

const NOBODY: &str = "litestripe-doctor-asks-for-nobody";

async fn healthy_installation_has_nothing_to_mend_and_is_not_changed(database: DatabaseKind) {
    let mut healthy = Healthy::start(database).await;
    healthy.bridge.start_ingress().wait_until_ready().await;
    let bought = Purchase::new(now() - 60);
    let created = bought.subscription_event(CREATED, bought.created, json!({}));
    healthy.bridge.deliver(&created).await;
    healthy.bridge.wait_until_applied().await;
    // Workers record signs of life, and budgets are kept at the broker.
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    let before = (
        healthy.bridge.database.dump().await,
        streams(&healthy).await,
    );
    let requests = healthy.api.requests("/").len();

    let report = healthy.examine().await;
    report.check_healthy();
    for line in &report.lines {
        // There is no user lookup.
        let expected = if line["check"] == "user lookup" {
            "skipped"
        } else {
            "ok"
        };
        assert_eq!(line["state"], expected, "{line}");
    }
    let after = (
        healthy.bridge.database.dump().await,
        streams(&healthy).await,
    );
    assert_eq!(before.0.expect("it answers"), after.0.expect("it answers"));
    assert_eq!(before.1, after.1);
    assert_eq!(healthy.api.requests("/").len(), requests + 6);

    let shown = healthy.bridge.worker().arg("doctor").run(DEADLINE).await;
    assert_eq!(shown.status.code(), Some(0), "{shown:?}");
    for row in ["state", "ok       schema", "skipped  user lookup"] {
        assert!(
            shown.stdout.contains(row),
            "{row} is not in {}",
            shown.stdout
        );
    }
}

/// What the streams hold and how they are configured.
async fn streams(healthy: &Healthy) -> Vec<(Config, u64, usize)> {
    let mut found = Vec::new();
    for name in [
        "STRIPE_EVENTS",
        "LITESTRIPE_SIGNALS",
        "STRIPE_DEAD_LETTERS",
        "KV_litestripe",
    ] {
        let stream = healthy.bridge.stream(name).await;
        let info = stream.cached_info();
        let (state, config) = (&info.state, info.config.clone());
        found.push((config, state.last_sequence, state.consumer_count));
    }
    found
}

#[tokio::test]
async fn installation_that_was_never_started_has_nothing_to_mend_and_is_not_started() {
    let mut healthy = Healthy::prepare(DatabaseKind::Sqlite, |_| {}).await;
    healthy.bridge.broker.resume().await;
    let report = healthy.examine().await;
    report.check_healthy();
    let streams = report.lines.iter().find(|line| line["check"] == "streams");
    assert!(
        format!("{streams:?}").contains("STRIPE_EVENTS"),
        "{streams:?}"
    );
    let folder = healthy.bridge.database.folder().expect("it has one");
    let files = std::fs::read_dir(folder).expect("it exists").count();
    assert_eq!(files, 0, "no file was created");
    let jetstream = healthy.bridge.jetstream().await;
    assert!(jetstream.get_stream("STRIPE_EVENTS").await.is_err());
    assert!(jetstream.get_key_value(KV_BUCKET).await.is_err());
}

/// Freezes all that it needs: it ends by itself, with a line for each.
#[tokio::test]
async fn nothing_answers_and_each_part_has_one_line() {
    let healthy = Healthy::start(DatabaseKind::Postgres).await;
    let _held = healthy.api.hold("/");
    let (broker, database) = (&healthy.bridge.broker, &healthy.bridge.database);
    broker.process().expect("it runs").signal(Signal::Stop);
    database.process().expect("it runs").signal(Signal::Stop);
    healthy.examine().await.check_all(&[
        ("broker", &["cannot reach NATS", "NATS_URL"]),
        ("database", &["DATABASE_URL"]),
        ("Stripe's API", &["STRIPE_API_BASE"]),
    ]);
    broker.process().expect("it runs").signal(Signal::Cont);
    database.process().expect("it runs").signal(Signal::Cont);
}

async fn database_of_another_installation_is_named(database: DatabaseKind) {
    let mut healthy = Healthy::start(database).await;
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    let bucket = healthy
        .bridge
        .jetstream()
        .await
        .get_key_value(KV_BUCKET)
        .await;
    let bucket = bucket.expect("it exists");
    bucket
        .put("installation", "anotherInstallation000".into())
        .await
        .expect("it can be written");
    healthy
        .check(
            "installation",
            &["another", "DATABASE_URL", "litestripe-worker join"],
        )
        .await;
}

/// A mistyped DATABASE_URL of SQLite leads to a file that does not exist, as before the first start.
#[tokio::test]
async fn missing_file_of_an_installation_that_has_a_broker_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let folder = tempfile::tempdir().expect("a folder can be made");
    let url = format!(
        "sqlite://{}?mode=rwc",
        folder.path().join("mistyped.db").display()
    );
    let report = examine(healthy.doctor().env("DATABASE_URL", url)).await;
    report.check("installation", &["DATABASE_URL"]);
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("it exists").count(),
        0
    );
}

#[tokio::test]
async fn own_clock_that_is_wrong_is_named_once() {
    let healthy = Healthy::start(DatabaseKind::Postgres).await;
    let clock = Clock::new();
    clock.set_ahead(2 * 60 * 60);
    let environment = clock.environment().into_iter();
    let doctor = environment.fold(healthy.doctor(), |doctor, (name, value)| {
        doctor.env(name, value)
    });
    let said = ["ahead of those of the database, the broker, Stripe", "NTP"];
    examine(doctor).await.check("clocks", &said);
}

#[tokio::test]
async fn lookup_that_does_not_answer_as_it_should_is_named() {
    let mut healthy = Healthy::start_with(DatabaseKind::Sqlite, |plan| {
        plan.options = plan
            .options
            .clone()
            .worker("LITESTRIPE_USER_LOOKUP", "nats:app.user.known");
    })
    .await;
    healthy
        .check("user lookup", &["app.user.known", "start the application"])
        .await;
    let application = Application::start(&healthy.bridge).await;
    for (answer, said) in [
        (Answer::Silence, "does not answer"),
        (Answer::Text("yes"), "is not {\\\"known\\\": true}"),
        (Answer::Known(true), "knows a user whom nobody has"),
    ] {
        application.answer(NOBODY, answer);
        healthy.check("user lookup", &[said]).await;
    }
    application.answer(NOBODY, Answer::Known(false));
    healthy.examine().await.check_healthy();

    healthy.bridge.set_worker(
        "LITESTRIPE_USER_LOOKUP",
        "sql:select 1 from users where id = $1",
    );
    healthy
        .check("user lookup", &["users", "LITESTRIPE_USER_DATABASE_URL"])
        .await;
    let made = healthy
        .bridge
        .database
        .execute("CREATE TABLE users (id text)")
        .await;
    made.expect("the table can be made");
    healthy.examine().await.check_healthy();
}

/// The UUID is a setting of ingress, which a worker need not have.
#[tokio::test]
async fn without_the_uuid_any_hook_counts() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let doctor = healthy.bridge.worker().args(["doctor", "--json"]);
    examine(doctor.clone()).await.check_healthy();
    let other = doctor
        .arg("--stripe-webhook-uuid")
        .arg(HOOK.replace('6', "7"));
    let finished = other.run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(3), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).expect("it is JSON");
    assert_eq!(
        report["checks"][0]["check"], "webhook endpoint",
        "{report:#}"
    );
}
