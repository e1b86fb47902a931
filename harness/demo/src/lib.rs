//! The parts of the demo, the sender and the tests that they share: running a broker and our
//! programs, and playing Stripe.
//!
//! It is a separate crate, so that building the demo compiles none of the tests' large
//! dependencies. The broker is never faked: a [`nats::Server`] is the real program on 127.0.0.1
//! with its own folder and port. Dropping it ends the program and removes the folder, also after a
//! failed test.

pub mod eventually;
pub mod nats;
pub mod port;
pub mod process;
pub mod program;
pub mod stripe;
pub mod tools;

pub use eventually::eventually;
