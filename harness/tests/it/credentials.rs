//! Who the programs are at the broker: a user in `NATS_URL`, and credentials that others rotate
//! while the programs run, also those of the database and of Stripe's API.

mod files;
mod jwt;

use std::path::Path;
use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Node, Options, SECRET};
use litestripe_harness::stripe::{Delivery, Purchase};
use litestripe_harness::{eventually, nats, port};
use nkeys::KeyPair;
use serde_json::json;
use tempfile::TempDir;

use crate::credentials::jwt::Operator;
use crate::orphans::{CREATED, now};
use crate::sdk::{lines, python};

const DEADLINE: Duration = Duration::from_secs(60);

/// A password of everything that a URL has to escape, and how it stands in one.
const PASSWORD: &str = "p@ss/w:rd%#?,$ü";
const ESCAPED: &str = "p%40ss%2Fw%3Ard%25%23%3F%2C$%C3%BC";

#[tokio::test]
async fn user_and_password_in_the_url_are_used_and_never_printed() {
    let user = format!("litestripe:{ESCAPED}");
    check_url(&users(PASSWORD), &user, &[PASSWORD, ESCAPED]).await;
}

#[tokio::test]
async fn token_in_the_url_is_used_and_never_printed() {
    let config = format!("authorization {{ token: {PASSWORD:?} }}");
    check_url(&config, ESCAPED, &[PASSWORD, ESCAPED]).await;
}

/// It escapes nothing.
#[tokio::test]
async fn url_that_leads_nats_py_to_a_server_leads_the_programs_there() {
    for (config, user) in [
        (users("hunter2$"), "litestripe:hunter2$@"),
        (
            "authorization { token: \"hunter2$\" }".to_owned(),
            "hunter2$@",
        ),
    ] {
        let broker = broker(&config);
        let (gone, port) = (port::free(), broker.port());
        let url = format!("nats://127.0.0.1:{gone},nats://{user}127.0.0.1:{port}");
        let bridge = start(broker, &[("NATS_URL", &url)]).await;
        let connected = lines(&python("connect.py").arg(&url)).await;
        assert_eq!(connected, [json!(port)]);
        works(&bridge, 1).await;
    }
}

/// Checks that the programs work with `user` in the URL of one of two servers, and that neither
/// they nor a command prints one of `secrets`.
async fn check_url(config: &str, user: &str, secrets: &[&str]) {
    let broker = broker(config);
    // The first server does not run, and its URL names no user.
    let (gone, port) = (port::free(), broker.port());
    let url = format!("nats://127.0.0.1:{gone},nats://{user}@127.0.0.1:{port}");
    let settings = [("NATS_URL", url.as_str()), ("RUST_LOG", "debug")];
    let mut bridge = start(broker, &settings).await;
    works(&bridge, 1).await;
    let reached = bridge.worker().arg("status").run(DEADLINE).await;
    assert_eq!(reached.status.code(), Some(0), "{reached:?}");
    bridge.broker.kill().await;
    let unreached = bridge.worker().arg("status").run(DEADLINE).await;
    assert_eq!(unreached.status.code(), Some(1), "{unreached:?}");
    for program in programs(&bridge) {
        program
            .wait_for_log("connection to NATS lost", DEADLINE)
            .await;
    }
    let said = [
        format!("{reached:?} {unreached:?}"),
        bridge.ingress().log(),
        bridge.workers[0].log(),
    ];
    for said in said {
        for secret in secrets {
            assert!(!said.contains(secret), "{said}");
        }
    }
}

#[tokio::test]
async fn rotated_password_file_is_read_at_the_next_connection() {
    let file = File::new("hunter2-old\n");
    let settings = [
        ("NATS_USER", "litestripe"),
        ("NATS_PASSWORD_FILE", file.path()),
    ];
    let mut bridge = start(broker(&users("hunter2-old")), &settings).await;
    works(&bridge, 1).await;

    // At first the new file is not whole: that is logged once, by the setting's name, and retried.
    file.write("\n");
    bridge
        .broker
        .reconfigure(|config| config.replace("hunter2-old", "hunter2-new"));
    for program in programs(&bridge) {
        program
            .wait_for_log("of NATS_PASSWORD_FILE: it is empty", DEADLINE)
            .await;
    }
    file.write("hunter2-new\r\n");
    works(&bridge, 2).await;
    // A program that starts now reads it as well.
    bridge.start_worker().wait_until_ready().await;
    for program in programs(&bridge) {
        assert!(
            program.count_in_log("NATS_PASSWORD_FILE") <= 1,
            "{}",
            program.log()
        );
        assert_eq!(program.count_in_log("hunter2"), 0, "{}", program.log());
    }
}

#[tokio::test]
async fn rotated_nkey_seed_is_read_at_the_next_connection() {
    let (old, new) = (KeyPair::new_user(), KeyPair::new_user());
    let seed = |key: &KeyPair| key.seed().expect("it has one");
    let file = File::new(&seed(&old));
    let config = format!(
        "authorization {{ users: [ {{ user: tests, password: tests }}, {{ nkey: {} }} ] }}\nno_auth_user: tests",
        old.public_key()
    );
    let settings = [("NATS_NKEY_SEED_FILE", file.path())];
    let bridge = start(broker(&config), &settings).await;
    works(&bridge, 1).await;

    // The broker has the new key before the file does.
    bridge
        .broker
        .reconfigure(|config| config.replace(&old.public_key(), &new.public_key()));
    are_refused(&bridge).await;
    file.write(&format!("{}\n", seed(&new)));
    works(&bridge, 2).await;
}

#[tokio::test]
async fn credentials_that_expire_are_read_again() {
    let operator = Operator::new();
    let file = File::new(&operator.credentials(Some(now() + 4)));
    let settings = [("NATS_CREDS", file.path())];
    let broker = broker(&operator.config());
    let mut bridge = prepare(broker, &settings).await;
    bridge.start_ingress();
    bridge.start_worker();
    // Whether they connected before the end or not: the server does not take these any more.
    are_refused(&bridge).await;
    file.write(&operator.credentials(None));
    for program in programs(&bridge) {
        program.wait_until_ready().await;
    }
    works(&bridge, 1).await;
}

/// The broker has no TLS at all; the files are read before that matters.
#[tokio::test]
async fn rotated_certificate_that_is_unusable_is_named() {
    let file = File::new("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let bridge = {
        let mut bridge = prepare(broker(""), &[("NATS_TLS_CA", file.path())]).await;
        bridge.start_ingress();
        bridge
    };
    let ingress = bridge.ingress();
    ingress.wait_for_log("waiting for NATS", DEADLINE).await;
    assert_eq!(ingress.count_in_log("NATS_TLS_CA"), 0, "{}", ingress.log());
    file.write("hunter2");
    ingress
        .wait_for_log("of NATS_TLS_CA: it holds no PEM certificate", DEADLINE)
        .await;
    assert_eq!(ingress.count_in_log("hunter2"), 0);
}

/// A broker with these lines in its configuration. It does not run yet.
fn broker(config: &str) -> nats::Server {
    let options = nats::Options {
        config: config.to_owned(),
        ..nats::Options::default()
    };
    nats::Server::prepare(options).expect("a folder for nats-server can be made")
}

/// Configures two users: the tests need no password, the programs need this one.
fn users(password: &str) -> String {
    format!(
        "authorization {{ users = [\n  {{ user: tests, password: tests }}\n  \
         {{ user: litestripe, password: {password:?} }}\n] }}\nno_auth_user: tests\n"
    )
}

/// Starts the broker. Both programs will have these settings.
async fn prepare(broker: nats::Server, settings: &[(&'static str, &str)]) -> Bridge {
    let options = settings.iter().fold(
        Options::new(DatabaseKind::Sqlite),
        |options, (name, value)| options.ingress(name, *value).worker(name, *value),
    );
    let mut bridge = Bridge::prepare(options);
    bridge.broker = broker;
    bridge.broker.resume().await;
    bridge
}

async fn start(broker: nats::Server, settings: &[(&'static str, &str)]) -> Bridge {
    let mut bridge = prepare(broker, settings).await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    bridge
}

fn programs(bridge: &Bridge) -> Vec<&Node> {
    let workers = bridge.workers.iter();
    std::iter::once(bridge.ingress()).chain(workers).collect()
}

/// Checks that a delivery is accepted and leads to the row number `rows`. Stripe would deliver
/// again, too.
async fn works(bridge: &Bridge, rows: usize) {
    let purchase = Purchase::new(now());
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    eventually("a delivery that is accepted", DEADLINE, async || {
        let delivery = Delivery::new(event.body(), SECRET);
        match bridge.post(&delivery).await.status().as_u16() {
            200 => Ok(()),
            status => Err(format!("{status}: {}", bridge.ingress().log())),
        }
    })
    .await;
    eventually("its row", DEADLINE, async || {
        match bridge.rows().await.len() {
            found if found == rows => Ok(()),
            found => Err(format!("{found} rows: {}", bridge.workers[0].log())),
        }
    })
    .await;
}

async fn are_refused(bridge: &Bridge) {
    for program in programs(bridge) {
        program
            .wait_for_log("cannot connect to NATS at", DEADLINE)
            .await;
    }
}

/// A file that holds a secret.
struct File {
    folder: TempDir,
    path: String,
}

impl File {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("secret").display().to_string();
        let file = Self { folder, path };
        file.write(text);
        file
    }

    fn path(&self) -> &str {
        &self.path
    }

    /// Replaces it in one step, as those who rotate secrets do.
    fn write(&self, text: &str) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, text).expect("the folder is ours");
        std::fs::rename(&new, Path::new(&self.path)).expect("the folder is ours");
    }
}
