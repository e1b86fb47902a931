//! The signing secrets in use.
//!
//! Owns where they come from: the setting, or a file that is read again when it changes. Either may
//! hold several: one per endpoint at Stripe, and two of one endpoint while its secret is rolled.
//! Never prints a secret; log lines show its fingerprint, so that an operator can recognize it.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use litestripe_contract::signing_secret::{self, FILE_BYTES_MAX, PREFIX};
use tokio::sync::watch;
use tokio::task;
use tracing::{info, warn};

use crate::signature::SigningSecret;

pub(crate) const SETTING: &str = "STRIPE_WEBHOOK_SECRET";

pub(crate) const FILE_SETTING: &str = "STRIPE_WEBHOOK_SECRET_FILE";

/// How many times the file is read at start until it holds a secret, and the delay between two
/// reads.
const TRIES: u32 = 10;
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// How often the file is read to notice a new secret.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub(crate) enum SecretSource {
    Given(Arc<[SigningSecret]>),
    File(PathBuf),
}

#[derive(Debug, thiserror::Error)]
#[error(
    "no signing secret: {SETTING} is not set, and {FILE_SETTING} names {}, {why} after {TRIES} tries",
    path.display()
)]
pub struct NoSecret {
    path: PathBuf,
    why: String,
}

/// The secrets in use, and their later changes.
pub(crate) type Secrets = watch::Receiver<Arc<[SigningSecret]>>;

/// Returns the secrets to start with. Waits for the file if it holds none yet, and logs that once.
pub(crate) async fn obtain(source: &SecretSource) -> Result<Arc<[SigningSecret]>, NoSecret> {
    let path = match source {
        SecretSource::Given(secrets) => {
            secrets.iter().for_each(|secret| announce(secret, SETTING));
            return Ok(Arc::clone(secrets));
        }
        SecretSource::File(path) => path,
    };
    let mut tries = 1;
    loop {
        let why = match read(path).await {
            Ok(secrets) if !secrets.is_empty() => {
                secrets
                    .iter()
                    .for_each(|secret| announce(secret, FILE_SETTING));
                return Ok(secrets.into());
            }
            Ok(_) => "which contains no whsec_…".to_owned(),
            Err(error) => format!("which cannot be read ({error})"),
        };
        if tries == TRIES {
            return Err(NoSecret {
                path: path.clone(),
                why,
            });
        }
        if tries == 1 {
            let path = path.display();
            warn!("waiting for a signing secret: {FILE_SETTING} names {path}, {why}");
        }
        tries += 1;
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Replaces `secrets` whenever the file holds others. Keeps the last ones while the file is missing
/// or holds none.
///
/// The file is read again and again, not watched: a mounted volume may not report changes.
pub(crate) async fn follow(path: &Path, secrets: &watch::Sender<Arc<[SigningSecret]>>) {
    let mut is_missing = false;
    loop {
        tokio::time::sleep(REREAD_INTERVAL).await;
        let found = match read(path).await {
            Ok(found) if !found.is_empty() => found,
            unusable => {
                if !std::mem::replace(&mut is_missing, true) {
                    let path = path.display();
                    let why = match unusable {
                        Ok(_) => "no longer contains a whsec_…".to_owned(),
                        Err(error) => format!("cannot be read any more ({error})"),
                    };
                    warn!("{path} ({FILE_SETTING}) {why}; keeping the last ones");
                }
                continue;
            }
        };
        is_missing = false;
        let known = Arc::clone(&secrets.borrow());
        let new: Vec<_> = found.iter().filter(|one| !is_among(one, &known)).collect();
        let gone: Vec<_> = known.iter().filter(|one| !is_among(one, &found)).collect();
        if new.is_empty() && gone.is_empty() {
            continue;
        }
        // Those that stay keep the time of their last use.
        let stay = known.iter().filter(|one| is_among(one, &found));
        secrets.send_replace(stay.chain(new.iter().copied()).cloned().collect());
        for secret in new {
            announce(secret, FILE_SETTING);
        }
        for secret in gone {
            let fingerprint = secret.fingerprint();
            info!(
                fingerprint,
                "no longer using the signing secret with fingerprint {fingerprint}"
            );
        }
    }
}

fn is_among(secret: &SigningSecret, others: &[SigningSecret]) -> bool {
    let fingerprint = secret.fingerprint();
    others
        .iter()
        .any(|other| other.fingerprint() == fingerprint)
}

/// Parses the value of `STRIPE_WEBHOOK_SECRET`: one secret, or several separated by commas.
pub(crate) fn parse_list(text: &str) -> Option<Arc<[SigningSecret]>> {
    let is_secret = |text: &&str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=_-".contains(&byte);
        text.strip_prefix(PREFIX)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(allowed))
    };
    text.split(',')
        .map(str::trim)
        .map(|text| Some(text).filter(is_secret).map(SigningSecret::new))
        .collect()
}

/// Whether the file holds a secret now.
pub fn is_in(path: &Path) -> bool {
    read_now(path).is_ok_and(|found| !found.is_empty())
}

async fn read(path: &Path) -> io::Result<Vec<SigningSecret>> {
    let path = path.to_owned();
    task::spawn_blocking(move || read_now(&path)).await?
}

fn read_now(path: &Path) -> io::Result<Vec<SigningSecret>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(find(&bytes))
}

/// Returns every secret in a file's content, each once.
fn find(file: &[u8]) -> Vec<SigningSecret> {
    let mut found: Vec<SigningSecret> = Vec::new();
    for secret in signing_secret::find(&String::from_utf8_lossy(file)) {
        let secret = SigningSecret::new(secret);
        if !is_among(&secret, &found) {
            found.push(secret);
        }
    }
    found
}

fn announce(secret: &SigningSecret, setting: &str) {
    let fingerprint = secret.fingerprint();
    info!(
        fingerprint,
        "using the signing secret with fingerprint {fingerprint} from {setting}"
    );
}

#[cfg(test)]
mod tests;
