//! Support of the tests and the benchmark: a whole bridge on real servers, and PostgreSQL.
//!
//! No product crate depends on it. Broker and database are never faked: a [`nats::Server`] or
//! [`postgres::Server`] is the real program on 127.0.0.1 with its own folder and port. Dropping it
//! ends the program and removes the folder, also after a failed test. Most functions panic on
//! failure and print the log of the program concerned, because a test can do nothing better with an
//! error.

pub mod bridge;
pub mod clock;
pub mod collector;
pub mod pgbouncer;
pub mod postgres;
pub mod prometheus;
pub mod proxy;

pub use litestripe_demo::{eventually, nats, port, process, program, stripe, tools};
