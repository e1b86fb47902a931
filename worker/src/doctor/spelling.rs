//! Variables that look like settings and that no program reads. Pure.
//!
//! A misspelt setting has no effect and no error. Only names are looked at, never values.

use litestripe_contract::settings::{SHARED, Setting};

use super::{Line, finding};
use crate::settings::SETTINGS;

const CHECK: &str = "settings";

/// What names of our own settings begin with.
const PREFIX: &str = "LITESTRIPE_";

/// The settings that only ingress has. A test compares them with ingress.
const OF_INGRESS: [&str; 8] = [
    "STRIPE_WEBHOOK_UUID",
    "STRIPE_WEBHOOK_SECRET",
    "STRIPE_WEBHOOK_SECRET_FILE",
    "STRIPE_WEBHOOK_TOLERANCE",
    "LITESTRIPE_LISTEN",
    "LITESTRIPE_EVENT_TYPES",
    "LITESTRIPE_BODY_LIMIT",
    "LITESTRIPE_GROUP_COMMIT",
];

/// Variables that Compose, scripts/tools, Stripe's own tools or a front end read.
const OTHERS: [&str; 19] = [
    "LITESTRIPE_NATS_PUBLISH",
    "LITESTRIPE_POSTGRES_PUBLISH",
    "LITESTRIPE_PUBLISH",
    "LITESTRIPE_SECRETS",
    "LITESTRIPE_FAKETIME",
    "LITESTRIPE_NATS_SERVER",
    "LITESTRIPE_NODE",
    "LITESTRIPE_NODE_MODULES",
    "LITESTRIPE_OLDEST_NATS_SERVER",
    "LITESTRIPE_PGBOUNCER",
    "LITESTRIPE_POSTGRES_BIN",
    "LITESTRIPE_PROMETHEUS",
    "LITESTRIPE_PROMETHEUS_MISSING",
    "LITESTRIPE_PROMTOOL",
    "LITESTRIPE_PYTHON",
    "STRIPE_API_KEY",
    "STRIPE_PUBLIC_KEY",
    "STRIPE_CLI_TELEMETRY_OPTOUT",
    "STRIPE_DEVICE_NAME",
];

/// By how many characters a misspelt name of another prefix may differ from a setting's: the file
/// serves other tools too, which have their own names.
const TYPOS_MAX: usize = 2;

/// From this length on, two typos are allowed; in a shorter name only one.
const LONG: usize = 12;

pub(super) fn examine(variables: &[String]) -> Vec<Line> {
    let unread = variables.iter().filter_map(|name| {
        let nearest = misspelt(name)?;
        let what = format!("no program reads {name}");
        Some(finding(
            what,
            match nearest {
                Some(meant) => {
                    format!("rename it to {meant} if that is meant, in .env or the environment")
                }
                None => "remove it; docs/settings.md lists all settings".to_owned(),
            },
        ))
    });
    Line::all(
        CHECK,
        unread.collect(),
        "every variable that looks like a setting is read by a program",
    )
}

/// Returns the setting that `name` may be meant to be, if it looks like a setting and is none.
fn misspelt(name: &str) -> Option<Option<&'static str>> {
    if settings().any(|known| known == name) || OTHERS.contains(&name) || is_of_kubernetes(name) {
        return None;
    }
    let upper = name.to_ascii_uppercase();
    let distance = |known: &&str| strsim::damerau_levenshtein(&upper, known);
    let nearest = settings().min_by_key(distance)?;
    if upper.starts_with(PREFIX) {
        // Anything may be meant by a name that is far from all others.
        return Some(Some(nearest).filter(|nearest| distance(nearest) <= nearest.len() / 2));
    }
    let typos_max = if nearest.len() < LONG { 1 } else { TYPOS_MAX };
    let is_ours = ["LITESTRIPE_", "STRIPE_", "NATS_"]
        .iter()
        .any(|prefix| nearest.starts_with(prefix));
    (is_ours && distance(&nearest) <= typos_max).then_some(Some(nearest))
}

fn settings() -> impl Iterator<Item = &'static str> {
    let declared = SETTINGS
        .iter()
        .chain(SHARED)
        .map(|setting: &Setting| setting.name);
    declared.chain(OF_INGRESS)
}

/// Whether Kubernetes makes such a variable for a service, such as `LITESTRIPE_INGRESS_PORT_80_TCP`.
/// Kubernetes: "Accessing the Service".
fn is_of_kubernetes(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_PORT")
        || ["_SERVICE_PORT", "_PORT_"]
            .iter()
            .any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use litestripe_contract::subject::SIGNALS_STREAM;

    use super::{PREFIX, misspelt};

    #[test]
    fn misspelt_setting_is_named_with_the_one_that_is_meant() {
        let check =
            |name: &str, meant: Option<&str>| assert_eq!(misspelt(name), Some(meant), "{name}");
        check("LITESTRIPE_ORPHAN_GRCAE", Some("LITESTRIPE_ORPHAN_GRACE"));
        check("litestripe_batch", Some("LITESTRIPE_BATCH"));
        check("LITESTRIPE_BODY_LIMITS", Some("LITESTRIPE_BODY_LIMIT"));
        check("LITESTRIPE_COMPLETELY_UNKNOWN_SETTING_OF_SOMEBODY", None);
        check("STRIPE_SECERT_KEY", Some("STRIPE_SECRET_KEY"));
        check("STRIPE_WEBHOOK_SECRETS", Some("STRIPE_WEBHOOK_SECRET"));
        check("LITESTRPE_BATCH", Some("LITESTRIPE_BATCH"));
        check("NATS_CRED", Some("NATS_CREDS"));
        check("NATS_PASWORD", Some("NATS_PASSWORD"));
    }

    #[test]
    fn variables_of_compose_and_tools_are_left_alone() {
        let files = [
            include_str!("../../../compose.yml"),
            include_str!("../../../compose.reader.yml"),
            include_str!("../../../.env.example"),
            include_str!("../../../scripts/tools"),
        ];
        let is_of_name = |letter: char| letter.is_ascii_uppercase() || letter == '_';
        let words = files
            .iter()
            .flat_map(|file| file.split(|letter| !is_of_name(letter)));
        let is_variable = |word: &&str| {
            word.strip_prefix(PREFIX)
                .is_some_and(|rest| !rest.is_empty())
                && *word != SIGNALS_STREAM
        };
        let names: Vec<_> = words.filter(is_variable).collect();
        assert!(names.len() > 50, "{names:?}");
        for name in names {
            assert_eq!(misspelt(name), None, "{name}");
        }
    }

    #[test]
    fn variables_of_others_are_left_alone() {
        for name in [
            "PATH",
            "DATABASE_URI",
            "RUST_LOGS",
            "STRIPE_PUBLISHABLE_KEY",
            "STRIPE_API_KEY",
            "NATS_SERVER",
            "LITESTRIPE_PUBLISH",
            "LITESTRIPE_INGRESS_SERVICE_HOST",
            "LITESTRIPE_INGRESS_PORT_8080_TCP_ADDR",
            "NATS_PORT",
            "LITESTRIPE_BATCH",
            "STRIPE_WEBHOOK_UUID",
        ] {
            assert_eq!(misspelt(name), None, "{name}");
        }
    }
}
