//! Which crate may depend on which, as ARCHITECTURE.md says, checked with `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// The crates that do I/O or bring a runtime: `domain` must not depend on any of them.
const IO: &[&str] = &[
    "tokio",
    "async-nats",
    "sea-orm",
    "sqlx",
    "sqlx-core",
    "warp",
    "hyper",
    "reqwest",
    "tracing",
];

/// The crates that speak SQL.
const SQL: &[&str] = &[
    "sea-orm",
    "sea-query",
    "sqlx",
    "sqlx-core",
    "libsqlite3-sys",
];

#[test]
fn our_crates_depend_on_each_other_in_one_direction_only() {
    let graph = Graph::read();
    let check = |name: &str, expected: &[&str]| {
        let ours = graph
            .direct(name)
            .into_iter()
            .filter_map(|below| below.strip_prefix("litestripe-"));
        assert_eq!(
            ours.collect::<BTreeSet<_>>(),
            expected.iter().copied().collect(),
            "dependencies of {name}"
        );
    };
    check("litestripe-contract", &[]);
    check("litestripe-domain", &["contract"]);
    check("litestripe-entity", &[]);
    check("litestripe-migration", &[]);
    check("litestripe-ingress", &["contract"]);
    check(
        "litestripe-worker",
        &["contract", "domain", "entity", "migration"],
    );
    // What the demo builds: neither the programs as libraries nor the tests' support.
    check("litestripe-demo", &["contract", "entity"]);
}

#[test]
fn domain_reaches_no_runtime_database_broker_or_http() {
    let graph = Graph::read();
    let below = graph.below("litestripe-domain");
    assert!(
        below.contains("litestripe-contract") && below.contains("serde_json"),
        "{below:?}"
    );
    assert_none(&below, IO);
    assert_none(&below, SQL);
}

/// A newcomer waits for the demo to build, so it builds nothing more.
#[test]
fn demo_builds_nothing_that_only_tests_need() {
    let graph = Graph::read();
    let below = graph.below("litestripe-demo");
    assert!(below.contains("sea-orm"), "{below:?}");
    assert_none(&below, &["jsonschema", "divan", "insta", "proptest"]);
}

/// Tests and demo build without jemalloc; a plain `cargo build --release` must have it.
#[test]
fn both_programs_have_their_allocator_by_default() {
    let metadata = metadata();
    for name in ["litestripe-ingress", "litestripe-worker"] {
        let package = list(&metadata["packages"])
            .iter()
            .find(|package| package["name"] == name);
        let default = &package.expect("it is ours")["features"]["default"];
        assert_eq!(*default, serde_json::json!(["jemalloc"]), "{name}");
    }
}

#[test]
fn ingress_cannot_reach_the_database() {
    let graph = Graph::read();
    let below = graph.below("litestripe-ingress");
    assert!(below.contains("async-nats"), "{below:?}");
    assert_none(&below, SQL);
    assert!(
        graph.below("litestripe-worker").contains("sea-orm"),
        "the test can find a SQL crate"
    );
}

#[test]
fn contract_without_its_process_feature_does_no_io() {
    assert_none(&Graph::read().below("litestripe-contract"), IO);
}

fn assert_none(below: &BTreeSet<&str>, banned: &[&str]) {
    let found: Vec<_> = banned
        .iter()
        .filter(|name| below.contains(**name))
        .collect();
    assert!(found.is_empty(), "{found:?} must not be reached");
}

/// The dependencies that are compiled in, without those of tests and build scripts.
struct Graph {
    /// Dependencies by crate: of our own crates without features, of other crates as built in the
    /// workspace.
    edges: BTreeMap<String, BTreeSet<String>>,
    /// The dependencies that the feature `process` adds to `contract`.
    process: BTreeSet<String>,
    /// Our crates that enable that feature.
    with_process: BTreeSet<String>,
}

fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = Command::new(rustc).arg("-vV").output().expect("rustc runs");
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    // Crates for other platforms may never have been downloaded. `--offline` is not used: jemalloc,
    // which only a release needs, may have to be downloaded here.
    let arguments = ["metadata", "--format-version=1", "--locked"];
    let output = Command::new(cargo)
        .args(arguments)
        .args(["--filter-platform", host.expect("rustc names its host")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    let output = output.expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("metadata is JSON")
}

impl Graph {
    fn read() -> Self {
        let metadata = metadata();
        let mut graph = Self {
            edges: BTreeMap::new(),
            process: BTreeSet::new(),
            with_process: BTreeSet::new(),
        };
        let packages = list(&metadata["packages"]);
        let names: BTreeMap<&str, &str> = packages
            .iter()
            .map(|package| (text(package, "id"), text(package, "name")))
            .collect();
        for node in list(&metadata["resolve"]["nodes"]) {
            let normal = list(&node["deps"]).iter().filter(|dep| {
                list(&dep["dep_kinds"])
                    .iter()
                    .any(|kind| kind["kind"].is_null())
            });
            let below = normal.map(|dep| names[text(dep, "pkg")].to_owned());
            // Several versions of one crate count as one.
            graph
                .edges
                .entry(names[text(node, "id")].to_owned())
                .or_default()
                .extend(below);
        }
        for package in packages
            .iter()
            .filter(|package| package["source"].is_null())
        {
            let declared = list(&package["dependencies"])
                .iter()
                .filter(|dep| dep["kind"].is_null());
            let (optional, always): (Vec<_>, Vec<_>) =
                declared.partition(|dep| dep["optional"] == true);
            let own = |deps: &[&Value]| {
                deps.iter()
                    .map(|dep| text(dep, "name").to_owned())
                    .collect::<BTreeSet<_>>()
            };
            if text(package, "name") == "litestripe-contract" {
                graph.process = own(&optional);
            }
            let asks = |dep: &&&Value| {
                list(&dep["features"])
                    .iter()
                    .any(|feature| feature == "process")
            };
            if always.iter().any(|dep| asks(&dep)) {
                graph.with_process.insert(text(package, "name").to_owned());
            }
            graph
                .edges
                .insert(text(package, "name").to_owned(), own(&always));
        }
        graph
    }

    fn direct(&self, name: &str) -> BTreeSet<&str> {
        self.edges[name].iter().map(String::as_str).collect()
    }

    /// All direct and indirect dependencies of `name`.
    fn below(&self, name: &str) -> BTreeSet<&str> {
        let mut below = BTreeSet::new();
        let mut next = self.direct(name);
        if self.with_process.contains(name) {
            next.extend(self.process.iter().map(String::as_str));
        }
        while let Some(name) = next.pop_first() {
            if below.insert(name) {
                next.extend(
                    self.edges
                        .get(name)
                        .into_iter()
                        .flatten()
                        .map(String::as_str),
                );
                if self.with_process.contains(name) {
                    next.extend(self.process.iter().map(String::as_str));
                }
            }
        }
        below
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().expect("cargo gives it as text")
}
