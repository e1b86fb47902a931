//! The endpoints to which Stripe delivers events.
//!
//! Owns their two APIs: webhook endpoints (`/v1/`), which get snapshot events, and event
//! destinations (`/v2/`), which get thin ones. May not know which endpoint is wanted, nor where its
//! secret is kept.
//!
//! Stripe returns a signing secret in its answer to the creation alone, and neither API can change
//! one. The creation's idempotency key is in the endpoint's metadata: until Stripe forgets the key,
//! the same request gets the same answer once more, with the secret.

use std::collections::BTreeMap;
use std::fmt;

use litestripe_contract::event::THIN_PREFIX;
use litestripe_domain::event::api;
use reqwest::Method;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::stripe::api::{Answer, ApiError, Call, Content, StripeApi, VERSION};
use crate::stripe::path::{EVENT_DESTINATIONS, EVENTS, WEBHOOK_ENDPOINTS};

/// The key in an endpoint's metadata that marks it as made by Litestripe. Its value is the
/// idempotency key of the creation.
const MARKER: &str = "litestripe";
const MARKER_FIELD: &str = "metadata[litestripe]";

/// The key in the metadata of a webhook endpoint for connected accounts: Stripe does not say for
/// which accounts one is.
const SOURCE: &str = "litestripe_events_from";
const SOURCE_FIELD: &str = "metadata[litestripe_events_from]";

/// Stripe's name for connected accounts. Stripe: "Event destinations", `events_from`.
const ACCOUNTS: &str = "@accounts";

const NAME: &str = "Litestripe";

/// The most pages of a list of event destinations. Stripe allows 16 endpoints per account.
const PAGES_MAX: usize = 100;

/// What events contain: the object, or only its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Payload {
    Snapshot,
    Thin,
}

impl Payload {
    /// What the names of its event types begin with.
    pub(crate) fn type_prefix(self) -> &'static str {
        match self {
            Self::Snapshot => "",
            Self::Thin => THIN_PREFIX,
        }
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snapshot => "snapshot",
            Self::Thin => "thin",
        })
    }
}

/// Whose events an endpoint gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Source {
    Account,
    ConnectedAccounts,
}

impl Source {
    fn new(is_connect: bool) -> Self {
        if is_connect {
            Self::ConnectedAccounts
        } else {
            Self::Account
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Account => "account",
            Self::ConnectedAccounts => "connected accounts",
        })
    }
}

/// An endpoint at Stripe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Endpoint {
    pub id: String,
    pub url: String,
    pub payload: Payload,
    pub source: Source,
    pub types: Vec<String>,
    /// The version in which snapshots are rendered. `None` for the account's default, and for thin
    /// events.
    pub api_version: Option<String>,
    pub enabled: bool,
    pub livemode: bool,
    /// Seconds since the Unix epoch.
    pub created: i64,
    /// The idempotency key with which Litestripe created it. `None` if somebody else did.
    #[serde(skip)]
    pub marker: Option<String>,
}

/// An endpoint to create.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Creation<'a> {
    pub url: &'a str,
    pub payload: Payload,
    pub source: Source,
    pub types: &'a [String],
    /// A new one for each endpoint, and the same one to get the answer to an earlier creation again.
    pub idempotency_key: &'a str,
}

/// A created endpoint and its signing secret. `None` if Stripe does not show it again.
#[derive(Debug)]
pub(crate) struct Created {
    pub endpoint: Endpoint,
    pub secret: Option<SecretString>,
}

impl StripeApi {
    /// Lists the endpoints of one payload style. Stripe: "List all webhook endpoints", "List event
    /// destinations". The second also lists destinations of snapshots, which the first has too, and
    /// those that are no URL.
    pub(crate) async fn endpoints(&self, payload: Payload) -> Result<Vec<Endpoint>, ApiError> {
        match payload {
            Payload::Snapshot => {
                let listed = self.list(WEBHOOK_ENDPOINTS, &[], api::page, None, None);
                let (objects, answer) = listed.await?;
                objects
                    .iter()
                    .map(|object| {
                        let endpoint = serde_json::from_str::<WebhookEndpoint>(object.raw.get());
                        Ok(endpoint.map_err(|_| unreadable(&answer))?.read().endpoint)
                    })
                    .collect()
            }
            Payload::Thin => self.event_destinations().await,
        }
    }

    async fn event_destinations(&self) -> Result<Vec<Endpoint>, ApiError> {
        let mut endpoints = Vec::new();
        let mut query = vec![("include[0]".to_owned(), "webhook_endpoint.url".to_owned())];
        for _ in 0..PAGES_MAX {
            let fields: Vec<_> = query
                .iter()
                .map(|(name, value)| (&**name, &**value))
                .collect();
            let listed = Call {
                query: &fields,
                ..Call::new(Method::GET, EVENT_DESTINATIONS, Content::None)
            };
            let answer = self.call(&listed).await?;
            let page: DestinationPage =
                serde_json::from_slice(&answer.body).map_err(|_| unreadable(&answer))?;
            let thin = page.data.into_iter().filter(|one| {
                one.event_payload == "thin" && one.destination_type == "webhook_endpoint"
            });
            for destination in thin {
                let created = destination.read().ok_or_else(|| unreadable(&answer))?;
                endpoints.push(created.endpoint);
            }
            let Some(next) = page.next_page_url else {
                return Ok(endpoints);
            };
            query = match next.split_once('?') {
                Some((path, query)) if path == EVENT_DESTINATIONS.to_string() => {
                    url::form_urlencoded::parse(query.as_bytes())
                        .into_owned()
                        .collect()
                }
                _ => return Err(answer.unusable("its next page is elsewhere")),
            };
        }
        Ok(endpoints)
    }

    /// Creates an endpoint. Stripe: "Create a webhook endpoint", "Create an event destination".
    pub(crate) async fn create_endpoint(
        &self,
        creation: Creation<'_>,
    ) -> Result<Created, ApiError> {
        match creation.payload {
            Payload::Snapshot => {
                let fields = creation.fields();
                let created = Call::new(Method::POST, WEBHOOK_ENDPOINTS, Content::Form(&fields));
                let answer = self.call(&creation.keyed(created)).await?;
                webhook_endpoint(&answer)
            }
            Payload::Thin => {
                let value = creation.value();
                let created = Call::new(Method::POST, EVENT_DESTINATIONS, Content::Json(&value));
                let answer = self.call(&creation.keyed(created)).await?;
                event_destination(&answer)
            }
        }
    }

    /// Sets the types of events that an endpoint gets. Stripe: "Update a webhook endpoint", "Update
    /// an event destination".
    pub(crate) async fn set_types(
        &self,
        endpoint: &Endpoint,
        types: &[String],
    ) -> Result<(), ApiError> {
        match endpoint.payload {
            Payload::Snapshot => {
                let path = WEBHOOK_ENDPOINTS.of(&endpoint.id);
                let fields: Vec<_> = enabled_events(types).collect();
                self.call(&Call::new(Method::POST, path, Content::Form(&fields)))
                    .await?;
            }
            Payload::Thin => {
                let path = EVENT_DESTINATIONS.of(&endpoint.id);
                let value = json!({ "enabled_events": types });
                self.call(&Call::new(Method::POST, path, Content::Json(&value)))
                    .await?;
            }
        }
        Ok(())
    }

    /// Counts, up to a page of them, the events of `types` created from `since` to `until` (seconds
    /// since the Unix epoch) that at least one endpoint has not accepted yet. Stripe: "List all
    /// events".
    pub(crate) async fn undelivered_events(
        &self,
        types: &[&str],
        since: i64,
        until: i64,
    ) -> Result<usize, ApiError> {
        let (since, until) = (since.to_string(), until.to_string());
        let mut query = vec![
            ("limit", "100"),
            ("created[gte]", since.as_str()),
            ("created[lte]", until.as_str()),
            ("delivery_success", "false"),
        ];
        query.extend(types.iter().map(|name| ("types[]", *name)));
        let listed = Call {
            query: &query,
            ..Call::new(Method::GET, EVENTS, Content::None)
        };
        let answer = self.call(&listed).await?;
        let page = api::page(&answer.body).ok_or_else(|| answer.unusable("it is no list"))?;
        Ok(page.objects.len())
    }

    /// Enables or disables an endpoint. Stripe does not send later what happens while it is
    /// disabled.
    pub(crate) async fn set_enabled(
        &self,
        endpoint: &Endpoint,
        enabled: bool,
    ) -> Result<(), ApiError> {
        match endpoint.payload {
            Payload::Snapshot => {
                let path = WEBHOOK_ENDPOINTS.of(&endpoint.id);
                let fields = [("disabled", if enabled { "false" } else { "true" })];
                self.call(&Call::new(Method::POST, path, Content::Form(&fields)))
                    .await?;
            }
            Payload::Thin => {
                let action = if enabled { "enable" } else { "disable" };
                let path = EVENT_DESTINATIONS.of(&endpoint.id).action(action);
                let nothing = json!({});
                self.call(&Call::new(Method::POST, path, Content::Json(&nothing)))
                    .await?;
            }
        }
        Ok(())
    }
}

impl<'a> Creation<'a> {
    fn fields(&self) -> Vec<(&'a str, &'a str)> {
        let mut fields = vec![
            ("url", self.url),
            ("api_version", VERSION),
            ("description", NAME),
            (MARKER_FIELD, self.idempotency_key),
        ];
        if self.source == Source::ConnectedAccounts {
            fields.push(("connect", "true"));
            fields.push((SOURCE_FIELD, ACCOUNTS));
        }
        fields.extend(enabled_events(self.types));
        fields
    }

    fn value(&self) -> serde_json::Value {
        let from = match self.source {
            Source::Account => "@self",
            Source::ConnectedAccounts => ACCOUNTS,
        };
        json!({
            "name": NAME,
            "type": "webhook_endpoint",
            "webhook_endpoint": { "url": self.url },
            "event_payload": "thin",
            "events_from": [from],
            "enabled_events": self.types,
            "metadata": { MARKER: self.idempotency_key },
            "include": ["webhook_endpoint.signing_secret", "webhook_endpoint.url"],
        })
    }

    fn keyed(&self, call: Call<'a>) -> Call<'a> {
        Call {
            idempotency_key: Some(self.idempotency_key),
            ..call
        }
    }
}

fn enabled_events(types: &[String]) -> impl Iterator<Item = (&str, &str)> {
    types.iter().map(|name| ("enabled_events[]", name.as_str()))
}

fn unreadable(answer: &Answer) -> ApiError {
    answer.unusable("it is no endpoint")
}

fn webhook_endpoint(answer: &Answer) -> Result<Created, ApiError> {
    let endpoint = serde_json::from_slice::<WebhookEndpoint>(&answer.body);
    Ok(endpoint.map_err(|_| unreadable(answer))?.read())
}

fn event_destination(answer: &Answer) -> Result<Created, ApiError> {
    let destination = serde_json::from_slice::<EventDestination>(&answer.body).ok();
    destination
        .and_then(EventDestination::read)
        .ok_or_else(|| unreadable(answer))
}

/// Stripe: "The webhook endpoint object".
#[derive(Deserialize)]
struct WebhookEndpoint {
    id: String,
    url: String,
    enabled_events: Vec<String>,
    api_version: Option<String>,
    status: String,
    livemode: bool,
    created: i64,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    application: Option<String>,
    secret: Option<String>,
}

impl WebhookEndpoint {
    fn read(mut self) -> Created {
        let marker = self.metadata.remove(MARKER);
        let is_connect = match marker {
            Some(_) => self
                .metadata
                .get(SOURCE)
                .is_some_and(|from| from == ACCOUNTS),
            // Endpoints for connected accounts have an application, whoever made them.
            None => self.application.is_some(),
        };
        Created {
            endpoint: Endpoint {
                id: self.id,
                url: self.url,
                payload: Payload::Snapshot,
                source: Source::new(is_connect),
                types: self.enabled_events,
                api_version: self.api_version,
                enabled: self.status == "enabled",
                livemode: self.livemode,
                created: self.created,
                marker,
            },
            secret: self.secret.map(SecretString::from),
        }
    }
}

#[derive(Deserialize)]
struct DestinationPage {
    data: Vec<EventDestination>,
    next_page_url: Option<String>,
}

/// Stripe: "The event destination object".
#[derive(Deserialize)]
struct EventDestination {
    id: String,
    #[serde(rename = "type")]
    destination_type: String,
    event_payload: String,
    enabled_events: Vec<String>,
    events_from: Option<Vec<String>>,
    status: String,
    livemode: bool,
    created: String,
    metadata: Option<BTreeMap<String, String>>,
    webhook_endpoint: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    url: Option<String>,
    signing_secret: Option<String>,
}

impl EventDestination {
    fn read(self) -> Option<Created> {
        let target = self.webhook_endpoint?;
        let created = OffsetDateTime::parse(&self.created, &Rfc3339).ok()?;
        let is_connect = self
            .events_from
            .is_some_and(|from| from.iter().any(|from| from == ACCOUNTS));
        Some(Created {
            endpoint: Endpoint {
                id: self.id,
                url: target.url?,
                payload: Payload::Thin,
                source: Source::new(is_connect),
                types: self.enabled_events,
                api_version: None,
                enabled: self.status == "enabled",
                livemode: self.livemode,
                created: created.unix_timestamp(),
                marker: self
                    .metadata
                    .and_then(|mut metadata| metadata.remove(MARKER)),
            },
            secret: target.signing_secret.map(SecretString::from),
        })
    }
}
