//! `endpoint create | list | check | roll | disable`: the endpoint at Stripe that delivers to ingress.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use litestripe_contract::{exit, settings};
use reqwest::StatusCode;
use serde_json::json;
use url::Url;

use super::Failure;
use super::print::{self, Output};
use crate::endpoint::check::{self, Problem};
use crate::endpoint::roll::{Options, Step};
use crate::endpoint::secret_file::{self, SecretFile};
use crate::endpoint::{self, Address, Done, EndpointError, Endpoints, IN_FLIGHT, Listed, probe};
use crate::settings::Settings;
use crate::stripe::api::StripeApi;
use crate::stripe::endpoint::{Endpoint, Payload, Source};

pub(super) const AFTER_HELP: &str = "\
Needs STRIPE_SECRET_KEY, neither database nor broker. A restricted key needs write access to webhook endpoints, for \
thin events to event destinations, and for `roll` read access to events.

The signing secret goes to the file that ingress reads (STRIPE_WEBHOOK_SECRET_FILE), which may hold several. The file \
belongs to the user that ran the command, who alone may read it (0600); one that exists keeps its owner. Run the \
command as the user of ingress. All of these commands may be run again, also after they were interrupted.";

#[derive(Debug, Subcommand)]
pub(crate) enum EndpointCommand {
    /// Make sure that Stripe delivers to a URL: the event types that this version handles
    #[command(after_help = CREATE_HELP)]
    Create(Create),
    /// List the endpoints of the key's account and mode
    List(Output),
    /// Compare the endpoints with what this version needs; exits with 3 if something is to be mended
    Check(Check),
    /// Replace the signing secret, without a delivery that is refused
    #[command(after_help = ROLL_HELP)]
    Roll(Roll),
    /// Disable an endpoint: Stripe delivers nothing more to it, also not later
    Disable {
        /// Id of the endpoint (we_… or ed_…); may be left out if Litestripe made only one
        id: Option<String>,
    },
}

const CREATE_HELP: &str = "\
An endpoint that this command made before is found by its metadata (`litestripe`), URL, payload style and source. Then \
its event types are corrected, and it is enabled again if it was disabled. If the command was interrupted before the \
secret was written, run it again within 23 hours: Stripe then shows the secret once more.";

const ROLL_HELP: &str = "\
Stripe's API cannot change a secret, so this makes a second endpoint for the same URL, adds its secret to the file, \
sends test deliveries to the URL until ingress accepts it, disables the old endpoint, and removes the old secret 30 s \
later. Meanwhile Stripe delivers every event twice, which is harmless. It exits with 3 if the old endpoint cannot be \
disabled yet; run it again then. Both secrets are valid until it succeeds. After that, another run with the same id \
changes nothing; one without an id rolls again.";

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Where Stripe delivers to: `https://your.host/ls/hook/<STRIPE_WEBHOOK_UUID>/`
    #[arg(long, value_parser = endpoint::parse_url)]
    url: Url,
    #[command(flatten)]
    style: Style,
    /// File for the signing secret; others in it are kept
    #[arg(long, value_name = "FILE")]
    secret_file: PathBuf,
}

#[derive(Debug, Clone, Copy, Args)]
struct Style {
    /// Thin events, which hold only ids: the workers need STRIPE_SECRET_KEY then
    #[arg(long)]
    thin: bool,
    /// Events of connected accounts, not of the account itself
    #[arg(long)]
    connect: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Expect an endpoint for this URL; without it, all that Litestripe made are checked
    #[arg(long, value_parser = endpoint::parse_url)]
    url: Option<Url>,
    /// Expect it to be for thin events
    #[arg(long, requires = "url")]
    thin: bool,
    /// Expect it to be for connected accounts
    #[arg(long, requires = "url")]
    connect: bool,
    /// Also check that this file has the endpoints' secrets, and that ingress accepts them: sends
    /// test deliveries
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Roll {
    /// Id of the endpoint (we_… or ed_…); may be left out if Litestripe made only one
    id: Option<String>,
    /// File with the signing secret
    #[arg(long, value_name = "FILE")]
    secret_file: PathBuf,
    /// Disable the old endpoint even if ingress was not seen to accept the new secret, or if events
    /// are left that only the old endpoint delivers
    #[arg(long)]
    force: bool,
    /// How long the old secret stays valid after its endpoint was disabled. For tests.
    #[arg(long, hide = true, value_parser = duration)]
    in_flight: Option<Duration>,
}

fn duration(text: &str) -> Result<Duration, String> {
    settings::duration(text).ok_or_else(|| format!("must be {}", settings::DURATION))
}

fn failure(error: EndpointError) -> Failure {
    match error {
        EndpointError::File(error) => Failure::configuration(error),
        EndpointError::Unfinished(error) => Failure::differences(error),
        error => Failure::new(error),
    }
}

impl EndpointCommand {
    pub(crate) async fn execute(self, settings: &Settings) -> Result<(), Failure> {
        let api = StripeApi::without_broker(super::require_stripe(settings)?.clone())?;
        match self {
            Self::Create(create) => create.execute(settings, &api).await,
            Self::List(output) => list(&api, output).await,
            Self::Check(check) => check.execute(settings, &api).await,
            Self::Roll(roll) => roll.execute(settings, &api).await,
            Self::Disable { id } => disable(&api, id.as_deref()).await,
        }
    }
}

impl Create {
    async fn execute(self, settings: &Settings, api: &StripeApi) -> Result<(), Failure> {
        if endpoint::hook_uuid(&self.url).is_none() {
            exit::print_error_line(format_args!(
                "warning: {} does not end in /ls/hook/<STRIPE_WEBHOOK_UUID>/, where ingress listens",
                self.url
            ));
        }
        let address = self.style.address(self.url);
        let types = endpoint::types(settings, address.payload);
        let mut endpoints = Endpoints {
            api,
            address,
            types,
            file: open(&self.secret_file)?,
        };
        let (endpoint, done) = endpoints.ensure().await.map_err(failure)?;
        let (id, file) = (&endpoint.id, self.secret_file.display());
        print::line(&match done {
            Done::Nothing => format!("{id} is there already; its secret is in {file}"),
            Done::Created => format!("created {id}; its secret is in {file}"),
            Done::Recovered => format!("{id} is there already; its secret is now in {file}"),
            Done::Updated => format!("{id} is there already; corrected its event types"),
            Done::Enabled => {
                format!("enabled {id}; `litestripe-worker backfill` fetches what it missed")
            }
        });
        Ok(())
    }
}

impl Style {
    fn address(self, url: Url) -> Address {
        Address {
            url,
            payload: if self.thin {
                Payload::Thin
            } else {
                Payload::Snapshot
            },
            source: if self.connect {
                Source::ConnectedAccounts
            } else {
                Source::Account
            },
        }
    }
}

/// Opens the file of secrets, before Stripe is asked to change anything.
fn open(path: &Path) -> Result<SecretFile, Failure> {
    let waiting = || exit::print_error_line("waiting for another `litestripe-worker endpoint`…");
    let file = SecretFile::open(path, waiting).map_err(Failure::configuration)?;
    if let Some(mode) = file.readable_for_others() {
        exit::print_error_line(format_args!(
            "warning: {} had mode {mode:o}; when it is written, it gets 600: ingress has to run as its owner",
            path.display()
        ));
    }
    Ok(file)
}

async fn list(api: &StripeApi, output: Output) -> Result<(), Failure> {
    let endpoints = all(api).await?;
    let as_json: Vec<_> = endpoints
        .iter()
        .map(|endpoint| {
            let mut value = serde_json::to_value(endpoint)?;
            value["litestripe"] = json!(endpoint.marker.is_some());
            Ok(value)
        })
        .collect::<Result<_, serde_json::Error>>()?;
    output.print(&as_json, || {
        if endpoints.is_empty() {
            print::line("no endpoints");
            return;
        }
        let row = |endpoint: &Endpoint| {
            let yes_or_no = |is: bool| if is { "yes" } else { "no" }.to_owned();
            [
                endpoint.id.clone(),
                endpoint.url.clone(),
                endpoint.payload.to_string(),
                endpoint.source.to_string(),
                endpoint.types.len().to_string(),
                endpoint
                    .api_version
                    .clone()
                    .unwrap_or_else(|| "-".to_owned()),
                yes_or_no(endpoint.enabled),
                yes_or_no(endpoint.marker.is_some()),
            ]
        };
        print::table(
            [
                "id",
                "url",
                "payload",
                "events of",
                "types",
                "version",
                "enabled",
                "litestripe",
            ],
            endpoints.iter().map(row),
        );
    })
}

/// Lists all endpoints. A key that may read only one kind of them is enough, with a warning.
async fn all(api: &StripeApi) -> Result<Vec<Endpoint>, Failure> {
    let Listed { endpoints, failed } = endpoint::list(api).await;
    let may_read_one = failed.len() == 1;
    for (payload, error) in failed {
        if !may_read_one || error.status() != Some(StatusCode::FORBIDDEN) {
            return Err(EndpointError::from(error).into());
        }
        exit::print_error_line(format_args!(
            "warning: STRIPE_SECRET_KEY may not read the endpoints of {payload} events"
        ));
    }
    Ok(endpoints)
}

impl Check {
    async fn execute(self, settings: &Settings, api: &StripeApi) -> Result<(), Failure> {
        let endpoints = all(api).await?;
        let style = Style {
            thin: self.thin,
            connect: self.connect,
        };
        let asked = self.url.map(|url| style.address(url));
        let types = |payload| endpoint::types(settings, payload);
        let mut problems = check::problems(&endpoints, asked.as_ref(), types);
        if let Some(file) = &self.secret_file {
            let is_checked = |endpoint: &&Endpoint| {
                let is_ours = endpoint.marker.is_some() && endpoint.enabled;
                is_ours && asked.as_ref().is_none_or(|asked| asked.is_of(endpoint))
            };
            let checked: Vec<_> = endpoints.iter().filter(is_checked).collect();
            problems.extend(secret_problems(&checked, file).await?);
        }
        self.output.print(&json!({ "problems": problems }), || {
            if problems.is_empty() {
                print::line("nothing to mend");
                return;
            }
            let row = |problem: &Problem| {
                let endpoint = problem.endpoint.clone();
                [
                    endpoint.unwrap_or_else(|| "-".to_owned()),
                    problem.problem.clone(),
                    problem.mend.clone(),
                ]
            };
            print::table(["endpoint", "problem", "mend"], problems.iter().map(row));
        })?;
        match problems.len() {
            0 => Ok(()),
            count => Err(Failure::differences(format!("{count} to be mended"))),
        }
    }
}

/// Finds endpoints whose secret is not in the file, or is not accepted by ingress.
async fn secret_problems(endpoints: &[&Endpoint], file: &Path) -> Result<Vec<Problem>, Failure> {
    let secrets = secret_file::read_named(file).map_err(Failure::configuration)?;
    let mut problems = Vec::new();
    for checked in endpoints {
        let id = checked.id.clone();
        let named = secrets.iter().find(|(owner, _)| *owner == id);
        let (Some((_, secret)), Ok(url)) = (named, Url::parse(&checked.url)) else {
            problems.push(Problem {
                problem: format!("its secret is not in {}", file.display()),
                mend: endpoint::mend_lost(&id),
                endpoint: Some(id),
            });
            continue;
        };
        if let Err(error) = probe::wait_until_accepted(&url, secret).await {
            problems.push(Problem {
                endpoint: Some(id),
                problem: exit::chain(&error),
                mend: "make sure that the URL leads to ingress, and that ingress reads this file \
                       (STRIPE_WEBHOOK_SECRET_FILE) and has no STRIPE_WEBHOOK_SECRET"
                    .to_owned(),
            });
        }
    }
    Ok(problems)
}

impl Roll {
    async fn execute(self, settings: &Settings, api: &StripeApi) -> Result<(), Failure> {
        let file = open(&self.secret_file)?;
        let same_address = |one: &Endpoint, other: &Endpoint| {
            Address::of_endpoint(one) == Address::of_endpoint(other)
        };
        let old = select(&all(api).await?, self.id.as_deref(), same_address)?;
        let Some(address) = Address::of_endpoint(&old) else {
            return Err(Failure::new(format!("{} has no valid URL", old.id)));
        };
        let types = endpoint::types(settings, address.payload);
        let mut endpoints = Endpoints {
            api,
            address,
            types,
            file,
        };
        let options = Options {
            force: self.force,
            in_flight: self.in_flight.unwrap_or(IN_FLIGHT),
        };
        let path = self.secret_file.display();
        let new = endpoints.roll(&old, options, |step| {
            print::line(&match step {
                Step::Created(id) => format!("created {id}; its secret is in {path}"),
                Step::Recovered(id) => {
                    format!("{id} was created before; its secret is now in {path}")
                }
                Step::Continued(id) => format!("continuing: {id} was created before"),
                Step::Disabled(id) => format!("disabled {id}"),
                Step::Waiting(time) => {
                    format!("waiting {} s for deliveries in flight", time.as_secs())
                }
                Step::Removed(ids) => {
                    format!("removed the secret of {} from {path}", ids.join(", "))
                }
                Step::UnnamedSecret(id) => {
                    format!("{path} does not say which secret is that of {id}: remove it by hand")
                }
            });
        });
        let new = new.await.map_err(failure)?;
        print::line(&format!("rolled: {} delivers now", new.id));
        Ok(())
    }
}

async fn disable(api: &StripeApi, id: Option<&str>) -> Result<(), Failure> {
    let same = |one: &Endpoint, other: &Endpoint| one.id == other.id;
    let endpoint = select(&all(api).await?, id, same)?;
    let id = &endpoint.id;
    if !endpoint.enabled {
        print::line(&format!("{id} is disabled already"));
        return Ok(());
    }
    api.set_enabled(&endpoint, false)
        .await
        .map_err(EndpointError::from)?;
    print::line(&format!(
        "disabled {id}: Stripe does not deliver later what happens from now on"
    ));
    Ok(())
}

/// Returns the endpoint with that id; without one, the newest enabled one that Litestripe made, if all
/// others that it made are the same to the caller.
fn select(
    endpoints: &[Endpoint],
    id: Option<&str>,
    same: impl Fn(&Endpoint, &Endpoint) -> bool,
) -> Result<Endpoint, Failure> {
    if let Some(id) = id {
        let found = endpoints.iter().find(|endpoint| endpoint.id == id);
        return found.cloned().ok_or_else(|| {
            Failure::new(format!(
                "there is no endpoint {id} for this key: `litestripe-worker endpoint list` lists them all"
            ))
        });
    }
    let is_ours = |endpoint: &&Endpoint| endpoint.marker.is_some() && endpoint.enabled;
    let mut ours: Vec<_> = endpoints.iter().filter(is_ours).collect();
    ours.sort_by_key(|endpoint| endpoint.created);
    let Some(newest) = ours.last() else {
        return Err(Failure::new(
            "there is no enabled endpoint that Litestripe made; name another one by its id: `litestripe-worker endpoint \
             list` lists them all",
        ));
    };
    if !ours.iter().all(|endpoint| same(endpoint, newest)) {
        let ids: Vec<_> = ours.iter().map(|endpoint| endpoint.id.as_str()).collect();
        return Err(Failure::configuration(format!(
            "Litestripe made several endpoints, so name one: {}",
            ids.join(", ")
        )));
    }
    Ok((*newest).clone())
}
