//! The demo: what it shows, how it ends, and that it leaves nothing behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use litestripe_harness::process::Signal;
use litestripe_harness::program::{Finished, Launch, Program};
use litestripe_harness::{eventually, tools};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn two_demos_at_once_show_the_story_and_leave_nothing_behind() {
    let folders = [folder(), folder()];
    let launches = folders
        .each_ref()
        .map(|folder| demo(folder).args(["--once", "--pace", "0"]));
    let (one, other) = tokio::join!(launches[0].run(DEADLINE), launches[1].run(DEADLINE));

    for Finished {
        status,
        stdout,
        stderr,
    } in [one, other]
    {
        assert!(status.success(), "{status}\n{stdout}{stderr}");
        assert_eq!(stderr, "");
        assert_eq!(stdout.matches("→ 200 ").count(), 8, "{stdout}");
        assert_eq!(
            stdout.matches("← subscription.changed ").count(),
            8,
            "{stdout}"
        );
        assert_eq!(stdout.matches("← orphan.created ").count(), 1, "{stdout}");
        for shown in [
            "trialing → active",
            "active → canceled",
            "user_4711",
            "rescue-me@example.com",
            "as expected",
        ] {
            assert!(stdout.contains(shown), "{shown} is missing in:\n{stdout}");
        }
        assert!(!stdout.contains('\u{1b}'), "colours outside a terminal");
        for line in stdout.lines() {
            assert!(line.chars().count() <= 100, "too long: {line}");
        }
    }
    for folder in &folders {
        assert_clean(folder);
    }
}

#[tokio::test]
async fn thin_demo_shows_what_is_fetched_and_leads_to_the_same_rows() {
    let folder = folder();
    let finished = demo(&folder)
        .args(["--once", "--thin", "--pace", "0"])
        .run(DEADLINE)
        .await;

    let Finished {
        status,
        stdout,
        stderr,
    } = finished;
    assert!(status.success(), "{status}\n{stdout}{stderr}");
    assert_eq!(stderr, "");
    for shown in [
        "→ 200 v1.checkout.session.completed ",
        "→ 200 v1.customer.subscription.active ",
        "→ 200 v1.customer.subscription.cancel_at_changed ",
        "⇄ GET /v1/checkout/sessions/cs_test_",
        "⇄ GET /v1/subscriptions/sub_1",
        "(for 2 thin events)",
        "trialing → active",
        "active → canceled",
        "user_4711",
        "rescue-me@example.com",
        "as expected",
    ] {
        assert!(stdout.contains(shown), "{shown} is missing in:\n{stdout}");
    }
    assert_eq!(stdout.matches("→ 200 ").count(), 10, "{stdout}");
    assert_eq!(stdout.matches("⇄ GET ").count(), 8, "{stdout}");
    assert_eq!(stdout.matches("← orphan.created ").count(), 1, "{stdout}");
    for line in stdout.lines() {
        assert!(line.chars().count() <= 100, "too long: {line}");
    }
    assert_clean(&folder);
}

#[tokio::test]
async fn interrupted_demo_leaves_nothing_behind() {
    let folder = folder();
    let demo = demo(&folder).args(["--once", "--pace", "30"]).start();
    demo.wait_for_log("← subscription.changed", DEADLINE).await;
    assert_eq!(
        demo_processes(&folder).len(),
        3,
        "broker, ingress and worker run"
    );

    demo.signal(Signal::Int);

    assert_eq!(demo.wait(DEADLINE).await.code(), Some(130));
    assert_clean(&folder);
}

#[tokio::test]
async fn demo_keeps_running_for_the_commands_that_it_prints() {
    let folder = folder();
    let demo = demo(&folder).args(["--pace", "0"]).start();
    demo.wait_for_log("Signals that arrive from now on", DEADLINE)
        .await;

    let sent = printed(&demo.stdout(), "send one event")
        .run(DEADLINE)
        .await;
    assert!(sent.status.success(), "{sent:?}");
    demo.wait_for_log("no status → active", DEADLINE).await;
    let status = printed(&demo.stdout(), "show the worker's status")
        .run(DEADLINE)
        .await;
    assert!(status.status.success(), "{status:?}");
    let orphans = status
        .stdout
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("open orphans"))
        .and_then(|columns| columns.split_whitespace().next());
    assert_eq!(orphans, Some("1"), "{}", status.stdout);
    for log in ["broker.log", "ingress.log", "worker.log"] {
        let log = only_entry(&folder).join(log);
        assert!(
            std::fs::read_to_string(&log).is_ok_and(|log| !log.is_empty()),
            "{} is empty",
            log.display()
        );
    }

    demo.signal(Signal::Int);

    assert_eq!(
        demo.wait(DEADLINE).await.code(),
        Some(0),
        "{}",
        demo.stderr()
    );
    assert_clean(&folder);
}

#[tokio::test]
async fn demo_names_the_program_that_died() {
    let folder = folder();
    let demo = demo(&folder).args(["--pace", "30"]).start();
    demo.wait_for_log("← subscription.changed", DEADLINE).await;
    let worker = demo_processes(&folder)
        .into_iter()
        .find(|process| process.command.contains("litestripe-worker"));
    let worker = worker.expect("the worker runs").id;

    let kill = Program::at("/bin/sh")
        .arg("-c")
        .arg(format!("kill -s KILL {worker}"));
    assert!(kill.run(DEADLINE).await.status.success());

    assert_eq!(demo.wait(DEADLINE).await.code(), Some(1));
    let stderr = demo.stderr();
    assert!(
        stderr.starts_with("demo: the worker ended (signal: 9 (SIGKILL)); its last log lines:\n"),
        "{stderr}"
    );
    assert!(stderr.contains("consuming STRIPE_EVENTS"), "{stderr}");
    assert_clean(&folder);
}

#[tokio::test]
async fn kept_folder_is_named_and_holds_the_database() {
    let folder = folder();
    let finished = demo(&folder)
        .args(["--once", "--keep", "--pace", "0"])
        .run(DEADLINE)
        .await;

    let kept = only_entry(&folder);
    assert!(
        finished.stdout.ends_with(&format!("{}\n", kept.display())),
        "{}",
        finished.stdout
    );
    assert!(kept.join("litestripe.db").exists());
    assert_eq!(demo_processes(&folder), []);
}

/// Without `setpriv` no safe code can guarantee this.
#[tokio::test]
async fn killed_demo_ends_its_programs() {
    let has_setpriv = std::process::Command::new("setpriv")
        .arg("--version")
        .output()
        .is_ok();
    let folder = folder();
    let demo = demo(&folder).args(["--pace", "30"]).start();
    demo.wait_for_log("← subscription.changed", DEADLINE).await;

    demo.kill().await;

    if has_setpriv {
        eventually(
            "the demo's programs to end",
            DEADLINE,
            async || match demo_processes(&folder) {
                none if none.is_empty() => Ok(()),
                left => Err(format!("{left:?}")),
            },
        )
        .await;
    }
}

#[tokio::test]
async fn missing_broker_is_named() {
    let folder = folder();
    let finished = demo(&folder)
        .arg("--once")
        .env("LITESTRIPE_NATS_SERVER", "/nowhere/nats-server")
        .run(DEADLINE)
        .await;

    assert_eq!(finished.status.code(), Some(1));
    assert!(
        finished
            .stderr
            .contains("there is no nats-server at /nowhere/nats-server"),
        "{}",
        finished.stderr
    );
    assert_clean(&folder);
}

/// A demo that makes its folder in `folder`.
fn demo(folder: &TempDir) -> Launch {
    let nats_server = tools::nats_server().expect("scripts/tools finds or installs one");
    Program::named("demo")
        .env("TMPDIR", folder.path())
        .env("LITESTRIPE_NATS_SERVER", nats_server)
}

fn folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("litestripe-demo-test-")
        .tempdir()
        .expect("a folder can be made")
}

/// The command that the demo prints under `title`.
fn printed(stdout: &str, title: &str) -> Launch {
    let (_, after) = stdout.split_once(title).expect("the command has a title");
    let lines: Vec<&str> = after.lines().skip(1).collect();
    let more = lines.iter().take_while(|line| line.ends_with('\\')).count();
    let command = lines.get(..=more).expect("a command ends").join("\n");
    Program::at("/bin/sh").arg("-c").arg(command)
}

#[derive(Debug, PartialEq)]
struct Running {
    id: u32,
    command: String,
}

/// The running programs of the demo in `folder`: their working directory is in it, or their command
/// line names it.
fn demo_processes(folder: &TempDir) -> Vec<Running> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // Either fails for a process that has ended meanwhile.
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let place = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if place.starts_with(folder.path()) || command.contains(&*folder.path().to_string_lossy()) {
            found.push(Running { id, command });
        }
    }
    found
}

fn assert_clean(folder: &TempDir) {
    assert_eq!(demo_processes(folder), []);
    assert_eq!(entries(folder.path()), Vec::<PathBuf>::new());
}

fn only_entry(folder: &TempDir) -> PathBuf {
    let entries = entries(folder.path());
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.into_iter().next().expect("there is one")
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("it exists");
    entries
        .map(|entry| entry.expect("it can be read").path())
        .collect()
}
