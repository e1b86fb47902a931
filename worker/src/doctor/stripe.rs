//! Stripe: whether it answers, what the key may do, and what is sent to the hook.

use futures_util::future::join_all;
use litestripe_contract::exit;
use reqwest::StatusCode;

use super::{Line, endpoints, finding, needs, within};
use crate::clocks::Reading;
use crate::endpoint;
use crate::settings::Settings;
use crate::stripe::api::{ApiError, StripeApi};
use crate::stripe::mode;
use crate::stripe::path::{CHECKOUT_SESSIONS, CUSTOMERS, EVENTS, Path, SUBSCRIPTIONS};
use crate::stripe::probe::Reply;

const CHECK: &str = "Stripe's API";
const PERMISSIONS: &str = "key's permissions";

/// What workers read at Stripe: the permission's name, and a call that needs it and returns nothing
/// about a person. Stripe answers 404 about an object that does not exist only if the key may read
/// such objects.
const READ: [(&str, Path<'_>); 4] = [
    ("Subscriptions", SUBSCRIPTIONS.of("sub_litestripe_doctor")),
    (
        "Checkout Sessions",
        CHECKOUT_SESSIONS.of("cs_litestripe_doctor"),
    ),
    ("Customers", CUSTOMERS.of("cus_litestripe_doctor")),
    ("Events", EVENTS.of("evt_litestripe_doctor")),
];

/// Stripe as it was found.
#[derive(Default)]
pub(super) struct Stripe {
    pub(super) lines: Vec<Line>,
    pub(super) clock: Option<Reading>,
}

pub(super) async fn examine(settings: &Settings, hook: Option<&str>) -> Stripe {
    let Some(stripe) = &settings.stripe else {
        let what = "needs STRIPE_SECRET_KEY: without it, nothing is fetched from Stripe";
        return Stripe {
            lines: vec![Line::skipped(CHECK, what)],
            clock: None,
        };
    };
    let api = match StripeApi::without_broker(stripe.clone()) {
        Ok(api) => api,
        Err(error) => {
            let what = exit::chain(&error);
            return Stripe {
                lines: vec![Line::unknown(CHECK, finding(what, "try again"))],
                clock: None,
            };
        }
    };
    let reads = join_all(READ.map(|(_, path)| api.probe(path))).await;
    let lines = match reads.iter().find_map(|reply| fault(&reply.answer)) {
        Some(fault) => vec![
            fault,
            needs(PERMISSIONS, "Stripe's API"),
            needs(endpoints::CHECK, "Stripe's API"),
        ],
        None => {
            let mode = mode::mode_name(stripe.is_live());
            let answers = format!("Stripe answers and accepts the {mode} mode key");
            let mut lines = vec![Line::ok(CHECK, answers), permissions(&reads)];
            lines.extend(match within(endpoint::list(&api)).await {
                Some(listed) => {
                    let types = |payload| endpoint::types(settings, payload);
                    endpoints::judge(&listed, mode, hook, types)
                }
                None => vec![Line::unknown(
                    endpoints::CHECK,
                    finding("no answer in time", "try again"),
                )],
            });
            lines
        }
    };
    Stripe {
        lines,
        clock: reads.into_iter().find_map(|reply| reply.clock),
    }
}

/// Returns why no call can succeed, if this answer says so.
fn fault(answer: &Result<(), ApiError>) -> Option<Line> {
    let error = answer.as_ref().err()?;
    let found = match error.status() {
        Some(StatusCode::UNAUTHORIZED) => finding(exit::chain(error), "set another key"),
        // The key lacks a permission, or there is no such object.
        Some(StatusCode::FORBIDDEN | StatusCode::NOT_FOUND) => return None,
        Some(StatusCode::TOO_MANY_REQUESTS) => finding(
            format!("Stripe limits the calls: {}", exit::chain(error)),
            "try again; if it stays so, lower LITESTRIPE_MAX_REQUESTS_PER_MINUTE",
        ),
        _ => finding(
            format!(
                "Stripe's API gives no usable answer: {}",
                exit::chain(error)
            ),
            "check the way from here to STRIPE_API_BASE (firewall, proxy, DNS) and Stripe's status page",
        ),
    };
    Some(Line::mend(CHECK, found))
}

fn is_forbidden(reply: &Reply) -> bool {
    let error = reply.answer.as_ref().err();
    error.and_then(ApiError::status) == Some(StatusCode::FORBIDDEN)
}

fn permissions(reads: &[Reply]) -> Line {
    let named = READ.iter().zip(reads);
    let lacking = named.filter(|(_, reply)| is_forbidden(reply));
    let lacking: Vec<_> = lacking.map(|((name, _), _)| *name).collect();
    if lacking.is_empty() {
        return Line::ok(PERMISSIONS, "it may read all that a worker reads");
    }
    let lacking = lacking.join(", ");
    let found = finding(
        format!("STRIPE_SECRET_KEY may not read {lacking}"),
        format!("give the restricted key the permission to read {lacking} (Workbench, API keys)"),
    );
    Line::mend(PERMISSIONS, found)
}
