//! `orphans list | show | resolve`: find the users of payments that belong to no known user.

use std::time::Duration;

use clap::{Args, Subcommand};
use litestripe_contract::signal::Timestamp;
use litestripe_contract::{connect, exit};
use litestripe_domain::event::CLIENT_REFERENCE_ID_BYTES_MAX;
use litestripe_domain::payment::ClientReferenceId;
use litestripe_entity::orphaned_payment::Model;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::Failure;
use super::print::{self, Output};
use crate::installation;
use crate::settings::Settings;
use crate::start::database::{self, Schema};
use crate::store::{self, Store};
use crate::stream::own_event::{self, Resolution, Scope};

/// How long to wait until a running worker has applied a resolution.
const APPLIED_MAX: Duration = Duration::from_secs(10);

/// How often the table is checked meanwhile.
const POLL: Duration = Duration::from_millis(100);

/// Most orphans that `list` shows.
const LIST_MAX: usize = 1000;

pub(super) const AFTER_HELP: &str = "\
An orphan is a payment that belongs to no known user. Its reason is one of:
  missing_client_reference_id  a paid Checkout Session has no client reference id
  unknown_client_reference_id  LITESTRIPE_USER_LOOKUP does not know its client reference id
  no_checkout_session          no session claimed the subscription in LITESTRIPE_ORPHAN_GRACE

A session or a user that appears later resolves an orphan by itself.";

#[derive(Debug, Subcommand)]
pub(crate) enum Orphans {
    /// List open orphans, newest first
    List {
        /// List resolved orphans too
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show one orphan
    Show {
        /// Id of the orphan: a subscription's (sub_…) or a Checkout Session's (cs_…)
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Assign an orphan to a user; this erases the email and sends signals
    Resolve(Resolve),
}

#[derive(Debug, Args)]
pub(crate) struct Resolve {
    /// Id of the orphan: a subscription's (sub_…) or a Checkout Session's (cs_…)
    id: String,
    /// Your application's id of the user who paid
    #[arg(long, value_name = "ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    client_reference_id: String,
    /// Resolve even if this user has another subscription that has not ended, or if the orphan is
    /// resolved to another user already
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

impl Orphans {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let store = database::open(&settings.database, Schema::Current).await?;
        match self {
            Self::List { all, output } => list(&store, all, output).await,
            Self::Show { id, output } => output.fields(&as_json(&find(&store, &id).await?)),
            Self::Resolve(resolve) => resolve.execute(settings, &store).await,
        }
    }
}

async fn list(store: &Store, all: bool, output: Output) -> Result<(), Failure> {
    let mut orphans = store::orphan::list(store.connection(), !all, LIST_MAX as u64 + 1).await?;
    if orphans.len() > LIST_MAX {
        orphans.truncate(LIST_MAX);
        exit::print_error_line(format_args!("only the newest {LIST_MAX} are listed"));
    }
    let orphans: Vec<Value> = orphans.iter().map(as_json).collect();
    output.print(&orphans, || {
        if orphans.is_empty() {
            print::line(if all { "no orphans" } else { "no open orphans" });
            return;
        }
        let rows = orphans.iter().map(|orphan| {
            let cell = |field| print::cell(&orphan[field]);
            let mode = if orphan["livemode"] == true {
                "live"
            } else {
                "test"
            };
            let state = match &orphan["resolved_client_reference_id"] {
                Value::Null => "open".to_owned(),
                user => format!("resolved: {}", print::cell(user)),
            };
            let [id, reason, email, customer, since] = [
                "orphan_id",
                "reason",
                "customer_email",
                "stripe_customer_id",
                "dt_created",
            ]
            .map(cell);
            [id, reason, email, customer, mode.to_owned(), since, state]
        });
        print::table(
            [
                "id", "reason", "email", "customer", "mode", "since", "state",
            ],
            rows,
        );
    })
}

impl Resolve {
    async fn execute(self, settings: &Settings, store: &Store) -> Result<(), Failure> {
        let orphan = find(store, &self.id).await?;
        if orphan.resolved_client_reference_id.as_ref() == Some(&self.client_reference_id) {
            return self.print_resolved(&orphan);
        }
        self.check(store, &orphan).await?;
        let jetstream = connect::jetstream(super::connect(settings, "orphans").await?);
        installation::check(store, &jetstream).await?;
        let (id, user) = (&orphan.id, &self.client_reference_id);
        let resolution = Resolution {
            orphan_id: id,
            client_reference_id: user,
            payment: store::orphan::payment_ids(&orphan),
            reason: &orphan.reason,
        };
        let scope = Scope {
            livemode: orphan.livemode,
            account: None,
        };
        let created = created(store, &orphan, OffsetDateTime::now_utc()).await?;
        own_event::publish_resolution(&jetstream, &resolution, created, scope).await?;
        let Ok(resolved) =
            tokio::time::timeout(APPLIED_MAX, wait_until_resolved(store, id, (created, user)))
                .await
        else {
            let stored = json!({ "orphan_id": id, "client_reference_id": user, "state": "stored" });
            let later = "it takes effect when a worker runs (`litestripe-worker run`)";
            return self.output.print(&stored, || {
                print::line(&format!("the resolution of {id} is stored; {later}"))
            });
        };
        let resolved = resolved?;
        match &resolved.resolved_client_reference_id {
            Some(resolved_to) if resolved_to == user => self.print_resolved(&resolved),
            other => {
                let other = other.as_deref().unwrap_or_default();
                Err(Failure::new(format!(
                    "cannot resolve {id}: it was resolved to client reference id {other} meanwhile"
                )))
            }
        }
    }

    fn print_resolved(&self, orphan: &Model) -> Result<(), Failure> {
        let (id, user) = (&orphan.id, &self.client_reference_id);
        self.output.print(&as_json(orphan), || {
            print::line(&format!("{id} is resolved to client reference id {user}"));
        })
    }

    async fn check(&self, store: &Store, orphan: &Model) -> Result<(), Failure> {
        let (id, user) = (&orphan.id, &self.client_reference_id);
        if user.chars().any(char::is_control) || user.trim().is_empty() {
            return Err(Failure::new(
                "--client-reference-id must not be blank or contain control characters",
            ));
        }
        if user.len() > CLIENT_REFERENCE_ID_BYTES_MAX {
            return Err(Failure::new(format!(
                "--client-reference-id must not be longer than {CLIENT_REFERENCE_ID_BYTES_MAX} bytes"
            )));
        }
        if let (Some(at), false) = (orphan.resolved_at, self.force) {
            let to = orphan.resolved_client_reference_id.as_deref();
            return Err(Failure::new(format!(
                "{id} is resolved already, at {}, to client reference id {}; nothing was changed. If that was a mistake, \
                 add --force",
                timestamp(at),
                to.unwrap_or_default()
            )));
        }
        if self.force {
            return Ok(());
        }
        let this = orphan.stripe_subscription_id.as_deref();
        // Only rows of the same mode count: a user may have tried a subscription in test mode.
        match store::subscription::find_other_of_user(
            store.connection(),
            ClientReferenceId(user),
            orphan.livemode,
            this,
        )
        .await?
        {
            Some(other) => Err(Failure::new(format!(
                "client reference id {user} already has the subscription {other}, which has not ended; nothing was \
                 changed. If this is the right user, add --force"
            ))),
            None => Ok(()),
        }
    }
}

/// Returns the time of a resolution made at `now`: later than an earlier resolution and what the
/// orphan's row holds, so that a clock that is behind does not make the resolution lose.
async fn created(store: &Store, orphan: &Model, now: OffsetDateTime) -> Result<i64, Failure> {
    let earlier = orphan.resolved_at.map(OffsetDateTime::unix_timestamp);
    let now = earlier.map_or(now.unix_timestamp(), |at| now.unix_timestamp().max(at + 1));
    let Some(id) = orphan.stripe_subscription_id.as_deref() else {
        return Ok(now);
    };
    let row = store::subscription::load(store.connection(), &[id])
        .await?
        .remove(id);
    Ok(row.map_or(now, |row| row.state.resolution_created(now)))
}

/// Waits until the orphan `id` is resolved by `resolution` (its time and user) or by one that wins
/// over it, and returns the orphan. A resolution with an earlier time does not win.
async fn wait_until_resolved(
    store: &Store,
    id: &str,
    resolution: (i64, &str),
) -> Result<Model, Failure> {
    loop {
        let orphan = find(store, id).await?;
        let resolved_at = orphan.resolved_at.map(OffsetDateTime::unix_timestamp);
        let current = resolved_at.zip(orphan.resolved_client_reference_id.as_deref());
        if current.is_some_and(|(at, user)| user == resolution.1 || (at, user) > resolution) {
            return Ok(orphan);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn find(store: &Store, id: &str) -> Result<Model, Failure> {
    let orphan = store::orphan::find(store.connection(), id).await?;
    orphan.ok_or_else(|| {
        Failure::new(format!(
            "there is no orphan {id}: `litestripe-worker orphans list --all` lists them all"
        ))
    })
}

fn timestamp(at: OffsetDateTime) -> Timestamp {
    at.truncate_to_second().into()
}

fn as_json(orphan: &Model) -> Value {
    json!({
        "orphan_id": orphan.id,
        "reason": orphan.reason,
        "customer_email": orphan.customer_email,
        "checkout_session_id": orphan.checkout_session_id,
        "stripe_customer_id": orphan.stripe_customer_id,
        "stripe_subscription_id": orphan.stripe_subscription_id,
        "event_id": orphan.event_id,
        "livemode": orphan.livemode,
        "resolved_at": orphan.resolved_at.map(timestamp),
        "resolved_client_reference_id": orphan.resolved_client_reference_id,
        "dt_created": timestamp(orphan.dt_created),
        "dt_last_updated": timestamp(orphan.dt_last_updated),
    })
}
