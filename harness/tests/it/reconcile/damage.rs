//! A table with damages of every kind: all of them are found and repaired, and nothing else is
//! reported.

use std::collections::{BTreeMap, BTreeSet};

use litestripe_entity::stripe_subscription::Model;
use litestripe_harness::bridge::{Bridge, DatabaseKind, filter_by_subscription};
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::json;

use super::{
    Customer, EMAIL, PRIVATE, UPDATED, apply, difference, execute, findings, json_of, of_stripe,
    options, reconcile, with,
};

on_both_databases!(
    every_damage_is_found_and_repaired_without_a_worker,
    every_damage_is_found_and_repaired_while_workers_run,
);

async fn every_damage_is_found_and_repaired_without_a_worker(database: DatabaseKind) {
    let api = Api::start().await;
    let mut bridge = Bridge::start(options(database, &api)).await;
    let damage = damage(&mut bridge, &api).await;
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    check_found_and_repaired(&bridge, &api, damage).await;
}

async fn every_damage_is_found_and_repaired_while_workers_run(database: DatabaseKind) {
    let api = Api::start().await;
    let mut bridge = Bridge::start(options(database, &api).workers(2)).await;
    let damage = damage(&mut bridge, &api).await;
    check_found_and_repaired(&bridge, &api, damage).await;
}

/// The damages to a table.
struct Damage {
    before: Vec<Model>,
    /// The expected findings by subscription: the problem and the fields.
    expected: BTreeMap<String, (&'static str, BTreeSet<String>)>,
    /// Rows with a correct merge state and wrong columns: subscribers have the correct values.
    columns_only: Vec<String>,
    /// The row that was deleted.
    deleted: String,
}

/// Fills a table and then damages it in every way.
async fn damage(bridge: &mut Bridge, api: &Api) -> Damage {
    let is_sqlite = bridge.database.url().starts_with("sqlite:");
    let customers: Vec<_> = (0..15).map(|index| Customer::new(Some(index))).collect();
    for customer in &customers {
        customer.buy(bridge).await;
        customer.put(api);
    }
    bridge.wait_until_applied().await;
    // One subscription changes, and its merge state will be set back to before the change.
    let set_back = &customers[5];
    let id = set_back.id();
    let before = bridge.row(id).await.merge_state;
    let upgraded = json!({ "metadata": { "seats": "9" } });
    let update = set_back.purchase.subscription_event(
        UPDATED,
        set_back.purchase.created + 60,
        upgraded.clone(),
    );
    apply(bridge, &update).await;
    api.put_subscription(with(set_back.purchase.subscription(), upgraded));
    bridge.check().await;
    let rows = bridge.rows().await;

    let end = "2030-01-01T00:00:00+00:00";
    let before = before.replace('\'', "''");
    let metadata = format!(r#"{{"seats":"2","note":"{PRIVATE}"}}"#);
    let broken_items = if is_sqlite {
        "items = 'no JSON'"
    } else {
        r#"items = '"no list"'"#
    };
    let sets = [
        ("status = 'past_due'".to_owned(), "different", vec!["status"]),
        ("client_reference_id = NULL".to_owned(), "different", vec!["client_reference_id"]),
        (String::new(), "missing", vec![]),
        (
            format!("current_period_end = '{end}', trial_end = '{end}'"),
            "different",
            vec!["current_period_end", "trial_end"],
        ),
        ("items = '[]'".to_owned(), "different", vec!["items"]),
        (format!("merge_state = '{before}'"), "different", vec!["merge_state"]),
        (format!("subscription_metadata = '{metadata}'"), "different", vec!["subscription_metadata"]),
        ("merge_state = 'no JSON'".to_owned(), "unreadable", vec![]),
        ("merge_state = '{}'".to_owned(), "different", vec!["merge_state"]),
        (
            "stripe_customer_id = NULL, cancel_at_period_end = TRUE".to_owned(),
            "different",
            vec!["stripe_customer_id", "cancel_at_period_end"],
        ),
        (
            "merge_state = '{}', client_reference_id = NULL, checkout_session_id = NULL, status = 'active'".to_owned(),
            "different",
            vec!["merge_state", "client_reference_id", "checkout_session_id"],
        ),
        ("livemode = TRUE, created = NULL".to_owned(), "different", vec!["livemode", "created"]),
        (
            broken_items.to_owned(),
            if is_sqlite { "unreadable" } else { "different" },
            if is_sqlite { vec![] } else { vec!["items"] },
        ),
        (
            "merge_state = '', client_reference_id = 'somebody else'".to_owned(),
            "unreadable",
            vec!["client_reference_id"],
        ),
    ];
    assert_eq!(sets.len() + 1, customers.len(), "one row stays undamaged");
    let mut expected = BTreeMap::new();
    for (customer, (set, problem, fields)) in customers.iter().zip(sets) {
        let statement = if set.is_empty() {
            "DELETE FROM stripe_subscription".to_owned()
        } else {
            format!("UPDATE stripe_subscription SET {set}")
        };
        execute(
            bridge,
            &format!(
                "{statement} WHERE stripe_subscription_id = '{}'",
                customer.id()
            ),
        )
        .await;
        expected.insert(
            customer.id().to_owned(),
            (problem, fields.into_iter().map(str::to_owned).collect()),
        );
    }
    let ids = |indexes: &[usize]| {
        indexes
            .iter()
            .map(|index| customers[*index].id().to_owned())
            .collect()
    };
    Damage {
        before: rows,
        expected,
        columns_only: ids(&[0, 1, 3, 4, 6, 9, 11, 12]),
        deleted: customers[2].id().to_owned(),
    }
}

async fn check_found_and_repaired(bridge: &Bridge, api: &Api, damage: Damage) {
    let signals = bridge.signals().await.len();
    let events = bridge.stored_events().await;
    let found = reconcile(bridge, &["--json"]).await;
    assert_eq!(found.status.code(), Some(3), "{found:?}");
    let report = json_of(&found);
    assert_eq!(findings(&report), damage.expected, "{report:#}");
    let count = damage.expected.len();
    for (name, value) in [
        ("complete", json!(true)),
        ("compared", json!(count + 1)),
        ("equal", json!(1)),
        ("different", json!(count)),
        ("repaired", json!(0)),
        ("remaining", json!(count)),
        ("unknown_to_stripe", json!(0)),
        ("calls", json!(api.requests("/v1/").len())),
    ] {
        assert_eq!(report[name], value, "`{name}` of {report:#}");
    }
    let status = difference(&report, damage.columns_only[0].as_str(), "status");
    assert_eq!(
        (&status["row"], &status["stripe"]),
        (&json!("past_due"), &json!("active"))
    );
    let metadata = difference(
        &report,
        damage.columns_only[4].as_str(),
        "subscription_metadata",
    );
    assert_eq!(
        (&metadata["row"], &metadata["stripe"]),
        (&json!(["note", "seats"]), &json!(["seats"]))
    );

    let table = reconcile(bridge, &[]).await;
    assert_eq!(table.status.code(), Some(3), "{table:?}");
    assert!(
        table.stderr.contains("reconcile --repair"),
        "it names the command that repairs: {table:?}"
    );
    for (id, (_, fields)) in &damage.expected {
        for field in fields {
            let is_it = |line: &str| line.contains(id.as_str()) && line.contains(field.as_str());
            assert!(
                table.stdout.lines().any(is_it),
                "{id} {field} in\n{}",
                table.stdout
            );
        }
        assert!(
            table.stdout.contains(id.as_str()),
            "{id} in\n{}",
            table.stdout
        );
    }
    assert_eq!(
        bridge.stored_events().await,
        events,
        "comparing stores nothing"
    );
    assert_eq!(bridge.signals().await.len(), signals);

    let repaired = reconcile(bridge, &["--repair", "--json"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    let report = json_of(&repaired);
    assert_eq!(findings(&report), damage.expected, "{report:#}");
    assert_eq!(
        (&report["repaired"], &report["remaining"]),
        (&json!(count), &json!(0)),
        "{report:#}"
    );
    for output in [&found, &table, &repaired] {
        for private in [PRIVATE, EMAIL, API_KEY] {
            assert!(!format!("{output:?}").contains(private), "{private}");
        }
    }
    bridge.wait_until_applied().await;
    let rows = bridge.rows().await;
    assert_eq!(of_stripe(&rows), of_stripe(&damage.before));

    // The deleted row comes back as a new one, under a revision that subscribers do not know yet.
    let signals = bridge.signals().await;
    let of_deleted = filter_by_subscription(&signals, &damage.deleted);
    let [.., known, back] = of_deleted.as_slice() else {
        panic!("{of_deleted:?}")
    };
    assert!(
        back.body["revision"].as_i64() > known.body["revision"].as_i64(),
        "{back:?}"
    );
    for row in &rows {
        let before = damage
            .before
            .iter()
            .find(|before| before.stripe_subscription_id == row.stripe_subscription_id);
        let before = before.expect("no row is new");
        assert!(row.revision >= before.revision, "{row:?}");
        let last = filter_by_subscription(&signals, &row.stripe_subscription_id)
            .pop()
            .expect("it was signalled");
        assert_eq!(
            last.body["revision"], row.revision,
            "subscribers have the row"
        );
        if damage.columns_only.contains(&row.stripe_subscription_id) {
            assert_eq!(
                row.revision, before.revision,
                "subscribers had the correct row before: {row:?}"
            );
            assert_eq!(row.metadata, before.metadata);
            assert_eq!(row.merge_state, before.merge_state, "no event was needed");
        }
    }
    assert_eq!(bridge.orphans().await, []);
    assert_eq!(bridge.dead_letters().await.len(), 0);

    let nothing = reconcile(bridge, &["--json"]).await;
    assert_eq!(nothing.status.code(), Some(0), "{nothing:?}");
    assert_eq!(json_of(&nothing)["differences"], json!([]));
    let nothing = reconcile(bridge, &["--repair"]).await;
    assert_eq!(nothing.status.code(), Some(0), "{nothing:?}");
    assert!(nothing.stdout.contains(" 0 different"), "{nothing:?}");
}
