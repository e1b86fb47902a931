//! What the demo and the sender are made of, and the tests too: real servers, our real programs and
//! Stripe's side of the wire.
//!
//! A crate apart from the tests' own support, so that the demo compiles nothing that it does not run.
//! Nothing here fakes a broker: a [`nats::Server`] is the real program on 127.0.0.1, with its own folder
//! and port, and both are gone when it is dropped, also after a failed test.

pub mod eventually;
pub mod nats;
pub mod port;
pub mod process;
pub mod program;
pub mod stripe;
pub mod tools;

pub use eventually::eventually;
