//! What Stripe's events mean: the pure core of the worker.
//!
//! An event's bytes are decoded ([`event`]), merged into a row's state ([`merge`]), and what a batch
//! does to each row is planned ([`plan`]): its new columns, the signals of its changes ([`signal`]),
//! its orphans ([`orphan`]) and what has to be asked of others ([`question`]). May not know runtimes,
//! databases, brokers, HTTP or the clock: time is an argument. A test reads the dependency graph and
//! holds the crate to that.

pub mod arrival;
pub mod event;
pub mod merge;
pub mod orphan;
pub mod payment;
pub mod plan;
pub mod question;
pub mod row;
pub mod signal;
