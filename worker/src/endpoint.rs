//! The endpoints at Stripe that deliver to ingress, and the file with their signing secrets.
//!
//! Owns which endpoint is wanted, and the order in which an endpoint and its secret come and go: a
//! secret is in the file before it is relied on, and leaves it only once Stripe no longer signs with
//! it. May not know Stripe's API (`stripe::endpoint`), nor arguments and output
//! (`command::endpoint`).

use std::net::IpAddr;
use std::time::Duration;

use reqwest::StatusCode;
use time::OffsetDateTime;
use url::{Host, Url};

use crate::recover::backfill;
use crate::settings::Settings;
use crate::stripe::api::{ApiError, StripeApi};
use crate::stripe::endpoint::{Created, Creation, Endpoint, Payload, Source};

pub(crate) mod check;
pub(crate) mod probe;
pub(crate) mod roll;
pub(crate) mod secret_file;

use secret_file::{SecretFile, SecretFileError};

/// How long Stripe repeats its answer to a creation. It keeps idempotency keys for at least 24
/// hours. Stripe: "Idempotent requests".
const REPEATED_WITHIN: time::Duration = time::Duration::hours(23);

#[derive(Debug, thiserror::Error)]
pub(crate) enum EndpointError {
    #[error(
        "STRIPE_SECRET_KEY may not do this: a restricted key needs write access to webhook endpoints, for `--thin` to \
         event destinations, and for `roll` read access to events"
    )]
    NotPermitted(#[source] ApiError),
    #[error(transparent)]
    Api(ApiError),
    #[error(transparent)]
    File(#[from] SecretFileError),
    #[error(
        "{id} was created, but its secret could not be stored; mend the cause and run the same command again within 23 \
         hours, then Stripe shows the secret once more"
    )]
    NotStored {
        id: String,
        #[source]
        source: SecretFileError,
    },
    #[error(
        "Stripe's answer to the creation of {id} has no signing secret: disable it with `litestripe-worker endpoint \
         disable {id}`, and run the command again"
    )]
    NoSecret { id: String },
    #[error(
        "{id} delivers to this URL already, but its secret is not in the file: {}",
        mend_lost(id)
    )]
    Lost { id: String },
    #[error(transparent)]
    Unfinished(#[from] roll::Unfinished),
}

impl From<ApiError> for EndpointError {
    fn from(error: ApiError) -> Self {
        match error.status() {
            Some(StatusCode::FORBIDDEN) => Self::NotPermitted(error),
            _ => Self::Api(error),
        }
    }
}

/// Returns what to do about an endpoint whose secret is not in the file.
pub(crate) fn mend_lost(id: &str) -> String {
    format!(
        "if another file holds it, name that one; if not, `litestripe-worker endpoint roll {id} --secret-file FILE` makes \
         another endpoint and disables this one, because Stripe's API shows a secret only once; or reveal the secret in \
         Stripe's Dashboard and add it to the file as the line `whsec_… # {id}`"
    )
}

/// What sets endpoints apart. Two enabled endpoints with the same address deliver every event twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub url: Url,
    pub payload: Payload,
    pub source: Source,
}

impl Address {
    /// Returns an endpoint's address. `None` if its URL is none.
    pub(crate) fn of_endpoint(endpoint: &Endpoint) -> Option<Self> {
        Some(Self {
            url: Url::parse(&endpoint.url).ok()?,
            payload: endpoint.payload,
            source: endpoint.source,
        })
    }

    pub(crate) fn is_of(&self, endpoint: &Endpoint) -> bool {
        Self::of_endpoint(endpoint).as_ref() == Some(self)
    }
}

/// Parses a URL to which Stripe can deliver: https, or for tests http on this machine.
pub(crate) fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|_| {
        "must be a URL such as https://your.host/ls/hook/<STRIPE_WEBHOOK_UUID>/".to_owned()
    })?;
    let is_loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if is_loopback => {}
        _ => return Err("must begin with https://: Stripe delivers to nothing else".to_owned()),
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("must have no user, password or fragment".to_owned());
    }
    Ok(url)
}

/// Returns the UUID at the end of the path of ingress's hook. `None` for another path.
pub(crate) fn hook_uuid(url: &Url) -> Option<&str> {
    let mut parts = url.path().trim_end_matches('/').rsplit('/');
    let uuid = parts.next().filter(|uuid| uuid.len() == 36);
    uuid.filter(|_| parts.next() == Some("hook") && parts.next() == Some("ls"))
}

/// The endpoints of the key's account and mode.
#[derive(Debug)]
pub(crate) struct Listed {
    pub endpoints: Vec<Endpoint>,
    /// The lists that could not be fetched. A key may read only one of them.
    pub failed: Vec<(Payload, ApiError)>,
}

/// Lists the endpoints of both payload styles.
pub(crate) async fn list(api: &StripeApi) -> Listed {
    let mut listed = Listed {
        endpoints: Vec::new(),
        failed: Vec::new(),
    };
    for payload in [Payload::Snapshot, Payload::Thin] {
        match api.endpoints(payload).await {
            Ok(endpoints) => listed.endpoints.extend(endpoints),
            Err(error) => listed.failed.push((payload, error)),
        }
    }
    listed
}

/// Returns the event types that an endpoint should send: those that this version handles.
///
/// Thin events have finer types too, which the worker also handles. They are not asked for: whatever
/// they announce is announced by `updated` as well.
pub(crate) fn types(settings: &Settings, payload: Payload) -> Vec<String> {
    let prefix = payload.type_prefix();
    let handled = backfill::types(settings).into_iter();
    handled.map(|name| format!("{prefix}{name}")).collect()
}

/// What was done so that there is an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// It was there and right.
    Nothing,
    Created,
    /// It was there, and an earlier run had not stored its secret.
    Recovered,
    Updated,
    Enabled,
}

/// Endpoints of one address, and the file with their secrets.
pub(crate) struct Endpoints<'a> {
    pub api: &'a StripeApi,
    pub address: Address,
    /// The types that they should send.
    pub types: Vec<String>,
    pub file: SecretFile,
}

impl Endpoints<'_> {
    /// Makes sure that there is an enabled endpoint that sends the right types, and that the file
    /// holds its secret. Changes nothing where that is so.
    pub(crate) async fn ensure(&mut self) -> Result<(Endpoint, Done), EndpointError> {
        let mut ours = self.list().await?;
        ours.retain(|endpoint| endpoint.marker.is_some());
        let (enabled, disabled): (Vec<_>, Vec<_>) =
            ours.into_iter().partition(|endpoint| endpoint.enabled);
        let newest_held = |some: &[Endpoint]| {
            let held = |endpoint: &&Endpoint| self.file.secret(&endpoint.id).is_some();
            some.iter().rev().find(held).cloned()
        };
        if let Some(endpoint) = newest_held(&enabled) {
            let done = if self.correct_types(&endpoint).await? {
                Done::Updated
            } else {
                Done::Nothing
            };
            return Ok((endpoint, done));
        }
        if let Some(lost) = enabled.last() {
            return match self.recover(lost).await? {
                Some(endpoint) => Ok((endpoint, Done::Recovered)),
                None => Err(EndpointError::Lost {
                    id: lost.id.clone(),
                }),
            };
        }
        if let Some(endpoint) = newest_held(&disabled) {
            self.correct_types(&endpoint).await?;
            self.api.set_enabled(&endpoint, true).await?;
            return Ok((endpoint, Done::Enabled));
        }
        Ok((self.create().await?, Done::Created))
    }

    /// Lists the endpoints of this address, oldest first.
    async fn list(&self) -> Result<Vec<Endpoint>, EndpointError> {
        let mut endpoints = self.api.endpoints(self.address.payload).await?;
        endpoints.retain(|endpoint| self.address.is_of(endpoint));
        endpoints.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(endpoints)
    }

    /// Returns whether the types had to be changed.
    async fn correct_types(&self, endpoint: &Endpoint) -> Result<bool, EndpointError> {
        if check::same_types(&endpoint.types, &self.types) {
            return Ok(false);
        }
        self.api.set_types(endpoint, &self.types).await?;
        Ok(true)
    }

    /// Creates another endpoint and stores its secret.
    async fn create(&mut self) -> Result<Endpoint, EndpointError> {
        let created = self.request_creation(&nuid::next()).await?;
        let Created { endpoint, secret } = created;
        match secret {
            Some(secret) => self.store(endpoint, &secret),
            None => Err(EndpointError::NoSecret { id: endpoint.id }),
        }
    }

    /// Stores the secret of an endpoint of which the file has none, because an earlier run ended
    /// between Stripe's answer and the file: has Stripe repeat that answer. Returns `None` if it
    /// does not.
    async fn recover(&mut self, lost: &Endpoint) -> Result<Option<Endpoint>, EndpointError> {
        let age = OffsetDateTime::now_utc().unix_timestamp() - lost.created;
        let Some(marker) = lost.marker.as_deref() else {
            return Ok(None);
        };
        // Later, the same request would create another endpoint.
        if age > REPEATED_WITHIN.whole_seconds() {
            return Ok(None);
        }
        match self.request_creation(marker).await {
            Ok(Created {
                endpoint,
                secret: Some(secret),
            }) => self.store(endpoint, &secret).map(Some),
            Ok(Created { secret: None, .. }) => Ok(None),
            // Another version, which handles other types, created it: it is not the same request.
            Err(error) if error.status() == Some(StatusCode::BAD_REQUEST) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn request_creation(&self, idempotency_key: &str) -> Result<Created, ApiError> {
        self.api
            .create_endpoint(Creation {
                url: self.address.url.as_str(),
                payload: self.address.payload,
                source: self.address.source,
                types: &self.types,
                idempotency_key,
            })
            .await
    }

    fn store(
        &mut self,
        endpoint: Endpoint,
        secret: &secrecy::SecretString,
    ) -> Result<Endpoint, EndpointError> {
        match self.file.add(&endpoint.id, secret) {
            Ok(()) => Ok(endpoint),
            Err(source) => Err(EndpointError::NotStored {
                id: endpoint.id,
                source,
            }),
        }
    }
}

/// How long a delivery may be in flight: the timeout of the Stripe CLI when it forwards one. Stripe
/// does not publish its own.
pub(crate) const IN_FLIGHT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
