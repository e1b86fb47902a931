//! What a walk reports: the rows that are not as Stripe has them.
//!
//! Owns the shape of a finding, which `reconcile --json` prints. May not know how one is found.

use serde::Serialize;

use super::Difference;

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// Columns are not as Stripe has them.
    Different,
    /// There is none.
    Missing,
    /// Its columns or its merge state cannot be read.
    Unreadable,
    /// Stripe has no such subscription.
    UnknownToStripe,
    /// What Stripe says cannot be kept.
    CannotBeKept,
}

/// A row that is not as Stripe has it.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The row's key.
    pub stripe_subscription_id: String,
    /// What is wrong.
    pub problem: Problem,
    /// Whether it is repaired.
    pub repaired: bool,
    /// Where it is wrong.
    pub differences: Vec<Difference>,
    /// What a person has to know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Finding {
    pub(super) fn new(id: &str, problem: Problem) -> Self {
        let stripe_subscription_id = id.to_owned();
        Self { stripe_subscription_id, problem, repaired: false, differences: Vec::new(), note: None }
    }

    pub(super) fn unknown_to_stripe(id: &str) -> Self {
        Self::new(id, Problem::UnknownToStripe)
            .with_note("not repairable: Stripe has no such subscription in the account and mode of STRIPE_SECRET_KEY")
    }

    pub(super) fn with_note(self, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..self }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Subscriptions of Stripe's that were compared with their rows.
    pub compared: u64,
    /// Rows that are not as Stripe has them, or were not.
    pub findings: Vec<Finding>,
    /// Requests to Stripe, retries aside.
    pub calls: u64,
}

impl Report {
    /// How many rows are still wrong.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.findings.iter().filter(|finding| !finding.repaired).count()
    }

    /// How many have this problem.
    #[must_use]
    pub fn count(&self, problem: Problem) -> usize {
        self.findings.iter().filter(|finding| finding.problem == problem).count()
    }
}
