//! `doctor`: each fault that is planted in a healthy installation is named by it, and nothing else.

mod broker;
mod database;
mod parts;
mod settings;
mod stripe;

use std::time::Duration;

use litestripe_contract::event::HANDLED_TYPES;
use litestripe_harness::bridge::{Bridge, DatabaseKind, HOOK, Options};
use litestripe_harness::program::{Finished, Launch};
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::{nats, port};
use serde_json::{Value, json};

/// Whatever does not answer, it ends by itself; a busy machine may need some of this.
const DEADLINE: Duration = Duration::from_secs(60);

/// The user whose rights a test changes.
const PASSWORD: &str = "onlyTheWorkerKnowsThis4711";

/// The id of the endpoint at Stripe.
const ENDPOINT: &str = "we_byHand";

/// A bridge and a stub of Stripe's API with nothing to mend.
struct Healthy {
    bridge: Bridge,
    api: Api,
    /// The address of the broker's monitoring.
    monitoring: String,
}

/// What a test may have different from the start.
struct Plan {
    options: Options,
    broker: nats::Options,
}

impl Healthy {
    /// Starts an installation, and leaves a worker running.
    async fn start(database: DatabaseKind) -> Self {
        Self::start_with(database, |_| {}).await
    }

    async fn start_with(database: DatabaseKind, change: impl FnOnce(&mut Plan)) -> Self {
        let mut healthy = Self::prepare(database, change).await;
        healthy.bridge.broker.resume().await;
        healthy.bridge.database.resume().await;
        healthy.bridge.start_worker().wait_until_ready().await;
        healthy
    }

    /// Makes an installation that was never started.
    async fn prepare(database: DatabaseKind, change: impl FnOnce(&mut Plan)) -> Self {
        let api = Api::start().await;
        api.put_endpoint(ENDPOINT, &endpoint(&hook(HOOK), &HANDLED_TYPES));
        let port = port::free();
        let mut plan = Plan {
            options: Options::new(database)
                .worker("STRIPE_API_BASE", api.url())
                .worker("STRIPE_SECRET_KEY", API_KEY)
                .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
                .worker("LITESTRIPE_EVENTS_MAX_BYTES", "1GiB"),
            broker: nats::Options {
                config: format!("http: \"127.0.0.1:{port}\""),
                jetstream: "sync_interval: always".to_owned(),
                ..nats::Options::default()
            },
        };
        change(&mut plan);
        let mut bridge = Bridge::prepare(plan.options);
        bridge.broker = nats::Server::prepare(plan.broker).expect("a folder can be made");
        Self {
            bridge,
            api,
            monitoring: format!("http://127.0.0.1:{port}"),
        }
    }

    /// `doctor` with the workers' settings, for changes.
    fn doctor(&self) -> Launch {
        self.bridge.worker().env("STRIPE_WEBHOOK_UUID", HOOK).args([
            "doctor",
            "--json",
            "--nats-monitoring",
            &self.monitoring,
        ])
    }

    async fn examine(&self) -> Report {
        examine(self.doctor()).await
    }

    /// Checks that there is one fault.
    async fn check(&self, check: &str, said: &[&str]) {
        self.examine().await.check(check, said);
    }
}

/// The hook's URL with that UUID.
fn hook(uuid: &str) -> String {
    format!("https://litestripe.example.com/ls/hook/{uuid}/")
}

/// An endpoint that was made by hand, as Stripe's API shows it.
fn endpoint(url: &str, types: &[&str]) -> Value {
    json!({
        "object": "webhook_endpoint",
        "api_version": null,
        "application": null,
        "created": 1,
        "enabled_events": types,
        "livemode": false,
        "metadata": {},
        "status": "enabled",
        "url": url,
    })
}

/// What `doctor --json` printed.
#[derive(Debug)]
struct Report {
    finished: Finished,
    lines: Vec<Value>,
}

async fn examine(doctor: Launch) -> Report {
    let finished = doctor.run(DEADLINE).await;
    for secret in [API_KEY, HOOK, PASSWORD] {
        assert!(!finished.stdout.contains(secret), "{finished:?}");
        assert!(!finished.stderr.contains(secret), "{finished:?}");
    }
    let report: Result<Value, _> = serde_json::from_str(&finished.stdout);
    let report = report.unwrap_or_else(|problem| panic!("{problem}: {finished:?}"));
    let lines = report["checks"].as_array().expect("it is a list").clone();
    let report_lines = Report { finished, lines };
    assert_eq!(report["to_mend"], report_lines.of("mend").len());
    assert_eq!(report["unknown"], report_lines.of("unknown").len());
    report_lines
}

impl Report {
    fn of(&self, state: &str) -> Vec<&Value> {
        let is_of = |line: &&Value| line["state"] == state;
        self.lines.iter().filter(is_of).collect()
    }

    #[track_caller]
    fn check_healthy(&self) {
        assert_eq!(self.of("mend"), Vec::<&Value>::new(), "{self:?}");
        assert_eq!(self.of("unknown"), Vec::<&Value>::new(), "{self:?}");
        assert_eq!(self.finished.status.code(), Some(0), "{self:?}");
    }

    /// Checks that there is one line to mend, about that and with these texts, and exit code 3.
    #[track_caller]
    fn check(&self, check: &str, said: &[&str]) {
        self.check_all(&[(check, said)]);
    }

    /// Checks that there are exactly these lines to mend, in any order.
    #[track_caller]
    fn check_all(&self, expected: &[(&str, &[&str])]) {
        let found = self.of("mend");
        assert_eq!(
            found.len(),
            expected.len(),
            "{found:#?} {}",
            self.finished.stderr
        );
        assert_eq!(self.of("unknown"), Vec::<&Value>::new());
        assert_eq!(self.finished.status.code(), Some(3), "{self:?}");
        for (check, said) in expected {
            let of_it = |line: &&&Value| line["check"] == *check;
            let line = found.iter().find(of_it);
            let line = line.unwrap_or_else(|| panic!("nothing about {check}: {found:#?}"));
            let text = format!("{} {}", line["what"], line["mend"]);
            assert!(line["mend"].as_str().is_some_and(|mend| !mend.is_empty()));
            for said in *said {
                assert!(text.contains(said), "{said} is not in {text}");
            }
        }
    }

    /// Checks that nothing is to be mended, one thing is not known, and exit code 1.
    #[track_caller]
    fn check_unknown(&self, check: &str, said: &str) {
        assert_eq!(self.of("mend"), Vec::<&Value>::new());
        let [line] = self.of("unknown")[..] else {
            panic!("not one unknown: {self:?}");
        };
        assert_eq!(line["check"], check, "{line}");
        assert!(
            format!("{} {}", line["what"], line["mend"]).contains(said),
            "{line}"
        );
        assert_eq!(self.finished.status.code(), Some(1), "{self:?}");
    }
}
