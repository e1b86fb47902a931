//! Integration tests against real brokers and databases, with our real programs. One module per
//! feature.

#[macro_use]
mod bridge;
mod any_order;
mod arrows;
mod backfill;
mod budget;
mod credentials;
mod demo;
mod docs;
mod erase;
mod group_commit;
mod growth;
mod infra;
mod ingress;
mod least_privilege;
mod localstripe;
mod locks;
mod operators;
mod orphans;
mod outages;
mod postgres;
mod previous;
mod progress;
mod pull;
mod reconcile;
mod refusals;
mod renderings;
mod replay;
mod resend;
mod room;
mod rows;
mod scale;
mod sdk;
mod stripe_api;
mod thin;
