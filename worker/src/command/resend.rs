//! `resend`: publish the current state of rows again, under their current revision, or that of open
//! orphans.

use clap::Args;
use litestripe_contract::shutdown;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Failure;
use super::print::{self, Output};
use super::progress::Progress;
use crate::installation::Membership;
use crate::recover::resend::{self, Chosen, Resent};
use crate::settings::Settings;
use crate::start::database::Schema;
use crate::store::{self, Store};

#[derive(Debug, Args)]
#[group(id = "rows", required = true, multiple = false)]
struct Rows {
    /// Publish the row of this subscription, also if it is withheld; may be given several times
    #[arg(long, value_name = "SUB")]
    subscription: Vec<String>,
    /// Publish every row
    #[arg(long)]
    all: bool,
    /// Publish `orphan.created` of every open orphan
    #[arg(long)]
    orphans: bool,
}

const AFTER_HELP: &str = "\
For subscribers that are new or were away longer than LITESTRIPE_SIGNALS_MAX_AGE. Each signal carries the row's current \
revision, so a subscriber that has seen it ignores it. --all leaves out rows whose \
user is unknown, and keeps the number of waiting signals low, so that live ones are not delayed. --orphans sends only \
`orphan.created`: subscribers know an orphan by its id.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Resend {
    #[command(flatten)]
    rows: Rows,
    #[command(flatten)]
    output: Output,
}

impl Resend {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let parts = super::start(settings, "resend", Schema::Current, Membership::MayBeNew).await?;
        let store = &parts.store;
        let sending = parts.while_relaying(settings, self.send(store));
        let Resent {
            sent,
            left,
            withheld,
        } = sending.await?;
        let waiting = store::outbox::backlog(store.connection()).await?.0;
        if self.output.json {
            print::line(
                &json!({ "sent": sent, "outbox": waiting, "left_to_replay": left, "withheld": withheld })
                    .to_string(),
            );
        } else {
            let what = if self.rows.orphans { "orphans" } else { "rows" };
            let note = match waiting {
                0 => String::new(),
                waiting => {
                    format!("; {waiting} signals are not published yet and wait in the outbox")
                }
            };
            print::line(&format!("{sent} {what} signalled again{note}"));
        }
        if left > 0 {
            tracing::warn!(
                "{left} rows were not resent: their signals wait for the end of the replay; if it was interrupted, run it again"
            );
        }
        if withheld > 0 {
            tracing::warn!(
                "{withheld} rows were not sent, because their user is unknown: `reconcile --repair` asks Stripe, `resend \
                 --subscription ID` sends one as it is"
            );
        }
        Ok(())
    }

    async fn send(&self, store: &Store) -> Result<Resent, Failure> {
        if self.rows.orphans {
            return send_orphans(store).await;
        }
        if self.rows.all {
            return send_all(store).await;
        }
        let ids = &self.rows.subscription;
        let known = store::subscription::existing(store.connection(), ids).await?;
        if let Some(unknown) = ids.iter().find(|id| !known.contains(*id)) {
            return Err(Failure::new(format!(
                "cannot resend {unknown}: there is no row of this subscription; nothing was sent"
            )));
        }
        Ok(resend::put_in_outbox(store, ids.clone(), Chosen::Named).await?)
    }
}

async fn send_all(store: &Store) -> Result<Resent, Failure> {
    let shutdown = shutdown::token()?;
    let total = store::subscription::count(store.connection()).await?;
    let mut progress = Progress::start("resend", "rows", Some(total));
    let (mut resent, mut after) = (Resent::default(), String::new());
    loop {
        let ids =
            store::subscription::keys_after(store.connection(), &after, resend::BATCH).await?;
        let Some(last) = ids.last() else { break };
        wait_for_room(store, &resent, &after, &shutdown).await?;
        after.clone_from(last);
        let count = ids.len() as u64;
        resent += resend::put_in_outbox(store, ids, Chosen::All).await?;
        progress.advance(count);
    }
    progress.finish();
    Ok(resent)
}

async fn send_orphans(store: &Store) -> Result<Resent, Failure> {
    let shutdown = shutdown::token()?;
    let (mut resent, mut after) = (Resent::default(), String::new());
    loop {
        wait_for_room(store, &resent, &after, &shutdown).await?;
        let (some, last) = resend::put_orphans_in_outbox(store, after).await?;
        resent += some;
        let Some(last) = last else { return Ok(resent) };
        after = last;
    }
}

/// Waits until there is room in the outbox. Fails if a stop is requested first.
async fn wait_for_room(
    store: &Store,
    resent: &Resent,
    after: &str,
    shutdown: &CancellationToken,
) -> Result<(), Failure> {
    resend::wait_for_room(store, shutdown).await?;
    if shutdown.is_cancelled() {
        return Err(Failure::new(format!(
            "stopped after {} signals, the last one of {after}; running it again begins at the beginning",
            resent.sent
        )));
    }
    Ok(())
}
