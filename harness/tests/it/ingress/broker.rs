//! Ingress with a broker that starts late, dies, or refuses events.

use std::time::Instant;

use litestripe_contract::subject;
use litestripe_harness::nats;
use litestripe_harness::process::Signal;
use litestripe_harness::stripe::Delivery;
use reqwest::StatusCode;

use super::{
    ANSWER_WITHIN, AT_ONCE, DEADLINE, Ingress, SECRET, Setup, TYPE, check_error, event,
    event_with_length, until_in_flight,
};

#[tokio::test]
async fn ingress_waits_for_a_broker_that_starts_later() {
    let mut broker =
        nats::Server::prepare(nats::Options::default()).expect("a server can be prepared");
    let ingress = Ingress::start(&broker, |launch| {
        launch.env("STRIPE_WEBHOOK_SECRET", SECRET)
    });
    ingress
        .program
        .wait_for_log("waiting for NATS", DEADLINE)
        .await;
    assert_eq!(ingress.get("/healthz").await.status(), StatusCode::OK);
    check_error(ingress.get("/readyz").await, 503, "not ready").await;
    let start = Instant::now();
    let answer = ingress
        .post(&Delivery::new(event("evt_1", TYPE), SECRET))
        .await;
    assert!(start.elapsed() < ANSWER_WITHIN);
    assert!(answer.headers().contains_key("retry-after"));
    check_error(answer, 503, "no broker").await;
    // A sender without the secret learns nothing about the broker.
    let forged = Delivery::new(event("evt_1", TYPE), "whsec_other");
    check_error(ingress.post(&forged).await, 400, "forged").await;

    broker.resume().await;
    ingress.until_ready().await;
    assert_eq!(ingress.post_event("evt_1").await, StatusCode::OK);
    let log = ingress.program.log();
    assert_eq!(log.matches("waiting for NATS").count(), 1, "{log}");
}

#[tokio::test]
async fn a_broker_that_dies_during_a_request_leads_to_a_503() {
    let Setup {
        mut broker,
        ingress,
    } = Setup::new().await;
    broker
        .process()
        .expect("the broker runs")
        .signal(Signal::Stop);
    let delivery = Delivery::new(event("evt_1", TYPE), SECRET);
    let start = Instant::now();
    let (answer, ()) = tokio::join!(ingress.post(&delivery), async {
        until_in_flight(&ingress, 1).await;
        broker.kill().await;
    });
    assert!(start.elapsed() < ANSWER_WITHIN, "{:?}", start.elapsed());
    assert!(answer.headers().contains_key("retry-after"));
    check_error(answer, 503, "the broker died").await;
    check_error(ingress.get("/readyz").await, 503, "not ready").await;
    for n in 0..20 {
        let start = Instant::now();
        let answer = ingress
            .post(&Delivery::new(event(&format!("evt_x{n}"), TYPE), SECRET))
            .await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(
            start.elapsed() < AT_ONCE,
            "answered at once after the connection was given up"
        );
    }

    broker.resume().await;
    ingress.until_ready().await;
    assert_eq!(ingress.post(&delivery).await.status(), StatusCode::OK);
    let log = ingress.program.log();
    assert_eq!(log.matches("events are not stored").count(), 1, "{log}");
    assert_eq!(log.matches("events are stored again").count(), 1, "{log}");
    let setup = Setup { broker, ingress };
    assert_eq!(setup.state().await.messages, 1);
}

#[tokio::test]
async fn a_deleted_stream_is_created_again() {
    let setup = Setup::new().await;
    let jetstream = async_nats::jetstream::new(setup.broker.connect().await);
    jetstream
        .delete_stream(subject::EVENTS_STREAM)
        .await
        .expect("a stream can be deleted");
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
    assert_eq!(setup.state().await.messages, 1);
}

#[tokio::test]
async fn a_full_stream_is_answered_503_at_once_and_logged_once() {
    let setup = Setup::with(nats::Options::default(), |launch| {
        launch.env("LITESTRIPE_EVENTS_MAX_BYTES", "64KiB")
    })
    .await;
    let mut full = 0;
    for n in 0..12 {
        let start = Instant::now();
        let answer = setup
            .ingress
            .post(&Delivery::new(
                event_with_length(&format!("evt_{n}"), 20_000),
                SECRET,
            ))
            .await;
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
        if answer.status() != StatusCode::OK {
            assert!(answer.headers().contains_key("retry-after"));
            check_error(answer, 503, "full").await;
            full += 1;
        }
    }
    assert!(
        (9..12).contains(&full),
        "three events fit, {full} of 12 did not"
    );
    let log = setup.ingress.program.log();
    assert_eq!(log.matches("events are not stored").count(), 1, "{log}");
}
