//! A subscription's row, without its database representation. Pure.
//!
//! Owns the parts of a row that are read before a batch and written after it. May not know SQL.

use litestripe_contract::signal::Subscription;
use time::OffsetDateTime;

use crate::merge::{State, Visible};

/// A row as it was read before a batch.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    pub state: State,
    pub version: i64,
    /// The revision of its last signal; 0 if there was none yet.
    pub revision: i64,
    /// When it was first written. `None` if it was not, or if the column cannot be read.
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
    /// The revision of its last signal, including signals of this batch.
    pub revision: i64,
    /// What subscribers were last sent about it, including signals of this batch.
    pub last_sent: LastSent,
}

impl Stored {
    /// Returns the row that replaces this one.
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

/// What subscribers were last sent about a row. The row has an unsent or withheld signal exactly
/// while this differs from what it shows. Its JSON is the column `last_sent`, which is usually
/// null.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum LastSent {
    /// What the row shows. For a row without a revision nothing was sent, but nothing is unsent
    /// either: it was written silently.
    #[default]
    Current,
    /// Nothing: the row's first signal is unsent. It is sent at the replay's end.
    Nothing,
    /// Nothing, and the first signal waits until the row is whole: a rebuild has not found its
    /// user. See [`Visible::is_whole`].
    Withheld,
    /// Nothing, like `Withheld`, but a replay without signals wrote the row. If such a replay makes
    /// it whole, nothing is unsent.
    Silent,
    /// These columns, which the row does not show any more.
    Older(Box<Subscription>),
}

/// The columns of [`LastSent::Withheld`] and [`LastSent::Silent`]: JSON texts.
pub const WITHHELD: &str = "\"withheld\"";
pub const SILENT: &str = "\"silent\"";

impl LastSent {
    /// Returns whether the row has an unsent signal, which is sent once no replay is unfinished.
    pub fn has_unsent_signal(&self) -> bool {
        matches!(self, Self::Nothing | Self::Older(_))
    }

    /// Returns whether the row's first signal waits until the row is whole.
    pub fn is_withheld(&self) -> bool {
        matches!(self, Self::Withheld | Self::Silent)
    }

    /// Removes the metadata, for a row that shows `shown`, which has no metadata any more either.
    /// An unsent signal stays unsent, because subscribers have to learn that the metadata is gone.
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

    /// Returns the column's value.
    pub fn to_json(&self) -> Option<String> {
        match self {
            Self::Current => None,
            Self::Nothing => Some("null".to_owned()),
            Self::Withheld => Some(WITHHELD.to_owned()),
            Self::Silent => Some(SILENT.to_owned()),
            Self::Older(sent) => Some(
                serde_json::to_string(sent)
                    .expect("a signal has no map with keys that are not text"),
            ),
        }
    }

    /// Reads the column's value. A value that only a later version can read counts as nothing sent.
    pub fn from_json(json: Option<&str>) -> Self {
        match json {
            None => Self::Current,
            Some(WITHHELD) => Self::Withheld,
            Some(SILENT) => Self::Silent,
            Some(json) => match serde_json::from_str(json) {
                Ok(Some(sent)) => Self::Older(sent),
                _ => Self::Nothing,
            },
        }
    }
}
