//! What `/metrics` of the programs shows, and that a scrape waits for nothing.

use std::time::Duration;

use litestripe_contract::signal::OrphanReason;
use litestripe_domain::question::Kind;
use litestripe_entity::question::{self as question_entity, Column};
use litestripe_entity::signal_outbox;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Node, Options};
use litestripe_harness::eventually;
use litestripe_harness::process::Signal;
use litestripe_harness::proxy::{Mode, Proxy};
use litestripe_harness::stripe::api::{Api, Trouble};
use litestripe_harness::stripe::{self, Purchase};
use litestripe_worker::store::figures::{self, COUNT_MAX};
use litestripe_worker::store::question;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait as _, EntityTrait as _, QueryFilter as _};
use serde_json::json;
use time::OffsetDateTime;

use crate::growth::{commit, open, question_about, signal};
use crate::orphans::{CREATED, DEADLINE, apply, now, until};
use crate::postgres::url_at;
use crate::stripe_api::{SUBSCRIPTIONS, there_and_back, with_key};

on_both_databases!(
    worker_shows_what_waits,
    delays_are_measured_from_the_receipt_of_an_event,
    figures_say_what_the_tables_hold_and_count_up_to_a_bound,
    figures_that_the_database_refuses_are_unknown_and_nobody_waits,
);

/// Returns the values of the series `name{labels}` and `name_count{labels}`.
fn value(page: &str, series: &str) -> Option<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(series))?;
    line.strip_prefix(' ')?.parse().ok()
}

/// Waits until the page shows these values, each of a series.
pub(crate) async fn until_shown(node: &Node, expected: &[(&str, f64)]) {
    eventually("the metrics", DEADLINE, async || {
        let (_, page) = node.page("/metrics").await?;
        for (series, expected) in expected {
            let found = value(&page, series);
            if found
                .is_none_or(|found| found != *expected && !(found.is_nan() && expected.is_nan()))
            {
                return Err(format!(
                    "{series} {found:?} instead of {expected} in\n{page}"
                ));
            }
        }
        Ok(())
    })
    .await;
}

async fn worker_shows_what_waits(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api).worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    let worker = &bridge.workers[0];
    // An uncertain row whose fetch fails, an orphan, a dead letter.
    api.refuse(SUBSCRIPTIONS, Trouble::status(401));
    let uncertain = Purchase::new(now() - 60);
    bridge.deliver_all(&there_and_back(&uncertain, 5)).await;
    let unclaimed = Purchase::new(now() - 60);
    let created = unclaimed.subscription_event(CREATED, unclaimed.created, json!({}));
    apply(&bridge, &created).await;
    until(&bridge, &unclaimed.subscription, |_| true).await;
    bridge
        .publish("customer.subscription.updated", "7", "evt_poison")
        .await;
    let streams = [
        "STRIPE_EVENTS",
        "LITESTRIPE_SIGNALS",
        "STRIPE_DEAD_LETTERS",
        "KV_litestripe",
    ];
    until_shown(
        worker,
        &[
            ("litestripe_worker_uncertain_rows", 1.0),
            (
                "litestripe_worker_open_orphans{reason=\"no_checkout_session\"}",
                1.0,
            ),
            (
                "litestripe_worker_open_orphans{reason=\"missing_client_reference_id\"}",
                0.0,
            ),
            ("litestripe_worker_open_questions{kind=\"fetch\"}", 1.0),
            ("litestripe_worker_stored_dead_letters", 1.0),
            ("litestripe_worker_pending_dead_letters", 0.0),
            ("litestripe_worker_outbox_signals", 0.0),
            ("litestripe_worker_outbox_oldest_seconds", 0.0),
            ("litestripe_worker_events_pending", 0.0),
            ("litestripe_worker_ack_pending", 0.0),
            ("litestripe_worker_oldest_unapplied_seconds", 0.0),
        ],
    )
    .await;
    let (_, page) = worker.page("/metrics").await.expect("it answers");
    for stream in streams {
        let of = |name: &str| value(&page, &format!("{name}{{stream=\"{stream}\"}}"));
        let bytes = of("litestripe_worker_stream_bytes").expect("it is shown");
        let limit = of("litestripe_worker_stream_bytes_max").expect("it is shown");
        assert!(0.0 < bytes && bytes < limit, "{stream}: {bytes} of {limit}");
    }
    // A page may be rendered between the two.
    eventually("a request in both", DEADLINE, async || {
        let (_, page) = worker.page("/metrics").await?;
        let refused = |name: &str| value(&page, &format!("{name}{{outcome=\"refused\"}}"));
        let timed = refused("litestripe_worker_stripe_request_seconds_count");
        let counted = refused("litestripe_worker_stripe_requests_total");
        let is_in_both = timed == counted && counted >= Some(1.0);
        is_in_both.then_some(()).ok_or(page)
    })
    .await;
    let program = "litestripe_build_info{program=\"litestripe-worker\",version=\"";
    assert!(page.contains(program), "{page}");
    let started = value(&page, "process_start_time_seconds").expect("it is shown");
    assert!((now() as f64 - started).abs() < 600.0, "{started}");

    // An event that no worker applies, because its row is locked.
    let lock = match database {
        DatabaseKind::Postgres => litestripe_harness::bridge::lock_row_sql(&unclaimed.subscription),
        DatabaseKind::Sqlite => "UPDATE stripe_subscription SET revision = revision".to_owned(),
    };
    let held = bridge.database.hold_lock(&lock).await;
    let updated = unclaimed.subscription_event(
        "customer.subscription.updated",
        now(),
        json!({ "cancel_at_period_end": true }),
    );
    bridge.deliver(&updated).await;
    until_shown(worker, &[("litestripe_worker_ack_pending", 1.0)]).await;
    let (_, page) = worker.page("/metrics").await.expect("it answers");
    let oldest = value(&page, "litestripe_worker_oldest_unapplied_seconds").expect("it is shown");
    assert!(oldest > 0.0 && oldest < 300.0, "{oldest}");
    held.rollback().await.expect("it is released");
    until_shown(
        worker,
        &[("litestripe_worker_oldest_unapplied_seconds", 0.0)],
    )
    .await;
}

async fn delays_are_measured_from_the_receipt_of_an_event(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).workers(2)).await;
    let story = stripe::story(OffsetDateTime::now_utc());
    bridge.deliver_all(&story).await;
    let signals = bridge.check().await.len();
    // Not received by ingress: without a time of receipt.
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.publish(CREATED, created.body(), created.id()).await;
    bridge.check().await;
    eventually("the histograms", DEADLINE, async || {
        let mut counts = [0.0; 3];
        for worker in &bridge.workers {
            let (_, page) = worker.page("/metrics").await?;
            for (count, name) in
                counts
                    .iter_mut()
                    .zip(["commit_delay", "signal_delay", "transaction"])
            {
                let name = format!("litestripe_worker_{name}_seconds");
                *count += value(&page, &format!("{name}_count")).ok_or("no count")?;
                let long = value(&page, &format!("{name}_bucket{{le=\"60\"}}"));
                let all = value(&page, &format!("{name}_bucket{{le=\"+Inf\"}}"));
                assert_eq!(long, all, "{page}");
            }
        }
        let [commits, sent, transactions] = counts;
        let expected = (story.len() as f64, signals as f64);
        if (commits, sent) == expected && transactions >= 1.0 {
            Ok(())
        } else {
            Err(format!("{counts:?} instead of {expected:?}"))
        }
    })
    .await;
    // The receipt is kept with the signal until it is sent, by whichever worker.
    let db = bridge.database.connection().await.expect("it answers");
    assert_eq!(signal_outbox::Entity::find().all(db).await, Ok(vec![]));
}

async fn figures_say_what_the_tables_hold_and_count_up_to_a_bound(kind: DatabaseKind) {
    let bridge = Bridge::start(Options::new(kind).workers(0)).await;
    let store = open(&bridge.database, kind).await;
    store.migrate_up().await.expect("it can be migrated");
    let found = figures::read(&store).await.expect("they are read");
    assert_eq!((found.signals.count, found.signals.oldest), (0, None));
    assert_eq!(
        found.questions(Kind::Fetch).oldest_wait(found.now),
        time::Duration::ZERO
    );

    let hour_ago = OffsetDateTime::now_utc() - time::Duration::HOUR;
    let many = COUNT_MAX + 5;
    let write = store.uncancelled(async move |tx| {
        let signals = (0..many).map(|number| signal(&format!("sub_{number}")));
        litestripe_worker::store::outbox::insert(&tx, signals.collect(), hour_ago).await?;
        let questions = (0..3).map(|number| question_about(&format!("sub_{number}")));
        question::save(&tx, questions.collect(), hour_ago).await?;
        commit(tx).await
    });
    write.await.expect("they are saved");
    let fail = question_entity::Entity::update_many()
        .col_expr(Column::LastError, Expr::value("no answer"))
        .col_expr(Column::DtCreated, Expr::value(hour_ago))
        .filter(Column::EntityId.eq("sub_1"));
    fail.exec(store.connection()).await.expect("it is changed");

    let found = figures::read(&store).await.expect("they are read");
    assert_eq!(found.signals.count, COUNT_MAX);
    let age = found
        .signals
        .oldest
        .map(|oldest| (found.now - oldest).whole_minutes());
    assert_eq!(age, Some(60));
    let fetches = found.questions(Kind::Fetch);
    assert_eq!((fetches.open.count, fetches.failing.count), (3, 1));
    assert_eq!(
        fetches.oldest_wait(found.now).whole_minutes(),
        60,
        "since it was saved"
    );
    assert_eq!(found.questions(Kind::Grace).open.count, 0);
    assert_eq!(found.waiting_for_key(None), 0);
    assert_eq!(found.open_orphans(OrphanReason::NoCheckoutSession), 0);
}

async fn figures_that_the_database_refuses_are_unknown_and_nobody_waits(database: DatabaseKind) {
    const OUTBOX: &str = "litestripe_worker_outbox_signals";
    const WAITING: &str = r#"litestripe_worker_waiting{for="database"}"#;
    let bridge = Bridge::start(Options::new(database)).await;
    let worker = &bridge.workers[0];
    until_shown(worker, &[(OUTBOX, 0.0), (WAITING, 0.0)]).await;
    // A table that only the figures read as long as there is no event.
    let rename = async |from: &str, to: &str| {
        let rename = format!("ALTER TABLE {from} RENAME TO {to}");
        let renamed = bridge.database.execute(&rename).await;
        renamed.expect("a table can be renamed");
    };
    rename("orphaned_payment", "elsewhere").await;
    until_shown(worker, &[(OUTBOX, f64::NAN), (WAITING, 0.0)]).await;
    worker
        .wait_for_log("the figures of the tables are unknown", DEADLINE)
        .await;
    rename("elsewhere", "orphaned_payment").await;
    until_shown(worker, &[(OUTBOX, 0.0), (WAITING, 0.0)]).await;
    worker
        .wait_for_log("the figures of the tables are known again", DEADLINE)
        .await;
}

/// Starts a bridge with a proxy between the worker and PostgreSQL, which can freeze.
pub(crate) async fn behind_a_proxy(options: Options) -> (Bridge, Proxy) {
    let mut bridge = Bridge::prepare(options);
    bridge.broker.resume().await;
    bridge.database.resume().await;
    let proxy = Proxy::start(bridge.database.server().port()).await;
    let url = url_at(&bridge, proxy.port());
    bridge.set_worker("DATABASE_URL", url);
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    (bridge, proxy)
}

#[tokio::test]
async fn scrape_waits_for_neither_database_nor_broker() {
    let (bridge, database) = behind_a_proxy(Options::new(DatabaseKind::Postgres)).await;
    let worker = &bridge.workers[0];
    until_shown(
        worker,
        &[
            ("litestripe_worker_outbox_signals", 0.0),
            ("litestripe_worker_events_pending", 0.0),
        ],
    )
    .await;
    let broker = bridge.broker.process().expect("it runs");
    database.set(Mode::HalfOpen);
    broker.signal(Signal::Stop);
    let unknown = [
        ("litestripe_worker_outbox_signals", f64::NAN),
        ("litestripe_worker_open_questions{kind=\"grace\"}", f64::NAN),
        ("litestripe_worker_events_pending", f64::NAN),
        (
            "litestripe_worker_stream_bytes{stream=\"STRIPE_EVENTS\"}",
            f64::NAN,
        ),
        ("litestripe_worker_waiting{for=\"database\"}", 1.0),
        ("litestripe_worker_waiting{for=\"broker\"}", 1.0),
    ];
    until_shown(worker, &unknown).await;
    // Each is answered at once: together they take less time than one answer of a frozen server.
    let scrapes = async {
        for _ in 0..200 {
            worker.page("/metrics").await.expect("it answers");
        }
    };
    let answered = tokio::time::timeout(Duration::from_secs(60), scrapes).await;
    answered.expect("no scrape waits");
    database.set(Mode::Pass);
    broker.signal(Signal::Cont);
    until_shown(
        worker,
        &[
            ("litestripe_worker_outbox_signals", 0.0),
            ("litestripe_worker_events_pending", 0.0),
            ("litestripe_worker_waiting{for=\"database\"}", 0.0),
            ("litestripe_worker_waiting{for=\"broker\"}", 0.0),
        ],
    )
    .await;
}

#[tokio::test]
async fn idle_worker_shows_that_the_broker_is_away() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    bridge.broker.stop().await;
    let ingress = bridge.ingress();
    until_shown(
        ingress,
        &[("litestripe_ingress_waiting{for=\"broker\"}", 1.0)],
    )
    .await;
    until_shown(
        &bridge.workers[0],
        &[("litestripe_worker_waiting{for=\"broker\"}", 1.0)],
    )
    .await;
}
