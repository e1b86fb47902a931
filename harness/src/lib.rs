//! The tests' and the benchmark's support: a whole bridge on real servers, and PostgreSQL.
//!
//! No product crate depends on it. Nothing here fakes a broker or a database: a [`nats::Server`] or a
//! [`postgres::Server`] is the real program on 127.0.0.1, with its own folder and port, and both are gone
//! when it is dropped, also after a failed test. A helper that cannot continue panics with the log of the
//! program concerned, because a test has nothing better to do with it.

pub mod bridge;
pub mod postgres;

pub use litestripe_demo::{eventually, nats, port, process, program, stripe, tools};
