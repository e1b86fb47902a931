//! Settings that no program reads.

use std::fs;

use litestripe_harness::bridge::DatabaseKind;

use super::{Healthy, examine};

#[tokio::test]
async fn misspelt_setting_of_the_environment_or_dotenv_is_named_with_the_one_that_is_meant() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let misspelt = healthy.doctor().env("LITESTRIPE_ORPHAN_GRCAE", "hunter2");
    let report = examine(misspelt).await;
    report.check(
        "settings",
        &["LITESTRIPE_ORPHAN_GRCAE", "LITESTRIPE_ORPHAN_GRACE if"],
    );
    assert!(!report.finished.stdout.contains("hunter2"), "{report:?}");

    let folder = tempfile::tempdir().expect("a folder can be made");
    let lines = "STRIPE_SECERT_KEY=hunter2\nSTRIPE_PUBLIC_KEY=pk_1\nLITESTRIPE_NOTHING=\nTITLE=x\n";
    fs::write(folder.path().join(".env"), lines).expect("it can be written");
    let report = examine(healthy.doctor().folder(folder.path())).await;
    report.check(
        "settings",
        &["STRIPE_SECERT_KEY", "STRIPE_SECRET_KEY if", ".env"],
    );
    assert!(!report.finished.stdout.contains("hunter2"), "{report:?}");
}

/// Every setting of both programs, and what compose.yml and the scripts read.
#[tokio::test]
async fn setting_of_any_program_is_no_fault() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let of_ingress = litestripe_ingress::settings::SETTINGS.iter();
    let of_ingress = of_ingress.map(|setting| setting.name);
    let of_others = [
        "LITESTRIPE_PUBLISH",
        "LITESTRIPE_NATS_SERVER",
        "STRIPE_API_KEY",
        "JS_KEY",
    ];
    // The UUID has its value.
    let names = of_ingress
        .chain(of_others)
        .filter(|name| *name != "STRIPE_WEBHOOK_UUID");
    let doctor = names.fold(healthy.doctor(), |doctor, name| doctor.env(name, "x"));
    examine(doctor).await.check_healthy();
}
