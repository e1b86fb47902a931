//! Which endpoints at Stripe deliver to the hook, and whether they send all that the worker handles.
//! Pure.
//!
//! Those that `litestripe-worker endpoint` made are judged by its rules. One that was made by hand
//! only has to be enabled and to send every type. No line holds a UUID.

use litestripe_contract::exit;
use url::Url;

use super::{Line, finding};
use crate::endpoint::check::{self, Problem};
use crate::endpoint::{Listed, hook_uuid};
use crate::stripe::api::ApiError;
use crate::stripe::endpoint::{Endpoint, Payload};

pub(super) const CHECK: &str = "webhook endpoint";

/// How an operator gets an endpoint that is right.
const CREATE: &str = "`litestripe-worker endpoint create --url https://your.host/ls/hook/<STRIPE_WEBHOOK_UUID>/ \
                      --secret-file FILE`";

/// An endpoint whose URL is a hook's, on whatever host.
struct Hook<'a> {
    endpoint: &'a Endpoint,
    url: Url,
}

/// Judges the account's endpoints. `mode` is the key's, and `hook` the UUID in the hook's path, if it
/// is known. `types` are the types that an endpoint should send.
pub(super) fn judge(
    listed: &Listed,
    mode: &str,
    hook: Option<&str>,
    types: impl Fn(Payload) -> Vec<String>,
) -> Vec<Line> {
    let hooks: Vec<_> = listed.endpoints.iter().filter_map(Hook::new).collect();
    let is_ours = |found: &&Hook<'_>| hook.is_none_or(|uuid| found.has(uuid));
    let ours: Vec<_> = hooks.iter().filter(is_ours).collect();
    let is_enabled = |found: &&&Hook<'_>| found.endpoint.enabled;
    let enabled: Vec<_> = ours.iter().filter(is_enabled).copied().collect();
    if enabled.is_empty() && !listed.failed.is_empty() {
        return vec![unread(&listed.failed)];
    }
    let Some(first) = ours.first() else {
        return vec![missing(hooks.first(), mode)];
    };
    let relevant = if enabled.is_empty() { &ours } else { &enabled };
    if relevant.iter().any(|found| found.endpoint.marker.is_some()) {
        judge_made(&ours, &enabled, types)
    } else if enabled.is_empty() {
        let what = format!("the endpoint {first} is disabled: Stripe sends it nothing");
        let mend = format!(
            "enable it (Workbench, Webhooks) or replace it ({CREATE}); then `litestripe-worker backfill` fetches what was \
             missed"
        );
        vec![Line::mend(CHECK, finding(what, mend))]
    } else {
        vec![judge_types(&enabled, &types(Payload::Snapshot))]
    }
}

/// Judges endpoints of which `litestripe-worker endpoint` made at least one, by its rules.
fn judge_made(
    ours: &[&Hook<'_>],
    enabled: &[&Hook<'_>],
    types: impl Fn(Payload) -> Vec<String>,
) -> Vec<Line> {
    let listed: Vec<_> = ours.iter().map(|found| found.endpoint.clone()).collect();
    let hide = |text: &str| {
        let hide_one =
            |text: String, found: &&Hook<'_>| text.replace(found.uuid(), "<STRIPE_WEBHOOK_UUID>");
        ours.iter().fold(text.to_owned(), hide_one)
    };
    let found = |problem: Problem| {
        let what = match problem.endpoint {
            Some(id) => format!("{id}: {}", problem.problem),
            None => problem.problem,
        };
        finding(hide(&what), hide(&problem.mend))
    };
    let problems = check::problems(&listed, None, types).into_iter();
    Line::all(CHECK, problems.map(found).collect(), well(enabled))
}

/// Whether the endpoints together send every wanted type.
fn judge_types(enabled: &[&Hook<'_>], wanted: &[String]) -> Line {
    let is_sent = |name: &str| enabled.iter().any(|found| sends(found.endpoint, name));
    let missing = wanted.iter().map(String::as_str);
    let missing: Vec<_> = missing.filter(|name| !is_sent(name)).collect();
    if missing.is_empty() {
        return Line::ok(CHECK, well(enabled));
    }
    let hooks = described(enabled, " or ");
    let what = format!(
        "these types are not sent to {hooks}: {}",
        missing.join(", ")
    );
    let is_thin = |found: &&Hook<'_>| found.endpoint.payload == Payload::Thin;
    let thin = if enabled.iter().all(is_thin) {
        ", each with v1. in front"
    } else {
        ""
    };
    let mend = format!(
        "add them to the endpoint (Workbench, Webhooks){thin}, or replace it: {CREATE}, then `litestripe-worker endpoint \
         disable`"
    );
    Line::mend(CHECK, finding(what, mend))
}

fn sends(endpoint: &Endpoint, wanted: &str) -> bool {
    let prefix = endpoint.payload.type_prefix();
    let is_wanted = |name: &String| name == "*" || name.strip_prefix(prefix) == Some(wanted);
    endpoint.types.iter().any(is_wanted)
}

fn unread(failed: &[(Payload, ApiError)]) -> Line {
    let name = |payload: &Payload| match payload {
        Payload::Snapshot => "Webhook Endpoints",
        Payload::Thin => "Event Destinations",
    };
    let names: Vec<_> = failed.iter().map(|(payload, _)| name(payload)).collect();
    let reasons = failed.iter().map(|(payload, error)| {
        let reason = exit::chain(error);
        format!("{}: {reason}", name(payload))
    });
    let what = format!(
        "what Stripe delivers to cannot be listed with STRIPE_SECRET_KEY ({})",
        reasons.collect::<Vec<_>>().join("; ")
    );
    let mend = format!(
        "give the restricted key the permission to read {}, or run `litestripe-worker endpoint check` with a key that may",
        names.join(", ")
    );
    Line::unknown(CHECK, finding(what, mend))
}

/// Says that no endpoint delivers to our hook. `other` is one that delivers to another hook.
fn missing(other: Option<&Hook<'_>>, mode: &str) -> Line {
    let found = match other {
        Some(other) => finding(
            format!(
                "the endpoint {other} has another UUID than STRIPE_WEBHOOK_UUID: its deliveries are answered 404"
            ),
            format!("correct STRIPE_WEBHOOK_UUID for ingress and here, or {CREATE}"),
        ),
        None => finding(
            format!(
                "Stripe has no {mode} mode endpoint for /ls/hook/<STRIPE_WEBHOOK_UUID>/: it sends nothing"
            ),
            format!("{CREATE}; while you use `stripe listen`, none is needed"),
        ),
    };
    Line::mend(CHECK, found)
}

fn well(enabled: &[&Hook<'_>]) -> String {
    format!("all types go to {}", described(enabled, " and "))
}

fn described(hooks: &[&Hook<'_>], separator: &str) -> String {
    let one = |found: &&Hook<'_>| {
        let Endpoint {
            payload,
            api_version,
            ..
        } = found.endpoint;
        match (payload, api_version) {
            (Payload::Thin, _) => format!("{found} (thin)"),
            (Payload::Snapshot, Some(version)) => {
                format!("{found} (snapshots of API version {version})")
            }
            (Payload::Snapshot, None) => {
                format!("{found} (snapshots of the account's API version)")
            }
        }
    };
    hooks.iter().map(one).collect::<Vec<_>>().join(separator)
}

impl<'a> Hook<'a> {
    fn new(endpoint: &'a Endpoint) -> Option<Self> {
        let url = Url::parse(&endpoint.url).ok()?;
        hook_uuid(&url)?;
        Some(Self { endpoint, url })
    }

    fn uuid(&self) -> &str {
        hook_uuid(&self.url).unwrap_or_default()
    }

    fn has(&self, uuid: &str) -> bool {
        self.uuid().eq_ignore_ascii_case(uuid)
    }
}

/// Shows the URL without user, password, query and UUID.
impl std::fmt::Display for Hook<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { url, .. } = self;
        let path = url.path().replace(self.uuid(), "…");
        write!(f, "{}{path}", url.origin().ascii_serialization())
    }
}

#[cfg(test)]
mod tests;
