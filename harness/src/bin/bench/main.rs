//! The program behind `scripts/bench`. It measures how fast ingress and the worker are, compared
//! with what the machine allows.
//!
//! Every measurement runs its contenders in turns, several times within a few minutes, each with
//! its own broker and database, and reports their ratio: absolute figures depend on the machine.
#![expect(
    clippy::print_stdout,
    reason = "people read its output, which is tables"
)]

mod end_to_end;
mod growth;
mod half_load;
mod idle;
mod ingress;
mod instructions;
mod load;
mod pool;
mod reference;
mod report;
mod rig;
mod scaling;
mod signals;
mod usage;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use litestripe_harness::bridge::DatabaseKind::{Postgres, Sqlite};
use litestripe_harness::tools;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::instructions::Step;
use crate::load::Load;
use crate::pool::{Events, Kind};
use crate::reference::Reference;
use crate::report::Measurement;

/// Measures ingress and the worker against the simplest programs that do the same work.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    /// Run for about three minutes, for a first impression.
    #[arg(long)]
    quick: bool,
    /// Run only the measurements with this text in their name.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Write the figures to this file, as JSON [default: docs/bench.json; none with --quick or
    /// --only].
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A folder with the programs of an earlier build, for `end-to-end` to run in turns with these.
    #[arg(long, value_name = "FOLDER")]
    before: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Run a program to compare with. The bench starts it itself.
    #[command(subcommand, hide = true)]
    Reference(Reference),
    /// Only send load, to an ingress that already runs under a profiler, with the harness's hook
    /// and secret.
    #[command(hide = true)]
    Load {
        address: SocketAddr,
        connections: usize,
        seconds: u64,
    },
    /// Fill a stream with this many events of new subscriptions, for a worker under a profiler.
    #[command(hide = true)]
    Fill { nats: String, count: usize },
    /// Repeat one step of processing an event this many times, for valgrind.
    #[command(hide = true)]
    Repeat { step: Step, times: u32 },
}

/// How long to measure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Quick,
    Full,
}

impl Mode {
    pub(crate) fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }
}

/// Returns the order of the contenders in each round. Every second round is reversed, so that no
/// contender always follows the same other one.
pub(crate) fn in_turns(mode: Mode, contenders: &[&'static str]) -> Vec<Vec<&'static str>> {
    let round = |number: usize| {
        let mut order = contenders.to_vec();
        if !number.is_multiple_of(2) {
            order.reverse();
        }
        order
    };
    (0..mode.pick(1, 5)).map(round).collect()
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.role {
        // A reference may use all cores, like the programs that it is compared with.
        Some(Role::Reference(reference)) => {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
            runtime.block_on(reference.run());
            ExitCode::SUCCESS
        }
        Some(Role::Load {
            address,
            connections,
            seconds,
        }) => on_one_thread(send_load(address, connections, seconds)),
        Some(Role::Fill { nats, count }) => on_one_thread(fill(&nats, count)),
        Some(Role::Repeat { step, times }) => {
            step.repeat(times);
            ExitCode::SUCCESS
        }
        None => on_one_thread(bench(&arguments)),
    }
}

/// Runs `program` on one thread, which leaves the other cores to the measured programs.
fn on_one_thread(program: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime can be made").block_on(program)
}

async fn send_load(address: SocketAddr, connections: usize, seconds: u64) -> ExitCode {
    let number = u64::from(std::process::id());
    let kind = Kind(Box::leak(format!("p{number}x").into_boxed_str()));
    let requests = Arc::new(pool::requests(
        &Events::new(),
        kind,
        30_000 * usize::try_from(seconds).unwrap_or(1),
    ));
    let measured = Duration::from_secs(seconds);
    let load = Load {
        address,
        connections,
        warmup: Duration::from_secs(1),
        measured,
        status: 200,
        rate: None,
    };
    match load.send(&requests, false).await {
        Ok(answered) => {
            let percentile = |share| load::percentile(&answered.latencies_us, share);
            println!(
                "{:.0} events/s, p50 {} µs, p99 {} µs",
                answered.rate(),
                percentile(0.5),
                percentile(0.99)
            );
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("{problem}");
            ExitCode::FAILURE
        }
    }
}

async fn fill(nats: &str, count: usize) -> ExitCode {
    let client = async_nats::connect(nats)
        .await
        .map_err(|problem| problem.to_string());
    let filled = match client {
        Ok(client) => {
            rig::fill_with_new(async_nats::jetstream::new(client), &Events::new(), count).await
        }
        Err(problem) => Err(problem),
    };
    match filled {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            println!("{problem}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(arguments: &Arguments) -> ExitCode {
    tokio::select! {
        code = measure(arguments) => code,
        // Dropping the measurement ends all processes that it started.
        _ = tokio::signal::ctrl_c() => ExitCode::from(130),
    }
}

async fn measure(arguments: &Arguments) -> ExitCode {
    let mode = if arguments.quick {
        Mode::Quick
    } else {
        Mode::Full
    };
    if cfg!(debug_assertions) {
        println!(
            "This is a debug build: its figures mean nothing. Use scripts/bench, which makes a release build."
        );
    }
    let events = Events::new();
    let mut measured = Vec::new();
    let mut has_failed = false;
    macro_rules! measurements {
        ($($name:literal: $measurement:expr;)*) => {
            $(if arguments.only.as_deref().is_none_or(|part| $name.contains(part)) {
                match $measurement.await {
                    Ok(measurement) => print_and_keep(measurement, &mut measured),
                    Err(problem) => {
                        has_failed = true;
                        println!("\n{}: cannot be measured: {problem}", $name);
                    }
                }
            })*
        };
    }
    measurements! {
        "ingress": ingress::accepted(mode, &events);
        "bad signatures": ingress::refused(mode, &events);
        "ingress, synced": ingress::synced(mode, &events);
        "worker, PostgreSQL": worker::applied("worker, PostgreSQL", Postgres, mode, &events);
        "worker, SQLite": worker::applied("worker, SQLite", Sqlite, mode, &events);
        "replay, PostgreSQL": worker::replayed("replay, PostgreSQL", Postgres, mode, &events);
        "replay, SQLite": worker::replayed("replay, SQLite", Sqlite, mode, &events);
        "HTTP to signal": half_load::signalled(mode, &events);
        "end-to-end": end_to_end::signalled(mode, &events, arguments.before.as_deref());
        "scaling": scaling::scaled(mode, &events);
        "growth, PostgreSQL": growth::with_large_tables("growth, PostgreSQL", Postgres, mode, &events);
        "growth, SQLite": growth::with_large_tables("growth, SQLite", Sqlite, mode, &events);
        "idle": idle::idle(mode);
    }
    if instructions::are_countable() {
        measurements! { "instructions": instructions::counted(); }
    }
    if mode == Mode::Full {
        measurements! {
            "growth of the stream": growth::with_large_stream(mode, &events);
            "outage": worker::caught_up(&events);
        }
    }
    let is_whole = mode == Mode::Full && arguments.only.is_none() && !has_failed;
    let default =
        is_whole.then(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bench.json").into());
    if let Some(path) = arguments.json.clone().or(default) {
        let text = format!("{:#}\n", document(mode, &measured));
        if let Err(problem) = std::fs::write(&path, text) {
            has_failed = true;
            println!("cannot write {}: {problem}", path.display());
        }
    }
    if has_failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn print_and_keep(measurement: Measurement, measured: &mut Vec<Value>) {
    println!("{}", measurement.tables());
    measured.push(measurement.json());
}

fn document(mode: Mode, measured: &[Value]) -> Value {
    json!({
        "measured_at": OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
        "mode": mode.pick("quick", "full"),
        "machine": {
            "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            "processor": processor(),
            "nats_server": version(tools::nats_server().ok().map(PathBuf::from)),
            "postgres": version(tools::postgres_bin().ok().map(|folder| folder.join("postgres"))),
        },
        "measurements": measured,
    })
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model
        .map(|(_, name)| name.trim().to_owned())
        .unwrap_or_default()
}

fn version(program: Option<PathBuf>) -> String {
    let output = program.and_then(|program| {
        std::process::Command::new(program)
            .arg("--version")
            .output()
            .ok()
    });
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
