//! Faults: whatever part is killed, frozen, cut off or filled up, nothing that was answered 200 is
//! lost, doubled or signalled out of order.
//!
//! The short form is part of every test run. The long form of [`random`] is chosen by the
//! environment:
//!
//!     cargo build --workspace --bins --features litestripe-harness/faults
//!     LITESTRIPE_FAULTS=600 cargo test -p litestripe-harness --features faults --test faults \
//!         -- --nocapture campaign
//!
//! spends 600 seconds on 20 fresh seeds and prints a table; with `LITESTRIPE_SEED=7` besides it
//! spends them on that seed, whose schedule of faults is always the same.

mod broker;
mod check;
mod cluster;
mod database;
mod dead_letters;
mod dice;
mod disk;
#[cfg(feature = "faults")]
mod kill_points;
mod ledger;
mod load;
mod overload;
mod proxy;
mod random;
mod rig;
mod tampering;
