//! `endpoint`: the endpoint at Stripe, and the file with its secret. Stripe's API is a stub, which
//! does not deliver: the tests do, to the endpoints that it has enabled and with their secrets.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use litestripe_contract::event::HANDLED_TYPES;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::program::{self, Finished, Launch, Program};
use litestripe_harness::stripe::api::{API_KEY, Api, Endpoint, Trouble};
use litestripe_harness::stripe::{Delivery, Purchase};
use serde_json::{Value, json};
use tempfile::TempDir;
use time::OffsetDateTime;

const DEADLINE: Duration = Duration::from_secs(90);

const URL: &str = "https://shop.example/ls/hook/6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c/";

const ENDPOINTS: &str = "/v1/webhook_endpoints";

const DESTINATIONS: &str = "/v2/core/event_destinations";

/// The version that the worker pins.
const VERSION: &str = "2026-10-28.endive";

/// A folder with the file of secrets, and a stub of Stripe's API.
struct Place {
    api: Api,
    folder: TempDir,
}

impl Place {
    async fn new() -> Self {
        Self {
            api: Api::start().await,
            folder: tempfile::tempdir().expect("a folder can be made"),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("secret")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.file()).expect("there is a file")
    }

    /// The command, with neither a broker nor a database.
    fn command(&self, arguments: &[&str]) -> Launch {
        Program::named("litestripe-worker")
            .env("STRIPE_API_BASE", self.api.url())
            .env("STRIPE_SECRET_KEY", API_KEY)
            .env("NATS_URL", "nats://127.0.0.1:1")
            .arg("endpoint")
            .args(arguments)
    }

    async fn run(&self, arguments: &[&str]) -> Finished {
        self.command(arguments).run(DEADLINE).await
    }

    fn create_command(&self, more: &[&str]) -> Launch {
        self.command(&["create", "--url", URL, "--secret-file"])
            .arg(self.file())
            .args(more)
    }

    async fn create(&self, more: &[&str]) -> Finished {
        let finished = self.create_command(more).run(DEADLINE).await;
        self.check_unprinted(&finished);
        finished
    }

    /// No secret is ever printed.
    fn check_unprinted(&self, finished: &Finished) {
        for Endpoint { secret, .. } in self.api.endpoints() {
            let printed = format!("{}{}", finished.stdout, finished.stderr);
            assert!(!printed.contains(&secret), "{printed}");
        }
    }

    fn only_endpoint(&self) -> Endpoint {
        let [endpoint] = self.api.endpoints().try_into().expect("there is one");
        endpoint
    }

    fn changes(&self) -> usize {
        self.api
            .requests("")
            .iter()
            .filter(|request| request.method != "GET")
            .count()
    }
}

fn check_code(finished: &Finished, code: i32) {
    assert_eq!(finished.status.code(), Some(code), "{finished:?}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it exists").mode() & 0o777
}

fn line(endpoint: &Endpoint) -> String {
    format!("{} # {}\n", endpoint.secret, endpoint.id)
}

#[tokio::test]
async fn create_makes_one_endpoint_and_stores_its_secret_for_its_owner_alone() {
    let place = Place::new().await;
    let created = place.create(&[]).await;
    check_code(&created, 0);
    let endpoint = place.only_endpoint();
    assert_eq!(endpoint.types(), HANDLED_TYPES);
    assert_eq!(endpoint.object["url"], URL);
    assert_eq!(endpoint.object["api_version"], VERSION);
    assert_eq!(endpoint.object["application"], Value::Null);
    assert_eq!(place.text(), line(&endpoint));
    assert_eq!(mode(&place.file()), 0o600);
    assert!(created.stdout.contains(&endpoint.id), "{created:?}");

    let again = place.create(&[]).await;
    check_code(&again, 0);
    assert!(again.stdout.contains(&endpoint.id), "{again:?}");
    assert_eq!(place.changes(), 1, "it is there already");
    assert_eq!(place.text(), line(&endpoint));
    let left = fs::read_dir(place.folder.path())
        .expect("it is a folder")
        .count();
    assert_eq!(left, 1, "nothing else is left in the folder");

    let checked = place.command(&["check", "--url", URL]).run(DEADLINE).await;
    check_code(&checked, 0);
}

#[tokio::test]
async fn thin_and_connect_endpoints_are_separate_ones_in_the_same_file() {
    let place = Place::new().await;
    for _ in 0..2 {
        for more in [
            &[][..],
            &["--thin"],
            &["--connect"],
            &["--thin", "--connect"],
        ] {
            check_code(&place.create(more).await, 0);
        }
    }
    let endpoints = place.api.endpoints();
    let [snapshot, thin, connect, thin_connect] = endpoints.as_slice() else {
        panic!("four are made, once each: {endpoints:#?}")
    };
    let thin_types = HANDLED_TYPES.map(|name| format!("v1.{name}"));
    assert_eq!(snapshot.object["application"], Value::Null);
    assert_eq!(connect.object["application"], "ca_ofTheStub");
    for (endpoint, from) in [(thin, "@self"), (thin_connect, "@accounts")] {
        assert_eq!(endpoint.types(), thin_types);
        assert_eq!(endpoint.object["event_payload"], "thin");
        assert_eq!(endpoint.object["events_from"], json!([from]));
        assert_eq!(endpoint.object["webhook_endpoint"]["url"], URL);
    }
    let lines: String = endpoints.iter().map(line).collect();
    assert_eq!(place.text(), lines);

    let list = place.run(&["list", "--json"]).await;
    let list: Value = serde_json::from_str(&list.stdout).expect("it is JSON");
    let styles: Vec<_> = list
        .as_array()
        .expect("it is a list")
        .iter()
        .map(|one| {
            (
                one["payload"].as_str(),
                one["source"].as_str(),
                one["litestripe"].as_bool(),
            )
        })
        .collect();
    for payload in ["snapshot", "thin"] {
        for source in ["account", "connected_accounts"] {
            assert!(
                styles.contains(&(Some(payload), Some(source), Some(true))),
                "{styles:?}"
            );
        }
    }
    check_code(&place.run(&["check"]).await, 0);

    // Several addresses: each of these commands has to know which one is meant.
    for arguments in [&["disable"][..], &["roll", "--secret-file", "secret"]] {
        let refused = place
            .command(arguments)
            .folder(place.folder.path())
            .run(DEADLINE)
            .await;
        check_code(&refused, 2);
        assert!(refused.stderr.contains(&thin.id), "{refused:?}");
    }
    check_code(&place.run(&["disable", &thin.id]).await, 0);
    let enabled: Vec<_> = place
        .api
        .endpoints()
        .iter()
        .map(Endpoint::is_enabled)
        .collect();
    assert_eq!(enabled, [true, false, true, true]);
    check_code(&place.create(&["--thin"]).await, 0);
    assert!(
        place.api.endpoints().iter().all(Endpoint::is_enabled),
        "it is enabled again"
    );
}

#[tokio::test]
async fn customer_deleted_is_asked_for_if_it_is_handled() {
    let place = Place::new().await;
    let command = place
        .create_command(&[])
        .env("LITESTRIPE_ERASE_ON_CUSTOMER_DELETED", "true");
    check_code(&command.run(DEADLINE).await, 0);
    assert!(place.only_endpoint().types().contains(&"customer.deleted"));
}

#[tokio::test]
async fn what_is_in_the_file_is_kept_and_only_its_owner_may_read_it() {
    let place = Place::new().await;
    let before = "# our secrets\nwhsec_byHand\nwhsec_another # we_another";
    fs::write(place.file(), before).expect("it can be written");
    fs::set_permissions(place.file(), fs::Permissions::from_mode(0o644)).expect("it is ours");
    // Only root can give it to another user.
    let is_root = chown(place.file(), Some(10001), Some(10002)).is_ok();
    let link = place.folder.path().join("link");
    std::os::unix::fs::symlink(place.file(), &link).expect("it can be linked");
    let created = place
        .command(&["create", "--url", URL, "--secret-file"])
        .arg(&link)
        .run(DEADLINE)
        .await;
    check_code(&created, 0);
    assert!(created.stderr.contains("644"), "{created:?}");
    assert_eq!(
        place.text(),
        format!("{before}\n{}", line(&place.only_endpoint()))
    );
    assert_eq!(mode(&place.file()), 0o600);
    if is_root {
        let file = fs::metadata(place.file()).expect("it exists");
        assert_eq!(
            (file.uid(), file.gid()),
            (10001, 10002),
            "its owner keeps it"
        );
    }
    assert!(link.is_symlink(), "the link leads to the same file");
}

#[tokio::test]
async fn bad_input_is_refused_before_stripe_is_asked_to_change_anything() {
    let place = Place::new().await;
    let folder = place.folder.path();
    fs::write(folder.join("file"), "").expect("it can be written");
    fs::write(folder.join("large"), vec![b'#'; (64 << 10) + 1]).expect("it can be written");
    let check = async |arguments: &[&str], expected: &str| {
        let command = place.command(&["create"]).args(arguments).folder(folder);
        let refused = command.run(DEADLINE).await;
        check_code(&refused, 2);
        assert!(refused.stderr.contains(expected), "{expected}: {refused:?}");
    };
    let file = ["--secret-file", "secret"];
    check(
        &["--url", "http://shop.example/", file[0], file[1]],
        "https://",
    )
    .await;
    check(&["--url", "shop", file[0], file[1]], "--url").await;
    check(&["--url", URL], "--secret-file").await;
    check(
        &["--url", URL, "--secret-file", "no/such/folder/secret"],
        "no/such/folder",
    )
    .await;
    check(
        &["--url", URL, "--secret-file", "file/secret"],
        "file does not exist",
    )
    .await;
    check(&["--url", URL, "--secret-file", "."], "not a file").await;
    check(&["--url", URL, "--secret-file", "large"], "64 KiB").await;
    check(&["--url", URL, "--secret-file", ""], "--secret-file").await;
    // Nobody can make a file there, not even root.
    check(
        &["--url", URL, "--secret-file", "/proc/secret"],
        "cannot replace /proc/secret",
    )
    .await;
    assert_eq!(place.api.requests("").len(), 0);

    let without_key = place
        .create_command(&[])
        .env("STRIPE_SECRET_KEY", "")
        .run(DEADLINE)
        .await;
    check_code(&without_key, 2);
    assert!(
        without_key.stderr.contains("STRIPE_SECRET_KEY"),
        "{without_key:?}"
    );
}

/// As with `docker run -v ./secret:/folder/secret`: the file is there and cannot be replaced.
#[tokio::test]
async fn a_file_that_is_mounted_alone_is_refused_before_stripe_is_asked() {
    const MOUNT: &str = r#"mount --bind secret secret && exec "$0" "$@""#;
    let place = Place::new().await;
    fs::write(place.file(), "whsec_another\n").expect("it can be written");
    let mounted = |program: &Path| {
        Program::at("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", MOUNT])
            .arg(program)
            .folder(place.folder.path())
    };
    let tried = mounted(Path::new("true")).run(DEADLINE).await;
    if !tried.status.success() {
        eprintln!("skipped: this machine does not let us mount: {tried:?}");
        return;
    }
    let worker = program::folder().expect("a test knows where it lies");
    let refused = mounted(&worker.join("litestripe-worker"))
        .env("STRIPE_API_BASE", place.api.url())
        .env("STRIPE_SECRET_KEY", API_KEY)
        .args(["endpoint", "create", "--url", URL, "--secret-file"])
        .arg(place.file())
        .run(DEADLINE)
        .await;
    check_code(&refused, 2);
    assert!(refused.stderr.contains("mount the folder"), "{refused:?}");
    assert_eq!(place.api.requests("").len(), 0);
    assert_eq!(place.text(), "whsec_another\n");
}

#[tokio::test]
async fn a_slash_at_the_end_of_the_files_name_does_not_lose_the_secret() {
    let place = Place::new().await;
    let command = place.command(&["create", "--url", URL, "--secret-file", "secret/"]);
    check_code(&command.folder(place.folder.path()).run(DEADLINE).await, 0);
    assert_eq!(place.text(), line(&place.only_endpoint()));
}

#[tokio::test]
async fn a_key_that_stripe_refuses_is_named_with_what_it_needs() {
    let place = Place::new().await;
    for arguments in [
        &["list"][..],
        &["create", "--url", URL, "--secret-file", "secret"],
    ] {
        let unknown = place
            .command(arguments)
            .env("STRIPE_SECRET_KEY", "sk_test_deleted");
        let refused = unknown.run(DEADLINE).await;
        check_code(&refused, 1);
        let text = "STRIPE_SECRET_KEY must be a key that exists";
        assert!(refused.stderr.contains(text), "{refused:?}");
        assert!(refused.stderr.contains("401"), "{refused:?}");
    }

    place
        .api
        .refuse("POST /v1/webhook_endpoints", Trouble::status(403));
    let refused = place.create(&[]).await;
    check_code(&refused, 1);
    assert!(
        refused.stderr.contains("write access to webhook endpoints"),
        "{refused:?}"
    );
    assert!(!place.file().exists());

    place.api.refuse_nothing();
    check_code(&place.create(&[]).await, 0);
    place.api.refuse(DESTINATIONS, Trouble::status(403));
    let list = place.run(&["list"]).await;
    check_code(&list, 0);
    assert!(list.stdout.contains(&place.only_endpoint().id), "{list:?}");
    assert!(
        list.stderr.contains("thin"),
        "it says what it does not list: {list:?}"
    );
}

/// Stripe shows the secret only once, in an answer that never came, or came to a run that was killed.
#[tokio::test]
async fn a_secret_is_not_lost_when_the_command_dies_before_it_is_stored() {
    for (more, path) in [(&[][..], ENDPOINTS), (&["--thin"][..], DESTINATIONS)] {
        let place = Place::new().await;
        fs::write(place.file(), "whsec_another\n").expect("it can be written");
        let hold = place.api.hold(if more.is_empty() {
            "POST /v1/webhook_endpoints"
        } else {
            "POST /v2/core/event_destinations"
        });
        let killed = place.create_command(more).start();
        eventually("Stripe to have made the endpoint", DEADLINE, async || {
            let count = place.api.endpoints().len();
            (count == 1).then_some(()).ok_or(killed.log())
        })
        .await;
        killed.kill().await;
        drop(hold);
        assert_eq!(place.text(), "whsec_another\n");

        check_code(&place.create(more).await, 0);
        let endpoint = place.only_endpoint();
        assert_eq!(place.text(), format!("whsec_another\n{}", line(&endpoint)));
        assert_eq!(place.changes(), 2, "{path}");
        check_code(&place.create(more).await, 0);
        assert_eq!(place.changes(), 2, "now it is as it should be");
    }
}

#[tokio::test]
async fn a_secret_that_is_lost_for_good_is_named_and_a_roll_replaces_it() {
    let place = Place::new().await;
    check_code(&place.create(&[]).await, 0);
    let lost = place.only_endpoint();
    fs::remove_file(place.file()).expect("it exists");
    let old = OffsetDateTime::now_utc().unix_timestamp() - 24 * 60 * 60;
    place.api.put_endpoint(&lost.id, &json!({ "created": old }));
    place.api.forget_idempotency_keys();

    let refused = place.create(&[]).await;
    check_code(&refused, 1);
    for text in [lost.id.as_str(), "endpoint roll", "Dashboard"] {
        assert!(refused.stderr.contains(text), "{text}: {refused:?}");
    }
    assert_eq!(place.api.endpoints().len(), 1);

    // Nothing answers at the URL.
    let rolled = place
        .command(&["roll", "--force", "--secret-file"])
        .arg(place.file())
        .run(DEADLINE)
        .await;
    check_code(&rolled, 0);
    place.check_unprinted(&rolled);
    let endpoints = place.api.endpoints();
    let [old, new] = endpoints.as_slice() else {
        panic!("a second one is made: {endpoints:#?}")
    };
    assert!(!old.is_enabled() && new.is_enabled());
    assert_eq!(place.text(), line(new));
}

#[tokio::test]
async fn a_line_that_is_added_by_hand_during_a_roll_is_kept() {
    let place = Place::new().await;
    check_code(&place.create(&[]).await, 0);
    let add = |line: &str| {
        let text = place.text() + line;
        fs::write(place.file(), text).expect("it can be written");
    };
    let create = place.api.hold("POST /v1/webhook_endpoints");
    let disable = place.api.hold("POST /v1/webhook_endpoints/");
    // Nothing answers at the URL.
    let roll = place.command(&["roll", "--force", "--in-flight", "0s", "--secret-file"]);
    let roll = roll.arg(place.file()).start();
    let asked = async |path: &'static str, count: usize| {
        eventually("the roll to ask Stripe", DEADLINE, async || {
            let asked = place.api.requests(path).len();
            (asked >= count).then_some(()).ok_or(roll.log())
        })
        .await;
    };
    asked("POST /v1/webhook_endpoints", 2).await;
    add("whsec_beforeItsSecret\n");
    drop(create);
    asked("POST /v1/webhook_endpoints/", 1).await;
    add("whsec_afterItsSecret");
    drop(disable);
    let status = roll.wait(DEADLINE).await;
    assert!(status.success(), "{}", roll.log());
    let endpoints = place.api.endpoints();
    let new = line(endpoints.last().expect("there is one"));
    let expected = format!("whsec_beforeItsSecret\n{new}whsec_afterItsSecret");
    assert_eq!(place.text(), expected);
}

#[tokio::test]
async fn two_runs_at_once_make_one_endpoint() {
    let place = Place::new().await;
    let hold = place.api.hold("POST /v1/webhook_endpoints");
    let first = place.create_command(&[]).start();
    eventually("the first run to ask Stripe", DEADLINE, async || {
        let count = place.changes();
        (count == 1).then_some(()).ok_or(first.log())
    })
    .await;
    let second = place.create_command(&[]).start();
    second.wait_for_log("waiting for another", DEADLINE).await;
    drop(hold);
    for run in [&first, &second] {
        let status = run.wait(DEADLINE).await;
        assert!(status.success(), "{}", run.log());
    }
    assert_eq!(place.text(), line(&place.only_endpoint()));
}

#[tokio::test]
async fn check_names_each_difference_and_create_mends_the_types() {
    let place = Place::new().await;
    let check = async |code: i32, expected: &[&str]| {
        let finished = place.run(&["check", "--json"]).await;
        check_code(&finished, code);
        let found: Value = serde_json::from_str(&finished.stdout).expect("it is JSON");
        let problems = found["problems"].as_array().expect("it is a list");
        assert_eq!(problems.len(), expected.len(), "{found:#}");
        for (problem, part) in problems.iter().zip(expected) {
            assert!(problem["mend"].is_string(), "{problem}");
            assert!(problem.to_string().contains(part), "{part}: {problem}");
        }
    };
    check(3, &["endpoint create"]).await;
    check_code(&place.create(&[]).await, 0);
    check(0, &[]).await;

    let endpoint = place.only_endpoint();
    let set = |changes: Value| place.api.put_endpoint(&endpoint.id, &changes);
    set(json!({ "enabled_events": ["checkout.session.completed", "invoice.paid"] }));
    check(3, &["invoice.paid"]).await;
    check_code(&place.create(&[]).await, 0);
    assert_eq!(place.only_endpoint().types(), HANDLED_TYPES);
    check(0, &[]).await;

    set(json!({ "status": "disabled" }));
    check(3, &["disabled"]).await;
    check_code(&place.create(&[]).await, 0);
    set(json!({ "api_version": "2024-06-20" }));
    check(3, &["2024-06-20"]).await;
    set(json!({ "api_version": VERSION }));

    let mut stranger = endpoint.object.clone();
    stranger["metadata"] = json!({});
    stranger["id"] = json!("we_byHand");
    place.api.put_endpoint("we_byHand", &stranger);
    check(3, &["we_byHand"]).await;
    check_code(&place.run(&["disable", "we_byHand"]).await, 0);
    check(0, &[]).await;

    let thin = place.run(&["check", "--url", URL, "--thin"]).await;
    check_code(&thin, 3);
    assert!(thin.stdout.contains("--thin"), "{thin:?}");
    let elsewhere = URL.replace("shop", "other");
    let elsewhere = place.run(&["check", "--url", &elsewhere]).await;
    check_code(&elsewhere, 3);
    assert!(elsewhere.stdout.contains(&endpoint.id), "{elsewhere:?}");
}

/// A bridge whose ingress reads its secrets from the file of a [`Place`], and an endpoint for it.
struct Rolled {
    place: Place,
    bridge: Bridge,
    old: Endpoint,
    client: reqwest::Client,
}

impl Rolled {
    async fn new(style: &[&str]) -> Self {
        let place = Place::new().await;
        let file = place.file().display().to_string();
        let options = Options::new(DatabaseKind::Sqlite)
            .ingress("STRIPE_WEBHOOK_SECRET", "")
            .ingress("STRIPE_WEBHOOK_SECRET_FILE", file)
            // A test delivery would be stored, and harm nothing.
            .ingress("LITESTRIPE_EVENT_TYPES", "*")
            .worker("STRIPE_SECRET_KEY", API_KEY)
            .worker("STRIPE_API_BASE", place.api.url());
        let mut bridge = Bridge::prepare(options);
        bridge.broker.resume().await;
        // Waits for the secret.
        bridge.start_ingress();
        let created = place
            .command(&["create", "--url", &bridge.hook(), "--secret-file"])
            .arg(place.file())
            .args(style)
            .run(DEADLINE)
            .await;
        check_code(&created, 0);
        bridge.ingress().wait_until_ready().await;
        bridge.start_worker().wait_until_ready().await;
        let old = place.only_endpoint();
        Self {
            place,
            bridge,
            old,
            client: litestripe_harness::stripe::client(),
        }
    }

    fn roll(&self, in_flight: &str, more: &[&str]) -> Launch {
        self.place
            .command(&["roll", "--in-flight", in_flight, "--secret-file"])
            .arg(self.place.file())
            .args(more)
    }

    /// Delivers a new snapshot event at once, and returns the status.
    async fn deliver(&self, endpoint: &Endpoint) -> u16 {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let event =
            Purchase::new(now).subscription_event("customer.subscription.created", now, json!({}));
        let delivery = Delivery::new(event.body(), &endpoint.secret);
        let answer = delivery.post(&self.client, &self.bridge.hook()).await;
        answer.expect("ingress answers").status().as_u16()
    }

    /// Delivers a new event of the endpoint's style, signed by Stripe's SDK, and returns the status.
    /// Starting the SDK takes up to seconds.
    async fn deliver_by_sdk(&self, endpoint: &Endpoint) -> u64 {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let purchase = Purchase::new(now);
        self.place.api.put_subscription(purchase.subscription());
        let body = if endpoint.object["event_payload"] == "thin" {
            let event_type = "v1.customer.subscription.created";
            purchase
                .subscription_notification(event_type, now * 1000)
                .body()
        } else {
            let event_type = "customer.subscription.created";
            purchase
                .subscription_event(event_type, now, json!({}))
                .body()
        };
        let bodies = json!([String::from_utf8_lossy(&body)]);
        let file = tempfile::NamedTempFile::new().expect("a file can be made");
        fs::write(file.path(), bodies.to_string()).expect("it can be written");
        let hook = self.bridge.hook();
        let script = crate::sdk::python("notify.py").args([hook.as_str(), &endpoint.secret]);
        let answers = crate::sdk::lines(&script.arg(file.path())).await;
        answers[0]["status"].as_u64().expect("it is a status")
    }

    async fn new_endpoint(&self) -> Endpoint {
        eventually("another endpoint", DEADLINE, async || {
            let endpoints = self.place.api.endpoints();
            let new = endpoints
                .into_iter()
                .find(|endpoint| endpoint.id != self.old.id);
            new.ok_or("there is none".to_owned())
        })
        .await
    }
}

#[tokio::test]
async fn deliveries_verify_before_during_and_after_a_roll() {
    roll_while_delivering(&[], "POST /v1/webhook_endpoints/").await;
}

#[tokio::test]
async fn deliveries_of_thin_events_verify_before_during_and_after_a_roll() {
    roll_while_delivering(&["--thin"], "/disable").await;
}

async fn roll_while_delivering(style: &[&str], disabling: &'static str) {
    let rolled = Rolled::new(style).await;
    let (place, old) = (&rolled.place, &rolled.old);
    assert_eq!(rolled.deliver_by_sdk(old).await, 200, "before");

    // Nothing is delivered to the old endpoint once Stripe has disabled it, but until then always.
    let hold = place.api.hold(disabling);
    let run = rolled.roll("3s", &[]).start();
    let mut delivered = 0;
    while place.api.requests(disabling).is_empty() {
        assert!(run.is_running(), "{}", run.log());
        assert_eq!(rolled.deliver(old).await, 200, "{}", run.log());
        delivered += 1;
    }
    assert!(delivered > 0);
    let new = rolled.new_endpoint().await;
    assert_eq!(new.types(), old.types());
    assert_eq!(rolled.deliver_by_sdk(old).await, 200, "during");
    assert_eq!(rolled.deliver_by_sdk(&new).await, 200, "during");
    assert_eq!(place.text(), format!("{}{}", line(old), line(&new)));

    drop(hold);
    run.wait_for_log("deliveries in flight", DEADLINE).await;
    let in_flight = rolled.deliver(old).await;
    let status = run.wait(DEADLINE).await;
    assert!(status.success(), "{}", run.log());
    assert_eq!(
        in_flight, 200,
        "it was on its way when the endpoint was disabled"
    );
    assert_eq!(place.text(), line(&new));
    let enabled: Vec<_> = place
        .api
        .endpoints()
        .iter()
        .map(Endpoint::is_enabled)
        .collect();
    assert_eq!(enabled, [false, true]);
    assert_eq!(rolled.deliver_by_sdk(&new).await, 200, "after");
    eventually("ingress to refuse the old secret", DEADLINE, async || {
        let status = rolled.deliver(old).await;
        (status == 400).then_some(()).ok_or(status.to_string())
    })
    .await;

    let again = rolled.roll("1s", &[&old.id]).run(DEADLINE).await;
    check_code(&again, 0);
    assert!(again.stdout.contains(&new.id), "{again:?}");
    assert_eq!(place.api.endpoints().len(), 2, "it is rolled already");
    assert_eq!(place.text(), line(&new));

    // Its secrets are those that ingress accepts.
    let check = place.command(&["check", "--secret-file"]).arg(place.file());
    check_code(&check.run(DEADLINE).await, 0);
    let log = rolled.bridge.ingress().log();
    assert!(
        !log.contains(&new.secret) && !log.contains(&old.secret),
        "{log}"
    );
    rolled.bridge.wait_until_applied().await;
}

#[tokio::test]
async fn a_roll_that_was_killed_anywhere_is_continued() {
    let rolled = Rolled::new(&[]).await;
    let place = &rolled.place;
    // Between Stripe's answer and the file; before the old one is disabled; before its secret is
    // removed.
    let points = [
        ("POST /v1/webhook_endpoints", 1),
        ("POST /v1/webhook_endpoints/", 2),
        ("", 3),
    ];
    for (point, count) in points {
        let hold = (!point.is_empty()).then(|| place.api.hold(point));
        let run = rolled.roll("1h", &[]).start();
        match count {
            1 => drop(rolled.new_endpoint().await),
            2 => {
                eventually("the request to disable it", DEADLINE, async || {
                    let count = place.api.requests("/v1/webhook_endpoints/").len();
                    (count > 0).then_some(()).ok_or(run.log())
                })
                .await;
            }
            _ => drop(run.wait_for_log("deliveries in flight", DEADLINE).await),
        }
        run.kill().await;
        drop(hold);
        assert_eq!(
            place.api.endpoints().len(),
            2,
            "no run makes a third endpoint"
        );
        assert_eq!(
            rolled.deliver(&rolled.old).await,
            200,
            "its secret is still valid"
        );
    }
    let last = rolled.roll("3s", &[]).run(DEADLINE).await;
    check_code(&last, 0);
    let endpoints = place.api.endpoints();
    let [old, new] = endpoints.as_slice() else {
        panic!("no third endpoint: {endpoints:#?}")
    };
    assert!(!old.is_enabled() && new.is_enabled());
    assert_eq!(place.text(), line(new));
}

#[tokio::test]
async fn the_old_endpoint_stays_while_something_needs_it() {
    let rolled = Rolled::new(&[]).await;
    let place = &rolled.place;
    let both_stay = async |finished: Finished, text: &str| {
        check_code(&finished, 3);
        assert!(finished.stderr.contains(text), "{finished:?}");
        let endpoints = place.api.endpoints();
        assert_eq!(endpoints.len(), 2);
        assert!(endpoints.iter().all(Endpoint::is_enabled));
        assert_eq!(rolled.deliver(&rolled.old).await, 200);
    };
    let purchase = Purchase::new(rolled.old.object["created"].as_i64().expect("it is a time") - 60);
    let undelivered =
        purchase.subscription_event("customer.subscription.created", purchase.created, json!({}));
    place.api.put_event(undelivered.value, false);
    both_stay(
        rolled.roll("3s", &[]).run(DEADLINE).await,
        "not delivered yet (1)",
    )
    .await;

    let ambiguous = place.run(&["disable"]).await;
    check_code(&ambiguous, 2);
    assert!(ambiguous.stderr.contains(&rolled.old.id), "{ambiguous:?}");

    // Ingress reads another file.
    let elsewhere = place.folder.path().join("elsewhere");
    let text = place.text();
    fs::rename(place.file(), &elsewhere).expect("it can be moved");
    fs::write(place.file(), line(&rolled.old)).expect("it can be written");
    rolled
        .bridge
        .ingress()
        .wait_for_log("no longer using", DEADLINE)
        .await;
    let roll = place
        .command(&["roll", "--in-flight", "1s", "--secret-file"])
        .arg(&elsewhere);
    both_stay(roll.run(DEADLINE).await, "does not accept").await;
    let checked = place.command(&["check", "--secret-file"]).arg(&elsewhere);
    let checked = checked.run(DEADLINE).await;
    check_code(&checked, 3);
    assert!(checked.stdout.contains("answered 400"), "{checked:?}");
    assert_eq!(fs::read_to_string(&elsewhere).ok(), Some(text));

    check_code(&roll.arg("--force").run(DEADLINE).await, 0);
    let new = rolled.new_endpoint().await;
    assert_eq!(fs::read_to_string(&elsewhere).ok(), Some(line(&new)));
}

#[tokio::test]
async fn check_waits_until_ingress_has_read_a_new_secret() {
    let rolled = Rolled::new(&[]).await;
    let (place, ingress) = (&rolled.place, rolled.bridge.ingress());
    let new = place.folder.path().join("new");
    fs::copy(place.file(), &new).expect("it can be copied");
    fs::write(place.file(), "whsec_another\n").expect("it can be written");
    ingress.wait_for_log("no longer using", DEADLINE).await;

    let check = place.command(&["check", "--secret-file"]).arg(&new).start();
    ingress.wait_for_log("refused a delivery", DEADLINE).await;
    fs::rename(&new, place.file()).expect("it can be moved");
    let status = check.wait(DEADLINE).await;
    assert!(status.success(), "{}", check.log());
}

/// An endpoint that was made in the Dashboard, and its secret put into the file by hand.
#[tokio::test]
async fn an_endpoint_made_by_hand_can_be_rolled() {
    let rolled = Rolled::new(&[]).await;
    let place = &rolled.place;
    place
        .api
        .put_endpoint(&rolled.old.id, &json!({ "metadata": {} }));
    fs::write(place.file(), &rolled.old.secret).expect("it can be written");
    let unnamed = rolled.roll("3s", &[]).run(DEADLINE).await;
    check_code(&unnamed, 1);

    let finished = rolled.roll("1s", &[&rolled.old.id]).run(DEADLINE).await;
    check_code(&finished, 0);
    assert!(finished.stdout.contains("by hand"), "{finished:?}");
    let new = rolled.new_endpoint().await;
    assert_eq!(
        place.text(),
        format!("{}\n{}", rolled.old.secret, line(&new))
    );
    assert_eq!(rolled.deliver(&new).await, 200);
}
