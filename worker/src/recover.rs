//! What brings rows and subscribers back after an outage.
//!
//! Owns the four ways: events of the stream applied again (`replay`), events that never arrived fetched
//! from Stripe (`backfill`), rows compared with Stripe's subscriptions (`reconcile`), and rows
//! signalled once more (`resend`). What a replay leaves to be signalled is `owed`'s. May not know the command line.

pub mod backfill;
pub mod owed;
pub mod reconcile;
pub mod replay;
pub mod resend;
