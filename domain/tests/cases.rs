//! Recorded cases: `cases/<name>.json` is a webhook's body as Stripe sends it, and
//! `cases/<name>.expect` the expected result of applying it, alone, to an empty row.
//!
//! A new API version is two files and no code. An expectation has the keys
//! - `subscription` and `access`: the row, for an event that concerns one;
//! - `session`: the Checkout Session as it is read, in addition to the row if there is one;
//! - `notification`: what a thin event is about;
//! - `ignored`: an event of a type that we do not handle;
//! - `poison`: for an event that can never be applied, the field that the reason names.
//!
//! Personal data is marked PERSONAL in every body. Nothing with this mark may be kept.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};

use litestripe_contract::signal::Access;
use litestripe_domain::event::{self, Body, DecodeError, Event, MetadataKeys, NotifiedObject};
use litestripe_domain::merge::State;
use litestripe_domain::signal;
use serde_json::{Value, json};

/// The mark in a name, an address, an email, a phone number or a free text of a case's body.
const PERSONAL: &str = "PERSONAL";

#[test]
fn every_case_reads_as_expected() {
    check_all(|case| {
        let (expected, read) = (case.expected()?, reading(&case.body)?);
        let same = match (&expected["poison"], &read["poison"]) {
            (Value::String(field), Value::String(reason)) => names(reason, field),
            _ => expected == read,
        };
        if same {
            Ok(())
        } else {
            Err(diff(&pretty(&expected), &pretty(&read)).into())
        }
    });
}

#[test]
fn no_case_leaves_personal_data_behind() {
    check_all(|case| {
        if !String::from_utf8_lossy(&case.body).contains(PERSONAL) {
            return Err("contains nothing marked PERSONAL".into());
        }
        match left_of(&case.body)?
            .into_iter()
            .find(|text| text.contains(PERSONAL))
        {
            None => Ok(()),
            Some(text) => Err(format!("keeps personal data: {text}").into()),
        }
    });
}

/// Reads a body and returns the result in the form of an expectation.
fn reading(body: &[u8]) -> Result<Value, Box<dyn Error>> {
    let event = match decode(body) {
        Ok(Some(event)) => event,
        Ok(None) => return Ok(json!({ "ignored": true })),
        Err(error) => return Ok(json!({ "poison": error.to_string().to_lowercase() })),
    };
    let mut reading = json!({});
    if let Some(id) = event.stripe_subscription_id() {
        let visible = applied(&event).visible();
        let mut row = serde_json::to_value(&visible.subscription)?;
        row["stripe_subscription_id"] = json!(id);
        row["checkout_session_id"] = json!(visible.checkout_session_id);
        reading["subscription"] = row;
        reading["access"] = json!(Access::from_status(visible.subscription.status.as_deref()));
    }
    if let Body::CheckoutSession(session) = &event.body {
        reading["session"] = json!({
            "id": session.id,
            "mode": session.mode,
            "payment_status": session.payment_status,
            "is_paid": session.is_paid(),
            "client_reference_id": session.client_reference_id,
            "stripe_customer_id": session.stripe_customer_id,
            "stripe_subscription_id": session.stripe_subscription_id,
        });
    }
    if let Body::Notification(notification) = &event.body {
        let kind = match notification.object {
            NotifiedObject::Subscription(_) => "subscription",
            NotifiedObject::CheckoutSession(_) => "checkout.session",
        };
        reading["notification"] = json!({
            "object": kind,
            "id": notification.object.id(),
            "context": notification.context,
            "stripe_account_id": event.stripe_account_id,
            "created": signal::reference(&event).created,
            "livemode": event.livemode,
        });
    }
    Ok(reading)
}

/// Returns everything that is kept of a body or could be seen: the row, its merge state, a log
/// line.
fn left_of(body: &[u8]) -> Result<Vec<String>, Box<dyn Error>> {
    match decode(body) {
        Ok(None) => Ok(vec![]),
        Ok(Some(event)) => {
            let state = applied(&event);
            let row = serde_json::to_string(&state.visible().subscription)?;
            Ok(vec![
                row,
                serde_json::to_string(&state)?,
                format!("{event:?}"),
            ])
        }
        Err(error) => {
            let causes = iter::successors(Some(&error as &dyn Error), |&error| error.source());
            Ok(causes
                .map(ToString::to_string)
                .chain([format!("{error:?}")])
                .collect())
        }
    }
}

fn decode(body: &[u8]) -> Result<Option<Event>, DecodeError> {
    event::decode(body, &MetadataKeys::All)
}

fn applied(event: &Event) -> State {
    let mut state = State::default();
    state.merge(event);
    state
}

/// Returns whether `reason` names `field`, by its whole path or by the end of it.
fn names(reason: &str, field: &str) -> bool {
    reason.match_indices(field).any(|(at, _)| {
        reason[..at].ends_with(['`', '.']) && reason[at + field.len()..].starts_with('`')
    })
}

struct Case {
    name: String,
    body: Vec<u8>,
    expect: PathBuf,
}

impl Case {
    fn expected(&self) -> Result<Value, Box<dyn Error>> {
        let text = fs::read(&self.expect)
            .map_err(|error| format!("{}: {error}", self.expect.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Runs `check` on every case and lists all that fail.
fn check_all(check: impl Fn(&Case) -> Result<(), Box<dyn Error>>) {
    let cases = cases();
    assert!(!cases.is_empty(), "there are no cases");
    let mut failed = String::new();
    let mut count = 0;
    for case in &cases {
        if let Err(error) = check(case) {
            count += 1;
            writeln!(failed, "--- {}\n{error}", case.name).expect("a string takes any text");
        }
    }
    assert!(
        failed.is_empty(),
        "{count} of {} cases failed\n{failed}",
        cases.len()
    );
}

/// Returns the cases by name. A case without a body gets an empty one, which does not decode.
fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let files = fs::read_dir(&folder).expect("the folder of cases is in the repository");
    let paths = files.map(|file| file.expect("a folder just opened lists its files").path());
    let stems: BTreeSet<PathBuf> = paths.map(|path| path.with_extension("")).collect();
    let case = |stem: PathBuf| Case {
        name: stem
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        body: fs::read(stem.with_extension("json")).unwrap_or_default(),
        expect: stem.with_extension("expect"),
    };
    stems.into_iter().map(case).collect()
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

/// Formats the lines that only `expected` has (`-`) or only `read` has (`+`), with their
/// neighbours.
fn diff(expected: &str, read: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), read.lines().collect());
    let lines = edits(&old, &new);
    let near = |at: usize| {
        let from = at.saturating_sub(2);
        lines[from..(at + 3).min(lines.len())]
            .iter()
            .any(|(mark, _)| *mark != ' ')
    };
    let mut text = String::new();
    for (_, (mark, line)) in lines.iter().enumerate().filter(|(at, _)| near(*at)) {
        writeln!(text, "{mark} {line}").expect("a string takes any text");
    }
    text
}

/// Merges the lines of both, by their longest common subsequence.
fn edits<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<(char, &'a str)> {
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(('-', old[i]));
            i += 1;
        } else {
            lines.push(('+', new[j]));
            j += 1;
        }
    }
    lines
}
