//! How ingress starts, reads its settings and secrets, and shuts down.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use litestripe_harness::process::Signal;
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::stripe::Delivery;
use litestripe_harness::{eventually, nats};
use reqwest::StatusCode;
use tokio::net::TcpStream;

use super::{
    AT_ONCE, DEADLINE, Ingress, SECRET, Setup, TYPE, UUID, event, event_with_length,
    until_in_flight,
};

#[tokio::test]
async fn requests_in_flight_are_finished_before_the_exit() {
    // More than one thread serves.
    const REQUESTS: usize = 40;
    let setup = Setup::new().await;
    let broker = setup.broker.process().expect("the broker runs");
    broker.signal(Signal::Stop);
    let deliveries: Vec<_> = (0..REQUESTS)
        .map(|number| Delivery::new(event_with_length(&format!("evt_{number}"), 1_000), SECRET))
        .collect();
    let posts = join_all(
        deliveries
            .iter()
            .map(|delivery| setup.ingress.post(delivery)),
    );
    let (answers, ()) = tokio::join!(posts, async {
        until_in_flight(&setup.ingress, REQUESTS * 1_000).await;
        setup.ingress.program.signal(Signal::Term);
        setup
            .ingress
            .program
            .wait_for_log("finishing what is in flight", DEADLINE)
            .await;
        broker.signal(Signal::Cont);
    });
    assert!(
        answers
            .iter()
            .all(|answer| answer.status() == StatusCode::OK),
        "{answers:?}"
    );
    let status = setup.ingress.program.wait(DEADLINE).await;
    assert_eq!(status.code(), Some(0));
    assert_eq!(setup.state().await.messages, REQUESTS as u64);
}

#[tokio::test]
async fn idle_connections_do_not_delay_the_shutdown() {
    let setup = Setup::new().await;
    let silent = TcpStream::connect(setup.ingress.address)
        .await
        .expect("ingress listens");
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
    let start = Instant::now();
    assert_eq!(setup.ingress.program.stop().await.code(), Some(0));
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    drop(silent);
}

#[tokio::test]
async fn a_second_stop_signal_ends_ingress_at_once() {
    let setup = Setup::new().await;
    let broker = setup.broker.process().expect("the broker runs");
    broker.signal(Signal::Stop);
    let client = setup.ingress.client.clone();
    let url = setup.ingress.hook();
    let post = tokio::spawn(async move {
        Delivery::new(event("evt_1", TYPE), SECRET)
            .post(&client, &url)
            .await
    });
    until_in_flight(&setup.ingress, 1).await;
    setup.ingress.program.signal(Signal::Term);
    setup
        .ingress
        .program
        .wait_for_log("finishing what is in flight", DEADLINE)
        .await;
    let start = Instant::now();
    setup.ingress.program.signal(Signal::Term);
    let status = setup.ingress.program.wait(DEADLINE).await;
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    assert_ne!(status.code(), Some(0));
    assert!(
        post.await.expect("it does not panic").is_err(),
        "the request must not be answered"
    );
    broker.signal(Signal::Cont);
}

#[tokio::test]
async fn ingress_whose_log_nobody_reads_serves_and_stops() {
    let setup = Setup::with(nats::Options::default(), Launch::unread_stderr).await;
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
    assert_eq!(setup.ingress.program.stop().await.code(), Some(0));

    let launch = Program::named("litestripe-ingress").unread_stderr();
    let finished = launch.run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(2), "no setting is set");
}

#[tokio::test]
async fn every_missing_or_malformed_setting_is_named_at_once() {
    let finished = Program::named("litestripe-ingress").run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(2));
    for name in [
        "STRIPE_WEBHOOK_UUID",
        "STRIPE_WEBHOOK_SECRET",
        "STRIPE_WEBHOOK_SECRET_FILE",
    ] {
        assert!(
            finished.stderr.contains(name),
            "{name}: {}",
            finished.stderr
        );
    }

    let names = [
        "STRIPE_WEBHOOK_UUID",
        "STRIPE_WEBHOOK_SECRET",
        "STRIPE_WEBHOOK_TOLERANCE",
        "LITESTRIPE_LISTEN",
        "LITESTRIPE_BODY_LIMIT",
        "LITESTRIPE_EVENTS_MAX_AGE",
        "LITESTRIPE_LOG_FORMAT",
    ];
    let launch = names
        .iter()
        .fold(Program::named("litestripe-ingress"), |launch, name| {
            launch.env(name, "hunter2")
        });
    let finished = launch.run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(2));
    for name in names {
        assert!(
            finished.stderr.contains(name),
            "{name}: {}",
            finished.stderr
        );
    }
    assert!(!finished.stderr.contains("hunter2"), "{}", finished.stderr);
}

#[tokio::test]
async fn help_names_every_setting_and_shows_no_value() {
    let launch = Program::named("litestripe-ingress").env("STRIPE_WEBHOOK_SECRET", SECRET);
    let help = launch.arg("--help").run(DEADLINE).await;
    assert_eq!(help.status.code(), Some(0));
    assert!(!help.stdout.contains(SECRET), "{}", help.stdout);
    for setting in litestripe_ingress::settings::SETTINGS
        .iter()
        .chain(litestripe_contract::settings::SHARED)
    {
        assert!(
            help.stdout.contains(setting.name),
            "{}: {}",
            setting.name,
            help.stdout
        );
        assert!(
            help.stdout.contains(&format!("--{}", setting.flag())),
            "{}: {}",
            setting.name,
            help.stdout
        );
    }
    let version = Program::named("litestripe-ingress")
        .arg("--version")
        .run(DEADLINE)
        .await;
    assert_eq!(
        version.stdout,
        format!("litestripe-ingress {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[tokio::test]
async fn a_secret_file_may_appear_late_and_change() {
    let broker = nats::Server::start().await;
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("secret");
    let ingress = Ingress::start(&broker, |launch| {
        launch.env("STRIPE_WEBHOOK_SECRET_FILE", &path)
    });
    ingress
        .program
        .wait_for_log("waiting for a signing secret", DEADLINE)
        .await;
    std::fs::write(
        &path,
        format!("> Ready! Your webhook signing secret is {SECRET} (^C to quit)\n"),
    )
    .expect("written");
    ingress.until_ready().await;
    assert_eq!(ingress.post_event("evt_1").await, StatusCode::OK);

    let rolled = "whsec_rolled";
    std::fs::write(&path, format!("{SECRET} # we_1\n{rolled} # we_2\n")).expect("written");
    let status_with = async |secret: &str| {
        ingress
            .post(&Delivery::new(event("evt_2", TYPE), secret))
            .await
            .status()
    };
    eventually("the new secret to be used", DEADLINE, async || {
        let status = status_with(rolled).await;
        if status == StatusCode::OK {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
    assert_eq!(
        status_with(SECRET).await,
        StatusCode::OK,
        "both are accepted"
    );

    std::fs::write(&path, rolled).expect("written");
    ingress
        .program
        .wait_for_log("no longer using the signing secret", DEADLINE)
        .await;
    let page = ingress.get("/metrics").await.text().await.expect("a page");
    let uses = page.lines().filter(|line| {
        line.starts_with("litestripe_ingress_signing_secret_last_used_timestamp_seconds{")
    });
    let uses: Vec<_> = uses.collect();
    assert!(uses.len() == 1 && !uses[0].ends_with(" 0"), "{uses:?}");
    assert_eq!(
        status_with(SECRET).await,
        StatusCode::BAD_REQUEST,
        "the old secret is no longer accepted"
    );
    assert_eq!(status_with(rolled).await, StatusCode::OK);

    std::fs::remove_file(&path).expect("removed");
    ingress
        .program
        .wait_for_log("cannot be read any more", DEADLINE)
        .await;
    assert_eq!(status_with(rolled).await, StatusCode::OK);
    let log = ingress.program.log();
    assert!(!log.contains(SECRET) && !log.contains(rolled), "{log}");
}

#[tokio::test]
async fn ingress_refuses_to_start_without_a_secret() {
    let broker = nats::Server::start().await;
    let ingress = Ingress::start(&broker, |launch| {
        launch.env("STRIPE_WEBHOOK_SECRET_FILE", "no/such/file")
    });
    let start = Instant::now();
    assert_eq!(ingress.program.wait(DEADLINE).await.code(), Some(2));
    assert!(
        start.elapsed() >= Duration::from_secs(17),
        "ten attempts, two seconds apart: {:?}",
        start.elapsed()
    );
    let log = ingress.program.log();
    // It need not be the last line: the end of the connection to NATS is logged at the same time.
    let refusal = log
        .lines()
        .find(|line| line.starts_with("error:"))
        .unwrap_or_else(|| panic!("no refusal: {log}"));
    for text in [
        "STRIPE_WEBHOOK_SECRET ",
        "STRIPE_WEBHOOK_SECRET_FILE",
        "no/such/file",
    ] {
        assert!(refusal.contains(text), "{text}: {log}");
    }
}

#[tokio::test]
async fn several_secrets_are_accepted_at_the_same_time() {
    let broker = nats::Server::start().await;
    let ingress = Ingress::start(&broker, |launch| {
        launch.env("STRIPE_WEBHOOK_SECRET", format!("whsec_old, {SECRET}"))
    });
    ingress.until_ready().await;
    for (secret, status) in [("whsec_old", 200), (SECRET, 200), ("whsec_other", 400)] {
        let answer = ingress
            .post(&Delivery::new(event("evt_1", TYPE), secret))
            .await;
        assert_eq!(answer.status().as_u16(), status, "{secret}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_a_clear_error() {
    let broker = nats::Server::start().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("there is a port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let launch = Program::named("litestripe-ingress")
        .env("STRIPE_WEBHOOK_UUID", UUID)
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .env("NATS_URL", broker.url())
        .env("LITESTRIPE_LISTEN", &address);
    let finished = launch.run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(1));
    assert!(
        finished.stderr.contains("LITESTRIPE_LISTEN") && finished.stderr.contains(&address),
        "{}",
        finished.stderr
    );
}
