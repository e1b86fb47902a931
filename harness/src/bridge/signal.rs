//! A signal as a subscriber receives it, and the checks on all signals together.
//!
//! Owns the checks that every test runs along the way. May not use the product's types for the
//! bodies, because it checks against the schemas that subscribers read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use async_nats::jetstream::Message;
use jsonschema::Validator;
use litestripe_entity::stripe_subscription;
use serde_json::{Map, Value, json};

use super::{headers, signal_fields};

/// The committed schemas by subject.
const SCHEMAS: [(&str, &str); 3] = [
    (
        "subscription.changed",
        include_str!("../../../docs/signals/subscription.changed.schema.json"),
    ),
    (
        "orphan.created",
        include_str!("../../../docs/signals/orphan.created.schema.json"),
    ),
    (
        "orphan.resolved",
        include_str!("../../../docs/signals/orphan.resolved.schema.json"),
    ),
];

/// A signal in the stream.
#[derive(Debug, Clone)]
pub struct Signal {
    /// Its sequence in `LITESTRIPE_SIGNALS`.
    pub sequence: u64,
    /// `subscription.changed`, `orphan.created` or `orphan.resolved`.
    pub subject: String,
    pub headers: BTreeMap<String, String>,
    pub body: Value,
}

impl Signal {
    /// Decodes a signal and checks it.
    ///
    /// # Panics
    /// When it violates its schema.
    pub(super) fn read(message: &Message) -> Self {
        let signal = Self {
            sequence: message
                .info()
                .expect("JetStream numbers its messages")
                .stream_sequence,
            subject: message.subject.to_string(),
            headers: headers(message),
            body: serde_json::from_slice(&message.payload).expect("a signal is JSON"),
        };
        signal.check_body();
        signal.check_headers();
        signal
    }

    /// The fields in `changed`.
    ///
    /// # Panics
    /// When it has no `changed`, like an orphan's signal.
    #[must_use]
    pub fn changed(&self) -> Vec<&str> {
        let changed = self.body["changed"]
            .as_array()
            .expect("a subscription's signal has `changed`");
        changed.iter().filter_map(Value::as_str).collect()
    }

    fn check_body(&self) {
        let schema = schema(&self.subject);
        let problems: Vec<_> = schema
            .validator
            .iter_errors(&self.body)
            .map(|error| error.to_string())
            .collect();
        assert!(
            problems.is_empty(),
            "{}: {problems:?}\n{:#}",
            self.subject,
            self.body
        );
        // JSON Schema accepts unknown fields, but every field should be documented.
        let fields: BTreeSet<_> = self
            .body
            .as_object()
            .expect("it is an object")
            .keys()
            .cloned()
            .collect();
        assert_eq!(
            fields, schema.fields,
            "{}: the fields differ from the documented ones",
            self.subject
        );
    }

    fn check_headers(&self) {
        let header = |name: &str| self.headers.get(name).map_or("", String::as_str);
        let entity = self
            .text("stripe_subscription_id")
            .filter(|_| self.subject == "subscription.changed");
        assert_eq!(header("ce-specversion"), "1.0");
        assert_eq!(header("ce-source"), "litestripe");
        assert_eq!(header("ce-type"), format!("litestripe.v1.{}", self.subject));
        assert_eq!(header("ce-datacontenttype"), "application/json");
        assert_eq!(header("ce-id"), header("Nats-Msg-Id"));
        assert_eq!(
            Some(header("ce-subject")),
            entity.or(self.text("orphan_id"))
        );
        assert_eq!(self.body["event"]["created"], header("ce-time"));
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.body[field].as_str()
    }
}

/// Selects the `subscription.changed` signals of one subscription.
#[must_use]
pub fn filter_by_subscription<'a>(signals: &'a [Signal], id: &str) -> Vec<&'a Signal> {
    let is_its = |signal: &&Signal| {
        signal.subject == "subscription.changed"
            && signal.text("stripe_subscription_id") == Some(id)
    };
    signals.iter().filter(is_its).collect()
}

/// Checks that the signals of each subscription follow from one another without a gap, and that no
/// signal occurs twice.
pub(super) fn check_chains(signals: &[Signal]) {
    let mut ids = BTreeSet::new();
    let mut rows: BTreeMap<&str, &Signal> = BTreeMap::new();
    let mut orphans: BTreeMap<&str, &str> = BTreeMap::new();
    for signal in signals {
        let id = signal
            .headers
            .get("Nats-Msg-Id")
            .expect("a signal has an id");
        assert!(ids.insert(id), "{id} occurs twice");
        match signal.text("orphan_id") {
            Some(orphan) => {
                let expected = if orphans.contains_key(orphan) {
                    "orphan.resolved"
                } else {
                    "orphan.created"
                };
                assert_eq!(signal.subject, expected, "the subject of {orphan}'s signal");
                orphans.insert(orphan, &signal.subject);
            }
            None => {
                let id = signal
                    .text("stripe_subscription_id")
                    .expect("the schema requires the id");
                let before = rows.get(id).copied();
                match before.filter(|before| before.body["revision"] == signal.body["revision"]) {
                    Some(before) => check_resent(before, signal),
                    None => check_step(before, signal),
                }
                rows.insert(id, signal);
            }
        }
    }
}

/// Checks the signal of a row that is sent again under its revision: the same row, and no change.
fn check_resent(before: &Signal, signal: &Signal) {
    for field in fields_of_rows() {
        assert_eq!(
            signal.body[&field], before.body[&field],
            "`{field}` of a row sent again"
        );
    }
    assert_eq!(signal.body["replayed"], true, "{:#}", signal.body);
    assert!(
        signal.changed().is_empty() && signal.body["previous_revision"].is_null(),
        "{:#}",
        signal.body
    );
}

fn check_step(before: Option<&Signal>, signal: &Signal) {
    let nothing = no_row();
    let before_body = before.map_or(&nothing, |before| &before.body);
    let body = &signal.body;
    let id = &body["stripe_subscription_id"];
    assert_eq!(
        body["previous_revision"], before_body["revision"],
        "`previous_revision` of {id} is the revision of the signal before"
    );
    assert!(
        body["revision"].as_i64() > before_body["revision"].as_i64(),
        "the revision of {id} grows"
    );
    let differing: Map<String, Value> = fields_of_rows()
        .filter(|field| before_body[field] != body[field])
        .map(|field| (field.clone(), before_body[field].clone()))
        .collect();
    let changed: BTreeSet<_> = signal.changed().into_iter().collect();
    assert_eq!(
        changed,
        differing.keys().map(String::as_str).collect(),
        "`changed` of {id}"
    );
    assert_eq!(
        body["previous"],
        Value::Object(differing),
        "`previous` of {id}"
    );
    assert!(
        before.is_none() || !changed.is_empty(),
        "{id} is signalled without a change"
    );
    let access = match body["status"].as_str() {
        Some("trialing" | "active") => "granted",
        Some("past_due") => "grace",
        _ => "revoked",
    };
    assert_eq!(body["access"], access, "`access` of {id}");
}

/// Checks that every row has signals, that the last of them agrees with the row, and that every
/// signal's row exists.
pub(super) fn check_rows(rows: &[stripe_subscription::Model], signals: &[Signal]) {
    let mut last: BTreeMap<&str, &Signal> = BTreeMap::new();
    for signal in signals
        .iter()
        .filter(|signal| signal.subject == "subscription.changed")
    {
        last.insert(
            signal
                .text("stripe_subscription_id")
                .expect("the schema requires the id"),
            signal,
        );
    }
    for row in rows {
        let id = row.stripe_subscription_id.as_str();
        let signal = last
            .remove(id)
            .unwrap_or_else(|| panic!("{id} has a row but no signal"));
        let row = signal_fields(row);
        for field in row.as_object().expect("it is an object").keys() {
            assert_eq!(
                row[field], signal.body[field],
                "`{field}` of the row {id} and its last signal"
            );
        }
    }
    assert!(last.is_empty(), "signals without a row: {:?}", last.keys());
}

/// The fields of a signal that come from the row's columns, without the revision.
fn fields_of_rows() -> impl Iterator<Item = String> {
    let Value::Object(fields) = no_row() else {
        unreachable!("it is written as an object below")
    };
    fields
        .into_iter()
        .map(|(field, _)| field)
        .filter(|field| field != "revision")
}

/// The values before the row existed, as in `previous` of its first signal.
fn no_row() -> Value {
    json!({
        "stripe_customer_id": null,
        "client_reference_id": null,
        "status": null,
        "created": null,
        "start_date": null,
        "cancel_at": null,
        "canceled_at": null,
        "cancellation_reason": null,
        "ended_at": null,
        "trial_start": null,
        "trial_end": null,
        "current_period_start": null,
        "current_period_end": null,
        "cancel_at_period_end": false,
        "collection_method": null,
        "pause_collection": null,
        "items": [],
        "metadata": {},
        "subscription_metadata": {},
        "livemode": false,
        "stripe_account_id": null,
        "uncertain": false,
        "revision": null,
    })
}

struct Schema {
    validator: Validator,
    fields: BTreeSet<String>,
}

/// The schema of a subject's signals, with formats (`date-time`) checked.
fn schema(subject: &str) -> &'static Schema {
    static ALL: OnceLock<BTreeMap<&str, Schema>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        SCHEMAS
            .into_iter()
            .map(|(subject, text)| (subject, compile(text)))
            .collect()
    });
    all.get(subject)
        .unwrap_or_else(|| panic!("{subject} is not documented"))
}

fn compile(text: &str) -> Schema {
    let schema: Value = serde_json::from_str(text).expect("the documents are JSON");
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&schema);
    let fields = schema["properties"]
        .as_object()
        .expect("a signal has properties")
        .keys()
        .cloned()
        .collect();
    Schema {
        validator: validator.expect("the documents are JSON Schemas"),
        fields,
    }
}
