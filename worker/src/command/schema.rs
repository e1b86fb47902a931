//! `schema`: the signals' JSON Schemas and the AsyncAPI document, derived from the Rust types.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use litestripe_contract::signal::{Orphan, SubscriptionChanged};
use litestripe_contract::subject;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::{Failure, print};

#[derive(Debug, Args)]
pub(crate) struct Schema {
    /// Print only this document [default: all, as one JSON object]
    document: Option<Document>,
    /// Write each document to a file in this folder instead of printing them
    #[arg(long, value_name = "FOLDER")]
    write: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Document {
    /// JSON Schema (2020-12) of `subscription.changed`
    #[value(name = subject::SUBSCRIPTION_CHANGED)]
    SubscriptionChanged,
    /// JSON Schema (2020-12) of `orphan.created`
    #[value(name = subject::ORPHAN_CREATED)]
    OrphanCreated,
    /// JSON Schema (2020-12) of `orphan.resolved`
    #[value(name = subject::ORPHAN_RESOLVED)]
    OrphanResolved,
    /// AsyncAPI 3 document of all signals
    Asyncapi,
}

/// The path of the schemas in an AsyncAPI document.
const SCHEMAS: &str = "/components/schemas";

impl Schema {
    pub(crate) fn print(self) -> Result<(), Failure> {
        if let Some(folder) = self.write {
            let written = write_all(&folder);
            return written.map_err(|error| {
                Failure::new(format!("cannot write to {}: {error}", folder.display()))
            });
        }
        let document = match self.document {
            Some(document) => document.content(),
            None => Document::value_variants()
                .iter()
                .map(|document| (document.name(), document.content()))
                .collect(),
        };
        print::line(&pretty(&document));
        Ok(())
    }
}

fn write_all(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for document in Document::value_variants() {
        std::fs::write(
            folder.join(document.file_name()),
            pretty(&document.content()) + "\n",
        )?;
    }
    Ok(())
}

impl Document {
    fn name(self) -> String {
        self.to_possible_value()
            .expect("no document is hidden")
            .get_name()
            .to_owned()
    }

    fn file_name(self) -> String {
        match self {
            Self::Asyncapi => "asyncapi.json".to_owned(),
            signal => format!("{}.schema.json", signal.name()),
        }
    }

    fn content(self) -> Value {
        match self {
            Self::SubscriptionChanged => signal_schema::<SubscriptionChanged>(
                self,
                "A subscription's row changed, and this is what it is now.",
            ),
            Self::OrphanCreated => {
                signal_schema::<Orphan>(self, "A payment belongs to no known user.")
            }
            Self::OrphanResolved => {
                signal_schema::<Orphan>(self, "The user of an orphaned payment was found.")
            }
            Self::Asyncapi => asyncapi(),
        }
    }
}

fn signal_schema<T: JsonSchema>(document: Document, description: &str) -> Value {
    let generator = SchemaSettings::draft2020_12()
        .for_serialize()
        .into_generator();
    let mut schema = generator.into_root_schema_for::<T>();
    schema.insert(
        "$id".to_owned(),
        json!(format!("urn:litestripe:v1:{}", document.name())),
    );
    schema.insert("title".to_owned(), json!(document.name()));
    schema.insert("description".to_owned(), json!(description));
    schema.into()
}

/// Builds the AsyncAPI document (AsyncAPI: "Specification 3.0.0"). It embeds the schemas, so that
/// it needs no other file.
fn asyncapi() -> Value {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.definitions_path = SCHEMAS.into());
    let mut generator = settings.for_serialize().into_generator();
    let signals = [
        (
            subject::SUBSCRIPTION_CHANGED,
            generator.subschema_for::<SubscriptionChanged>(),
        ),
        (subject::ORPHAN_CREATED, generator.subschema_for::<Orphan>()),
        (
            subject::ORPHAN_RESOLVED,
            generator.subschema_for::<Orphan>(),
        ),
    ];
    let mut channels = serde_json::Map::new();
    let mut operations = serde_json::Map::new();
    for (name, schema) in signals {
        let key = name.replace('.', "-");
        let message = json!({
            "name": name,
            "contentType": "application/json",
            "headers": headers(name),
            "payload": schema,
        });
        channels.insert(
            key.clone(),
            json!({ "address": name, "messages": { "signal": message } }),
        );
        let operation = json!({
            "action": "send",
            "channel": { "$ref": format!("#/channels/{key}") },
            "messages": [{ "$ref": format!("#/channels/{key}/messages/signal") }],
        });
        operations.insert(format!("send-{key}"), operation);
    }
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Litestripe signals",
            "version": "1",
            "description": "What Litestripe publishes to the JetStream stream LITESTRIPE_SIGNALS. \
                Delivery is at least once: ignore a signal whose `revision` is not above the highest \
                you have seen of its subscription.",
        },
        "servers": { "nats": { "host": "127.0.0.1:4222", "protocol": "nats" } },
        "channels": channels,
        "operations": operations,
        "components": { "schemas": generator.take_definitions(true) },
    })
}

fn headers(name: &str) -> Value {
    use litestripe_contract::header::{self, ce};
    let text = json!({ "type": "string" });
    let fixed = |value: &str| json!({ "type": "string", "const": value });
    json!({
        "type": "object",
        "properties": {
            (header::MESSAGE_ID): text,
            (ce::SPECVERSION): fixed("1.0"),
            (ce::ID): text,
            (ce::SOURCE): fixed(ce::SOURCE_VALUE),
            (ce::TYPE): fixed(&format!("{}{name}", ce::TYPE_PREFIX)),
            (ce::TIME): { "type": "string", "format": "date-time" },
            (ce::SUBJECT): text,
            (ce::DATACONTENTTYPE): fixed("application/json"),
            (header::TRACEPARENT): text,
            (header::TRACESTATE): text,
        },
        "required": [header::MESSAGE_ID, ce::SPECVERSION, ce::ID, ce::SOURCE, ce::TYPE, ce::SUBJECT],
    })
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value can be written")
}

#[cfg(test)]
mod tests;
