//! The worker's process: arguments, log, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    litestripe_worker::command::main()
}
