//! The figures about the tables that `/metrics` shows, in one statement.
//!
//! Owns what is counted. Every part reads an index from one end and stops at [`COUNT_MAX`], so the
//! statement takes the same few milliseconds however large the tables are. May not know metrics.

use litestripe_contract::signal::OrphanReason;
use litestripe_domain::question::Kind;
use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};
use time::OffsetDateTime;

use super::Store;
use super::subscription::IS_WITHHELD;
use crate::error::StoreError;

/// Where counting ends: a figure of this size means that it is at least so large.
pub const COUNT_MAX: u64 = 10_000;

/// What the tables hold.
#[derive(Debug)]
pub struct Figures {
    /// The time by the database's clock.
    pub now: OffsetDateTime,
    /// The signals in the outbox.
    pub signals: Rows,
    pub uncertain_rows: u64,
    pub withheld_rows: u64,
    /// Replays that have not reached their end, and a rebuild that waits for its replay.
    pub unfinished_replays: u64,
    pub pending_dead_letters: u64,
    open_orphans: Vec<(OrphanReason, u64)>,
    questions: Vec<(Kind, Questions)>,
    /// Open questions about thin events of live mode, and of test mode.
    notifications: [u64; 2],
}

/// Some rows.
#[derive(Debug, Default, Clone, Copy)]
pub struct Rows {
    pub count: u64,
    /// When the first of them was saved, or became due.
    pub oldest: Option<OffsetDateTime>,
}

/// The open questions of a kind.
#[derive(Debug, Default, Clone, Copy)]
pub struct Questions {
    /// All of them, with the earliest time at which one is due.
    pub open: Rows,
    /// Those whose last attempt failed, with the earliest time at which one was saved.
    pub failing: Rows,
}

impl Questions {
    /// Returns how long the oldest question has waited for its answer: since it was saved if its
    /// last attempt failed, else since it was due.
    pub fn oldest_wait(&self, now: OffsetDateTime) -> time::Duration {
        let oldest = self
            .open
            .oldest
            .into_iter()
            .chain(self.failing.oldest)
            .min();
        oldest.map_or(time::Duration::ZERO, |oldest| {
            (now - oldest).max(time::Duration::ZERO)
        })
    }
}

impl Figures {
    pub fn open_orphans(&self, reason: OrphanReason) -> u64 {
        let mut all = self.open_orphans.iter();
        all.find(|of| of.0 == reason).map_or(0, |of| of.1)
    }

    pub fn questions(&self, kind: Kind) -> Questions {
        let mut all = self.questions.iter();
        all.find(|of| of.0 == kind)
            .map_or_else(Questions::default, |of| of.1)
    }

    /// Returns how many open questions wait for a key: without one, thin events cannot be followed
    /// up. `key` is whether the key is of live mode, if there is one.
    pub fn waiting_for_key(&self, key: Option<bool>) -> u64 {
        let [live, test] = self.notifications;
        match key {
            None => live + test,
            Some(true) => test,
            Some(false) => live,
        }
    }
}

/// Some rows of a table, in an order that an index has.
struct Part {
    /// The table, its condition and the order.
    from: String,
    /// The column with the time of the first row.
    oldest: Option<&'static str>,
}

impl Part {
    fn count(from: impl Into<String>) -> Self {
        Self {
            from: from.into(),
            oldest: None,
        }
    }

    fn since(from: impl Into<String>, oldest: &'static str) -> Self {
        Self {
            oldest: Some(oldest),
            ..Self::count(from)
        }
    }

    fn sql(&self, part: usize) -> String {
        let from = &self.from;
        let oldest = self.oldest.map_or_else(
            || "NULL".to_owned(),
            |column| format!("(SELECT {column} FROM {from} LIMIT 1)"),
        );
        format!(
            "SELECT {part} AS part, (SELECT COUNT(*) FROM (SELECT 1 FROM {from} LIMIT {COUNT_MAX}) \
             AS first_rows) AS count, {oldest} AS oldest"
        )
    }
}

/// Returns the parts, in the order in which [`read`] takes them.
fn parts() -> Vec<Part> {
    let question = |condition: &str, order: &str| {
        format!("litestripe_question WHERE {condition} ORDER BY {order}")
    };
    let mut parts = vec![
        Part::since(
            "litestripe_signal_outbox WHERE id > $1 ORDER BY id",
            "dt_created",
        ),
        Part::count("stripe_subscription WHERE uncertain ORDER BY stripe_subscription_id"),
        Part::count(format!(
            "stripe_subscription WHERE {IS_WITHHELD} ORDER BY stripe_subscription_id"
        )),
        Part::count("litestripe_replay WHERE dt_finished IS NULL"),
        Part::count("litestripe_dead_letter ORDER BY stream_created, sequence"),
    ];
    for livemode in ["TRUE", "FALSE"] {
        let kind = Kind::Notification.as_str();
        let condition = format!("kind = '{kind}' AND livemode = {livemode}");
        parts.push(Part::count(question(&condition, "due_at")));
    }
    for reason in OrphanReason::ALL {
        let reason = reason.as_str();
        parts.push(Part::count(format!(
            "orphaned_payment WHERE resolved_at IS NULL AND reason = '{reason}' ORDER BY id"
        )));
    }
    for kind in Kind::ALL {
        let kind = format!("kind = '{}'", kind.as_str());
        let failing = format!("{kind} AND last_error IS NOT NULL");
        parts.push(Part::since(question(&kind, "due_at"), "due_at"));
        parts.push(Part::since(question(&failing, "dt_created"), "dt_created"));
    }
    parts
}

/// Reads the figures.
pub async fn read(store: &Store) -> Result<Figures, StoreError> {
    let doing = StoreError::doing("count what waits");
    let db = store.connection();
    let backend = db.get_database_backend();
    let now = match backend {
        DbBackend::Postgres => "clock_timestamp()",
        // The processes that share the file share a clock: see `clock`.
        _ => "NULL",
    };
    let mut sql = format!("SELECT -1 AS part, 0 AS count, {now} AS oldest");
    for (part, of) in parts().iter().enumerate() {
        sql += " UNION ALL ";
        sql += &of.sql(part);
    }
    let statement = Statement::from_sql_and_values(
        backend,
        format!("{sql} ORDER BY part"),
        [store.low_water().id().into()],
    );
    let rows = db.query_all_raw(statement).await.map_err(&doing)?;
    let rows: Result<Vec<Rows>, DbErr> = rows
        .iter()
        .map(|row| {
            Ok(Rows {
                count: row.try_get::<i64>("", "count")?.cast_unsigned(),
                oldest: row.try_get("", "oldest")?,
            })
        })
        .collect();
    let mut rows = rows.map_err(&doing)?.into_iter();
    let mut next = || {
        let missing = || DbErr::Custom("a part is missing".to_owned());
        rows.next().ok_or_else(missing).map_err(&doing)
    };
    Ok(Figures {
        now: next()?.oldest.unwrap_or_else(OffsetDateTime::now_utc),
        signals: next()?,
        uncertain_rows: next()?.count,
        withheld_rows: next()?.count,
        unfinished_replays: next()?.count,
        pending_dead_letters: next()?.count,
        notifications: [next()?.count, next()?.count],
        open_orphans: OrphanReason::ALL
            .into_iter()
            .map(|reason| Ok((reason, next()?.count)))
            .collect::<Result<_, StoreError>>()?,
        questions: Kind::ALL
            .into_iter()
            .map(|kind| {
                let (open, failing) = (next()?, next()?);
                Ok((kind, Questions { open, failing }))
            })
            .collect::<Result<_, StoreError>>()?,
    })
}
