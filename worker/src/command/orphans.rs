//! `orphans list | show | resolve`: what support staff do about payments that match no user.

use std::time::Duration;

use clap::{Args, Subcommand};
use litestripe_contract::connect;
use litestripe_contract::signal::Timestamp;
use litestripe_entity::orphaned_payment::Model;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::Failure;
use super::print;
use crate::settings::Settings;
use crate::start::database::{self, Schema};
use crate::store::{self, Store};
use crate::stream::own_event::{self, Resolution, Scope};

/// How long a resolution may take to reach the table while a worker runs.
const APPLIED_MAX: Duration = Duration::from_secs(10);

/// Between two looks at the table.
const POLL: Duration = Duration::from_millis(100);

/// Orphans listed, at most.
const LIST_MAX: usize = 1000;

#[derive(Debug, Subcommand)]
pub(crate) enum Orphans {
    /// List open orphans, newest first
    List(List),
    /// Show one orphan
    Show(Show),
    /// Say whose payment an orphan is: notes the user, erases the email, signals it
    Resolve(Resolve),
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// List resolved orphans too
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The orphan's id: a subscription's (sub_…) or a Checkout Session's (cs_…)
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Resolve {
    /// The orphan's id: a subscription's (sub_…) or a Checkout Session's (cs_…)
    id: String,
    /// The application's id of the user
    #[arg(long, value_name = "ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    client_reference_id: String,
    /// Also if another subscription of this user has not ended
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why an orphan cannot be shown or resolved.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there is no orphan {0}: `litestripe-worker orphans list --all` shows all")]
    Unknown(String),
    #[error("{id} was resolved already, at {at}, to client reference id {client_reference_id}; nothing was changed")]
    Resolved { id: String, at: Timestamp, client_reference_id: String },
    #[error(
        "client reference id {0} already has subscription {1}, which has not ended; nothing was changed. Is it the right user? `--force` resolves all the same"
    )]
    HasAnother(String, String),
    #[error("{0} was resolved meanwhile to client reference id {1}, which stands")]
    Overruled(String, String),
    #[error("a client reference id may not hold control characters")]
    NotAnId,
}

impl Refusal {
    fn resolved(orphan: &Model) -> Self {
        let at = orphan.resolved_at.unwrap_or(orphan.dt_last_updated);
        Self::Resolved {
            id: orphan.id.clone(),
            at: at.truncate_to_second().into(),
            client_reference_id: orphan.resolved_client_reference_id.clone().unwrap_or_default(),
        }
    }
}

impl Orphans {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let store = database::open(&settings.database, Schema::Current).await?;
        match self {
            Self::List(list) => list.execute(&store).await,
            Self::Show(show) => show.execute(&store).await,
            Self::Resolve(resolve) => resolve.execute(settings, &store).await,
        }
    }
}

impl List {
    async fn execute(self, store: &Store) -> Result<(), Failure> {
        let mut orphans = store::orphan::list(store.connection(), !self.all, LIST_MAX as u64 + 1).await?;
        if orphans.len() > LIST_MAX {
            orphans.truncate(LIST_MAX);
            eprintln!("only the newest {LIST_MAX} are listed");
        }
        if self.json {
            let orphans: Vec<Value> = orphans.iter().map(as_json).collect();
            print::json(&orphans)?;
            return Ok(());
        }
        if orphans.is_empty() {
            print::line(if self.all { "no orphans" } else { "no open orphans" });
            return Ok(());
        }
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let rows = orphans.into_iter().map(|orphan| {
            let state = match orphan.resolved_client_reference_id {
                Some(user) => format!("resolved: {user}"),
                None => "open".to_owned(),
            };
            let seen = Timestamp::from(orphan.dt_created.truncate_to_second()).to_string();
            let mode = if orphan.livemode { "live" } else { "test" };
            [
                orphan.id,
                orphan.reason,
                or_dash(orphan.customer_email),
                or_dash(orphan.stripe_customer_id),
                mode.to_owned(),
                seen,
                state,
            ]
        });
        print::table(["id", "reason", "email", "customer", "mode", "since", "state"], rows);
        Ok(())
    }
}

impl Show {
    async fn execute(self, store: &Store) -> Result<(), Failure> {
        let orphan = find(store, &self.id).await?;
        if self.json {
            print::json(&as_json(&orphan))?;
        } else {
            print::fields(&as_json(&orphan));
        }
        Ok(())
    }
}

impl Resolve {
    async fn execute(self, settings: &Settings, store: &Store) -> Result<(), Failure> {
        let orphan = find(store, &self.id).await?;
        self.check(store, &orphan).await?;
        let nats = super::connect(settings, "orphans").await?;
        let resolution = Resolution {
            orphan_id: &orphan.id,
            client_reference_id: &self.client_reference_id,
            payment: store::orphan::payment(&orphan),
            reason: &orphan.reason,
        };
        let scope = Scope { livemode: orphan.livemode, account: None };
        let created = OffsetDateTime::now_utc().unix_timestamp();
        own_event::publish_resolution(&connect::jetstream(nats), &resolution, created, scope).await?;
        let word = (created, self.client_reference_id.as_str());
        match tokio::time::timeout(APPLIED_MAX, resolved(store, &orphan.id, word)).await {
            Ok(orphan) => {
                let orphan = orphan?;
                if orphan.resolved_client_reference_id.as_ref() != Some(&self.client_reference_id) {
                    let user = orphan.resolved_client_reference_id.unwrap_or_default();
                    return Err(Refusal::Overruled(orphan.id, user).into());
                }
                if self.json {
                    print::json(&as_json(&orphan))?;
                } else {
                    print::line(&format!(
                        "{} is resolved to client reference id {}",
                        orphan.id, self.client_reference_id
                    ));
                }
            }
            Err(_) if self.json => {
                let stored = json!({
                    "orphan_id": orphan.id,
                    "client_reference_id": self.client_reference_id,
                    "state": "stored",
                });
                print::json(&stored)?;
            }
            Err(_) => print::line(&format!(
                "the resolution of {} is stored; it takes effect when a worker runs (`litestripe-worker run`)",
                orphan.id
            )),
        }
        Ok(())
    }

    async fn check(&self, store: &Store, orphan: &Model) -> Result<(), Failure> {
        if self.client_reference_id.chars().any(char::is_control) {
            return Err(Refusal::NotAnId.into());
        }
        if orphan.resolved_at.is_some() {
            return Err(Refusal::resolved(orphan).into());
        }
        if self.force {
            return Ok(());
        }
        let (this, user) = (orphan.stripe_subscription_id.as_deref(), &self.client_reference_id);
        // What a user tried in test mode says nothing about live mode.
        match store::subscription::other_of_user(store.connection(), user, orphan.livemode, this).await? {
            Some(other) => Err(Refusal::HasAnother(user.clone(), other).into()),
            None => Ok(()),
        }
    }
}

/// The orphan `id`, once it is resolved by `word` (when it was given, and the user) or by one that
/// stands against it: an earlier one does not.
async fn resolved(store: &Store, id: &str, word: (i64, &str)) -> Result<Model, Failure> {
    loop {
        let orphan = find(store, id).await?;
        let stands = orphan.resolved_at.map(OffsetDateTime::unix_timestamp);
        let stands = stands.zip(orphan.resolved_client_reference_id.as_deref());
        if stands.is_some_and(|(at, user)| user == word.1 || (at, user) > word) {
            return Ok(orphan);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn find(store: &Store, id: &str) -> Result<Model, Failure> {
    let orphan = store::orphan::find(store.connection(), id).await?;
    Ok(orphan.ok_or_else(|| Refusal::Unknown(id.to_owned()))?)
}

fn as_json(orphan: &Model) -> Value {
    let time = |at: OffsetDateTime| Timestamp::from(at.truncate_to_second());
    json!({
        "orphan_id": orphan.id,
        "reason": orphan.reason,
        "customer_email": orphan.customer_email,
        "checkout_session_id": orphan.checkout_session_id,
        "stripe_customer_id": orphan.stripe_customer_id,
        "stripe_subscription_id": orphan.stripe_subscription_id,
        "event_id": orphan.event_id,
        "livemode": orphan.livemode,
        "resolved_at": orphan.resolved_at.map(time),
        "resolved_client_reference_id": orphan.resolved_client_reference_id,
        "dt_created": time(orphan.dt_created),
        "dt_last_updated": time(orphan.dt_last_updated),
    })
}
