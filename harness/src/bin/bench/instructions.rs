//! Counts the instructions of each pure step of processing an event, with valgrind if it is
//! installed. The figures do not depend on the load of the machine, so a step that became slower
//! shows.

use std::hint::black_box;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use litestripe_domain::event::{Event, MetadataKeys, decode};
use litestripe_domain::merge::State;
use litestripe_harness::bridge::SECRET;
use litestripe_ingress::envelope::Envelope;
use litestripe_ingress::signature::{SigningSecret, verify};
use time::OffsetDateTime;

use crate::pool::{self, Events, Kind};
use crate::report::{Measurement, Sample};

const TOLERANCE: Duration = Duration::from_secs(300);

/// Two numbers of repetitions. The difference of their counts does not contain the start of the
/// program.
const FEW: u32 = 100;
const MANY: u32 = 600;

/// A step that the program can repeat.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Step {
    Verify,
    Envelope,
    Decode,
    Merge,
    State,
}

impl Step {
    fn what(self) -> &'static str {
        match self {
            Self::Verify => "ingress: a signature verified",
            Self::Envelope => "ingress: id and type found",
            Self::Decode => "worker: an event decoded",
            Self::Merge => "worker: an event merged, and what is visible",
            Self::State => "worker: a row's state read and written",
        }
    }

    /// Repeats the step `times` times.
    pub(crate) fn repeat(self, times: u32) {
        let (events, kind, now) = (Events::new(), Kind("count"), OffsetDateTime::now_utc());
        let body = Bytes::from(events.body(kind, 0));
        let signature = pool::signature(&body, now.unix_timestamp());
        let secrets = [SigningSecret::new(SECRET)];
        let verified = || {
            verify(
                black_box(&signature),
                body.clone(),
                &secrets,
                now,
                TOLERANCE,
            )
        };
        let genuine = verified().expect("it is signed");
        let event = |body: &[u8]| -> Event {
            decode(black_box(body), &MetadataKeys::All)
                .expect("it is an event")
                .expect("its type is handled")
        };
        let mut state = State::default();
        state.merge(&event(&body));
        let change = event(events.changes().body_of(kind, 1, 0, 1).as_bytes());
        for _ in 0..times {
            match self {
                Self::Verify => drop(black_box(verified())),
                Self::Envelope => drop(black_box(Envelope::read(black_box(&genuine)))),
                Self::Decode => drop(black_box(event(&body))),
                Self::Merge => {
                    let mut merged = state.clone();
                    merged.merge(black_box(&change));
                    drop(black_box(merged.visible()));
                }
                Self::State => {
                    let text = serde_json::to_string(black_box(&state)).expect("a state is JSON");
                    drop(black_box(serde_json::from_str::<State>(&text)));
                }
            }
        }
    }
}

/// Whether valgrind is installed.
pub(crate) fn are_countable() -> bool {
    Command::new("valgrind")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

pub(crate) async fn counted() -> Result<Measurement, String> {
    let mut measured = Measurement::new(
        "instructions",
        "instructions for one event of 4 KiB (valgrind's processor has no SHA extensions; with them, as on most real \
         processors, a signature takes a small part of these)",
    );
    for step in Step::value_variants() {
        let (few, many) = (count(*step, FEW).await?, count(*step, MANY).await?);
        let each = (many - few) / f64::from(MANY - FEW);
        measured.add(
            step.what(),
            Sample {
                instructions: Some(each),
                ..Sample::default()
            },
        );
    }
    Ok(measured)
}

/// Counts the instructions of a program that repeats the step `times` times.
async fn count(step: Step, times: u32) -> Result<f64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let name = step.to_possible_value().expect("no step is hidden");
    let mut valgrind = tokio::process::Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["repeat", name.get_name(), &times.to_string()])
        .kill_on_drop(true);
    let output = crate::rig::bounded("counting", valgrind.output())
        .await?
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    let count = said
        .lines()
        .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.ok_or_else(|| format!("valgrind counted nothing:\n{said}"))
}
