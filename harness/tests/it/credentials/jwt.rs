//! Operator mode: JWTs that a test signs itself. NATS: ADR-14, "JWT library free jwt user
//! generation".

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::orphans::now;

/// An operator with an account for the programs and one for the system.
pub(crate) struct Operator {
    operator: KeyPair,
    account: KeyPair,
    system: KeyPair,
}

impl Operator {
    pub(crate) fn new() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            account: KeyPair::new_account(),
            system: KeyPair::new_account(),
        }
    }

    /// The broker's configuration. The account may use JetStream as it likes.
    pub(crate) fn config(&self) -> String {
        let (account, system) = (self.account.public_key(), self.system.public_key());
        let unlimited = -1;
        let limits = json!({
            "subs": unlimited, "data": unlimited, "payload": unlimited, "imports": unlimited, "exports": unlimited,
            "wildcards": true, "conn": unlimited, "leaf": unlimited, "mem_storage": unlimited,
            "disk_storage": unlimited, "streams": unlimited, "consumer": unlimited
        });
        let operator = sign(
            &self.operator,
            &self.operator.public_key(),
            json!({ "type": "operator", "version": 2 }),
            None,
        );
        let sign_account = |key: &str, limits: Value| {
            let claims = json!({ "type": "account", "version": 2, "limits": limits });
            sign(&self.operator, key, claims, None)
        };
        let no_jetstream = json!({ "subs": unlimited, "data": unlimited, "payload": unlimited, "imports": unlimited,
            "exports": unlimited, "wildcards": true, "conn": unlimited, "leaf": unlimited });
        format!(
            "operator: {operator}\nresolver: MEMORY\nsystem_account: {system}\nresolver_preload: {{\n  \
             {account}: {}\n  {system}: {}\n}}\n",
            sign_account(&account, limits),
            sign_account(&system, no_jetstream)
        )
    }

    /// The file of a new user, whose JWT ends at `expires`.
    pub(crate) fn credentials(&self, expires: Option<i64>) -> String {
        let user = KeyPair::new_user();
        let claims = json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
        let jwt = sign(&self.account, &user.public_key(), claims, expires);
        format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             ************************* IMPORTANT *************************\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            user.seed().expect("a new key has one")
        )
    }
}

fn sign(issuer: &KeyPair, subject: &str, nats: Value, expires: Option<i64>) -> String {
    let mut claims = json!({
        "jti": subject, "iat": now(), "iss": issuer.public_key(), "name": subject, "sub": subject, "nats": nats
    });
    if let Some(expires) = expires {
        claims["exp"] = json!(expires);
    }
    let encoded = |part: &Value| BASE64URL_NOPAD.encode(part.to_string().as_bytes());
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let signed = format!("{}.{}", encoded(&header), encoded(&claims));
    let signature = issuer
        .sign(signed.as_bytes())
        .expect("a key with a seed signs");
    format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature))
}
