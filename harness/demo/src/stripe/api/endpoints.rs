//! The endpoints to which the stub's Stripe delivers: webhook endpoints (`/v1/`) and event
//! destinations (`/v2/`).
//!
//! Owns what their APIs accept, that a secret is shown in the answer to a creation alone, and that a
//! repeated idempotency key gets the same answer again. Does not deliver: tests do, to the endpoints
//! that are enabled, with their secrets.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Request;
use crate::stripe::unique;

const WEBHOOK_ENDPOINTS: &str = "/v1/webhook_endpoints";
const EVENT_DESTINATIONS: &str = "/v2/core/event_destinations";

/// Entries on a page of event destinations, whatever the request's limit, so that tests have several
/// pages.
const PAGE_SIZE: usize = 2;

/// An endpoint, with the secret that Stripe signs its deliveries with.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub id: String,
    pub secret: String,
    /// As Stripe's API shows it after the creation.
    pub object: Value,
}

impl Endpoint {
    pub fn is_enabled(&self) -> bool {
        self.object["status"] == "enabled"
    }

    /// The types that it gets.
    pub fn types(&self) -> Vec<&str> {
        let types = self.object["enabled_events"].as_array();
        types
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    }
}

#[derive(Default)]
pub(super) struct Endpoints {
    all: Vec<Endpoint>,
    /// The requests with an idempotency key, and how they were answered.
    answered: BTreeMap<String, (String, Value)>,
}

impl Endpoints {
    pub(super) fn all(&self) -> &[Endpoint] {
        &self.all
    }

    pub(super) fn put(&mut self, id: &str, changes: &Value) {
        if !self.all.iter().any(|endpoint| endpoint.id == id) {
            self.add(id.to_owned(), json!({}));
        }
        let found = self.all.iter_mut().find(|endpoint| endpoint.id == id);
        let object = found.and_then(|endpoint| endpoint.object.as_object_mut());
        let changes = changes.as_object().into_iter().flatten();
        let changes = changes.map(|(name, value)| (name.clone(), value.clone()));
        object.expect("it is an object").extend(changes);
    }

    pub(super) fn forget_keys(&mut self) {
        self.answered.clear();
    }

    /// Answers a request about endpoints with a status and a body; `None` for another.
    pub(super) fn answer(&mut self, request: &Request) -> Option<(u16, Value)> {
        let path = request.path.split('?').next().unwrap_or_default();
        let (folder, rest) = [WEBHOOK_ENDPOINTS, EVENT_DESTINATIONS]
            .iter()
            .find_map(|folder| Some((*folder, path.strip_prefix(folder)?)))?;
        let is_v1 = folder == WEBHOOK_ENDPOINTS;
        let answer = match (request.method.as_str(), rest.trim_start_matches('/')) {
            ("GET", "") if is_v1 => Ok(self.webhook_endpoints()),
            ("GET", "") => Ok(self.event_destinations(&request.path)),
            ("POST", "") => self.create_once(request, is_v1),
            ("POST", rest) => self.change(request, rest),
            _ => Err("unknown method".to_owned()),
        };
        Some(match answer {
            Ok(body) => (200, body),
            Err(message) => (400, json!({ "error": { "message": message } })),
        })
    }

    fn webhook_endpoints(&self) -> Value {
        let listed = self.objects("webhook_endpoint");
        let listed: Vec<_> = listed.rev().collect();
        json!({ "object": "list", "url": WEBHOOK_ENDPOINTS, "has_more": false, "data": listed })
    }

    /// Stripe, "API v2": its lists link to the next page.
    fn event_destinations(&self, path: &str) -> Value {
        let with_url = path.contains("webhook_endpoint.url");
        let start = path
            .split("page=")
            .nth(1)
            .and_then(|page| page.parse().ok());
        let start: usize = start.unwrap_or(0);
        let all: Vec<_> = self.objects("v2.core.event_destination").collect();
        let mut listed: Vec<_> = all
            .iter()
            .skip(start)
            .take(PAGE_SIZE)
            .map(|one| (*one).clone())
            .collect();
        for one in listed.iter_mut().filter(|_| !with_url) {
            one["webhook_endpoint"] = Value::Null;
        }
        let next = start + PAGE_SIZE;
        let next = (next < all.len())
            .then(|| format!("{EVENT_DESTINATIONS}?include[0]=webhook_endpoint.url&page={next}"));
        json!({ "data": listed, "next_page_url": next, "previous_page_url": null })
    }

    fn objects(&self, kind: &str) -> impl DoubleEndedIterator<Item = &Value> {
        let objects = self.all.iter().map(|endpoint| &endpoint.object);
        objects.filter(move |object| object["object"] == kind)
    }

    /// Stripe, "Idempotent requests".
    fn create_once(&mut self, request: &Request, is_v1: bool) -> Result<Value, String> {
        let key = request.headers.get("idempotency-key");
        if let Some((body, answer)) = key.and_then(|key| self.answered.get(key)) {
            return if *body == request.body {
                Ok(answer.clone())
            } else {
                Err(
                    "Keys for idempotent requests can only be used with the same parameters"
                        .to_owned(),
                )
            };
        }
        let object = if is_v1 {
            webhook_endpoint(&request.body)?
        } else {
            event_destination(&request.body)?
        };
        let id = format!("{}{}", if is_v1 { "we_" } else { "ed_test_" }, unique(24));
        let Endpoint { secret, object, .. } = self.add(id, object);
        let mut answer = object.clone();
        let includes = request.body.contains("webhook_endpoint.signing_secret");
        if is_v1 {
            answer["secret"] = json!(secret);
        } else if includes {
            answer["webhook_endpoint"]["signing_secret"] = json!(secret);
        }
        if let Some(key) = key {
            let answered = (request.body.clone(), answer.clone());
            self.answered.insert(key.clone(), answered);
        }
        Ok(answer)
    }

    fn add(&mut self, id: String, mut object: Value) -> &Endpoint {
        object["id"] = json!(id);
        self.all.push(Endpoint {
            id,
            secret: format!("whsec_{}", unique(32)),
            object,
        });
        self.all.last().expect("one was pushed just now")
    }

    /// Updates, enables or disables an endpoint.
    fn change(&mut self, request: &Request, rest: &str) -> Result<Value, String> {
        let (id, action) = rest.split_once('/').unwrap_or((rest, ""));
        let found = self.all.iter_mut().find(|endpoint| endpoint.id == id);
        let object = &mut found.ok_or("No such endpoint")?.object;
        let is_v1 = object["object"] == "webhook_endpoint";
        match action {
            "enable" | "disable" if !is_v1 => object["status"] = json!(format!("{action}d")),
            "" if is_v1 => {
                for (name, value) in form(&request.body) {
                    match name.as_str() {
                        "enabled_events" => object["enabled_events"] = value,
                        "disabled" if value == "true" => object["status"] = json!("disabled"),
                        "disabled" => object["status"] = json!("enabled"),
                        name => return Err(format!("Received unknown parameter: {name}")),
                    }
                }
            }
            "" => {
                let body: Value =
                    serde_json::from_str(&request.body).map_err(|error| error.to_string())?;
                object["enabled_events"] = body["enabled_events"].clone();
            }
            _ => return Err(format!("unknown action {action}")),
        }
        Ok(object.clone())
    }
}

/// Stripe, "Create a webhook endpoint".
fn webhook_endpoint(body: &str) -> Result<Value, String> {
    let fields = form(body);
    let mut object = json!({
        "object": "webhook_endpoint",
        "api_version": null,
        "application": null,
        "created": OffsetDateTime::now_utc().unix_timestamp(),
        "description": null,
        "livemode": false,
        "metadata": {},
        "status": "enabled",
    });
    for (name, value) in fields {
        match name.as_str() {
            "connect" => object["application"] = json!("ca_ofTheStub"),
            "url" | "api_version" | "description" | "metadata" | "enabled_events" => {
                object[name] = value
            }
            name => return Err(format!("Received unknown parameter: {name}")),
        }
    }
    check(&object["url"], &object["enabled_events"])?;
    Ok(object)
}

/// Stripe, "Create an event destination".
fn event_destination(body: &str) -> Result<Value, String> {
    let body: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
    let created = OffsetDateTime::now_utc().format(&Rfc3339);
    let mut object = json!({
        "object": "v2.core.event_destination",
        "created": created.expect("RFC 3339 can write it"),
        "livemode": false,
        "status": "enabled",
    });
    for (name, value) in body.as_object().into_iter().flatten() {
        match name.as_str() {
            "include" => {}
            "name" | "type" | "event_payload" | "events_from" | "enabled_events" | "metadata"
            | "webhook_endpoint" => object[name] = value.clone(),
            name => return Err(format!("unknown field {name}")),
        }
    }
    check(
        &object["webhook_endpoint"]["url"],
        &object["enabled_events"],
    )?;
    Ok(object)
}

/// Types are listed one by one, without wildcards.
fn check(url: &Value, types: &Value) -> Result<(), String> {
    if url.as_str().is_none_or(|url| !url.starts_with("http")) {
        return Err("Invalid URL".to_owned());
    }
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    let is_type = |one: &Value| one.as_str().is_some_and(|name| !name.contains('*'));
    if types.is_empty() || !types.iter().all(is_type) {
        return Err("Invalid enabled_events".to_owned());
    }
    Ok(())
}

/// Reads a form: lists (`a[]=1`) and maps (`a[b]=1`) one level deep.
fn form(body: &str) -> Map<String, Value> {
    let url = reqwest::Url::parse(&format!("http://stub/?{body}")).expect("a form is a query");
    let mut fields = Map::new();
    for (name, value) in url.query_pairs() {
        match name.trim_end_matches(']').split_once('[') {
            None => drop(fields.insert(name.into_owned(), json!(value))),
            Some((list, "")) => {
                let list = fields.entry(list).or_insert_with(|| json!([]));
                list.as_array_mut()
                    .expect("all are lists")
                    .push(json!(value));
            }
            Some((map, key)) => {
                let map = fields.entry(map).or_insert_with(|| json!({}));
                map[key] = json!(value);
            }
        }
    }
    fields
}
