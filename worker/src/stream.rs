//! All code that reads and writes the event stream and the dead letters.
//!
//! Owns JetStream's consumers and messages. May not know what an event means to a row.

pub(crate) mod consumer;
pub(crate) mod dead_letter;
pub(crate) mod findings;
mod origin;
pub(crate) mod own_event;
pub(crate) mod position;
pub mod progress;
mod pull;
pub(crate) mod room;
pub(crate) mod scan;
pub(crate) mod seen;

pub(crate) use origin::connection;
