//! What Stripe's events mean: the pure core of the worker.
//!
//! An event's bytes are decoded ([`event`]) and merged into a row's state ([`merge`]). A batch's
//! effect on each row is planned ([`plan`]): the new columns, the signals of its changes
//! ([`signal`]), its orphans ([`orphan`]) and its open questions ([`question`]). May not know
//! runtimes, databases, brokers, HTTP or the clock: time is an argument. A test checks this in the
//! dependency graph.

pub mod arrival;
pub mod event;
pub mod merge;
pub mod orphan;
pub mod payment;
pub mod plan;
pub mod question;
pub mod row;
pub mod signal;
