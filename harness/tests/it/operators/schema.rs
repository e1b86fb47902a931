//! The shapes that others rely on: the signals' schemas and the database's tables.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use litestripe_entity::{
    backfill, dead_letter, erasure, installation, lease, orphaned_payment, question, replay,
    signal_outbox, stripe_subscription, worker,
};
use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::program::Program;
use sea_orm::{ConnectionTrait as _, DbBackend, EntityTrait, Iterable as _, Schema, Statement};
use serde_json::{Value, json};

use super::run;

const DOCUMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/signals");

#[tokio::test]
async fn schema_prints_the_committed_documents_and_they_are_valid() {
    let all = printed(&[]).await;
    let names: Vec<_> = all
        .as_object()
        .expect("it prints them by name")
        .keys()
        .cloned()
        .collect();
    assert_eq!(
        names,
        [
            "asyncapi",
            "orphan.created",
            "orphan.resolved",
            "subscription.changed"
        ]
    );
    for name in names {
        let committed = if name == "asyncapi" {
            "asyncapi.json".to_owned()
        } else {
            format!("{name}.schema.json")
        };
        let committed =
            fs::read_to_string(Path::new(DOCUMENTS).join(committed)).expect("it is committed");
        let committed: Value = serde_json::from_str(&committed).expect("it is JSON");
        assert_eq!(
            all[&name], committed,
            "{name}: run `litestripe-worker schema --write docs/signals`"
        );
        assert_eq!(printed(&[&name]).await, committed);
        if name == "asyncapi" {
            continue;
        }
        assert_eq!(
            committed["$schema"],
            "https://json-schema.org/draft/2020-12/schema"
        );
        jsonschema::draft202012::meta::validate(&committed)
            .unwrap_or_else(|problem| panic!("{name}: {problem}"));
    }
}

#[tokio::test]
async fn schemas_are_written_to_a_folder() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let launch = Program::named("litestripe-worker")
        .args(["schema", "--write"])
        .arg(folder.path());
    assert!(run(launch).await.status.success());
    let files = |folder: &Path| -> BTreeMap<_, _> {
        let entries = fs::read_dir(folder)
            .expect("the folder exists")
            .map(|entry| entry.expect("it is readable"));
        entries
            .map(|entry| {
                (
                    entry.file_name(),
                    fs::read_to_string(entry.path()).expect("it is text"),
                )
            })
            .collect()
    };
    assert_eq!(
        files(folder.path()),
        files(Path::new(DOCUMENTS)),
        "byte for byte"
    );
}

#[tokio::test]
async fn asyncapi_document_holds_the_schemas_and_names_the_headers() {
    let document = printed(&["asyncapi"]).await;
    assert_eq!(document["asyncapi"], "3.0.0");
    let channels = document["channels"]
        .as_object()
        .expect("there are channels");
    assert_eq!(channels.len(), 3);
    for channel in channels.values() {
        let subject = channel["address"]
            .as_str()
            .expect("a channel has an address");
        let message = &channel["messages"]["signal"];
        let payload = resolved(&document, &message["payload"]);
        let alone = printed(&[subject]).await;
        assert_eq!(
            payload["properties"],
            pointing_at(&alone["properties"], "#/$defs/", "#/components/schemas/")
        );
        assert_eq!(
            message["headers"]["properties"]["ce-type"]["const"],
            format!("litestripe.v1.{subject}")
        );
    }
    for operation in document["operations"]
        .as_object()
        .expect("there are operations")
        .values()
    {
        resolved(&document, &operation["channel"]);
    }
    let text = document.to_string();
    for reference in text.split(r##""$ref":"#"##).skip(1) {
        let pointer = reference.split('"').next().unwrap_or_default();
        assert!(document.pointer(pointer).is_some(), "#{pointer} is nowhere");
    }
    assert_eq!(
        text.matches(r#""$ref":"#).count(),
        text.matches(r##""$ref":"#"##).count(),
        "it needs no other file"
    );
}

/// Resolves a `$ref` within `document`.
fn resolved<'a>(document: &'a Value, reference: &Value) -> &'a Value {
    let pointer = reference["$ref"]
        .as_str()
        .and_then(|text| text.strip_prefix('#'))
        .expect("it is a reference");
    document
        .pointer(pointer)
        .unwrap_or_else(|| panic!("#{pointer} is nowhere"))
}

fn pointing_at(schema: &Value, from: &str, to: &str) -> Value {
    serde_json::from_str(&schema.to_string().replace(from, to)).expect("it is still JSON")
}

/// A schema that accepts anything would say nothing.
#[tokio::test]
async fn schemas_reject_invalid_signals() {
    let schema = printed(&["orphan.created"]).await;
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&schema)
        .expect("it is a schema");
    let signal = json!({
        "orphan_id": "sub_1",
        "reason": "no_checkout_session",
        "checkout_session_id": null,
        "stripe_customer_id": null,
        "stripe_subscription_id": "sub_1",
        "livemode": true,
        "event": { "id": "evt_1", "type": "customer.subscription.created", "created": "2026-11-23T10:00:00Z" },
    });
    assert!(validator.is_valid(&signal));
    for (field, value) in [
        ("orphan_id", Value::Null),
        ("reason", json!("other")),
        ("livemode", json!("yes")),
        (
            "event",
            json!({ "id": "evt_1", "type": "x", "created": "yesterday" }),
        ),
    ] {
        let mut wrong = signal.clone();
        wrong[field] = value;
        assert!(
            !validator.is_valid(&wrong),
            "`{field}` may be {}",
            wrong[field]
        );
    }
}

#[tokio::test]
async fn sqlite_schema_matches_the_entities() {
    migrated_schema_matches_the_entities(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_schema_matches_the_entities() {
    migrated_schema_matches_the_entities(DatabaseKind::Postgres).await;
}

/// Creates one database by the migrations and another from the entities. The tables of the second
/// must be the same in the first.
async fn migrated_schema_matches_the_entities(kind: DatabaseKind) {
    let mut bridge = Bridge::prepare(Options::new(kind));
    bridge.database.resume().await;
    assert!(
        run(bridge.worker().args(["migrate", "up"]))
            .await
            .status
            .success()
    );
    let mut wanted = Database::prepare(kind);
    wanted.resume().await;
    create(&wanted, stripe_subscription::Entity).await;
    create(&wanted, orphaned_payment::Entity).await;
    create(&wanted, signal_outbox::Entity).await;
    create(&wanted, question::Entity).await;
    create(&wanted, replay::Entity).await;
    create(&wanted, lease::Entity).await;
    create(&wanted, backfill::Entity).await;
    create(&wanted, erasure::Entity).await;
    create(&wanted, dead_letter::Entity).await;
    create(&wanted, installation::Entity).await;
    create(&wanted, worker::Entity).await;

    let (migrated, entities) = (columns(&bridge.database).await, columns(&wanted).await);
    assert!(entities.len() >= stripe_subscription::Column::iter().count());
    for (column, entity) in &entities {
        assert_eq!(
            migrated.get(column),
            Some(entity),
            "{column}: the migrations' on the left, the entity's right"
        );
    }
    let tables: Vec<_> = entities
        .keys()
        .filter_map(|column| column.split('.').next())
        .collect();
    for column in migrated.keys() {
        let table = column.split('.').next().unwrap_or_default();
        assert!(
            entities.contains_key(column) || !tables.contains(&table),
            "{column} is in no entity"
        );
    }
}

/// PostgreSQL writes new index entries for each change of a row whose new version does not fit the
/// same page.
#[tokio::test]
async fn postgres_pages_have_room_for_updates() {
    const OPTIONS: &str =
        "SELECT reloptions::text AS options FROM pg_class WHERE relname = 'stripe_subscription'";
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.database.resume().await;
    assert!(
        run(bridge.worker().args(["migrate", "up"]))
            .await
            .status
            .success()
    );
    let db = bridge
        .database
        .connection()
        .await
        .expect("the database answers");
    let row = db
        .query_one_raw(Statement::from_string(DbBackend::Postgres, OPTIONS))
        .await
        .expect("it answers");
    let options: Option<String> = row
        .expect("the table exists")
        .try_get("", "options")
        .expect("it is text");
    assert_eq!(options.as_deref(), Some("{fillfactor=70}"));
}

async fn create<E: EntityTrait>(database: &Database, entity: E) {
    let connection = database.connection().await.expect("the database answers");
    let table = Schema::new(connection.get_database_backend()).create_table_from_entity(entity);
    connection
        .execute(&table)
        .await
        .expect("an entity's table can be made");
}

/// The type of each column by `table.column`, with `not null` and `key` where they apply.
pub(super) async fn columns(database: &Database) -> BTreeMap<String, String> {
    let sql = if database.url().starts_with("sqlite:") {
        "SELECT m.name || '.' || c.name AS name, \
            lower(c.type) || CASE WHEN c.\"notnull\" OR c.pk THEN ' not null' ELSE '' END || \
            CASE WHEN c.pk THEN ' key' ELSE '' END AS takes \
         FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type = 'table'"
    } else {
        "SELECT c.table_name || '.' || c.column_name AS name, \
            c.data_type || CASE c.is_nullable WHEN 'NO' THEN ' not null' ELSE '' END || \
            CASE WHEN k.column_name IS NULL THEN '' ELSE ' key' END AS takes \
         FROM information_schema.columns c LEFT JOIN information_schema.key_column_usage k \
            ON (k.table_name, k.column_name) = (c.table_name, c.column_name) \
         WHERE c.table_schema = 'public'"
    };
    let rows = database.query(sql).await.expect("the database answers");
    let text = |row: &sea_orm::QueryResult, column| row.try_get("", column).expect("it is text");
    rows.iter()
        .map(|row| (text(row, "name"), text(row, "takes")))
        .collect()
}

async fn printed(arguments: &[&str]) -> Value {
    // Without settings, as documents need neither broker nor database.
    let finished = run(Program::named("litestripe-worker")
        .arg("schema")
        .args(arguments.iter().copied()))
    .await;
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it is JSON")
}
