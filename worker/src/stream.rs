//! All that reads and writes the event stream and the dead letters.
//!
//! Owns JetStream's consumers and messages. May not know what an event means to a row.

pub mod consumer;
pub mod dead_letter;
pub mod own_event;
pub mod progress;
mod pull;
pub(crate) mod scan;
