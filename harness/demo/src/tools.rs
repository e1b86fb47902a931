//! Finds the programs that the tests run: named by environment variables, else found by
//! `scripts/tools`.
//!
//! `scripts/test` and `scripts/demo` set the variables. A plain `cargo nextest run` works too,
//! because the functions here then call `scripts/tools`, which installs what is missing.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The nats-server program.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn nats_server() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "nats", "LITESTRIPE_NATS_SERVER")
}

/// The nats-server program of the oldest version that Litestripe supports.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn oldest_nats_server() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "oldest-nats", "LITESTRIPE_OLDEST_NATS_SERVER")
}

/// The folder with PostgreSQL's `initdb` and `postgres`.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn postgres_bin() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "postgres", "LITESTRIPE_POSTGRES_BIN")
}

/// The `pgbouncer` program.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn pgbouncer() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "pgbouncer", "LITESTRIPE_PGBOUNCER")
}

/// The `prometheus` program.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the error says why.
pub fn prometheus() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    match std::env::var("LITESTRIPE_PROMETHEUS_MISSING") {
        Ok(why) => Err(io::Error::other(why)),
        Err(_) => locate(&FOUND, "prometheus", "LITESTRIPE_PROMETHEUS"),
    }
}

/// libfaketime's library for `LD_PRELOAD`, which gives a program another clock.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn faketime() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "faketime", "LITESTRIPE_FAKETIME")
}

/// The Python with the packages of `harness/python/requirements.txt`.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn python() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "python", "LITESTRIPE_PYTHON")
}

/// Node.js, which runs the TypeScript programs of `docs/`.
///
/// # Errors
/// When it is missing and `scripts/tools` cannot install it; the script's output is on stderr.
pub fn node() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "node", "LITESTRIPE_NODE")
}

/// The folder with the packages of `harness/typescript/package.json`.
///
/// # Errors
/// When they are missing and `scripts/tools` cannot install them; the script's output is on stderr.
pub fn node_modules() -> io::Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    locate(&FOUND, "node", "LITESTRIPE_NODE_MODULES")
}

fn locate(
    found: &'static OnceLock<PathBuf>,
    part: &str,
    variable: &str,
) -> io::Result<&'static Path> {
    if let Some(path) = found.get() {
        return Ok(path);
    }
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => ask_script(part, variable)?,
    };
    Ok(found.get_or_init(|| path))
}

fn ask_script(part: &str, variable: &str) -> io::Result<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/tools");
    // The script prints shell-quoted `export` lines, so a shell reads them.
    let read = format!(r#"eval "$("$0" {part})" && printf %s "${variable}""#);
    let output = Command::new("bash")
        .args(["-euc", &read, script])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "scripts/tools {part} failed, see its output above"
        )));
    }
    let path = String::from_utf8(output.stdout).map_err(io::Error::other)?;
    Ok(PathBuf::from(path))
}
