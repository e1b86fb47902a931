//! The report of a walk: the rows that differ from Stripe.
//!
//! Owns the shape of a finding, which `reconcile --json` prints. May not know how one is found.

use serde::Serialize;

use super::Difference;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Problem {
    Different,
    Missing,
    /// Its columns or its merge state cannot be read.
    Unreadable,
    UnknownToStripe,
    /// Stripe's object cannot be stored as an event.
    CannotBeKept,
}

/// A row that differs from Stripe.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    pub stripe_subscription_id: String,
    pub problem: Problem,
    pub repaired: bool,
    pub differences: Vec<Difference>,
    /// An explanation for the operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Finding {
    pub(super) fn new(id: &str, problem: Problem) -> Self {
        let stripe_subscription_id = id.to_owned();
        Self {
            stripe_subscription_id,
            problem,
            repaired: false,
            differences: Vec::new(),
            note: None,
        }
    }

    pub(super) fn unknown_to_stripe(id: &str) -> Self {
        Self::new(id, Problem::UnknownToStripe)
            .with_note("not repairable: Stripe has no such subscription in the account and mode of STRIPE_SECRET_KEY")
    }

    pub(super) fn with_note(self, note: impl Into<String>) -> Self {
        Self {
            note: Some(note.into()),
            ..self
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Stripe's subscriptions that were compared with their rows.
    pub compared: u64,
    pub findings: Vec<Finding>,
    /// Requests to Stripe, without retries.
    pub calls: u64,
}

impl Report {
    pub(crate) fn remaining(&self) -> usize {
        self.findings
            .iter()
            .filter(|finding| !finding.repaired)
            .count()
    }

    pub(crate) fn count(&self, problem: Problem) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.problem == problem)
            .count()
    }
}
