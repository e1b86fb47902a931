//! `litestripe-worker reconcile`: it finds rows that differ from Stripe's objects, and repairs
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use litestripe_entity::stripe_subscription::Model;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, filter_by_subscription};
use litestripe_harness::eventually;
use litestripe_harness::process::Signal;
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::api::{API_KEY, Api, Trouble};
use litestripe_harness::stripe::{MONTH, Purchase};
use serde_json::{Value, json};

use crate::orphans::{
    COMPLETED, CREATED, DEADLINE, EMAIL, UPDATED, apply, count_signals, now, until,
    until_all_questions_are_answered, with,
};

mod damage;

on_both_databases!(
    existing_account_is_imported_into_an_empty_database,
    lost_user_of_a_resolved_orphan_is_restored,
);

/// A command compares twice, some seconds apart.
const COMMAND: Duration = Duration::from_secs(120);

const LIST: &str = "/v1/subscriptions?";

/// Text that an operator put into metadata. It must not appear in any output.
const PRIVATE: &str = "the words of an operator";

/// A subscription at Stripe, and its user.
struct Customer {
    purchase: Purchase,
    user: Option<String>,
    changes: Value,
}

async fn existing_account_is_imported_into_an_empty_database(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = empty(database, &api).await;
    let customers: Vec<_> = (0..250)
        .map(|index| match index % 25 {
            0 => Customer::new(None),
            1 => Customer::new(Some(index))
                .with(json!({ "status": "canceled", "ended_at": now() - 60 })),
            _ => Customer::new(Some(index)),
        })
        .collect();
    for customer in &customers {
        customer.put(&api);
    }
    let migrated = bridge.worker().args(["migrate", "up"]).run(DEADLINE).await;
    assert!(
        migrated.status.success(),
        "comparing alone does not migrate: {migrated:?}"
    );
    let found = reconcile(&bridge, &["--json"]).await;
    assert_eq!(found.status.code(), Some(3), "{found:?}");
    let report = json_of(&found);
    assert!(
        findings(&report)
            .values()
            .all(|(problem, fields)| *problem == "missing" && fields.is_empty())
    );
    assert_eq!(
        (&report["different"], &report["calls"]),
        (&json!(250), &json!(3)),
        "comparing alone does not fetch their sessions"
    );

    let imported = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(imported.status.code(), Some(0), "{imported:?}");
    let report = json_of(&imported);
    assert_eq!(
        (&report["compared"], &report["repaired"]),
        (&json!(250), &json!(250))
    );
    assert_eq!(
        report["calls"],
        3 + 250,
        "three pages, and the session of each"
    );
    let signals = bridge.check().await;
    assert_eq!(count_signals(&signals, "orphan.created"), 0);
    assert_eq!(bridge.orphans().await, []);
    let questions = bridge
        .database
        .query("SELECT 1 FROM litestripe_question")
        .await
        .expect("the database answers");
    let without_user = customers.iter().filter(|customer| customer.user.is_none());
    assert_eq!(
        questions.len(),
        without_user.count(),
        "the others were claimed by their sessions"
    );
    for customer in &customers {
        let row = bridge.row(customer.id()).await;
        assert_eq!(row.client_reference_id, customer.user);
        assert_eq!(
            row.checkout_session_id,
            customer
                .user
                .as_ref()
                .map(|_| customer.purchase.checkout_session.clone())
        );
        let status = customer.changes["status"].as_str().unwrap_or("active");
        assert_eq!(row.status.as_deref(), Some(status));
        let sent = filter_by_subscription(&signals, customer.id())
            .pop()
            .expect("it is signalled");
        assert_eq!(sent.body["client_reference_id"], json!(customer.user));
    }

    let nothing = reconcile(&bridge, &[]).await;
    assert_eq!(nothing.status.code(), Some(0), "{nothing:?}");
    assert!(
        nothing.stdout.contains("250 equal, 0 different"),
        "{nothing:?}"
    );
    assert_eq!(bridge.signals().await.len(), signals.len());
}

/// The operator's resolution is stored in the orphan, so it survives the row, whatever the session
/// says.
async fn lost_user_of_a_resolved_orphan_is_restored(database: DatabaseKind) {
    let api = Api::start().await;
    let lookup = "sql:SELECT 1 WHERE $1 = 'user_4711'";
    let bridge =
        Bridge::start(options(database, &api).worker("LITESTRIPE_USER_LOOKUP", lookup)).await;
    let customers = [
        Customer::new(Some(1)).without_user(),
        Customer::new(Some(2)),
    ];
    for customer in &customers {
        customer.buy(&bridge).await;
        customer.put(&api);
        until(&bridge, customer.id(), |_| true).await;
        let resolution = [
            "orphans",
            "resolve",
            customer.id(),
            "--client-reference-id",
            "user_4711",
            "--force",
        ];
        assert!(
            bridge
                .worker()
                .args(resolution)
                .run(COMMAND)
                .await
                .status
                .success()
        );
        until(&bridge, customer.id(), |orphan| {
            orphan.resolved_at.is_some()
        })
        .await;
    }
    bridge.wait_until_applied().await;
    let orphans = bridge.orphans().await;
    execute(&bridge, "DELETE FROM stripe_subscription").await;

    let repaired = reconcile(&bridge, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    bridge.wait_until_applied().await;
    for customer in &customers {
        assert_eq!(
            bridge
                .row(customer.id())
                .await
                .client_reference_id
                .as_deref(),
            Some("user_4711")
        );
    }
    assert_eq!(bridge.orphans().await, orphans);
    assert_eq!(reconcile(&bridge, &[]).await.status.code(), Some(0));
    // A pending answer would write the row, and with it the column.
    until_all_questions_are_answered(&bridge).await;
    // Now the column alone is wrong, and so is the user in the session.
    execute(
        &bridge,
        "UPDATE stripe_subscription SET client_reference_id = 'user_2'",
    )
    .await;
    let found = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(
        (found.status.code(), &json_of(&found)["repaired"]),
        (Some(0), &json!(2)),
        "{found:?}"
    );
    assert_eq!(
        bridge
            .row(customers[1].id())
            .await
            .client_reference_id
            .as_deref(),
        Some("user_4711")
    );
}

#[tokio::test]
async fn session_without_a_user_creates_an_orphan_unless_its_subscription_ended() {
    let api = Api::start().await;
    let bridge = empty(DatabaseKind::Sqlite, &api).await;
    let running = Customer::new(Some(1)).without_user();
    let ended = Customer::new(Some(2))
        .without_user()
        .with(json!({ "status": "canceled" }));
    for customer in [&running, &ended] {
        customer.put(&api);
    }
    let repaired = reconcile(&bridge, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    let orphans = bridge.orphans().await;
    assert_eq!(
        orphans
            .iter()
            .map(|orphan| orphan.id.as_str())
            .collect::<Vec<_>>(),
        [running.id()]
    );
    assert_eq!(orphans[0].customer_email.as_deref(), Some(EMAIL));
    assert!(!format!("{repaired:?}").contains(EMAIL));
    assert_eq!(
        reconcile(&bridge, &[]).await.status.code(),
        Some(0),
        "an orphan is no difference"
    );
}

/// The row is the only record of the user: writing it would lose the user.
#[tokio::test]
async fn row_that_is_the_only_record_of_its_user_is_reported_and_left_alone() {
    let api = Api::start().await;
    let bridge = Bridge::start(options(DatabaseKind::Sqlite, &api)).await;
    let customer = Customer::new(Some(1));
    customer.buy(&bridge).await;
    bridge.wait_until_applied().await;
    api.put_subscription(customer.purchase.subscription());
    execute(&bridge, "UPDATE stripe_subscription SET merge_state = '{}'").await;
    let row = bridge.row(customer.id()).await;

    let report = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(report.status.code(), Some(3), "{report:?}");
    assert!(report.stdout.contains("not repairable"), "{report:?}");
    assert_eq!(bridge.row(customer.id()).await, row);
}

#[tokio::test]
async fn change_during_the_comparison_is_no_difference() {
    let api = Api::start().await;
    let bridge = Bridge::start(options(DatabaseKind::Sqlite, &api)).await;
    // More than one page: the second one is held back while rows change.
    let customers: Vec<_> = (0..101).map(|index| Customer::new(Some(index))).collect();
    for customer in &customers {
        customer.buy(&bridge).await;
        customer.put(&api);
    }
    bridge.wait_until_applied().await;
    let newest = customers
        .iter()
        .map(|customer| customer.purchase.created)
        .max()
        .unwrap_or_default();
    let (in_flight, still) = (Customer::at(newest + 10, 1), Customer::at(newest + 11, 2));
    // Stripe has changed this one, and the event is in flight when the first page is read.
    let changed = json!({ "metadata": { "seats": "9" } });
    in_flight.buy(&bridge).await;
    api.put_subscription(with(in_flight.purchase.subscription(), changed.clone()));
    // This one changes while the first page is in flight.
    still.buy(&bridge).await;
    still.put(&api);
    bridge.wait_until_applied().await;

    for arguments in [&["--json"][..], &["--repair", "--json"]] {
        let asked = api.requests(LIST).len();
        let (first, second) = (api.hold(LIST), api.hold("starting_after"));
        let running = bridge
            .worker()
            .arg("reconcile")
            .args(arguments.iter().copied())
            .start();
        until_asked(&api, asked + 1).await;
        let at = now();
        let ended = json!({ "cancel_at": at + MONTH, "metadata": { "at": at.to_string() } });
        apply(
            &bridge,
            &still
                .purchase
                .subscription_event(UPDATED, at, ended.clone()),
        )
        .await;
        api.put_subscription(with(still.purchase.subscription(), ended));
        drop(first);
        until_asked(&api, asked + 2).await;
        let update = in_flight
            .purchase
            .subscription_event(UPDATED, newest + 20, changed.clone());
        apply(&bridge, &update).await;
        drop(second);
        let status = running.wait(COMMAND).await;
        let report: Value = serde_json::from_str(&running.stdout()).expect("it is JSON");
        assert_eq!(status.code(), Some(0), "{report:#}\n{}", running.stderr());
        assert_eq!(report["compared"], 103);
        assert_eq!(
            bridge.row(still.id()).await.subscription_metadata,
            json!({ "at": at.to_string() })
        );
        assert_eq!(
            bridge.row(in_flight.id()).await.subscription_metadata,
            json!({ "seats": "9" })
        );
    }
    bridge.check().await;
}

#[tokio::test]
async fn outage_of_stripe_halfway_keeps_finished_repairs_and_the_next_run_does_the_rest() {
    let api = Api::start().await;
    let bridge = empty(DatabaseKind::Sqlite, &api).await;
    let customers: Vec<_> = (0..130).map(|index| Customer::new(Some(index))).collect();
    for customer in &customers {
        customer.put(&api);
    }
    api.answer_next(
        "starting_after",
        Trouble::status(503).header("Stripe-Should-Retry", "false"),
    );
    let broken = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(broken.status.code(), Some(1), "{broken:?}");
    for said in [
        "100 subscriptions",
        "100 rows repaired",
        "503",
        "req_ofTheStub",
        "running it again is safe",
    ] {
        assert!(broken.stderr.contains(said), "{said}: {}", broken.stderr);
    }
    let report = json_of(&broken);
    assert_eq!(
        (&report["complete"], &report["repaired"]),
        (&json!(false), &json!(100))
    );
    assert_eq!(bridge.rows().await.len(), 100);

    let again = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    let report = json_of(&again);
    assert_eq!(
        (&report["equal"], &report["repaired"]),
        (&json!(100), &json!(30))
    );
    assert_eq!(bridge.rows().await.len(), 130);
    bridge.check().await;
}

#[tokio::test]
async fn interrupted_repair_reports_what_it_did() {
    let api = Api::start().await;
    let bridge = empty(DatabaseKind::Sqlite, &api).await;
    for index in 0..130 {
        Customer::new(Some(index)).put(&api);
    }
    let held = api.hold("starting_after");
    let running = bridge
        .worker()
        .args(["reconcile", "--repair", "--json"])
        .start();
    until_asked(&api, 2).await;
    running.signal(Signal::Int);
    drop(held);
    let status = running.wait(COMMAND).await;
    assert_eq!(status.code(), Some(1), "{}", running.stderr());
    assert!(
        running.stderr().contains("asked to stop"),
        "{}",
        running.stderr()
    );
    let report: Value = serde_json::from_str(&running.stdout()).expect("it is JSON");
    assert_eq!(report["complete"], false);
    let rows = bridge.rows().await.len();
    assert_eq!(report["repaired"], rows, "{report:#}");
    assert!(rows >= 100, "the page in progress is finished: {rows}");
    bridge.check().await;
}

#[tokio::test]
async fn key_that_is_missing_or_of_the_other_mode_is_refused() {
    let api = Api::start().await;
    let bridge = Bridge::start(options(DatabaseKind::Sqlite, &api)).await;
    let without = bridge
        .worker()
        .env("STRIPE_SECRET_KEY", "")
        .args(["reconcile", "--repair"])
        .run(COMMAND)
        .await;
    assert_eq!(without.status.code(), Some(2), "{without:?}");
    assert!(
        without.stderr.contains("STRIPE_SECRET_KEY is missing"),
        "{without:?}"
    );

    // An empty table has no mode.
    assert_eq!(reconcile(&bridge, &[]).await.status.code(), Some(0));
    let asked = api.requests("").len();
    let customer = Customer::new(Some(1));
    customer.buy(&bridge).await;
    customer.put(&api);
    bridge.wait_until_applied().await;
    let live = "sk_live_theOtherModes";
    let other = bridge
        .worker()
        .env("STRIPE_SECRET_KEY", live)
        .args(["reconcile", "--repair"])
        .run(COMMAND)
        .await;
    assert_eq!(other.status.code(), Some(2), "{other:?}");
    for said in [
        "STRIPE_SECRET_KEY",
        "live mode key",
        "test mode",
        "--any-mode",
    ] {
        assert!(other.stderr.contains(said), "{said}: {other:?}");
    }
    assert!(!other.stderr.contains("theOtherModes"), "{other:?}");

    execute(&bridge, "UPDATE stripe_subscription SET livemode = TRUE").await;
    let other = reconcile(&bridge, &["--repair"]).await;
    assert_eq!(other.status.code(), Some(2), "{other:?}");
    assert!(
        other.stderr.contains("test mode key") && other.stderr.contains("live mode"),
        "{other:?}"
    );
    assert_eq!(api.requests("").len(), asked, "Stripe was not asked");
    let repaired = reconcile(&bridge, &["--repair", "--any-mode"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    assert!(!bridge.row(customer.id()).await.livemode);
}

#[tokio::test]
async fn only_subscriptions_of_the_given_status_are_compared() {
    let api = Api::start().await;
    let bridge = Bridge::start(options(DatabaseKind::Sqlite, &api)).await;
    let [late, ended, unknown] = ["past_due", "canceled", "active"]
        .map(|status| Customer::new(Some(1)).with(json!({ "status": status })));
    late.put(&api);
    ended.put(&api);
    unknown.buy(&bridge).await;
    bridge.wait_until_applied().await;
    for (status, expected) in [
        ("past_due", vec![late.id()]),
        ("ended", vec![ended.id()]),
        ("paused", vec![]),
    ] {
        let found = reconcile(&bridge, &["--json", "--status", status]).await;
        let report = json_of(&found);
        assert_eq!(
            findings(&report).keys().collect::<Vec<_>>(),
            expected,
            "{status}"
        );
        assert_eq!(
            found.status.code(),
            Some(if expected.is_empty() { 0 } else { 3 }),
            "{found:?}"
        );
        assert_eq!(api.requests(&format!("status={status}")).len(), 1);
    }
    let wrong = reconcile(&bridge, &["--status", "alive"]).await;
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    assert!(
        wrong.stderr.contains("alive") && wrong.stderr.contains("incomplete_expired"),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn rows_unknown_to_stripe_are_reported_and_unlisted_ones_are_compared() {
    let api = Api::start().await;
    let bridge = Bridge::start(options(DatabaseKind::Sqlite, &api)).await;
    let customers: Vec<_> = (0..4).map(|index| Customer::new(Some(index))).collect();
    let [listed, unknown, on_a_clock, connected] = customers.as_slice() else {
        panic!("there are four")
    };
    for customer in [listed, unknown, on_a_clock] {
        customer.buy(&bridge).await;
    }
    let mut event =
        connected
            .purchase
            .subscription_event(CREATED, connected.purchase.created, json!({}));
    event.value["account"] = json!("acct_1Connected");
    apply(&bridge, &event).await;
    bridge.wait_until_applied().await;
    listed.put(&api);
    // Stripe's lists leave out subscriptions of test clocks.
    let changes = with(
        on_a_clock.changes.clone(),
        json!({ "test_clock": "clock_1", "status": "past_due" }),
    );
    api.put_subscription(with(on_a_clock.purchase.subscription(), changes));
    let row = bridge.row(unknown.id()).await;

    let found = reconcile(&bridge, &["--json"]).await;
    assert_eq!(found.status.code(), Some(3), "{found:?}");
    let expected = BTreeMap::from([
        (
            unknown.id().to_owned(),
            ("unknown_to_stripe", BTreeSet::new()),
        ),
        (
            on_a_clock.id().to_owned(),
            ("different", BTreeSet::from(["status".to_owned()])),
        ),
    ]);
    let report = json_of(&found);
    assert_eq!(findings(&report), expected);
    assert_eq!(
        (&report["unknown_to_stripe"], &report["compared"]),
        (&json!(1), &json!(2))
    );

    let repaired = reconcile(&bridge, &["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(3), "{repaired:?}");
    assert!(
        repaired.stdout.contains("1 unknown to Stripe")
            && repaired.stdout.contains("not repairable"),
        "{repaired:?}"
    );
    assert_eq!(bridge.row(unknown.id()).await, row, "it is left alone");
    assert_eq!(
        bridge.row(on_a_clock.id()).await.status.as_deref(),
        Some("past_due")
    );
}

#[tokio::test]
async fn subscription_that_cannot_be_kept_is_reported_and_not_stored() {
    let api = Api::start().await;
    let bridge = empty(DatabaseKind::Sqlite, &api).await;
    let (good, bad) = (
        Customer::new(Some(1)),
        Customer::new(Some(2)).with(json!({ "status": { "is": PRIVATE } })),
    );
    good.put(&api);
    // The stub lists it with every filter.
    api.put_subscription(with(
        bad.purchase.subscription(),
        json!({ "cancel_at": PRIVATE }),
    ));
    let report = reconcile(&bridge, &["--repair", "--json"]).await;
    assert_eq!(report.status.code(), Some(3), "{report:?}");
    let found = json_of(&report);
    assert_eq!(findings(&found)[bad.id()].0, "cannot_be_kept");
    assert!(
        report.stdout.contains("`data.object.cancel_at`") && !report.stdout.contains(PRIVATE),
        "{report:?}"
    );
    assert_eq!(bridge.rows().await.len(), 1);
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

#[tokio::test]
async fn unavailable_broker_and_outdated_schema_are_named() {
    let api = Api::start().await;
    let mut bridge = Bridge::prepare(options(DatabaseKind::Sqlite, &api));
    // Comparing needs the broker too, which holds the budget of calls to Stripe.
    for arguments in [&["--repair"][..], &[]] {
        let refused = reconcile(&bridge, arguments).await;
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(refused.stderr.contains("NATS_URL"), "{refused:?}");
    }
    assert_eq!(api.requests("").len(), 0);
    bridge.broker.resume().await;
    let behind = bridge
        .worker()
        .env("LITESTRIPE_AUTO_MIGRATE", "false")
        .env("DATABASE_URL", "sqlite://new.db?mode=rwc");
    let behind = behind.args(["reconcile", "--repair"]).run(COMMAND).await;
    assert_eq!(behind.status.code(), Some(1), "{behind:?}");
    assert!(
        behind.stderr.contains("litestripe-worker migrate up"),
        "{behind:?}"
    );
}

impl Customer {
    /// A subscription that was created an hour ago, through Checkout or, without an index, by API.
    fn new(index: Option<i64>) -> Self {
        let (created, user) = (
            now() - 3600 - index.unwrap_or(0),
            index.map(|index| format!("user_{index}")),
        );
        Self {
            purchase: Purchase::new(created),
            user,
            changes: json!({ "metadata": { "seats": "1" } }),
        }
    }

    fn at(created: i64, index: i64) -> Self {
        Self {
            purchase: Purchase::new(created),
            ..Self::new(Some(index))
        }
    }

    fn without_user(self) -> Self {
        Self {
            user: Some(String::new()),
            ..self
        }
    }

    fn with(self, changes: Value) -> Self {
        Self {
            changes: with(self.changes, changes),
            ..self
        }
    }

    fn id(&self) -> &str {
        &self.purchase.subscription
    }

    fn session(&self) -> Option<Value> {
        self.user
            .as_ref()
            .map(|user| json!({ "client_reference_id": user }))
    }

    /// Adds the subscription and its session to the stub.
    fn put(&self, api: &Api) {
        api.put_subscription(with(self.purchase.subscription(), self.changes.clone()));
        if let Some(session) = self.session() {
            api.put_checkout_session(with(self.purchase.checkout_session(), session));
        }
    }

    /// Delivers the events of the purchase.
    async fn buy(&self, bridge: &Bridge) {
        let created = self.purchase.created;
        bridge
            .deliver(
                &self
                    .purchase
                    .subscription_event(CREATED, created, self.changes.clone()),
            )
            .await;
        if let Some(session) = self.session() {
            bridge
                .deliver(
                    &self
                        .purchase
                        .checkout_session_event(COMPLETED, created, session),
                )
                .await;
        }
    }
}

fn options(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "60000")
        // A backfill would repair rows before reconcile does.
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
}

/// A broker and a database without streams, tables and workers.
async fn empty(database: DatabaseKind, api: &Api) -> Bridge {
    let mut bridge = Bridge::prepare(options(database, api));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge
}

async fn reconcile(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("reconcile")
        .args(arguments.iter().copied())
        .run(COMMAND)
        .await
}

async fn execute(bridge: &Bridge, sql: &str) {
    bridge
        .database
        .query(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn until_asked(api: &Api, count: usize) {
    eventually("a list to be asked for", DEADLINE, async || {
        let asked = api.requests(LIST).len();
        if asked >= count {
            Ok(())
        } else {
            Err(asked.to_string())
        }
    })
    .await;
}

fn json_of(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}

/// The findings by subscription: the problem and the fields.
fn findings(report: &Value) -> BTreeMap<String, (&str, BTreeSet<String>)> {
    let text = |value: &Value| value.as_str().expect("it is a text").to_owned();
    let differences = report["differences"].as_array().expect("it is a list");
    let by_id: BTreeMap<_, _> = differences
        .iter()
        .map(|finding| {
            let fields = finding["differences"].as_array().expect("it is a list");
            let fields = fields
                .iter()
                .map(|difference| text(&difference["field"]))
                .collect();
            let problem = finding["problem"].as_str().expect("it is a text");
            (text(&finding["stripe_subscription_id"]), (problem, fields))
        })
        .collect();
    assert_eq!(
        by_id.len(),
        differences.len(),
        "each is reported once: {report:#}"
    );
    by_id
}

fn difference<'a>(report: &'a Value, id: &str, field: &str) -> &'a Value {
    let findings = report["differences"].as_array().expect("it is a list");
    let finding = findings
        .iter()
        .find(|finding| finding["stripe_subscription_id"] == id)
        .expect("it was found");
    let differences = finding["differences"].as_array().expect("it is a list");
    differences
        .iter()
        .find(|difference| difference["field"] == field)
        .expect("it differs in that")
}

/// The rows with only the columns that Stripe's objects determine.
fn of_stripe(rows: &[Model]) -> Vec<Model> {
    let at = time::OffsetDateTime::UNIX_EPOCH;
    let of_stripe = |row: &Model| Model {
        metadata: json!(null),
        revision: 0,
        version: 0,
        last_event_id: None,
        last_event_created: None,
        merge_state: String::new(),
        dt_created: at,
        dt_last_updated: at,
        ..row.clone()
    };
    rows.iter().map(of_stripe).collect()
}
