//! One start-up for `run` and every command, in one order: NATS, the database, JetStream's streams,
//! the erasures.
//!
//! Owns what is waited for and what is refused at once: what fails here needs a person. May not know the
//! command line.

pub(crate) mod broker;
pub(crate) mod consume;
pub(crate) mod database;
pub(crate) mod parts;
