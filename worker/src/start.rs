//! One start-up for `run` and every command, in one order: NATS, the database, JetStream's streams,
//! the erasures.
//!
//! Owns what is waited for and what is refused at once. May not know the command line.

pub mod broker;
pub mod consume;
pub mod database;
pub mod parts;
