//! `doctor`: what is wrong, before Stripe notices.

use clap::Args;
use serde_json::json;
use url::Url;

use super::Failure;
use super::print::{self, Output};
use crate::doctor::{self, Given, Line, Monitoring, State};
use crate::settings::Settings;

const AFTER_HELP: &str = "\
Examines, with the settings of a worker: clocks; the database and its schema; the broker, the user's rights there, the \
streams, their room, and how often the server syncs its disk; Stripe's API, the key's mode and permissions, and the \
webhook endpoint; the user lookup; misspelt settings. Changes nothing. Run it with the worker's settings, as its user at \
NATS, on its host. It calls Stripe's API six times, outside of LITESTRIPE_MAX_REQUESTS_PER_MINUTE, and ends within 30 s \
whatever does not answer.

Each line is `mend` (something has to be mended; the last column says how), `unknown` (it could not be found out), `ok`, \
or `skipped` (it needs a setting that is not set, or something that has to be mended first).

Exit codes: 0 nothing is `mend` or `unknown`, 3 something is `mend`, 1 nothing is `mend`, but something is `unknown`, or \
the examination failed, 2 a setting that cannot be used.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Doctor {
    /// UUID in the hook's path, as ingress has it: only an endpoint with this one counts [default: any]
    #[arg(
        long,
        env = "STRIPE_WEBHOOK_UUID",
        hide_env_values = true,
        value_name = "UUID"
    )]
    stripe_webhook_uuid: Option<String>,
    /// URL of the NATS server's monitoring, such as http://nats:8222 [default: port 8222 of the server in NATS_URL, if it
    /// answers there]
    #[arg(long, value_name = "URL")]
    nats_monitoring: Option<String>,
    #[command(flatten)]
    output: Output,
}

impl Doctor {
    /// Examines everything. `variables` are the names of the variables that are set.
    pub(crate) async fn execute(
        self,
        settings: &Settings,
        variables: Vec<String>,
    ) -> Result<(), Failure> {
        let given = Given {
            hook: self.stripe_webhook_uuid.filter(|uuid| !uuid.is_empty()),
            monitoring: monitoring(self.nats_monitoring.as_deref())?,
            variables,
        };
        let lines = doctor::examine(settings, &given).await;
        let count = |state| lines.iter().filter(|line| line.state == state).count();
        let (to_mend, unknown) = (count(State::Mend), count(State::Unknown));
        let report = json!({ "to_mend": to_mend, "unknown": unknown, "checks": lines });
        self.output.print(&report, || print(&lines))?;
        match (to_mend, unknown) {
            (0, 0) => Ok(()),
            (0, unknown) => Err(Failure::new(format!("could not be found out: {unknown}"))),
            (to_mend, _) => Err(Failure::differences(format!("to be mended: {to_mend}"))),
        }
    }
}

fn monitoring(url: Option<&str>) -> Result<Monitoring, Failure> {
    let Some(url) = url.filter(|url| !url.is_empty()) else {
        return Ok(Monitoring::Customary);
    };
    let is_http = |url: &Url| matches!(url.scheme(), "http" | "https");
    let parsed = Url::parse(url).ok().filter(is_http);
    parsed.map(Monitoring::At).ok_or_else(|| {
        Failure::configuration("--nats-monitoring must be a URL such as http://127.0.0.1:8222")
    })
}

fn print(lines: &[Line]) {
    let row = |line: &Line| {
        let mend = line.mend.clone().unwrap_or_default();
        [
            line.state.as_str().to_owned(),
            line.check.to_owned(),
            line.what.clone(),
            mend,
        ]
    };
    print::table(["state", "check", "what", "mend"], lines.iter().map(row));
}
