//! What proves our identity to a NATS server.
//!
//! Owns reading it from its file, for each connection: others rotate these files. Invariant: no
//! error holds what a file holds.

use std::path::Path;

use async_nats::Auth;
use nkeys::KeyPair;
use secrecy::ExposeSecret as _;

use super::{ConnectError, unusable};
use crate::settings::{Identity, NATS_CREDS, NATS_NKEY_SEED_FILE, Setting, text};

/// Returns the proof for a server that sent `nonce`.
pub(super) fn prove(identity: &Identity, nonce: &[u8]) -> Result<Auth, ConnectError> {
    let mut auth = Auth::new();
    match identity {
        Identity::Anonymous => {}
        Identity::Token(token) => auth.token = Some(token.expose_secret().to_owned()),
        Identity::Password(user, password) => {
            auth.username = Some(user.clone());
            let now = password.reread("a password", text).transpose()?;
            let at_start = || password.at_start().expose_secret().to_owned();
            auth.password = Some(now.unwrap_or_else(at_start));
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
