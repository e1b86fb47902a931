//! Rolling a signing secret.
//!
//! Stripe's API cannot change the secret of an endpoint, so a roll replaces the endpoint: a second
//! one with the same URL is made, and the first one disabled. Meanwhile every event is delivered by
//! both, which is harmless: the stream drops the repeat by the event's id.
//!
//! What is left to do follows from the endpoints at Stripe and from the file alone. So a run that was
//! ended anywhere is continued by the next one.

use std::time::Duration;

use litestripe_contract::event::HANDLED_TYPES;

use super::probe::{self, ProbeError};
use super::{EndpointError, Endpoints};
use crate::stripe::endpoint::{Endpoint, Source};

/// How long Stripe tries to deliver an event, in seconds. Stripe: "Receive Stripe events in your
/// webhook endpoint", retries.
const RETRIED_FOR_S: i64 = 3 * 24 * 60 * 60;

/// Why the old endpoint is not disabled yet. Both secrets stay valid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfinished {
    #[error(
        "ingress does not accept the secret of the new endpoint {new} yet. The old one stays enabled, and both secrets \
         are in the file. Ingress must read that file (STRIPE_WEBHOOK_SECRET_FILE) and STRIPE_WEBHOOK_SECRET must not \
         be set; then run the command again. If the URL cannot be reached from this machine, look in ingress's log for \
         its second secret and add --force"
    )]
    NotAccepted {
        new: String,
        #[source]
        source: ProbeError,
    },
    #[error(
        "events from before the new endpoint {new} are not delivered yet ({}), and only the old one delivers them. It \
         stays enabled, and both secrets are in the file. Run the command again when they are delivered; or fetch them \
         with `litestripe-worker backfill`, then add --force",
        at_least(*.count)
    )]
    Undelivered { new: String, count: usize },
}

fn at_least(count: usize) -> String {
    if count < 100 {
        count.to_string()
    } else {
        format!("{count} or more")
    }
}

/// What a roll did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Created(String),
    Recovered(String),
    Continued(String),
    Disabled(String),
    Waiting(Duration),
    Removed(Vec<String>),
    /// The old endpoint's secret is in the file, but the file does not say which it is.
    UnnamedSecret(String),
}

/// How a roll is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Disable the old endpoint without making sure that nothing is lost by that.
    pub force: bool,
    /// How long the old secret stays valid after its endpoint was disabled.
    pub in_flight: Duration,
}

impl Endpoints<'_> {
    /// Replaces `old` and every other endpoint that we made for this address by a new one, or
    /// continues doing so.
    pub(crate) async fn roll(
        &mut self,
        old: &Endpoint,
        options: Options,
        mut done: impl FnMut(Step),
    ) -> Result<Endpoint, EndpointError> {
        let mut ours = self.list().await?;
        ours.retain(|endpoint| endpoint.marker.is_some() || endpoint.id == old.id);
        let (enabled, disabled): (Vec<_>, Vec<_>) =
            ours.into_iter().partition(|endpoint| endpoint.enabled);
        let mut rolled: Vec<String> = disabled.into_iter().map(|endpoint| endpoint.id).collect();
        rolled.retain(|id| self.file.secret(id).is_some());

        // What replaced a disabled endpoint is there already.
        let is_begun = enabled.len() > 1 || !rolled.is_empty() || !old.enabled;
        let new = match enabled.last().filter(|_| is_begun) {
            Some(newest) => self.continue_with(newest, &mut done).await?,
            None => None,
        };
        let new = match new {
            Some(new) => new,
            None => {
                let new = self.create().await?;
                done(Step::Created(new.id.clone()));
                new
            }
        };
        let old: Vec<_> = enabled
            .iter()
            .filter(|endpoint| endpoint.id != new.id)
            .collect();
        if !old.is_empty() && !options.force {
            self.check_replaceable(&new).await?;
        }
        for endpoint in old {
            self.api.set_enabled(endpoint, false).await?;
            done(Step::Disabled(endpoint.id.clone()));
            if self.file.secret(&endpoint.id).is_some() {
                rolled.push(endpoint.id.clone());
            } else if self.file.has_unnamed() {
                done(Step::UnnamedSecret(endpoint.id.clone()));
            }
        }
        if !rolled.is_empty() {
            done(Step::Waiting(options.in_flight));
            tokio::time::sleep(options.in_flight).await;
            self.file.remove(&rolled)?;
            done(Step::Removed(rolled));
        }
        Ok(new)
    }

    /// Returns the newest endpoint if its secret is in the file, or can be recovered.
    async fn continue_with(
        &mut self,
        newest: &Endpoint,
        done: &mut impl FnMut(Step),
    ) -> Result<Option<Endpoint>, EndpointError> {
        if newest.marker.is_none() {
            return Ok(None);
        }
        if self.file.secret(&newest.id).is_some() {
            done(Step::Continued(newest.id.clone()));
            return Ok(Some(newest.clone()));
        }
        let recovered = self.recover(newest).await?;
        if let Some(endpoint) = &recovered {
            done(Step::Recovered(endpoint.id.clone()));
        }
        Ok(recovered)
    }

    /// Makes sure that `new` can do without the endpoints before it.
    async fn check_replaceable(&self, new: &Endpoint) -> Result<(), EndpointError> {
        let secret = self.file.secret(&new.id);
        let secret = secret.expect("the secret of a new endpoint was stored");
        probe::wait_until_accepted(&self.address.url, &secret)
            .await
            .map_err(|source| Unfinished::NotAccepted {
                new: new.id.clone(),
                source,
            })?;
        // Stripe lists no events of connected accounts here.
        if self.address.source == Source::ConnectedAccounts {
            return Ok(());
        }
        let since = new.created - RETRIED_FOR_S;
        let undelivered = self
            .api
            .undelivered_events(&HANDLED_TYPES, since, new.created);
        match undelivered.await? {
            0 => Ok(()),
            count => Err(Unfinished::Undelivered {
                new: new.id.clone(),
                count,
            }
            .into()),
        }
    }
}
