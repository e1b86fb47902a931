//! The user lookup: asks the application whether a client reference id is one of its users.
//!
//! Owns the three ways to ask. May not know orphans or rows. A failed lookup is an error, never an
//! answer: it does not make a user unknown.

use std::time::Duration;

use async_nats::Client;
use litestripe_domain::payment::ClientReferenceId;
use sea_orm::{ConnectionTrait as _, Statement};
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::error::StoreError;
use crate::settings::{DatabaseSettings, LookupSettings};
use crate::store::Connection;
use crate::store::Store;

/// How long the application may take to answer.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(5);

const OPENING: &str = "open the users' database (LITESTRIPE_USER_DATABASE_URL)";

/// How the application is asked.
pub enum Lookup {
    /// Without a lookup every client reference id counts as a user's.
    None,
    /// A query with one parameter, the id. The user is known if it returns a row.
    Sql {
        database: DatabaseSettings,
        store: OnceCell<Store>,
        query: String,
    },
    /// A request to the application with the id as its body. The answer is `{"known": true}` or
    /// `{"known": false}`.
    Nats { client: Client, subject: String },
}

/// Why a lookup failed.
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
    /// Creates the lookup that `settings` name. Its database is opened at the first query.
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

    /// Whether there is a lookup to ask.
    pub fn is_enabled(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// Returns whether the application knows the user.
    ///
    /// # Errors
    /// There is no answer: the caller asks again later.
    pub async fn knows(&self, user: ClientReferenceId<'_>) -> Result<bool, LookupError> {
        match self {
            Self::None => Ok(true),
            Self::Sql {
                database,
                store,
                query,
            } => {
                let store = store
                    .get_or_try_init(|| Store::open_to_read(database, OPENING))
                    .await
                    .map_err(LookupError::Sql)?;
                query_database(store.connection(), query, user).await
            }
            Self::Nats { client, subject } => ask_application(client, subject, user).await,
        }
    }
}

async fn query_database(
    db: &Connection,
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
        // A text that does not fit the type of the users' ids, such as an integer, is no user's id.
        Err(error) if error.is_about_unreadable(user.0) => Ok(false),
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
