//! What proves our identity to a NATS server.
//!
//! Owns reading it from its file, for each connection: others rotate these files. Invariant: no
//! error holds what a file holds.

use std::path::Path;

use async_nats::Auth;
use nkeys::KeyPair;
use secrecy::ExposeSecret as _;

use super::{ConnectError, unusable};
use crate::settings::{
    Identity, NATS_CREDS, NATS_NKEY_SEED_FILE, NATS_PASSWORD_FILE, Password, Setting,
};

/// Returns the proof for a server that sent `nonce`.
pub(super) fn prove(identity: &Identity, nonce: &[u8]) -> Result<Auth, ConnectError> {
    let mut auth = Auth::new();
    match identity {
        Identity::Anonymous => {}
        Identity::Token(token) => auth.token = Some(token.expose_secret().to_owned()),
        Identity::Password(user, password) => {
            auth.username = Some(user.clone());
            auth.password = Some(match password {
                Password::Given(password) => password.expose_secret().to_owned(),
                Password::File(file) => read_password(file)?,
            });
        }
        Identity::Nkey(file) => {
            let seed = read(&NATS_NKEY_SEED_FILE, file)?;
            let key = KeyPair::from_seed(seed.trim());
            let key = key.map_err(unusable(&NATS_NKEY_SEED_FILE, file))?;
            auth.signature = Some(sign(&NATS_NKEY_SEED_FILE, file, &key, nonce)?);
            auth.nkey = Some(key.public_key());
        }
        Identity::Credentials(file) => {
            let text = read(&NATS_CREDS, file)?;
            let mut blocks = blocks(&text);
            let (Some(jwt), Some(seed)) = (blocks.next(), blocks.next()) else {
                return Err(unusable(&NATS_CREDS, file)("it holds no JWT and nkey seed"));
            };
            let key = KeyPair::from_seed(seed).map_err(unusable(&NATS_CREDS, file))?;
            auth.signature = Some(sign(&NATS_CREDS, file, &key, nonce)?);
            auth.jwt = Some(jwt.to_owned());
        }
    }
    Ok(auth)
}

/// Returns what the file holds, without the newline that editors and `echo` put at its end.
fn read_password(file: &Path) -> Result<String, ConnectError> {
    let text = read(&NATS_PASSWORD_FILE, file)?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        return Err(unusable(&NATS_PASSWORD_FILE, file)("it is empty"));
    }
    Ok(password.to_owned())
}

fn read(setting: &Setting, file: &Path) -> Result<String, ConnectError> {
    std::fs::read_to_string(file).map_err(unusable(setting, file))
}

fn sign(
    setting: &Setting,
    file: &Path,
    key: &KeyPair,
    nonce: &[u8],
) -> Result<Vec<u8>, ConnectError> {
    key.sign(nonce).map_err(unusable(setting, file))
}

/// Returns the line after each line such as `-----BEGIN NATS USER JWT-----`.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut lines = text.lines().map(str::trim);
    std::iter::from_fn(move || {
        lines.find(|line| line.starts_with("---") && line.contains("BEGIN"))?;
        lines.next()
    })
}
