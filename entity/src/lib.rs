//! The tables' shape, as sea-orm entities.
//!
//! Owns columns and their types, nothing else. May not know where rows come from. The migrations
//! create the schema; a test compares it with these entities on both databases. No table has
//! relations.

pub mod backfill;
pub mod dead_letter;
pub mod erasure;
pub mod installation;
pub mod lease;
pub mod orphaned_payment;
pub mod question;
pub mod replay;
pub mod signal_outbox;
pub mod stripe_subscription;
pub mod worker;
