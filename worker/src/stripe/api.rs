//! The one client of Stripe's API.
//!
//! Owns requests and retries, each within the shared budget, and fetches lists to their end. May
//! not know what an object contains: bodies are returned as received, except that a list's later
//! pages are added to its first. The key is never logged. Errors contain Stripe's request id, and
//! its message only for a request that changes something, because those are about no person.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use bytes::Bytes;
use litestripe_contract::connect;
use litestripe_contract::settings::FileError;
use litestripe_domain::event::api::{self, Items};
use litestripe_domain::payment::AccountId;
use reqwest::header::{DATE, HeaderName, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tracing::Instrument as _;

use crate::metrics::{self, StripeOutcome};
use crate::settings::StripeSettings;
use crate::stream::progress::{self, ProgressError};
use crate::stripe::budget::Budget;
use crate::stripe::path::{
    CHECKOUT_SESSIONS, CUSTOMERS, EVENTS, Path, SUBSCRIPTION_ITEMS, SUBSCRIPTIONS,
};
use crate::trace;

/// The API version that answers are rendered in, and the events of the endpoints that we make. It is
/// pinned so that an upgrade of the account changes nothing. Decoding goes by which fields are
/// present, so a newer version would work as well.
pub(crate) const VERSION: &str = "2026-10-28.endive";

/// The timeout of one request, including its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// The most attempts of one request.
const ATTEMPTS_MAX: usize = 5;

/// The shortest pause before the second attempt. It doubles with each attempt.
const FIRST_DELAY: Duration = Duration::from_millis(500);

/// The longest pause between two attempts that we choose ourselves.
const DELAY_MAX: Duration = Duration::from_secs(15);

/// The longest pause that Stripe may ask for in `Retry-After`. If it asks for more, the call fails.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Objects on a page: the most that Stripe allows. Stripe: "Pagination".
const PAGE_SIZE: &str = "100";

/// The most entries of a list that is fetched to its end. The items of a larger
/// subscription would not fit into a message, even reduced to the fields that we keep.
const LISTED_MAX: usize = 10_000;

/// The most characters of Stripe's message in an error.
const MESSAGE_LENGTH_MAX: usize = 500;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("stripe-should-retry");

/// Why there is no usable answer from Stripe. Stripe's support finds a request by its request id.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("Stripe answered {status} (request {request_id}){}", about_key(*status))]
    Status {
        status: StatusCode,
        request_id: String,
    },
    /// Stripe refused a change and says why.
    #[error("Stripe answered {status}: {message} (request {request_id})")]
    Refused {
        status: StatusCode,
        message: String,
        request_id: String,
    },
    #[error("Stripe answered {status} and asks to wait {} s (request {request_id})", .after.as_secs())]
    RetryLater {
        status: StatusCode,
        after: Duration,
        request_id: String,
    },
    /// Stripe's API never redirects. A proxy may, and the server that it names must not receive the
    /// key.
    #[error("the API at STRIPE_API_BASE redirects to another address, which is not followed")]
    Redirected,
    #[error("cannot mark where the event stream ends before a call to Stripe's API")]
    Mark(#[from] ProgressError),
    #[error(transparent)]
    Key(#[from] FileError),
    #[error("cannot reach Stripe's API")]
    Transport(#[source] reqwest::Error),
    #[error("Stripe's answer was cut off (request {request_id})")]
    CutOff {
        request_id: String,
        source: reqwest::Error,
    },
    #[error("the subscription's items changed while they were fetched")]
    Changed,
    #[error("Stripe's answer cannot be used: {problem} (request {request_id})")]
    Answer {
        problem: &'static str,
        request_id: String,
    },
}

fn about_key(status: StatusCode) -> &'static str {
    if status == StatusCode::UNAUTHORIZED {
        ": STRIPE_SECRET_KEY must be a key that exists; it may have been rolled, deleted or restricted to other hosts"
    } else {
        ""
    }
}

impl ApiError {
    /// Whether the same request would be answered the same until somebody changes the key, its
    /// permissions, STRIPE_API_BASE or the object.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Redirected | Self::Answer { .. } => true,
            Self::Status { status, .. } | Self::Refused { status, .. } => {
                status.is_client_error()
                    && !matches!(
                        *status,
                        StatusCode::REQUEST_TIMEOUT
                            | StatusCode::CONFLICT
                            | StatusCode::TOO_EARLY
                            | StatusCode::TOO_MANY_REQUESTS
                    )
            }
            _ => false,
        }
    }

    /// Whether Stripe says that there is no such object.
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(StatusCode::NOT_FOUND)
    }

    /// Returns the status with which Stripe refused the request.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } | Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// An answer of Stripe's API.
#[derive(Debug, Clone)]
pub struct Answer {
    pub body: Bytes,
    /// The second of Stripe's `Date`, and how long the request took, in seconds rounded up.
    date: Option<(i64, i64)>,
    mark: u64,
    request_id: String,
}

impl Answer {
    /// Returns the second, by Stripe's clock, up to which the body contains every change: the
    /// answer's `Date` less the time that the request took, less one second.
    pub fn as_of(&self) -> Result<i64, ApiError> {
        let (date, took) = self.dated()?;
        Ok(date.saturating_sub(took).saturating_sub(1))
    }

    /// Returns the second in which Stripe answered, by its clock.
    pub fn date(&self) -> Result<i64, ApiError> {
        Ok(self.dated()?.0)
    }

    /// Returns the position of the last event in `STRIPE_EVENTS` when the request was sent: the
    /// answer holds every change of which an event was stored by then.
    pub fn mark(&self) -> u64 {
        self.mark
    }

    fn dated(&self) -> Result<(i64, i64), ApiError> {
        self.date.ok_or_else(|| self.unusable("it has no Date"))
    }

    /// Returns the answer with another body, or an error if that could not be made.
    fn with_body(self, body: Option<Vec<u8>>) -> Result<Self, ApiError> {
        match body {
            Some(body) => Ok(Self {
                body: body.into(),
                ..self
            }),
            None => Err(self.unusable("it cannot be completed")),
        }
    }

    /// Makes an error of an answer whose body the caller cannot use.
    pub fn unusable(&self, problem: &'static str) -> ApiError {
        ApiError::Answer {
            problem,
            request_id: self.request_id.clone(),
        }
    }
}

/// A request for Stripe's API.
pub(crate) struct Call<'a> {
    pub method: Method,
    pub path: Path<'a>,
    pub query: &'a [(&'a str, &'a str)],
    /// The connected account for which it is sent.
    pub account: Option<AccountId<'a>>,
    pub content: Content<'a>,
    /// Stripe answers a repeated request with the same key as it answered the first one. Stripe:
    /// "Idempotent requests".
    pub idempotency_key: Option<&'a str>,
}

impl<'a> Call<'a> {
    pub(super) fn new(method: Method, path: Path<'a>, content: Content<'a>) -> Self {
        Self {
            method,
            path,
            query: &[],
            account: None,
            content,
            idempotency_key: None,
        }
    }
}

/// What is sent with a request: forms to `/v1/`, JSON to `/v2/`.
pub(crate) enum Content<'a> {
    None,
    Form(&'a [(&'a str, &'a str)]),
    Json(&'a serde_json::Value),
}

/// The client of Stripe's API. Clones share its connections and its budget.
#[derive(Clone)]
pub struct StripeApi {
    http: reqwest::Client,
    settings: StripeSettings,
    broker: Option<Broker>,
    requests: Arc<AtomicU64>,
}

/// What the broker is needed for.
#[derive(Clone)]
struct Broker {
    budget: Arc<Budget>,
    /// Where answers are marked.
    jetstream: jetstream::Context,
}

impl StripeApi {
    /// Creates a client that keeps to `budget`, and marks its answers in the stream of `jetstream`.
    pub fn new(
        settings: StripeSettings,
        budget: Arc<Budget>,
        jetstream: jetstream::Context,
    ) -> Result<Self, ApiError> {
        Self::with_broker(settings, Some(Broker { budget, jetstream }))
    }

    /// Creates a client for a command that makes a few calls and needs no broker: it keeps to no
    /// budget, and its answers have no mark.
    pub(crate) fn without_broker(settings: StripeSettings) -> Result<Self, ApiError> {
        connect::install_crypto_provider();
        Self::with_broker(settings, None)
    }

    fn with_broker(settings: StripeSettings, broker: Option<Broker>) -> Result<Self, ApiError> {
        let http = reqwest::Client::builder()
            .timeout(REQUEST_TIMEOUT)
            // Following a redirect would be a second request, outside the budget, to an unknown
            // server.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("litestripe/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ApiError::Transport)?;
        Ok(Self {
            http,
            settings,
            broker,
            requests: Arc::default(),
        })
    }

    /// Returns how many requests were made so far, without retries.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether the key sees objects of this mode.
    pub fn sees(&self, livemode: bool) -> bool {
        self.settings.is_live() == livemode
    }

    /// Fetches a subscription with all of its items, which may take several requests. The answer is
    /// the first one with the other items added. Stripe: "Retrieve a subscription".
    pub async fn subscription(
        &self,
        id: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        let path = SUBSCRIPTIONS.of(id);
        let answer = self.get(path, &[], account).await?;
        match api::items(&answer.body) {
            Some(Items::All) => Ok(answer),
            Some(Items::More(after)) => {
                let more = self.items(id, after, account).await?;
                let whole = api::with_items(&answer.body, &more);
                answer.with_body(whole)
            }
            None => Err(answer.unusable("it is no subscription")),
        }
    }

    /// Returns a listed subscription with all of its items. A list has only their first page.
    pub async fn complete(
        &self,
        listed: api::Object,
        account: Option<AccountId<'_>>,
    ) -> Result<api::Object, ApiError> {
        let Some(Items::More(after)) = api::items(listed.raw.get().as_bytes()) else {
            return Ok(listed);
        };
        let more = self.items(&listed.id, after, account).await?;
        let whole = api::with_items(listed.raw.get().as_bytes(), &more);
        Ok(whole
            .and_then(|whole| api::object(&whole))
            .unwrap_or(listed))
    }

    /// Lists the items of a subscription after `after`. Stripe: "List all subscription items".
    async fn items(
        &self,
        subscription: &str,
        after: Option<String>,
        account: Option<AccountId<'_>>,
    ) -> Result<Vec<api::Object>, ApiError> {
        let query = [("subscription", subscription)];
        let listed = self.list(SUBSCRIPTION_ITEMS, &query, api::item_page, after, account);
        match listed.await {
            Ok((items, _)) => Ok(items),
            // The subscription exists, so its items changed since. The next attempt fetches the new
            // ones.
            Err(error) if error.is_not_found() => Err(ApiError::Changed),
            Err(error) => Err(error),
        }
    }

    /// Fetches a Checkout Session. Stripe: "Retrieve a Checkout Session".
    pub async fn checkout_session(
        &self,
        id: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.get(CHECKOUT_SESSIONS.of(id), &[], account).await
    }

    /// Lists all Checkout Sessions of a subscription. Stripe: "List all Checkout Sessions".
    pub async fn checkout_sessions_of(
        &self,
        subscription: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        let query = [("subscription", subscription)];
        let listed = self.list(CHECKOUT_SESSIONS, &query, api::page, None, account);
        let (sessions, first) = listed.await?;
        let whole = api::list(&sessions);
        first.with_body(whole)
    }

    /// Lists a page of subscriptions, newest first, starting behind `after`. `status` is one that
    /// Stripe accepts, such as `all`. Stripe: "List subscriptions".
    pub async fn subscriptions(
        &self,
        status: &str,
        after: Option<&str>,
    ) -> Result<Answer, ApiError> {
        let mut query = vec![("limit", PAGE_SIZE), ("status", status)];
        query.extend(after.map(|after| ("starting_after", after)));
        self.get(SUBSCRIPTIONS, &query, None).await
    }

    /// Lists a page of events created at `since` (seconds since the Unix epoch) or later, newest
    /// first, starting behind `after`. `undelivered` leaves out events that every endpoint has
    /// accepted. Stripe: "List all events".
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
        self.get(EVENTS, &query, None).await
    }

    /// Fetches a customer. Stripe: "Retrieve a customer".
    pub async fn customer(
        &self,
        id: &str,
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.get(CUSTOMERS.of(id), &[], account).await
    }

    /// Fetches a list to its end, starting behind `after`. Also returns the answer with its
    /// first page, because the later ones are not older.
    pub(super) async fn list(
        &self,
        path: Path<'_>,
        query: &[(&str, &str)],
        read: fn(&[u8]) -> Option<api::Page>,
        mut after: Option<String>,
        account: Option<AccountId<'_>>,
    ) -> Result<(Vec<api::Object>, Answer), ApiError> {
        let mut objects = Vec::new();
        let mut first = None;
        loop {
            let mut query = query.to_vec();
            query.push(("limit", PAGE_SIZE));
            query.extend(after.as_deref().map(|after| ("starting_after", after)));
            let answer = self.get(path, &query, account).await?;
            let page = read(&answer.body).ok_or_else(|| answer.unusable("it is no list"))?;
            let last = page.objects.last().map(|object| object.id.clone());
            objects.extend(page.objects);
            let first = first.get_or_insert_with(|| answer.clone());
            if !page.has_more {
                return Ok((objects, first.clone()));
            }
            if objects.len() >= LISTED_MAX {
                return Err(answer.unusable("the list has too many entries"));
            }
            after = last;
        }
    }

    async fn get(
        &self,
        path: Path<'_>,
        query: &[(&str, &str)],
        account: Option<AccountId<'_>>,
    ) -> Result<Answer, ApiError> {
        self.call(&Call {
            query,
            account,
            ..Call::new(Method::GET, path, Content::None)
        })
        .await
    }

    /// Sends a request, and retries as Stripe asks. Stripe: "Advanced error handling".
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Answer, ApiError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut delays = super::pauses(FIRST_DELAY, DELAY_MAX).take(ATTEMPTS_MAX - 1);
        let mut attempts = 0;
        loop {
            let mark = match &self.broker {
                Some(broker) => {
                    broker.budget.acquire().await;
                    progress::last_position(&broker.jetstream).await?
                }
                None => 0,
            };
            let request = self.request(call)?;
            let started = std::time::Instant::now();
            let span = trace::stripe_request(call, &self.settings.base, attempts);
            let sent = request.send().instrument(span.clone()).await;
            trace::record_response(&span, &sent);
            metrics::stripe_request(outcome(sent.as_ref().ok()), started.elapsed());
            attempts += 1;
            let (error, retry_after) = match sent {
                Ok(response) if response.status().is_success() => {
                    let answered = answer(response, started, mark);
                    match answered.instrument(span.clone()).await {
                        Ok(answer) => return Ok(answer),
                        Err(error) => {
                            trace::record_error(&span, "cut_off");
                            (error, None)
                        }
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
                Ok(response) => return Err(refusal(response, &call.method).await),
                Err(error) => (ApiError::Transport(error.without_url()), None),
            };
            let Some(delay) = delays.next() else {
                return Err(error);
            };
            let delay = delay.min(DELAY_MAX);
            // Never earlier than Stripe asks, and with jitter so that workers do not retry at the
            // same moment.
            let delay = retry_after.map_or(delay, |least| least + delay / 4);
            tokio::time::sleep(delay).await;
        }
    }

    pub(super) fn request(&self, call: &Call<'_>) -> Result<RequestBuilder, ApiError> {
        let key = self.settings.key()?;
        let mut request = self
            .http
            .request(
                call.method.clone(),
                format!("{}{}", self.settings.base, call.path),
            )
            .query(call.query)
            .bearer_auth(key.expose_secret())
            .header("Stripe-Version", VERSION);
        if let Some(account) = call.account {
            request = request.header("Stripe-Context", account.0);
        }
        if let Some(key) = call.idempotency_key {
            request = request.header(IDEMPOTENCY_KEY, key);
        }
        Ok(match call.content {
            Content::None => request,
            Content::Form(fields) => request.form(fields),
            Content::Json(value) => request.json(value),
        })
    }
}

async fn answer(
    response: Response,
    started: std::time::Instant,
    mark: u64,
) -> Result<Answer, ApiError> {
    let date = date(&response);
    let took = i64::try_from(started.elapsed().as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
    let date = date.map(|date| (date.unix_timestamp(), took));
    let request_id = request_id(&response);
    match response.bytes().await {
        Ok(body) => Ok(Answer {
            body,
            date,
            mark,
            request_id,
        }),
        Err(error) => Err(ApiError::CutOff {
            request_id,
            source: error.without_url(),
        }),
    }
}

/// Returns when Stripe answered, by its clock, in whole seconds.
pub(super) fn date(response: &Response) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(header(response, DATE)?, &Rfc2822).ok()
}

fn outcome(response: Option<&Response>) -> StripeOutcome {
    match response.map(Response::status) {
        Some(status) if status.is_success() => StripeOutcome::Ok,
        Some(StatusCode::NOT_FOUND) => StripeOutcome::NotFound,
        Some(StatusCode::TOO_MANY_REQUESTS) => StripeOutcome::Failed,
        Some(status) if status.is_client_error() => StripeOutcome::Refused,
        _ => StripeOutcome::Failed,
    }
}

/// Whether the request may succeed if it is sent again. `Stripe-Should-Retry` decides; without it,
/// conflicts, rate limits and server errors are retried.
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

/// Makes an error of a refusal, with Stripe's message if the request was to change something.
async fn refusal(response: Response, method: &Method) -> ApiError {
    let error = status_error(&response);
    let ApiError::Status { status, request_id } = error else {
        return error;
    };
    if *method == Method::GET {
        return ApiError::Status { status, request_id };
    }
    let body = response.bytes().await.unwrap_or_default();
    match serde_json::from_slice(&body) {
        Ok(ErrorBody {
            error: ErrorMessage { message },
        }) => ApiError::Refused {
            status,
            message: message
                .chars()
                .filter(|character| !character.is_control())
                .take(MESSAGE_LENGTH_MAX)
                .collect(),
            request_id,
        },
        Err(_) => ApiError::Status { status, request_id },
    }
}

/// Stripe: "Errors".
#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorMessage,
}

#[derive(Deserialize)]
struct ErrorMessage {
    message: String,
}

pub(super) fn status_error(response: &Response) -> ApiError {
    ApiError::Status {
        status: response.status(),
        request_id: request_id(response),
    }
}

/// Whether the answer is Stripe's, and not that of a proxy or another server.
pub(super) fn has_request_id(response: &Response) -> bool {
    header(response, REQUEST_ID).is_some()
}

fn request_id(response: &Response) -> String {
    header(response, REQUEST_ID).unwrap_or("unknown").to_owned()
}

fn header(response: &Response, name: HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}
