//! The alerts and the dashboard on a real Prometheus that scrapes the real programs: every
//! expression has a result, and each planted fault fires the alert that is its own and no other.
//!
//! `scripts/test` leaves these tests out on a machine without Prometheus, and says why.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET};
use litestripe_harness::clock::Clock;
use litestripe_harness::eventually;
use litestripe_harness::process::Signal;
use litestripe_harness::prometheus::{FOR_S, Prometheus};
use litestripe_harness::proxy::Mode;
use litestripe_harness::stripe::api::Api;
use litestripe_harness::stripe::{self, Delivery, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::metrics::behind_a_proxy;
use crate::orphans::lookup::buy;
use crate::orphans::{CREATED, now};
use crate::stripe_api::{there_and_back, until_certain, with_key};

const DEADLINE: Duration = Duration::from_secs(120);

/// How many times, once a second, the rules are evaluated after an alert has fired: another one
/// that follows from the same fault has that long to fire.
const EVALUATIONS: u32 = FOR_S + 5;

const DASHBOARD: &str = include_str!("../../../deploy/grafana/litestripe.json");

/// A bridge, watched by a Prometheus.
async fn watched(options: Options) -> (Bridge, Prometheus) {
    let bridge = Bridge::start(options).await;
    let prometheus = watch(&bridge).await;
    (bridge, prometheus)
}

/// Lets the bridge apply some events, which leave no orphan, and starts a Prometheus.
async fn watch(bridge: &Bridge) -> Prometheus {
    let purchase = buy(bridge, "user_1").await;
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.deliver(&created).await;
    bridge.check().await;
    assert_eq!(bridge.orphans().await, []);
    let workers = bridge.workers.iter().map(|worker| worker.url());
    let targets: Vec<&str> = workers.chain([bridge.ingress().url()]).collect();
    Prometheus::start(&targets).await
}

/// Checks that the planted fault fires `expected` (`name severity`) as long as it lasts, and that no
/// other alert has fired since Prometheus was started.
async fn check(prometheus: &Prometheus, expected: &str) {
    until_firing(prometheus, expected).await;
    prometheus.wait_for_evaluations(EVALUATIONS).await;
    let fired = prometheus.fired().await;
    assert_eq!(fired, Ok(vec![expected.to_owned()]));
    // A single scrape that takes too long resolves the alert, and it fires again.
    until_firing(prometheus, expected).await;
}

async fn until_firing(prometheus: &Prometheus, expected: &str) {
    eventually(expected, DEADLINE, async || {
        let firing = prometheus.alerts(r#"ALERTS{alertstate="firing"}"#).await?;
        let is_firing = firing.iter().any(|alert| alert == expected);
        let pending = prometheus.alerts("ALERTS").await?;
        is_firing
            .then_some(())
            .ok_or(format!("{firing:?} of {pending:?}"))
    })
    .await;
}

#[tokio::test]
async fn every_expression_has_a_result_and_a_sound_bridge_fires_no_alert() {
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Postgres, &api).workers(2);
    let (bridge, prometheus) = watched(options).await;
    // A call to Stripe, and traffic between two scrapes.
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    until_certain(&bridge, &purchase).await;
    bridge.check().await;
    prometheus.wait_for_evaluations(EVALUATIONS).await;

    let mut expressions = Vec::new();
    for rule in prometheus.rules().await.expect("it answers") {
        assert_eq!(rule.error, "", "{}", rule.expression);
        if rule.is_alert {
            // Here it has no result, but all that it reads exists.
            expressions.extend(selectors(&rule.expression));
        } else {
            expressions.push(rule.expression);
        }
    }
    let panels = panels();
    assert!(expressions.len() > 30 && panels.len() > 30);
    expressions.extend(panels);
    for expression in expressions {
        eventually(&expression, DEADLINE, async || {
            let series = prometheus.query(&expression).await?;
            (!series.is_empty())
                .then_some(())
                .ok_or("nothing".to_owned())
        })
        .await;
    }
    let fired = prometheus.fired().await;
    assert_eq!(fired, Ok(vec![]));
}

#[tokio::test]
async fn frozen_database_fires_its_alert() {
    let (bridge, database) = behind_a_proxy(Options::new(DatabaseKind::Postgres)).await;
    let prometheus = watch(&bridge).await;
    database.set(Mode::HalfOpen);
    let purchase = Purchase::new(now());
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.deliver(&created).await;
    check(&prometheus, "LitestripeDatabaseAway critical").await;
    database.set(Mode::Pass);
    bridge.check().await;
}

#[tokio::test]
async fn figures_that_the_database_refuses_fire_their_alert() {
    let (bridge, prometheus) = watched(Options::new(DatabaseKind::Postgres)).await;
    let rename = "ALTER TABLE orphaned_payment RENAME TO elsewhere";
    let renamed = bridge.database.execute(rename).await;
    renamed.expect("a table can be renamed");
    check(&prometheus, "LitestripeFiguresUnknown warning").await;
}

#[tokio::test]
async fn broker_that_is_away_fires_its_alert() {
    let (mut bridge, prometheus) = watched(Options::new(DatabaseKind::Sqlite)).await;
    bridge.broker.stop().await;
    let purchase = Purchase::new(now());
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    let refused = bridge.post(&Delivery::new(created.body(), SECRET)).await;
    assert_eq!(refused.status(), 503);
    check(&prometheus, "LitestripeBrokerAway critical").await;
}

#[tokio::test]
async fn frozen_broker_fires_its_alert() {
    let (bridge, prometheus) = watched(Options::new(DatabaseKind::Sqlite)).await;
    bridge
        .broker
        .process()
        .expect("it runs")
        .signal(Signal::Stop);
    check(&prometheus, "LitestripeBrokerAway critical").await;
}

#[tokio::test]
async fn poison_fires_its_alert() {
    let (bridge, prometheus) = watched(Options::new(DatabaseKind::Sqlite)).await;
    let poison =
        r#"{"object":"event","id":"evt_poison","type":"customer.subscription.updated","data":7}"#;
    bridge
        .publish("customer.subscription.updated", poison, "evt_poison")
        .await;
    check(&prometheus, "LitestripeDeadLetters warning").await;
}

#[tokio::test]
async fn growing_outbox_fires_its_alert() {
    let (bridge, prometheus) = watched(Options::new(DatabaseKind::Postgres)).await;
    // The signal of a subscription that has grown above the server's max_payload, an hour ago.
    let large = "INSERT INTO litestripe_signal_outbox \
        (shard, entity_id, subject, message_id, event_created, body, dt_created) \
        VALUES (0, 'sub_large', 'subscription.changed', 'sub_large:1', 1, repeat('x', 2000000), now() - interval '1 hour')";
    bridge.database.execute(large).await.expect("it is saved");
    check(&prometheus, "LitestripeOutboxGrowing critical").await;
}

#[tokio::test]
async fn worker_with_another_clock_fires_its_alert() {
    let clock = Clock::new();
    let options = Options::new(DatabaseKind::Postgres).clock(&clock);
    let (_bridge, prometheus) = watched(options).await;
    clock.set_ahead(5 * 60 * 60);
    check(&prometheus, "LitestripeClockOff warning").await;
}

#[tokio::test]
async fn ingress_with_another_clock_fires_its_alert() {
    let clock = Clock::new();
    let environment = clock.environment().into_iter();
    let options = environment.fold(
        Options::new(DatabaseKind::Sqlite),
        |options, (name, value)| options.ingress(name, value),
    );
    let (bridge, prometheus) = watched(options).await;
    clock.set_ahead(60 * 60);
    for event in stripe::story(OffsetDateTime::now_utc()) {
        let refused = bridge.post(&Delivery::new(event.body(), SECRET)).await;
        assert_eq!(refused.status(), 400);
    }
    check(&prometheus, "LitestripeClockOff critical").await;
}

#[tokio::test]
async fn refused_deliveries_fire_their_alert() {
    let (bridge, prometheus) = watched(Options::new(DatabaseKind::Sqlite)).await;
    for event in stripe::story(OffsetDateTime::now_utc()) {
        let refused = bridge
            .post(&Delivery::new(event.body(), "whsec_other"))
            .await;
        assert_eq!(refused.status(), 400);
    }
    check(&prometheus, "LitestripeDeliveriesRefused critical").await;
}

/// Returns the series that an expression reads, each with its matchers.
fn selectors(expression: &str) -> Vec<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut selectors = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_name) {
        let from = &rest[start..];
        let end = from.find(|c| !is_name(c)).unwrap_or(from.len());
        let (name, after) = from.split_at(end);
        rest = after;
        if let Some(quoted) = after.strip_prefix('"') {
            rest = quoted;
        }
        let is_series = ["litestripe_", "installation:", "process_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if !is_series {
            continue;
        }
        let matchers = match (after.starts_with('{'), after.find('}')) {
            (true, Some(end)) => &after[..=end],
            _ => "",
        };
        selectors.push(format!("{name}{matchers}"));
        rest = &after[matchers.len()..];
    }
    selectors
}

/// Returns the expressions of all panels but the list of firing alerts, as Grafana sends them.
fn panels() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("it is JSON");
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    targets
        .filter_map(|target| target["expr"].as_str())
        .filter(|expression| !expression.contains("ALERTS{"))
        .map(|expression| {
            expression
                .replace("$__rate_interval", "5m")
                .replace("$installation", ".*")
        })
        .collect()
}
