//! The one client of Stripe's API.
//!
//! Owns requests and retries, each within the shared budget. May not know what is in an object: bodies
//! are handed on as they came. The key is never logged, and errors name Stripe's request id, not the
//! answer's text. Everything fails when Stripe gives no answer that can be used.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use litestripe_domain::payment::AccountId;
use reqwest::header::{DATE, HeaderName, RETRY_AFTER};
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
const ATTEMPTS_MAX: usize = 5;

/// How long is waited before the second try, at least; doubles with each.
const FIRST_DELAY: Duration = Duration::from_millis(500);

/// The longest wait between two tries that we choose.
const DELAY_MAX: Duration = Duration::from_secs(15);

/// The longest wait that Stripe may ask for in `Retry-After`: after a longer one nobody waits here.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Objects on a page, the most that Stripe gives. Stripe: "Pagination".
const PAGE_SIZE: &str = "100";

const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("stripe-should-retry");

/// Why Stripe gave no answer that can be used. Request ids are those by which Stripe's support finds a request.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("Stripe answered {status} (request {request_id})")]
    Status {
        status: StatusCode,
        request_id: String,
    },
    #[error("Stripe answered {status} and asks to wait {} s (request {request_id})", .after.as_secs())]
    RetryLater {
        status: StatusCode,
        after: Duration,
        request_id: String,
    },
    /// Stripe's API redirects nobody; a proxy may, and whoever it names is not to see the key.
    #[error("the API at STRIPE_API_BASE redirects to another address, which is not followed")]
    Redirected,
    #[error("cannot reach Stripe's API")]
    Transport(#[source] reqwest::Error),
    #[error("Stripe's answer broke off (request {request_id})")]
    CutOff {
        request_id: String,
        source: reqwest::Error,
    },
    #[error("Stripe's answer cannot be used: {problem} (request {request_id})")]
    Answer {
        problem: &'static str,
        request_id: String,
    },
}

impl ApiError {
    /// Whether Stripe says that there is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: StatusCode::NOT_FOUND,
                ..
            }
        )
    }
}

/// An answer, and what it can be relied on for.
#[derive(Debug, Clone)]
pub struct Answer {
    pub body: Bytes,
    as_of: Option<i64>,
    request_id: String,
}

impl Answer {
    /// The second, in Stripe's clock, up to which every change is in the body: the answer's `Date`
    /// less the time the request took, less one second.
    pub fn as_of(&self) -> Result<i64, ApiError> {
        self.as_of.ok_or_else(|| self.unusable("it has no Date"))
    }

    pub fn unusable(&self, problem: &'static str) -> ApiError {
        ApiError::Answer {
            problem,
            request_id: self.request_id.clone(),
        }
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
    pub fn new(settings: StripeSettings, budget: Arc<Budget>) -> Result<Self, ApiError> {
        let http = reqwest::Client::builder()
            .timeout(REQUEST_TIMEOUT)
            // A second request, beside the budget, to whoever.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("litestripe/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ApiError::Transport)?;
        Ok(Self {
            http,
            settings,
            budget,
        })
    }

    /// Whether the key sees objects of this mode.
    pub fn sees(&self, livemode: bool) -> bool {
        self.settings.is_live() == livemode
    }

    /// A subscription. Stripe: "Retrieve a subscription".
    pub async fn subscription(
        &self,
        id: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.get(&format!("/v1/subscriptions/{id}"), &[], account)
            .await
    }

    /// The Checkout Sessions that led to a subscription. Stripe: "List all Checkout Sessions".
    pub async fn checkout_sessions_of(
        &self,
        subscription: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.get(
            "/v1/checkout/sessions",
            &[("subscription", subscription), ("limit", PAGE_SIZE)],
            account,
        )
        .await
    }

    /// A page of subscriptions, newest first, from the one after `after` on. `status` is one of
    /// Stripe's, or `all`. Stripe: "List subscriptions".
    pub async fn subscriptions(
        &self,
        status: &str,
        after: Option<&str>,
    ) -> Result<Answer, ApiError> {
        let mut query = vec![("limit", PAGE_SIZE), ("status", status)];
        query.extend(after.map(|after| ("starting_after", after)));
        self.get("/v1/subscriptions", &query, None).await
    }

    /// A page of events created at `since` (seconds since the Unix epoch) or later, newest first, from
    /// the one after `after` on; `undelivered` leaves out those that every endpoint has accepted.
    /// Stripe: "List all events".
    pub async fn events(
        &self,
        types: &[&str],
        since: i64,
        undelivered: bool,
        after: Option<&str>,
    ) -> Result<Answer, ApiError> {
        let since = since.to_string();
        let mut query = vec![("limit", PAGE_SIZE), ("created[gte]", since.as_str())];
        query.extend(types.iter().map(|name| ("types[]", *name)));
        query.extend(undelivered.then_some(("delivery_success", "false")));
        query.extend(after.map(|after| ("starting_after", after)));
        self.get("/v1/events", &query, None).await
    }

    /// A customer. Stripe: "Retrieve a customer".
    pub async fn customer(
        &self,
        id: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.get(&format!("/v1/customers/{id}"), &[], account).await
    }

    /// One GET, tried again as Stripe asks for. Stripe: "Advanced error handling".
    async fn get(
        &self,
        path: &str,
        query: &[(&str, &str)],
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        let mut delays = super::pauses(FIRST_DELAY, DELAY_MAX).take(ATTEMPTS_MAX - 1);
        loop {
            self.budget.acquire().await;
            let started = std::time::Instant::now();
            let (error, retry_after) = match self.send(path, query, account).await {
                Ok(response) if response.status().is_success() => {
                    match answer(response, started).await {
                        Ok(answer) => return Ok(answer),
                        Err(error) => (error, None),
                    }
                }
                Ok(response) if response.status().is_redirection() => {
                    return Err(ApiError::Redirected);
                }
                Ok(response) if may_retry(&response) => match retry_after(&response) {
                    Some(after) if after > RETRY_AFTER_MAX => {
                        let (status, request_id) = (response.status(), request_id(&response));
                        return Err(ApiError::RetryLater {
                            status,
                            after,
                            request_id,
                        });
                    }
                    after => (status_error(&response), after),
                },
                Ok(response) => return Err(status_error(&response)),
                Err(error) => (ApiError::Transport(error.without_url()), None),
            };
            let Some(delay) = delays.next() else {
                return Err(error);
            };
            let delay = delay.min(DELAY_MAX);
            // Never before Stripe asks for, and not all workers at the same moment then either.
            let delay = retry_after.map_or(delay, |least| least + delay / 4);
            tokio::time::sleep(delay).await;
        }
    }

    async fn send(
        &self,
        path: &str,
        query: &[(&str, &str)],
        account: Option<AccountId<'_>>,
    ) -> reqwest::Result<Response> {
        let mut request = self
            .http
            .get(format!("{}{path}", self.settings.base))
            .query(query);
        request = request
            .bearer_auth(self.settings.key.expose_secret())
            .header("Stripe-Version", VERSION);
        if let Some(account) = account {
            request = request.header("Stripe-Account", account.0);
        }
        request.send().await
    }
}

async fn answer(response: Response, started: std::time::Instant) -> Result<Answer, ApiError> {
    let date = header(&response, DATE).and_then(|date| OffsetDateTime::parse(date, &Rfc2822).ok());
    let took = i64::try_from(started.elapsed().as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
    let as_of = date.map(|date| date.unix_timestamp().saturating_sub(took).saturating_sub(1));
    let request_id = request_id(&response);
    match response.bytes().await {
        Ok(body) => Ok(Answer {
            body,
            as_of,
            request_id,
        }),
        Err(error) => Err(ApiError::CutOff {
            request_id,
            source: error.without_url(),
        }),
    }
}

/// Stripe says so in `Stripe-Should-Retry`; where it does not, conflicts, rate limits and its own
/// faults pass.
fn may_retry(response: &Response) -> bool {
    match header(response, SHOULD_RETRY) {
        Some("true") => true,
        Some("false") => false,
        _ => match response.status() {
            StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS => true,
            status => status.is_server_error(),
        },
    }
}

fn retry_after(response: &Response) -> Option<Duration> {
    header(response, RETRY_AFTER)?
        .parse()
        .ok()
        .map(Duration::from_secs)
}

fn status_error(response: &Response) -> ApiError {
    ApiError::Status {
        status: response.status(),
        request_id: request_id(response),
    }
}

fn request_id(response: &Response) -> String {
    header(response, REQUEST_ID).unwrap_or("unknown").to_owned()
}

fn header(response: &Response, name: HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}
