//! A subscription's row as the core sees it. Pure.
//!
//! Owns what is read of a row before a batch and what is written after it. May not know SQL.

use litestripe_contract::signal::Subscription;
use time::OffsetDateTime;

use crate::merge::{State, Visible};

/// What a row is before a batch.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    pub state: State,
    pub version: i64,
    /// The revision of its last signal; 0 if there was none yet.
    pub revision: i64,
    /// When it was first written. None if it was not, or if that cannot be read.
    pub dt_created: Option<OffsetDateTime>,
    pub last_sent: LastSent,
}

/// A row to be written.
#[derive(Debug, Default)]
pub struct Row {
    pub stripe_subscription_id: String,
    pub state: State,
    pub visible: Visible,
    pub version: i64,
    /// The revision of its last signal, this batch's included.
    pub revision: i64,
    /// What subscribers were sent of it last, this batch's signals included.
    pub last_sent: LastSent,
}

impl Stored {
    /// The row as it is to be written over this one.
    pub fn into_row(self, id: &str) -> Row {
        let Self {
            state,
            version,
            revision,
            last_sent,
            ..
        } = self;
        let visible = state.visible();
        Row {
            stripe_subscription_id: id.to_owned(),
            state,
            visible,
            version: version + 1,
            revision,
            last_sent,
        }
    }
}

/// What subscribers were sent of a row last. The row owes a signal exactly while that is not what it
/// shows. Its JSON is the column `last_sent`, which is null as a rule.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum LastSent {
    /// What the row shows. Nothing, of a row without a revision: it was written silently.
    #[default]
    Current,
    /// Nothing: the row owes its first signal.
    Nothing,
    /// This, which the row does not show any more.
    Older(Box<Subscription>),
}

impl LastSent {
    /// Whether the row owes a signal.
    pub fn has_unsent_signal(&self) -> bool {
        *self != Self::Current
    }

    /// Without metadata, of a row that shows `shown`, which is without metadata too: what was owed
    /// stays so, because subscribers have to hear that the metadata is gone.
    pub(crate) fn without_metadata(self, shown: &Subscription) -> Self {
        match self {
            Self::Older(mut sent) => {
                sent.metadata.clear();
                sent.subscription_metadata.clear();
                if *sent == *shown {
                    Self::Nothing
                } else {
                    Self::Older(sent)
                }
            }
            other => other,
        }
    }

    /// The column's value.
    pub fn to_json(&self) -> Option<String> {
        match self {
            Self::Current => None,
            Self::Nothing => Some("null".to_owned()),
            Self::Older(sent) => Some(
                serde_json::to_string(sent)
                    .expect("a signal has no map with keys that are not text"),
            ),
        }
    }

    /// Reads the column's value. What only a later program can read counts as nothing sent.
    pub fn from_json(json: Option<&str>) -> Self {
        match json.map(serde_json::from_str) {
            None => Self::Current,
            Some(Ok(Some(sent))) => Self::Older(sent),
            Some(_) => Self::Nothing,
        }
    }
}
