//! The start-up of `run` and every command, always in this order: NATS, the database, JetStream's
//! streams, the erasures.
//!
//! Owns which problems the program waits out and which ones end it because an operator has to act.
//! May not know the command line.

pub(crate) mod broker;
pub(crate) mod consume;
pub(crate) mod database;
pub(crate) mod parts;
pub(crate) mod rules;
