//! Whether a client reference id is a user.
//!
//! Owns the three ways to ask. May not know orphans or rows. No answer is no answer: it is never
//! taken for "unknown".

use std::time::Duration;

use async_nats::Client;
use litestripe_domain::payment::ClientReferenceId;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, Statement};
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::error::StoreError;
use crate::settings::{DatabaseSettings, LookupSettings};
use crate::store::Store;

/// How long the application may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// A way to ask.
pub enum Lookup {
    /// Nobody is asked: every client reference id is a user's.
    None,
    /// A query with one parameter. It knows the id when it returns a row.
    Sql {
        database: DatabaseSettings,
        store: OnceCell<Store>,
        query: String,
    },
    /// A request to the application: the id is the body, the answer `{"known": true}` or `{"known": false}`.
    Nats { client: Client, subject: String },
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    #[error("the user lookup's query failed")]
    Sql(#[source] StoreError),
    #[error("the application does not answer on {subject}")]
    Nats {
        subject: String,
        source: async_nats::RequestError,
    },
    #[error("the answer on {subject} is not {{\"known\": true}} or {{\"known\": false}}")]
    Answer { subject: String },
}

#[derive(Deserialize)]
struct Answer {
    known: bool,
}

impl Lookup {
    /// The way that `settings` say. Nothing is opened before it is needed.
    pub fn new(settings: &LookupSettings, client: &Client) -> Self {
        match settings {
            LookupSettings::None => Self::None,
            LookupSettings::Sql { query, database } => Self::Sql {
                database: database.clone(),
                store: OnceCell::new(),
                query: query.clone(),
            },
            LookupSettings::Nats { subject } => Self::Nats {
                client: client.clone(),
                subject: subject.clone(),
            },
        }
    }

    /// Whether anybody is asked at all.
    pub fn is_enabled(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether it is a user. After an error it is to be asked again.
    pub async fn knows(&self, user: ClientReferenceId<'_>) -> Result<bool, LookupError> {
        match self {
            Self::None => Ok(true),
            Self::Sql {
                database,
                store,
                query,
            } => {
                let store = store
                    .get_or_try_init(|| Store::open_to_read(database))
                    .await
                    .map_err(LookupError::Sql)?;
                query_database(store.connection(), query, user).await
            }
            Self::Nats { client, subject } => ask_application(client, subject, user).await,
        }
    }
}

async fn query_database(
    db: &DatabaseConnection,
    query: &str,
    user: ClientReferenceId<'_>,
) -> Result<bool, LookupError> {
    let statement =
        Statement::from_sql_and_values(db.get_database_backend(), query, [user.0.into()]);
    match db
        .query_one_raw(statement)
        .await
        .map_err(StoreError::doing("look a user up"))
    {
        Ok(row) => Ok(row.is_some()),
        // A text that is not even of the type of the users' ids is no user's.
        Err(error) if error.is_unreadable_value() => Ok(false),
        Err(error) => Err(LookupError::Sql(error)),
    }
}

async fn ask_application(
    client: &Client,
    subject: &str,
    user: ClientReferenceId<'_>,
) -> Result<bool, LookupError> {
    let request = async_nats::Request::new()
        .payload(user.0.as_bytes().to_vec().into())
        .timeout(Some(ANSWER_MAX));
    let reply = client.send_request(subject.to_owned(), request).await;
    let reply = reply.map_err(|source| LookupError::Nats {
        subject: subject.to_owned(),
        source,
    })?;
    let answer: Result<Answer, _> = serde_json::from_slice(&reply.payload);
    answer
        .map(|answer| answer.known)
        .map_err(|_| LookupError::Answer {
            subject: subject.to_owned(),
        })
}
