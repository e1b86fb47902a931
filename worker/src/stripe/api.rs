//! The one client of Stripe's API.
//!
//! Owns requests and retries, each within the shared budget. May not know what is in an object: bodies
//! are handed on as they came. The key is never logged, and errors name Stripe's request id, not the
//! answer's text.

use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder as _;
use bytes::Bytes;
use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use secrecy::ExposeSecret as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use crate::settings::StripeSettings;
use crate::stripe::budget::Budget;

/// The API version that answers are rendered in. Reading is by presence, so a newer one would do as
/// well; pinned, an account's upgrade changes nothing.
const VERSION: &str = "2026-03-25.dahlia";

/// How long one request may take, its answer included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Tries of one request, at most.
const TRIES_MAX: u32 = 5;

/// How long is waited before the second try, at least; doubles with each.
const FIRST_DELAY: Duration = Duration::from_millis(500);

/// The longest wait between two tries that we choose.
const DELAY_MAX: Duration = Duration::from_secs(15);

/// The longest wait that Stripe may ask for in `Retry-After`: after a longer one nobody waits here.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Objects on a page, the most that Stripe gives. Stripe: "Pagination".
const PAGE: &str = "100";

/// Why Stripe gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Stripe answered, and not with what was asked for.
    #[error("Stripe answered {status} (request {request_id})")]
    Status {
        /// The HTTP status.
        status: StatusCode,
        /// Stripe's `Request-Id`, by which its support finds the request.
        request_id: String,
    },
    /// Stripe wants to be left alone for longer than we wait.
    #[error("Stripe answered {status} and asks to wait {} s (request {request_id})", .after.as_secs())]
    Later {
        /// The HTTP status.
        status: StatusCode,
        /// For how long.
        after: Duration,
        /// Stripe's `Request-Id`.
        request_id: String,
    },
    /// Stripe's API redirects nobody; a proxy may, and whoever it names is not to see the key.
    #[error("the API at STRIPE_API_BASE redirects to another address, which is not followed")]
    Redirected,
    /// No answer came.
    #[error("cannot reach Stripe's API")]
    Transport(#[source] reqwest::Error),
    /// The answer did not come to its end.
    #[error("Stripe's answer broke off (request {request_id})")]
    BrokeOff {
        /// Stripe's `Request-Id`.
        request_id: String,
        /// How.
        source: reqwest::Error,
    },
    /// The answer is not what Stripe documents.
    #[error("Stripe's answer cannot be used: {problem} (request {request_id})")]
    Answer {
        /// What is wrong with it.
        problem: &'static str,
        /// Stripe's `Request-Id`.
        request_id: String,
    },
}

impl ApiError {
    /// Whether Stripe says that there is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: StatusCode::NOT_FOUND, .. })
    }
}

/// An answer, and what it can be relied on for.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The body as it came.
    pub body: Bytes,
    as_of: Option<i64>,
    request_id: String,
}

impl Answer {
    /// The second, in Stripe's clock, up to which every change is in the body: the answer's `Date`
    /// less the time the request took, less one second.
    ///
    /// # Errors
    /// When the answer has no `Date`.
    pub fn as_of(&self) -> Result<i64, ApiError> {
        self.as_of.ok_or_else(|| self.unusable("it has no Date"))
    }

    /// That it cannot be used, and why.
    #[must_use]
    pub fn unusable(&self, problem: &'static str) -> ApiError {
        ApiError::Answer { problem, request_id: self.request_id.clone() }
    }
}

/// A client of Stripe's API. Clones share its connections and its budget.
#[derive(Clone)]
pub struct StripeApi {
    http: reqwest::Client,
    settings: StripeSettings,
    budget: Arc<Budget>,
}

impl StripeApi {
    /// A client that keeps to `budget`.
    ///
    /// # Errors
    /// When there is no TLS.
    pub fn new(settings: StripeSettings, budget: Arc<Budget>) -> Result<Self, ApiError> {
        let http = reqwest::Client::builder()
            .timeout(REQUEST_TIMEOUT)
            // A second request, beside the budget, to whoever.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("litestripe/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ApiError::Transport)?;
        Ok(Self { http, settings, budget })
    }

    /// Whether the key sees objects of this mode.
    #[must_use]
    pub fn sees(&self, livemode: bool) -> bool {
        self.settings.is_live() == livemode
    }

    /// A subscription. Stripe: "Retrieve a subscription".
    ///
    /// # Errors
    /// When Stripe gives no answer, or knows no such subscription.
    pub async fn subscription(&self, id: &str, account: Option<&str>) -> Result<Answer, ApiError> {
        self.get(&format!("/v1/subscriptions/{id}"), &[], account).await
    }

    /// The Checkout Sessions that led to a subscription. Stripe: "List all Checkout Sessions".
    ///
    /// # Errors
    /// When Stripe gives no answer.
    pub async fn checkout_sessions_of(&self, subscription: &str, account: Option<&str>) -> Result<Answer, ApiError> {
        self.get("/v1/checkout/sessions", &[("subscription", subscription), ("limit", PAGE)], account).await
    }

    /// A page of subscriptions, newest first, from the one after `after` on. `status` is one of
    /// Stripe's, or `all`; without it canceled ones are left out. Stripe: "List subscriptions".
    ///
    /// # Errors
    /// When Stripe gives no answer.
    pub async fn subscriptions(&self, status: Option<&str>, after: Option<&str>) -> Result<Answer, ApiError> {
        let mut query = vec![("limit", PAGE)];
        query.extend(status.map(|status| ("status", status)));
        query.extend(after.map(|after| ("starting_after", after)));
        self.get("/v1/subscriptions", &query, None).await
    }

    /// A page of events created at `since` (seconds since the Unix epoch) or later, newest first, from
    /// the one after `after` on; `undelivered` leaves out those that every endpoint has accepted.
    /// Stripe: "List all events".
    ///
    /// # Errors
    /// When Stripe gives no answer.
    pub async fn events(
        &self,
        types: &[&str],
        since: i64,
        undelivered: bool,
        after: Option<&str>,
    ) -> Result<Answer, ApiError> {
        let since = since.to_string();
        let mut query = vec![("limit", PAGE), ("created[gte]", since.as_str())];
        query.extend(types.iter().map(|name| ("types[]", *name)));
        query.extend(undelivered.then_some(("delivery_success", "false")));
        query.extend(after.map(|after| ("starting_after", after)));
        self.get("/v1/events", &query, None).await
    }

    /// A customer. Stripe: "Retrieve a customer".
    ///
    /// # Errors
    /// When Stripe gives no answer, or knows no such customer.
    pub async fn customer(&self, id: &str, account: Option<&str>) -> Result<Answer, ApiError> {
        self.get(&format!("/v1/customers/{id}"), &[], account).await
    }

    /// One GET, tried again as Stripe asks for. Stripe: "Advanced error handling".
    async fn get(&self, path: &str, query: &[(&str, &str)], account: Option<&str>) -> Result<Answer, ApiError> {
        let mut delays = delays();
        for attempt in 1.. {
            self.budget.acquire().await;
            let started = std::time::Instant::now();
            let (error, retry_after) = match self.send(path, query, account).await {
                Ok(response) if response.status().is_success() => match answer(response, started).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => (error, None),
                },
                Ok(response) if response.status().is_redirection() => {
                    return Err(ApiError::Redirected);
                }
                Ok(response) if may_retry(&response) => match retry_after(response.headers()) {
                    Some(after) if after > RETRY_AFTER_MAX => {
                        let (status, request_id) = (response.status(), request_id(&response));
                        return Err(ApiError::Later { status, after, request_id });
                    }
                    after => (refusal(&response), after),
                },
                Ok(response) => return Err(refusal(&response)),
                Err(error) => (ApiError::Transport(error.without_url()), None),
            };
            if attempt == TRIES_MAX {
                return Err(error);
            }
            let delay = delays.next().unwrap_or(DELAY_MAX).min(DELAY_MAX);
            // Never before Stripe asks for, and not all workers at the same moment then either.
            let delay = retry_after.map_or(delay, |least| least + delay / 4);
            tokio::time::sleep(delay).await;
        }
        unreachable!("the loop above ends by returning")
    }

    async fn send(&self, path: &str, query: &[(&str, &str)], account: Option<&str>) -> reqwest::Result<Response> {
        let url = format!("{}{path}", self.settings.base);
        let request = self
            .http
            .get(url)
            .query(query)
            .bearer_auth(self.settings.key.expose_secret())
            .header("Stripe-Version", VERSION);
        match account {
            Some(account) => request.header("Stripe-Account", account).send().await,
            None => request.send().await,
        }
    }
}

/// Waits between tries, never at the same moment on all workers. Stripe: "Rate limits".
fn delays() -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::new()
        .with_min_delay(FIRST_DELAY)
        .with_max_delay(DELAY_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}

async fn answer(response: Response, started: std::time::Instant) -> Result<Answer, ApiError> {
    let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| OffsetDateTime::parse(date, &Rfc2822).ok());
    let took = i64::try_from(started.elapsed().as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
    let as_of = date.map(|date| date.unix_timestamp().saturating_sub(took).saturating_sub(1));
    let request_id = request_id(&response);
    match response.bytes().await {
        Ok(body) => Ok(Answer { body, as_of, request_id }),
        Err(error) => Err(ApiError::BrokeOff { request_id, source: error.without_url() }),
    }
}

/// Stripe says so in `Stripe-Should-Retry`; where it does not, conflicts, rate limits and its own
/// faults pass.
fn may_retry(response: &Response) -> bool {
    match response.headers().get("Stripe-Should-Retry").map(|value| value.as_bytes()) {
        Some(b"true") => true,
        Some(b"false") => false,
        _ => {
            let status = response.status();
            status == StatusCode::CONFLICT || status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
        }
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

fn refusal(response: &Response) -> ApiError {
    ApiError::Status { status: response.status(), request_id: request_id(response) }
}

fn request_id(response: &Response) -> String {
    response.headers().get("Request-Id").and_then(|id| id.to_str().ok()).unwrap_or("unknown").to_owned()
}
