//! What brings rows and subscribers back after an outage.
//!
//! Owns the four ways: events of the stream applied again (`replay`), events that never arrived fetched
//! from Stripe (`backfill`), rows compared with Stripe's subscriptions (`reconcile`), and rows
//! signalled once more (`resend`). May not know the command line.

pub mod backfill;
pub mod reconcile;
pub mod replay;
pub mod resend;
