use litestripe_contract::settings::{Given, Problems};

use super::{DatabaseKind, LookupSettings, Settings, read};

fn check(given: &[(&'static str, &str)]) -> Result<Settings, Problems> {
    read(
        given
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect::<Given>(),
    )
}

#[test]
fn the_default_database_is_the_embedded_one() {
    let settings = check(&[]).expect("every setting has a default");
    assert_eq!(settings.database.kind, DatabaseKind::Sqlite);
    assert!(settings.database.auto_migrate);
    assert_eq!(settings.batch, 250);
}

#[test]
fn postgresql_is_postgres_and_is_not_migrated_by_default() {
    let settings = check(&[("DATABASE_URL", "postgresql://u:p@h/d")]).expect("it is a URL");
    assert_eq!(settings.database.kind, DatabaseKind::Postgres);
    assert!(!settings.database.auto_migrate);
}

#[test]
fn all_problems_are_reported_without_their_values() {
    let Problems(problems) = check(&[
        ("DATABASE_URL", "mysql://u:hunter2@h/d"),
        ("LITESTRIPE_BATCH", "0"),
        ("LITESTRIPE_WORKER_LISTEN", "hunter2"),
        ("LITESTRIPE_SIGNALS_MAX_AGE", "soon"),
        ("NATS_URL", "::"),
    ])
    .map(|_| ())
    .expect_err("they are all wrong");
    assert_eq!(problems.len(), 5, "{problems:?}");
    assert!(!problems.concat().contains("hunter2"));
}

#[test]
fn a_database_url_with_an_unescaped_password_is_refused_without_printing_it() {
    for url in [
        "postgres://u:hunter2/x@h/d",
        "postgres://u:hunter2#x@h/d",
        "postgres://u:hunter2?x@h/d",
        "postgres://u:5432/hunter2@h/d",
        "postgres://u:5432?hunter2@h/d",
        "postgres://u:5432#hunter2@h/d",
        "postgres://u:hunter2@h:port/d",
        "postgres://u:hunter2@h/d?sslmode=hunter2",
        "sqlite://d.db?mode=hunter2",
    ] {
        for name in ["DATABASE_URL", "LITESTRIPE_USER_DATABASE_URL"] {
            let Problems(problems) = check(&[(name, url)]).map(|_| ()).expect_err(url);
            assert!(
                problems.len() == 1 && problems[0].starts_with(name),
                "{problems:?}"
            );
            assert!(!problems[0].contains("hunter2"), "{problems:?}");
        }
    }
    check(&[("DATABASE_URL", "postgres://u:hunter2%2Fx@h/d")]).expect("it is escaped");
}

#[test]
fn schema_is_for_postgres_and_has_a_name_that_needs_no_escapes() {
    const POSTGRES: (&str, &str) = ("DATABASE_URL", "postgres://u:p@h/d");
    const SCHEMA: &str = "LITESTRIPE_DATABASE_SCHEMA";
    for name in ["billing", "Our-billing_2", "_x", &"x".repeat(63)] {
        let settings = check(&[POSTGRES, (SCHEMA, name)]).expect("it is a name");
        let schema = settings.database.schema.expect("it is set");
        assert_eq!(schema.quoted(), format!("\"{name}\""));
    }
    for name in [
        "1x",
        "pg_x",
        "a b",
        "a\"b",
        "a,b",
        "a'b",
        "ä",
        &"x".repeat(64),
    ] {
        check(&[POSTGRES, (SCHEMA, name)]).expect_err(name);
    }
    let Problems(problems) = check(&[(SCHEMA, "billing")])
        .map(|_| ())
        .expect_err("SQLite has no schemas");
    assert!(
        problems.len() == 1 && problems[0].starts_with(SCHEMA),
        "{problems:?}"
    );
}

#[test]
fn user_lookup_does_not_look_in_our_schema() {
    let settings = check(&[
        ("DATABASE_URL", "postgres://u:p@h/d"),
        ("LITESTRIPE_DATABASE_SCHEMA", "billing"),
        (
            "LITESTRIPE_USER_LOOKUP",
            "sql:SELECT 1 FROM users WHERE id = $1",
        ),
    ])
    .expect("they are valid");
    let LookupSettings::Sql { database, .. } = settings.lookup else {
        panic!("{:?}", settings.lookup)
    };
    assert_eq!(database.schema, None);
}

#[test]
fn secrets_do_not_print() {
    let settings = check(&[("DATABASE_URL", "postgres://u:hunter2@h/d")]).expect("it is a URL");
    assert!(!format!("{settings:?}").contains("hunter2"));
}
