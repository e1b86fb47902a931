//! Settings: how wrong ones are refused, and that all places which list settings agree.

use std::collections::BTreeMap;
use std::fs;

use litestripe_contract::settings::dotenv;
use litestripe_harness::nats;
use litestripe_harness::program::{Finished, Program};

use super::run;

const INGRESS: &str = "litestripe-ingress";
const WORKER: &str = "litestripe-worker";
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const SETTINGS_PAGE: &str = "docs/settings.md";

/// Stands for a password in every malformed value.
const SECRET: &str = "hunter2";

/// Malformed settings of both programs.
const SHARED: [(&str, &str); 15] = [
    ("NATS_URL", "nats://user:hunter2@:::"),
    ("NATS_PASSWORD", "hunter2"),
    ("LITESTRIPE_STREAM_REPLICAS", "hunter2"),
    ("LITESTRIPE_EVENTS_MAX_AGE", "hunter2"),
    ("LITESTRIPE_EVENTS_MAX_BYTES", "hunter2"),
    ("LITESTRIPE_LOG_FORMAT", "hunter2"),
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "http://user:hunter2@127.0.0.1:4318",
    ),
    ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "hunter2"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "hunter2"),
    ("OTEL_RESOURCE_ATTRIBUTES", "hunter2"),
    ("OTEL_TRACES_SAMPLER", "hunter2"),
    ("OTEL_TRACES_SAMPLER_ARG", "hunter2"),
    ("OTEL_TRACES_EXPORTER", "hunter2"),
    ("OTEL_SDK_DISABLED", "hunter2"),
];

#[tokio::test]
async fn missing_settings_of_ingress_are_listed_all_at_once() {
    let finished = run(Program::named(INGRESS)).await;
    check_refused(&finished, &["STRIPE_WEBHOOK_UUID", "STRIPE_WEBHOOK_SECRET"]);
    assert!(
        finished.stderr.contains("STRIPE_WEBHOOK_SECRET_FILE"),
        "{finished:?}"
    );
}

#[tokio::test]
async fn malformed_settings_of_ingress_are_listed_all_at_once_without_their_values() {
    let own = [
        ("STRIPE_WEBHOOK_UUID", "hunter2"),
        ("STRIPE_WEBHOOK_SECRET", "whsec_hunter2,hunter2"),
        ("STRIPE_WEBHOOK_TOLERANCE", "hunter2"),
        ("LITESTRIPE_LISTEN", "hunter2"),
        ("LITESTRIPE_EVENT_TYPES", "hunter2 and more"),
        ("LITESTRIPE_BODY_LIMIT", "hunter2"),
    ];
    malformed_are_listed(INGRESS, &own).await;
}

#[tokio::test]
async fn malformed_settings_of_the_worker_are_listed_all_at_once_without_their_values() {
    let own = [
        ("DATABASE_URL", "postgres://user:hunter2/@localhost/db"),
        ("LITESTRIPE_AUTO_MIGRATE", "hunter2"),
        ("LITESTRIPE_WORKER_LISTEN", "hunter2"),
        ("LITESTRIPE_BATCH", "0hunter2"),
        ("LITESTRIPE_SIGNALS_MAX_AGE", "hunter2"),
        ("LITESTRIPE_SIGNALS_MAX_BYTES", "hunter2"),
        ("LITESTRIPE_DEAD_LETTERS_MAX_AGE", "hunter2"),
        ("LITESTRIPE_DEAD_LETTERS_MAX_BYTES", "0"),
        ("LITESTRIPE_METADATA_KEYS", "*,hunter2"),
        ("LITESTRIPE_ORPHAN_GRACE", "hunter2"),
        ("LITESTRIPE_ORPHAN_WITHOUT_SESSION", "hunter2"),
        ("LITESTRIPE_ORPHAN_EMAIL_MAX_AGE", "hunter2"),
        ("LITESTRIPE_ERASE_ON_CUSTOMER_DELETED", "hunter2"),
        ("LITESTRIPE_USER_LOOKUP", "hunter2"),
        (
            "LITESTRIPE_USER_DATABASE_URL",
            "mysql://user:hunter2@localhost/db",
        ),
        ("STRIPE_SECRET_KEY", "hunter2 and more"),
        ("STRIPE_API_BASE", "hunter2"),
        ("LITESTRIPE_BACKFILL_INTERVAL", "hunter2"),
        ("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "hunter2"),
        ("LITESTRIPE_API_RATE_LIMIT_CACHE_KEY", "hunter2 and more"),
        ("LITESTRIPE_API_RATE_LIMIT_WINDOW", "hunter2"),
    ];
    malformed_are_listed(WORKER, &own).await;
}

/// Gives malformed settings as environment, as flags, and in `.env`.
async fn malformed_are_listed(program: &str, own: &[(&str, &str)]) {
    let given: Vec<_> = own.iter().chain(&SHARED).copied().collect();
    // The password itself is valid, but its user is missing.
    let expected: Vec<_> = given
        .iter()
        .map(|(name, _)| {
            if *name == "NATS_PASSWORD" {
                "NATS_USER"
            } else {
                *name
            }
        })
        .collect();

    let launch = Program::named(program);
    check_refused(
        &run(given.iter().fold(launch.clone(), |launch, (name, value)| {
            launch.env(*name, *value)
        }))
        .await,
        &expected,
    );

    let flag = |name: &str| format!("--{}", name.to_lowercase().replace('_', "-"));
    check_refused(
        &run(given.iter().fold(launch.clone(), |launch, (name, value)| {
            launch.arg(flag(name)).arg(*value)
        }))
        .await,
        &expected,
    );

    let folder = tempfile::tempdir().expect("a folder can be made");
    let lines: String = given
        .iter()
        .map(|(name, value)| format!("{name}='{value}'\n"))
        .collect();
    fs::write(folder.path().join(".env"), lines).expect("it can be written");
    check_refused(&run(launch.folder(folder.path())).await, &expected);
}

#[tokio::test]
async fn malformed_dotenv_is_refused_without_its_lines() {
    for program in [INGRESS, WORKER] {
        let folder = tempfile::tempdir().expect("a folder can be made");
        fs::write(
            folder.path().join(".env"),
            "NATS_URL=nats://127.0.0.1:1\nsome words and hunter2\n",
        )
        .expect("written");
        let finished = run(Program::named(program).folder(folder.path())).await;
        assert_eq!(finished.status.code(), Some(2), "{finished:?}");
        assert!(finished.stderr.contains(".env line 2"), "{finished:?}");
        assert!(!finished.stderr.contains(SECRET), "{finished:?}");
    }
}

/// Other tools' lines are left to them, and a dollar sign in a password stays one.
#[tokio::test]
async fn dotenv_is_read_as_other_tools_read_it() {
    let broker = nats::Server::start_with(nats::Options {
        config: r#"authorization { user: "app", password: "pa$word #1" }"#.to_owned(),
        ..Default::default()
    })
    .await;
    let folder = tempfile::tempdir().expect("a folder can be made");
    let connects = async |lines: &str| {
        let url = format!("NATS_URL={} # the tests' broker\n", broker.url());
        fs::write(folder.path().join(".env"), url + lines).expect("it can be written");
        run(Program::named(WORKER).arg("status").folder(folder.path())).await
    };
    let finished = connects(
        "TITLE=My App Name\nEXPANDED=${HOME}/x\nOPEN='no end\nexport NATS_USER = app\nNATS_PASSWORD=\"pa$word #1\"\n",
    )
    .await;
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");

    let refused = connects("NATS_USER=app\nNATS_PASSWORD=${PASSWORD}\n").await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains(".env line 3: NATS_PASSWORD"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn python_dotenv_reads_the_same_values() {
    let text = fs::read_to_string(format!("{ROOT}/.env.example")).expect("there is a .env.example");
    let more = [
        "A=plain",
        "export B = spaced",
        "C=My App Name",
        "D=pa$word",
        "E=\"two words # part\" # comment",
        "F='two words # part'",
        "G=value # comment",
        "H=value#part",
        "I=#hash",
        r#"J="a \"quoted\" \n\t word \\ \q""#,
        r"K='it\'s'",
        "L=",
        "M=\"first",
        "second\"",
        r#"N=a\b "c" d"#,
        "O=\u{263a}",
        "A=last",
    ];
    let text = format!("{text}\n{}\n", more.join("\n"));
    let file = tempfile::NamedTempFile::new().expect("a file can be made");
    fs::write(file.path(), &text).expect("it can be written");
    let theirs = crate::sdk::lines(&crate::sdk::python("dotenv_parse.py").arg(file.path())).await;
    let ours = dotenv::parse(&text, |_| true).expect("all of it can be read");
    let ours: serde_json::Map<_, _> = ours
        .into_iter()
        .map(|(name, value)| (name, value.into()))
        .collect();
    assert_eq!(theirs, [serde_json::Value::Object(ours)]);
}

/// A file of the wrong content would otherwise look like a broker that does not answer.
#[tokio::test]
async fn files_that_can_never_work_are_refused_by_name_without_their_content() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = folder.path().join("file");
    fs::write(&file, "-----BEGIN PRIVATE KEY-----hunter2").expect("it can be written");
    let empty = folder.path().join("empty");
    fs::write(&empty, "\n").expect("it can be written");
    let certificate = folder.path().join("certificate.pem");
    fs::write(
        &certificate,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .expect("written");
    for (name, other) in [
        ("NATS_CREDS", None),
        ("NATS_NKEY_SEED_FILE", None),
        ("NATS_PASSWORD_FILE", Some("NATS_USER")),
        ("NATS_TLS_CA", None),
        ("NATS_TLS_KEY", Some("NATS_TLS_CERT")),
    ] {
        // Any text may be a password.
        let wrong = if name == "NATS_PASSWORD_FILE" {
            &empty
        } else {
            &file
        };
        for path in [wrong, &folder.path().join("missing")] {
            let launch = Program::named(WORKER).arg("status").env(name, path);
            let launch = other
                .into_iter()
                .fold(launch, |launch, other| launch.env(other, &certificate));
            let finished = run(launch).await;
            assert_eq!(finished.status.code(), Some(2), "{finished:?}");
            assert!(finished.stderr.contains(name), "{finished:?}");
            assert!(!finished.stderr.contains(SECRET), "{finished:?}");
        }
    }
}

/// Files that hold secrets, instead of the settings themselves.
#[tokio::test]
async fn secret_files_that_cannot_be_used_are_listed_all_at_once_without_their_content() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("it can be written");
        path
    };
    let malformed = file("malformed", "hunter2 and more\n");
    let empty = file("empty", "\n");
    let missing = folder.path().join("missing");
    let names = [
        "DATABASE_URL_FILE",
        "LITESTRIPE_USER_DATABASE_URL_FILE",
        "STRIPE_SECRET_KEY_FILE",
        "NATS_PASSWORD_FILE",
    ];
    for (path, count) in [(&malformed, 3), (&empty, 4), (&missing, 4)] {
        let launch = Program::named(WORKER)
            .arg("status")
            .env("NATS_USER", "worker");
        let launch = names
            .iter()
            .fold(launch, |launch, name| launch.env(name, path));
        check_refused(&run(launch).await, &names[..count]);
    }
    // A file and the setting itself.
    let launch = names
        .iter()
        .fold(Program::named(WORKER).arg("status"), |launch, name| {
            let setting = name.trim_end_matches("_FILE");
            launch.env(name, &empty).env(setting, SECRET)
        });
    let finished = run(launch.env("NATS_USER", "worker")).await;
    check_refused(&finished, &names);
    assert_eq!(finished.stderr.matches("are both set").count(), names.len());
}

/// Checks for exit code 2, one line for each of these settings, and no secret.
fn check_refused(finished: &Finished, names: &[&str]) {
    assert_eq!(finished.status.code(), Some(2), "{finished:?}");
    assert_eq!(finished.stdout, "");
    for name in names {
        let count = finished
            .stderr
            .lines()
            .filter(|line| line.split_whitespace().next() == Some(name))
            .count();
        assert_eq!(
            count, 1,
            "{name} is listed {count} times: {}",
            finished.stderr
        );
    }
    let lines = finished
        .stderr
        .lines()
        .filter(|line| line.starts_with("  "))
        .count();
    assert_eq!(
        lines,
        names.len(),
        "other problems than these {names:?}: {}",
        finished.stderr
    );
    assert!(!finished.stderr.contains(SECRET), "{}", finished.stderr);
}

#[tokio::test]
async fn help_and_env_example_list_the_same_settings_and_defaults() {
    let text = fs::read_to_string(format!("{ROOT}/.env.example")).expect("there is a .env.example");
    let settings = helped().await;
    let mut listed = example(&text);
    let mut problems = Vec::new();
    for (name, setting) in &settings {
        // A default that is a sentence or another setting's value stands in the comment beside it.
        let plain = |default: &&str| !default.contains(' ') && !settings.contains_key(*default);
        let expected = setting.default.as_deref().filter(plain).unwrap_or_default();
        match listed.remove(name) {
            None => problems.push(format!("{name} is not there")),
            Some(value)
                if value == expected || (name == "LITESTRIPE_BATCH" && value.is_empty()) => {}
            Some(value) => problems.push(format!("{name}={value}, but {expected:?} in --help")),
        }
    }
    check_listed(".env.example", problems, listed);
}

/// The table of docs/settings.md: rows of | `NAME` | program | default | meaning |.
#[tokio::test]
async fn help_and_settings_page_list_the_same_settings_and_defaults() {
    let text = fs::read_to_string(format!("{ROOT}/{SETTINGS_PAGE}")).expect("the page exists");
    let mut listed = table(&text);
    let mut problems = Vec::new();
    for (name, setting) in helped().await {
        let Some(row) = listed.remove(&name) else {
            problems.push(format!("{name} is not there"));
            continue;
        };
        if row.program != setting.program {
            problems.push(format!(
                "{name} is a setting of {}, not of {}",
                setting.program, row.program
            ));
        }
        let default = row.default.trim_start_matches("as ");
        let is_none = ["", "-", "–", "—", "none", "required"].contains(&default);
        if setting
            .default
            .as_deref()
            .map_or(!is_none, |expected| expected != default)
        {
            problems.push(format!(
                "{name} has the default {default:?}, but {:?} in --help",
                setting.default
            ));
        }
    }
    check_listed(SETTINGS_PAGE, problems, listed);
}

fn check_listed<T>(place: &str, mut problems: Vec<String>, rest: BTreeMap<String, T>) {
    // STRIPE_PUBLIC_KEY belongs to a front end.
    let rest = rest.into_keys().filter(|name| name != "STRIPE_PUBLIC_KEY");
    problems.extend(rest.map(|name| format!("{name} is in no --help")));
    assert!(
        problems.is_empty(),
        "{place} and --help disagree:\n  {}",
        problems.join("\n  ")
    );
}

/// What `--help` says of a setting.
#[derive(Debug, PartialEq)]
struct Shown {
    /// `ingress`, `worker` or `both`.
    program: &'static str,
    default: Option<String>,
}

/// A row of the table in docs/settings.md.
struct Row {
    program: String,
    default: String,
}

/// All settings that the programs' `--help` lists.
async fn helped() -> BTreeMap<String, Shown> {
    let mut all: BTreeMap<String, Shown> = BTreeMap::new();
    for (program, short) in [(INGRESS, "ingress"), (WORKER, "worker")] {
        let finished = run(Program::named(program).arg("--help")).await;
        assert!(finished.status.success());
        // An entry begins with its flag and is wrapped; within it only single blanks matter.
        let words = finished
            .stdout
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        for entry in words.split(" --").skip(1) {
            let Some(name) = within(entry, "[env: ") else {
                continue;
            };
            assert!(
                entry.starts_with(&name.to_lowercase().replace('_', "-")),
                "the flag of {name} is of another name"
            );
            let shown = Shown {
                program: short,
                default: within(entry, "[default: "),
            };
            if let Some(other) = all.insert(name.clone(), shown) {
                let shown = all.get_mut(&name).expect("it was inserted just now");
                assert_eq!(shown.default, other.default, "{name} has two defaults");
                shown.program = "both";
            }
        }
    }
    assert!(all.len() > 20, "{all:?}");
    all
}

/// What stands between `opening` and the next `]`.
fn within(text: &str, opening: &str) -> Option<String> {
    let (_, rest) = text.split_once(opening)?;
    Some(rest.split(']').next().unwrap_or_default().to_owned())
}

/// `NAME=value` and `# NAME=value`, except for what compose.yml alone reads.
fn example(text: &str) -> BTreeMap<String, String> {
    let mut section = "";
    let mut values = BTreeMap::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title;
        }
        let line = line.trim_start_matches("# ");
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let is_name = name
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        if is_name && !section.contains("compose.yml only") {
            values.insert(name.to_owned(), value.trim_matches('\'').to_owned());
        }
    }
    values
}

fn table(text: &str) -> BTreeMap<String, Row> {
    let mut rows = BTreeMap::new();
    for line in text
        .lines()
        .filter(|line| line.trim_start().starts_with("| `"))
    {
        let cells: Vec<_> = line
            .split('|')
            .skip(1)
            .map(|cell| cell.trim().replace("\\", ""))
            .collect();
        let [names, program, default, _meaning, ..] = cells.as_slice() else {
            continue;
        };
        // Rows of other tables.
        if !["ingress", "worker", "both"].contains(&program.as_str()) {
            continue;
        }
        // One row may list several settings that go together.
        for name in names.split('`').skip(1).step_by(2) {
            if name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
            {
                let row = Row {
                    program: program.clone(),
                    default: default.replace('`', ""),
                };
                assert!(
                    rows.insert(name.to_owned(), row).is_none(),
                    "{name} is in the table of {SETTINGS_PAGE} twice"
                );
            }
        }
    }
    rows
}
