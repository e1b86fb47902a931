//! The law of the merge, over histories as Stripe would tell them, and the cases it rests on.

mod cases;
mod erased;
mod history;
mod law;
mod model;
mod random;
