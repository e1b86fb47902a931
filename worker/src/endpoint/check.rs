//! What is wrong with the endpoints at Stripe, and what mends it. Pure.

use std::collections::BTreeSet;

use litestripe_contract::event::HANDLED_THIN_TYPES;
use serde::Serialize;

use super::{Address, hook_uuid};
use crate::stripe::api::VERSION;
use crate::stripe::endpoint::{Endpoint, Payload, Source};

/// Something to be mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    /// The endpoint that has it. `None` if there is none.
    pub endpoint: Option<String>,
    pub problem: String,
    pub mend: String,
}

/// Returns whether two lists name the same types.
pub(crate) fn same_types(some: &[String], others: &[String]) -> bool {
    some.iter().collect::<BTreeSet<_>>() == others.iter().collect::<BTreeSet<_>>()
}

/// Finds what is wrong with the endpoints `listed` at Stripe. `asked` is the address that there must
/// be an endpoint for; without it those that Litestripe made are checked. `types` are the types that
/// an endpoint should send.
pub(crate) fn problems(
    listed: &[Endpoint],
    asked: Option<&Address>,
    types: impl Fn(Payload) -> Vec<String>,
) -> Vec<Problem> {
    let addresses = match asked {
        Some(asked) => vec![asked.clone()],
        None => our_addresses(listed),
    };
    if addresses.is_empty() {
        return vec![Problem {
            endpoint: None,
            problem: "no endpoint that Litestripe made".to_owned(),
            mend: "litestripe-worker endpoint create --url https://your.host/ls/hook/<STRIPE_WEBHOOK_UUID>/ \
                   --secret-file FILE"
                .to_owned(),
        }];
    }
    addresses
        .iter()
        .flat_map(|address| problems_of(listed, address, &types(address.payload)))
        .collect()
}

fn our_addresses(listed: &[Endpoint]) -> Vec<Address> {
    let mut addresses = Vec::new();
    let ours = listed.iter().filter(|endpoint| endpoint.marker.is_some());
    for address in ours.filter_map(Address::of_endpoint) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    // An address that was given up is not missed while another one is in use.
    let in_use = |address: &Address| listed.iter().any(|one| one.enabled && address.is_of(one));
    if addresses.iter().any(in_use) {
        addresses.retain(in_use);
    }
    addresses
}

fn problems_of(listed: &[Endpoint], address: &Address, types: &[String]) -> Vec<Problem> {
    let (ours, others): (Vec<_>, Vec<_>) = listed
        .iter()
        .partition(|endpoint| endpoint.marker.is_some() && address.is_of(endpoint));
    let enabled: Vec<_> = ours.iter().filter(|endpoint| endpoint.enabled).collect();
    let mut problems = Vec::new();
    let mut problem = |endpoint: Option<&Endpoint>, problem: String, mend: String| {
        problems.push(Problem {
            endpoint: endpoint.map(|endpoint| endpoint.id.clone()),
            problem,
            mend,
        });
    };
    let create = create_command(address);
    if enabled.is_empty() {
        match ours.last() {
            Some(disabled) => problem(
                Some(disabled),
                "it is disabled, so Stripe delivers nothing".to_owned(),
                format!("{create} (enables it); then litestripe-worker backfill"),
            ),
            None => problem(None, missing(address, listed), create.clone()),
        }
    }
    if let [.., newest] = enabled.as_slice()
        && enabled.len() > 1
    {
        problem(
            Some(newest),
            format!(
                "{} endpoints deliver to this URL: a roll is not finished",
                enabled.len()
            ),
            format!(
                "litestripe-worker endpoint roll {} --secret-file FILE",
                newest.id
            ),
        );
    }
    for endpoint in enabled {
        if let Some(difference) = type_difference(endpoint, types) {
            problem(Some(endpoint), difference, create.clone());
        }
        let has_version = endpoint.api_version.as_deref() == Some(VERSION);
        if endpoint.payload == Payload::Snapshot && !has_version {
            let version = endpoint.api_version.as_deref();
            problem(
                Some(endpoint),
                format!(
                    "it renders events in API version {}, not {VERSION}",
                    version.unwrap_or("the account's default")
                ),
                format!(
                    "litestripe-worker endpoint roll {} --secret-file FILE (Stripe cannot change an endpoint's version)",
                    endpoint.id
                ),
            );
        }
    }
    if hook_uuid(&address.url).is_none() {
        problem(
            None,
            format!("{} does not end in /ls/hook/<UUID>/", address.url),
            "make sure that your proxy leads it to ingress's hook".to_owned(),
        );
    }
    let doubles = others.iter().filter(|endpoint| {
        endpoint.enabled
            && endpoint.marker.is_none()
            && Address::of_endpoint(endpoint).is_some_and(|other| other.url == address.url)
    });
    for endpoint in doubles {
        problem(
            Some(endpoint),
            "it delivers to the same URL, and Litestripe did not make it".to_owned(),
            format!("litestripe-worker endpoint disable {}", endpoint.id),
        );
    }
    problems
}

fn missing(address: &Address, listed: &[Endpoint]) -> String {
    let near = listed
        .iter()
        .filter(|endpoint| endpoint.marker.is_some() && endpoint.enabled);
    let near: Vec<_> = near
        .map(|endpoint| {
            let Endpoint {
                id,
                payload,
                source,
                url,
                ..
            } = endpoint;
            format!("{id} delivers {payload} events of the {source} to {url}")
        })
        .collect();
    let Address {
        url,
        payload,
        source,
    } = address;
    let missing = format!("no endpoint delivers {payload} events of the {source} to {url}");
    if near.is_empty() {
        missing
    } else {
        format!("{missing}; {}", near.join("; "))
    }
}

/// Returns how an endpoint's types differ from those that it should send. Finer types of thin events
/// do no harm.
fn type_difference(endpoint: &Endpoint, types: &[String]) -> Option<String> {
    let is_missing = |name: &&String| !endpoint.types.contains(name);
    let missing: Vec<_> = types.iter().filter(is_missing).cloned().collect();
    let is_handled = |name: &str| {
        HANDLED_THIN_TYPES.iter().any(|handled| {
            let prefix = handled.strip_suffix('*');
            prefix.is_some_and(|prefix| name.starts_with(prefix))
        })
    };
    let more: Vec<_> = endpoint
        .types
        .iter()
        .filter(|name| !types.contains(name) && !is_handled(name))
        .cloned()
        .collect();
    let part = |what: &str, names: &[String]| {
        (!names.is_empty()).then(|| format!("{what} {}", names.join(", ")))
    };
    let parts: Vec<_> = [
        part("it does not send", &missing),
        part("it sends what no worker handles:", &more),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Returns the command that makes sure that there is an endpoint.
fn create_command(address: &Address) -> String {
    let thin = match address.payload {
        Payload::Snapshot => "",
        Payload::Thin => " --thin",
    };
    let connect = match address.source {
        Source::Account => "",
        Source::ConnectedAccounts => " --connect",
    };
    format!(
        "litestripe-worker endpoint create --url {} --secret-file FILE{thin}{connect}",
        address.url
    )
}
