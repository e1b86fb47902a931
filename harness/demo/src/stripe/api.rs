//! A stub of Stripe's API, the only part of these tests that is not real.
//!
//! Owns its objects (subscriptions, events of both versions, Checkout Sessions, customers, and in
//! `endpoints` those that it delivers to) and the connected accounts they belong to, lists in pages
//! as Stripe documents them, the errors that a test plans, and a record of the requests. May not
//! know what the worker does with the answers.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

mod endpoints;

pub use endpoints::Endpoint;
use endpoints::Endpoints;

/// The only API key that the stub accepts, a test mode key.
pub const API_KEY: &str = "sk_test_onlyTheStubKnowsThis4711";

/// A running stub. Dropping it ends it.
pub struct Api {
    url: String,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

/// A received request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The time of its arrival.
    pub at: Instant,
    pub method: String,
    /// Path and query, such as `/v1/checkout/sessions?subscription=sub_…&limit=100`.
    pub path: String,
    /// Its headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    /// The account for which it asks: its header `Stripe-Context`.
    pub fn context(&self) -> Option<&str> {
        self.headers.get("stripe-context").map(String::as_str)
    }
}

/// How many items a subscription has in an answer; the others are at `/v1/subscription_items`.
pub const ITEMS_ON_FIRST_PAGE: usize = 10;

/// A planned answer in place of an object.
#[derive(Clone, Debug)]
pub struct Trouble {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Value,
}

impl Trouble {
    /// An answer with this HTTP status, such as 429.
    #[must_use]
    pub fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: json!({ "error": { "type": "api_error" } }),
        }
    }

    /// The answer to a restricted key without that permission, such as `rak_customer_read`.
    #[must_use]
    pub fn forbidden(permission: &str) -> Self {
        let message = format!(
            "The provided key 'rk_test_*********4711' does not have the required permissions for this endpoint on account \
             'acct_1Litestripe'. Having the '{permission}' permission would allow this request to continue."
        );
        Self {
            body: json!({ "error": { "message": message, "type": "invalid_request_error" } }),
            ..Self::status(403)
        }
    }

    /// Adds a header, such as `Retry-After`.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// Delays the answers to requests for a path until it is dropped. The answers contain what the stub
/// had when the requests arrived.
#[must_use]
pub struct Hold {
    path: &'static str,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    released: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    subscriptions: BTreeMap<String, Value>,
    customers: BTreeMap<String, Value>,
    checkout_sessions: Vec<Value>,
    endpoints: Endpoints,
    /// Events, each with whether every endpoint accepted it.
    events: Vec<(Value, bool)>,
    /// Whole events of the second version, which thin events announce.
    v2_events: BTreeMap<String, Value>,
    /// The connected accounts of objects, by the object's id. An object that is not listed is found
    /// whatever the request's `Stripe-Context`.
    accounts: BTreeMap<String, String>,
    /// The key that is accepted in place of [`API_KEY`].
    key: Option<String>,
    /// The `Date` of all answers, in place of the time.
    date: Option<String>,
    troubles: Vec<(&'static str, Trouble)>,
    /// Answers to all requests with that path.
    refusals: BTreeMap<&'static str, Trouble>,
    held: Vec<&'static str>,
    requests: Vec<Request>,
}

impl Api {
    /// Starts a stub without any object.
    pub async fn start() -> Self {
        Self::start_with(true).await
    }

    /// Starts a stub that sends no `Date` header, like a proxy that removes it.
    pub async fn start_without_date() -> Self {
        Self::start_with(false).await
    }

    async fn start_with(date: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::<Shared>::default();
        let mut server = JoinSet::new();
        server.spawn(serve(listener, Arc::clone(&shared), date));
        Self {
            url: format!("http://{address}"),
            shared,
            _server: server,
        }
    }

    /// The value for `STRIPE_API_BASE`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Adds a subscription, or replaces it.
    pub fn put_subscription(&self, object: Value) {
        let id = text(&object, "id");
        self.shared.state().subscriptions.insert(id, object);
    }

    /// Adds a customer, or replaces it.
    pub fn put_customer(&self, object: Value) {
        let id = text(&object, "id");
        self.shared.state().customers.insert(id, object);
    }

    /// Adds a Checkout Session, or replaces it.
    pub fn put_checkout_session(&self, object: Value) {
        let mut state = self.shared.state();
        let sessions = &mut state.checkout_sessions;
        sessions.retain(|session| session["id"] != object["id"]);
        sessions.push(object);
    }

    /// Adds an event. `delivered` is whether every endpoint accepted it.
    pub fn put_event(&self, object: Value, delivered: bool) {
        self.shared.state().events.push((object, delivered));
    }

    /// Adds the whole event that a thin event announces: [`Notification::whole`].
    ///
    /// [`Notification::whole`]: super::Notification::whole
    pub fn put_v2_event(&self, object: Value) {
        let id = text(&object, "id");
        self.shared.state().v2_events.insert(id, object);
    }

    /// The endpoints that it delivers to, in the order of their creation.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.shared.state().endpoints.all().to_vec()
    }

    /// Changes fields of an endpoint, or adds one that somebody else made, as Stripe's API would show
    /// it: a `webhook_endpoint` or a `v2.core.event_destination`.
    pub fn put_endpoint(&self, id: &str, changes: &Value) {
        self.shared.state().endpoints.put(id, changes);
    }

    /// Forgets the idempotency keys of earlier requests, as Stripe does after a day.
    pub fn forget_idempotency_keys(&self) {
        self.shared.state().endpoints.forget_keys();
    }

    /// Makes the object with that id one of a connected account: without the account's
    /// `Stripe-Context` it is not found.
    pub fn assign(&self, id: &str, account: &str) {
        let mut state = self.shared.state();
        state.accounts.insert(id.to_owned(), account.to_owned());
    }

    /// Stops the clock that dates the answers, at this second (Unix time).
    ///
    /// # Panics
    /// When it is no valid time.
    pub fn stop_clock(&self, second: i64) {
        let at = OffsetDateTime::from_unix_timestamp(second).expect("it is a valid time");
        let date = at.format(format_description!(
            "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
        ));
        self.shared.state().date = Some(date.expect("it has all these parts"));
    }

    /// Lets the clock that dates the answers run again.
    pub fn resume_clock(&self) {
        self.shared.state().date = None;
    }

    /// Plans the answer to the next request with `path` in its method and path (`POST /v1/…`).
    /// Several calls plan several requests.
    pub fn answer_next(&self, path: &'static str, trouble: Trouble) {
        self.shared.state().troubles.push((path, trouble));
    }

    /// Plans the answer to all requests with `path` in their method and path.
    pub fn refuse(&self, path: &'static str, trouble: Trouble) {
        self.shared.state().refusals.insert(path, trouble);
    }

    /// Accepts this key from now on, and no other.
    pub fn set_key(&self, key: &str) {
        self.shared.state().key = Some(key.to_owned());
    }

    /// Ends all [`Self::refuse`].
    pub fn refuse_nothing(&self) {
        self.shared.state().refusals.clear();
    }

    /// Delays the answers to requests with `path` in their method and path.
    pub fn hold(&self, path: &'static str) -> Hold {
        self.shared.state().held.push(path);
        Hold {
            path,
            shared: Arc::clone(&self.shared),
        }
    }

    /// The requests so far with `path` in their method and path.
    pub fn requests(&self, path: &str) -> Vec<Request> {
        let state = self.shared.state();
        state
            .requests
            .iter()
            .filter(|request| format!("{} {}", request.method, request.path).contains(path))
            .cloned()
            .collect()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(index) = state.held.iter().position(|held| *held == self.path) {
            state.held.remove(index);
        }
        drop(state);
        self.shared.released.send_replace(());
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Records a request and answers it, after the end of any [`Hold`] on its path.
    async fn answer(&self, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        let mut released = self.released.subscribe();
        let (head, body) = request.into_parts();
        // Fails when the worker is killed in the middle of a request.
        let body = body
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes);
        let body = String::from_utf8_lossy(&body.unwrap_or_default()).into_owned();
        let path = head.uri.to_string();
        let named = format!("{} {path}", head.method);
        let headers = head.headers.iter();
        let headers = headers.map(|(name, value)| {
            (
                name.to_string(),
                String::from_utf8_lossy(value.as_bytes()).into(),
            )
        });
        let headers: BTreeMap<String, String> = headers.collect();
        let request = Request {
            at: Instant::now(),
            method: head.method.to_string(),
            path: path.clone(),
            headers: headers.clone(),
            body,
        };
        let mut answer = {
            let mut state = self.state();
            state.requests.push(request.clone());
            let key = state.key.as_deref().unwrap_or(API_KEY);
            let authorized = headers.get("authorization") == Some(&format!("Bearer {key}"));
            match state.take_trouble(&named) {
                Some(trouble) => response(&trouble, &trouble.body),
                None if !authorized => response(&Trouble::status(401), &json!({ "error": {} })),
                None => match state.endpoints.answer(&request) {
                    Some((status, body)) => response(&Trouble::status(status), &body),
                    None if head.method != Method::GET => {
                        response(&Trouble::status(405), &Value::Null)
                    }
                    None => state.look_up(&path, &headers),
                },
            }
        };
        while self.state().held.iter().any(|held| named.contains(held)) {
            // The sender lives as long as `self`.
            let _ = released.changed().await;
        }
        if let Some(date) = &self.state().date {
            let date = date.parse().expect("a date is a header's value");
            answer.headers_mut().insert("Date", date);
        }
        answer
    }
}

impl State {
    fn take_trouble(&mut self, path: &str) -> Option<Trouble> {
        let planned = self.troubles.iter();
        match planned
            .clone()
            .position(|(wanted, _)| path.contains(wanted))
        {
            Some(index) => Some(self.troubles.remove(index).1),
            None => {
                let mut refusals = self.refusals.iter();
                let refusal = refusals.find(|(wanted, _)| path.contains(**wanted));
                refusal.map(|(_, trouble)| trouble.clone())
            }
        }
    }

    fn look_up(&self, path: &str, headers: &BTreeMap<String, String>) -> Response<Full<Bytes>> {
        let url = reqwest::Url::parse(&format!("http://stub{path}")).expect("a request has a path");
        let query: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        // Stripe, "API v2 overview": its requests must name a version.
        if url.path().starts_with("/v2/") && !headers.contains_key("stripe-version") {
            return response(&Trouble::status(400), &json!({ "error": {} }));
        }
        // The context of a connected account of an organisation is a path to it.
        let context = headers.get("stripe-context");
        let context = context.and_then(|context| context.rsplit('/').next());
        let is_visible = |object: &&Value| {
            let account = object["id"].as_str().and_then(|id| self.accounts.get(id));
            account.is_none_or(|account| context == Some(account))
        };
        let list = |mut objects: Vec<&Value>| {
            objects.retain(is_visible);
            page(objects, url.path(), &query)
        };
        let found = match url.path() {
            "/v1/subscriptions" => list(self.subscriptions(&query)).map(|mut page| {
                let listed = page["data"].as_array_mut();
                listed.into_iter().flatten().for_each(cut_items);
                page
            }),
            "/v1/subscription_items" => one(&query, "subscription")
                .and_then(|id| self.subscriptions.get(id))
                .filter(is_visible)
                .and_then(items)
                .and_then(|items| part(&items, url.path(), &query)),
            "/v1/events" => list(self.events(&query)),
            "/v1/checkout/sessions" => list(self.checkout_sessions(&query)),
            path => self
                .object(path)
                .filter(is_visible)
                .cloned()
                .map(|mut object| {
                    cut_items(&mut object);
                    object
                }),
        };
        match found {
            Some(object) => response(&Trouble::status(200), &object),
            None => response(
                &Trouble::status(404),
                &json!({ "error": { "code": "resource_missing", "message": "none" } }),
            ),
        }
    }

    fn object(&self, path: &str) -> Option<&Value> {
        let (folder, id) = path.rsplit_once('/')?;
        let events = || self.events.iter().map(|(event, _)| event);
        match folder {
            "/v1/subscriptions" => self.subscriptions.get(id),
            "/v1/customers" => self.customers.get(id),
            "/v1/checkout/sessions" => self
                .checkout_sessions
                .iter()
                .find(|object| object["id"] == id),
            "/v1/events" => events().find(|event| event["id"] == id),
            "/v2/core/events" => self.v2_events.get(id),
            _ => None,
        }
    }

    fn checkout_sessions(&self, query: &[(String, String)]) -> Vec<&Value> {
        let wanted = one(query, "subscription");
        self.checkout_sessions
            .iter()
            .filter(|session| session["subscription"].as_str() == wanted)
            .collect()
    }

    /// Stripe, "List subscriptions": `status` is `all`, `ended` or one status; without it all
    /// subscriptions but the canceled are listed. Those of a test clock never are.
    fn subscriptions(&self, query: &[(String, String)]) -> Vec<&Value> {
        let is_wanted = |status: &str| match one(query, "status") {
            None => status != "canceled",
            Some("all") => true,
            Some("ended") => matches!(status, "canceled" | "incomplete_expired"),
            Some(wanted) => status == wanted,
        };
        let listed = self
            .subscriptions
            .values()
            .filter(|object| object["test_clock"].is_null());
        listed
            .filter(|object| object["status"].as_str().is_some_and(is_wanted))
            .collect()
    }

    /// Stripe, "List all events".
    fn events(&self, query: &[(String, String)]) -> Vec<&Value> {
        let types: Vec<&str> = all(query, "types[]").collect();
        let since: i64 = one(query, "created[gte]")
            .and_then(|since| since.parse().ok())
            .unwrap_or(0);
        let until: i64 = one(query, "created[lte]")
            .and_then(|until| until.parse().ok())
            .unwrap_or(i64::MAX);
        let delivered = one(query, "delivery_success").map(|text| text == "true");
        let wanted = self.events.iter().filter(|(event, was_delivered)| {
            let name = event["type"].as_str().unwrap_or_default();
            (types.is_empty() || types.contains(&name))
                && event["created"]
                    .as_i64()
                    .is_some_and(|created| (since..=until).contains(&created))
                && delivered.is_none_or(|delivered| delivered == *was_delivered)
        });
        wanted.map(|(event, _)| event).collect()
    }
}

fn all<'a>(query: &'a [(String, String)], name: &str) -> impl Iterator<Item = &'a str> {
    query
        .iter()
        .filter(move |(given, _)| given == name)
        .map(|(_, value)| value.as_str())
}

fn one<'a>(query: &'a [(String, String)], name: &str) -> Option<&'a str> {
    all(query, name).next()
}

/// Makes a page of a list, newest first; `None` if `starting_after` is not in the list. Stripe,
/// "Pagination".
fn page(mut objects: Vec<&Value>, url: &str, query: &[(String, String)]) -> Option<Value> {
    objects.sort_by_key(|object| {
        (
            std::cmp::Reverse(object["created"].as_i64()),
            object["id"].to_string(),
        )
    });
    part(&objects, url, query)
}

/// Makes a page of a list whose order is known.
fn part(objects: &[&Value], url: &str, query: &[(String, String)]) -> Option<Value> {
    let limit = one(query, "limit")
        .and_then(|limit| limit.parse().ok())
        .unwrap_or(10);
    let first = match one(query, "starting_after") {
        Some(after) => objects.iter().position(|object| object["id"] == after)? + 1,
        None => 0,
    };
    let data: Vec<_> = objects.iter().skip(first).take(limit).collect();
    let has_more = objects.len() > first + data.len();
    Some(json!({ "object": "list", "url": url, "has_more": has_more, "data": data }))
}

/// Returns the items of a subscription, in its order. Stripe, "List all subscription items".
fn items(subscription: &Value) -> Option<Vec<&Value>> {
    Some(subscription["items"]["data"].as_array()?.iter().collect())
}

/// Cuts a subscription's items to their first page, as in Stripe's answers.
fn cut_items(object: &mut Value) {
    let Some(items) = object.get_mut("items") else {
        return;
    };
    if let Some(data) = items["data"].as_array_mut()
        && data.len() > ITEMS_ON_FIRST_PAGE
    {
        data.truncate(ITEMS_ON_FIRST_PAGE);
        items["has_more"] = true.into();
    }
}

/// Makes a response. Hyper adds the `Date` header, unless switched off in `serve`.
fn response(trouble: &Trouble, body: &Value) -> Response<Full<Bytes>> {
    let response = Response::builder()
        .status(trouble.status)
        .header("Content-Type", "application/json")
        .header("Request-Id", "req_ofTheStub");
    let response = trouble
        .headers
        .iter()
        .fold(response, |response, (name, value)| {
            response.header(*name, value)
        });
    response
        .body(Full::new(body.to_string().into()))
        .expect("tests ask for headers that can be sent")
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, date: bool) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        let answer = service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(shared.answer(request).await) }
        });
        connections.spawn(async move {
            // Fails when the worker is killed in the middle of a request.
            let _ = http1::Builder::new()
                .auto_date_header(date)
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

fn text(object: &Value, field: &str) -> String {
    object[field]
        .as_str()
        .expect("Stripe's objects have ids")
        .to_owned()
}
