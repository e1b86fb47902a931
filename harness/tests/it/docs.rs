//! Every Python, TypeScript and Rust program of the docs, run as it stands there. Only the broker's
//! address is changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET, Signal};
use litestripe_harness::program::{self, Launch, Program};
use litestripe_harness::stripe::{Delivery, Purchase};
use litestripe_harness::{eventually, tools};
use serde_json::{Value, json};
use tempfile::TempDir;
use time::OffsetDateTime;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const SIGNALS: &str = "LITESTRIPE_SIGNALS";
const DOCUMENTED_URL: &str = "nats://127.0.0.1:4222";
const LOOKUP: &str = "app.users.known";
const KNOWN_USER: &str = "user_4711";
const EXAMPLE: &str = include_str!("../../examples/subscribe.rs");
const COMPLETED: &str = "checkout.session.completed";

/// The TypeScript compiler alone takes seconds on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Language {
    Python,
    TypeScript,
    Rust,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The README's: prints user and access of each signal.
    First,
    /// Receives signals as docs/subscribing.md says.
    Subscriber,
    /// Answers the worker's user lookups.
    Answerer,
}

/// A program of the docs.
#[derive(Clone, Debug)]
struct Documented {
    file: String,
    language: Language,
    kind: Kind,
    text: String,
}

#[test]
fn docs_have_a_subscriber_in_each_language_and_each_has_its_own_durable_consumer() {
    let all = documented();
    let mut found: Vec<_> = all.iter().map(|one| (one.language, one.kind)).collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [
            (Language::Python, Kind::First),
            (Language::Python, Kind::Subscriber),
            (Language::Python, Kind::Answerer),
            (Language::TypeScript, Kind::Subscriber),
            (Language::TypeScript, Kind::Answerer),
            (Language::Rust, Kind::Subscriber),
        ],
        "a program that was added, or shown twice, is to be run here too"
    );
    let mut durables: Vec<_> = subscribers().iter().map(Documented::durable).collect();
    durables.sort_unstable();
    durables.dedup();
    assert_eq!(durables.len(), 4, "{durables:?}");
}

#[test]
fn rust_program_of_the_docs_is_the_compiled_example() {
    let is_rust = |one: &Documented| one.language == Language::Rust;
    let shown = documented().into_iter().find(is_rust).expect("it is shown");
    let start = EXAMPLE.find("\nuse ").expect("it begins with imports") + 1;
    assert_eq!(
        shown.text,
        EXAMPLE[start..],
        "{}: copy it from harness/examples/subscribe.rs",
        shown.file
    );
}

#[tokio::test]
async fn subscribers_of_the_docs_receive_every_signal_and_survive_a_restart_of_the_broker() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let mut running = Vec::new();
    for one in subscribers() {
        running.push(Running::start(&one, &bridge).await);
    }
    for one in &running {
        one.until_it_consumes(&bridge).await;
    }

    let now = OffsetDateTime::now_utc().unix_timestamp();
    let (user, guest) = (Purchase::new(now - 60), Purchase::new(now - 60));
    let id = &user.subscription;
    bridge
        .deliver_all(&[
            user.checkout_session_event(
                COMPLETED,
                user.created,
                json!({ "client_reference_id": KNOWN_USER }),
            ),
            user.subscription_event("customer.subscription.created", user.created, json!({})),
            guest.checkout_session_event(
                COMPLETED,
                guest.created,
                json!({ "client_reference_id": null }),
            ),
        ])
        .await;
    bridge.check().await;
    for one in &running {
        if one.kind == Kind::First {
            one.until_it_prints(&[KNOWN_USER, "granted"]).await;
            continue;
        }
        one.until_it_prints(&[id, KNOWN_USER, "ranted", "active"])
            .await;
        one.until_it_prints(&["orphan.created", "missing_client_reference_id"])
            .await;
    }
    // Only the complete programs promise to survive what follows.
    running.retain(|one| one.kind == Kind::Subscriber);
    assert_eq!(running.len(), 3);

    bridge.broker.restart().await;
    let ended = user.subscription_event(
        "customer.subscription.deleted",
        now,
        json!({ "status": "canceled", "ended_at": now }),
    );
    eventually("ingress to accept events again", DEADLINE, async || {
        let answer = bridge.post(&Delivery::new(ended.body(), SECRET)).await;
        let status = answer.status().as_u16();
        (status == 200).then_some(()).ok_or(status.to_string())
    })
    .await;
    for one in &running {
        one.until_it_prints(&[id, KNOWN_USER, "evoked", "canceled"])
            .await;
    }

    // The current row once more, under its revision: a repeat that each of them ignores.
    let resent = bridge
        .worker()
        .args(["resend", "--subscription", id])
        .start();
    assert!(resent.wait(DEADLINE).await.success(), "{}", resent.log());
    for one in &running {
        one.until_it_prints(&[id, "is not above", "ignored"]).await;
        assert!(one.program.is_running(), "{}", one.program.log());
    }
    // A null user means "not known here": no subscriber forgets the user that it knows.
    let signals = bridge.signals().await;
    let of_user = |signal: &&Signal| signal.body["stripe_subscription_id"] == id.as_str();
    let last = signals.iter().rfind(of_user).expect("it was signalled");
    let mut unclaimed = last.body.clone();
    let revision = unclaimed["revision"].as_i64().expect("it is a number");
    unclaimed["client_reference_id"] = Value::Null;
    unclaimed["status"] = json!("past_due");
    (unclaimed["revision"], unclaimed["previous_revision"]) =
        (json!(revision + 1), json!(revision));
    let jetstream = bridge.jetstream().await;
    let body = unclaimed.to_string().into();
    let sent = jetstream.publish("subscription.changed", body).await;
    sent.expect("it is sent").await.expect("it is stored");
    for one in &running {
        one.until_it_prints(&[id, KNOWN_USER, "past_due"]).await;
    }
    for one in running {
        one.until_it_has_acked(&bridge).await;
        one.program.kill().await;
    }
}

#[tokio::test]
async fn python_program_of_the_docs_answers_user_lookups() {
    check_answerer(Language::Python).await;
}

#[tokio::test]
async fn typescript_program_of_the_docs_answers_user_lookups() {
    check_answerer(Language::TypeScript).await;
}

async fn check_answerer(language: Language) {
    let lookup = format!("nats:{LOOKUP}");
    let options = Options::new(DatabaseKind::Sqlite).worker("LITESTRIPE_USER_LOOKUP", lookup);
    let bridge = Bridge::start(options).await;
    let answerer = documented()
        .into_iter()
        .find(|one| (one.language, one.kind) == (language, Kind::Answerer))
        .expect("it is shown");
    let running = Running::start(&answerer, &bridge).await;

    let now = OffsetDateTime::now_utc().unix_timestamp();
    for user in [KNOWN_USER, "user_nobody"] {
        let purchase = Purchase::new(now - 60);
        let changes = json!({ "client_reference_id": user });
        let paid = purchase.checkout_session_event(COMPLETED, purchase.created, changes);
        bridge.deliver(&paid).await;
        if user == KNOWN_USER {
            eventually("the lookup to be answered", DEADLINE, async || {
                let open = bridge
                    .database
                    .query("SELECT entity_id FROM litestripe_question")
                    .await;
                let open = open.map_err(|error| error.to_string())?;
                let log = running.program.log();
                open.is_empty()
                    .then_some(())
                    .ok_or(format!("{open:?}; {log}"))
            })
            .await;
            assert_eq!(bridge.orphans().await, [], "{user} is known");
        } else {
            let created = eventually("the orphan to be signalled", DEADLINE, async || {
                let signals = bridge.signals().await;
                let orphan = |signal: &&Signal| signal.subject == "orphan.created";
                let found = signals
                    .iter()
                    .find(orphan)
                    .map(|signal| signal.body.clone());
                found.ok_or(running.program.log())
            })
            .await;
            assert_eq!(created["reason"], "unknown_client_reference_id");
            assert_eq!(created["stripe_subscription_id"], purchase.subscription);
        }
    }
    running.program.kill().await;
}

/// A program of the docs that runs.
struct Running {
    program: Program,
    language: Language,
    kind: Kind,
    durable: String,
    // Removed after the program has ended.
    _folder: TempDir,
}

impl Running {
    async fn start(documented: &Documented, bridge: &Bridge) -> Self {
        let folder = TempDir::new().expect("a folder can be made");
        let text = documented
            .text
            .replace(DOCUMENTED_URL, &bridge.broker.url());
        let launch = match documented.language {
            Language::Python => python(folder.path(), &text),
            Language::TypeScript => typescript(folder.path(), &text).await,
            Language::Rust => example().env("NATS_URL", bridge.broker.url()),
        };
        Self {
            program: launch.folder(folder.path()).start(),
            language: documented.language,
            kind: documented.kind,
            durable: if documented.kind == Kind::Answerer {
                String::new()
            } else {
                documented.durable()
            },
            _folder: folder,
        }
    }

    async fn until_it_consumes(&self, bridge: &Bridge) {
        self.until("make its consumer", bridge, |_| true).await;
    }

    async fn until_it_has_acked(&self, bridge: &Bridge) {
        let is_done = |info: &Info| (info.num_pending, info.num_ack_pending) == (0, 0);
        self.until("ack every signal", bridge, is_done).await;
    }

    /// Waits until its consumer exists and `is_done` with its info.
    async fn until(&self, what: &str, bridge: &Bridge, is_done: impl Fn(&Info) -> bool) {
        let stream = bridge.stream(SIGNALS).await;
        let what = format!("{:?}, consumer {}, to {what}", self.language, self.durable);
        eventually(&what, DEADLINE, async || {
            let info = stream.consumer_info(&self.durable).await;
            let info = info.map_err(|error| format!("{error}; {}", self.program.log()))?;
            is_done(&info).then_some(()).ok_or(format!("{info:?}"))
        })
        .await;
    }

    /// Waits for a line that has all of `parts`.
    async fn until_it_prints(&self, parts: &[&str]) {
        let what = format!("{:?} to print {parts:?}", self.language);
        eventually(&what, DEADLINE, async || {
            let printed = self.program.stdout();
            let has_all = |line: &str| parts.iter().all(|part| line.contains(part));
            let found = printed.lines().any(has_all);
            let log = self.program.log();
            found.then_some(()).ok_or(format!("{printed}\n{log}"))
        })
        .await;
    }
}

fn python(folder: &Path, text: &str) -> Launch {
    let file = folder.join("program.py");
    fs::write(&file, text).expect("it can be written");
    Program::at(tools::python().expect("scripts/tools installs it"))
        // Or it keeps what it prints until it ends.
        .arg("-u")
        .arg(file)
}

/// Compiled under `strict`, as the docs say.
async fn typescript(folder: &Path, text: &str) -> Launch {
    let modules = tools::node_modules().expect("scripts/tools installs them");
    let node = tools::node().expect("scripts/tools finds it");
    std::os::unix::fs::symlink(modules, folder.join("node_modules")).expect("it can be linked");
    fs::write(folder.join("package.json"), r#"{ "type": "module" }"#).expect("it can be written");
    fs::write(folder.join("program.ts"), text).expect("it can be written");
    let compiled = Program::at(node)
        .arg(modules.join("typescript/bin/tsc"))
        .args(["--strict", "--module", "nodenext", "--target", "es2022"])
        .args(["--types", "node", "program.ts"])
        .folder(folder)
        .run(DEADLINE)
        .await;
    assert!(compiled.status.success(), "{}", compiled.stdout);
    Program::at(node).arg(folder.join("program.js"))
}

/// Built with the tests.
fn example() -> Launch {
    let folder = program::folder().expect("a test knows where it lies");
    let path = folder.join("examples/subscribe");
    assert!(path.exists(), "run `cargo build --workspace --all-targets`");
    Program::at(path)
}

impl Documented {
    fn durable(&self) -> String {
        let named = |line: &&str| {
            ["DURABLE = ", "const DURABLE", "durable="]
                .iter()
                .any(|name| line.contains(name))
        };
        let line = self.text.lines().find(named).expect("it names a durable");
        let quoted = line.split('"').find(|part| part.starts_with("my-"));
        quoted.expect("which is the application's").to_owned()
    }
}

fn subscribers() -> Vec<Documented> {
    let is_subscriber = |one: &Documented| one.kind != Kind::Answerer;
    documented().into_iter().filter(is_subscriber).collect()
}

/// Every program that the README or a page of docs/ shows.
fn documented() -> Vec<Documented> {
    let mut files: Vec<PathBuf> = fs::read_dir(format!("{ROOT}/docs"))
        .expect("there is a folder docs")
        .map(|entry| entry.expect("it can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    files.push(format!("{ROOT}/README.md").into());
    files.sort_unstable();
    let programs = files.iter().flat_map(|file| {
        let page = fs::read_to_string(file).expect("it is text");
        programs(&file.display().to_string(), &page)
    });
    programs.collect()
}

/// The fenced blocks of a page that are programs.
fn programs(file: &str, page: &str) -> Vec<Documented> {
    // Outside and inside of blocks take turns.
    let blocks = page.split("```").skip(1).step_by(2);
    let programs = blocks.filter_map(|block| {
        let (language, text) = block.split_once('\n')?;
        let language = match language {
            "python" => Language::Python,
            "typescript" => Language::TypeScript,
            "rust" => Language::Rust,
            _ => return None,
        };
        let kind = if text.contains(LOOKUP) {
            Kind::Answerer
        } else if file.ends_with("README.md") {
            Kind::First
        } else {
            Kind::Subscriber
        };
        Some(Documented {
            file: file.to_owned(),
            language,
            kind,
            text: text.to_owned(),
        })
    });
    programs.collect()
}
