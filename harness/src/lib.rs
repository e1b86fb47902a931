//! Real servers, our real binaries and Stripe's side of the wire.
//!
//! For the integration and fault tests, the demo, the sender and the benches; no product crate
//! depends on it. Nothing here fakes a broker or a database: a [`nats::Server`] or a
//! [`postgres::Server`] is the real program on 127.0.0.1, with a folder and a port of its own, and
//! both are gone when it is dropped, also after a failed test. What cannot go on panics with the
//! log of the program concerned, because a test has nothing better to do with it.

pub mod bridge;
pub mod eventually;
pub mod nats;
pub mod port;
pub mod postgres;
pub mod process;
pub mod program;
pub mod stripe;
pub mod tools;

pub use eventually::eventually;
