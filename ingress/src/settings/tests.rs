use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use litestripe_contract::event::HANDLED_TYPES;
use litestripe_contract::settings::{Given, Problems};

use super::{EventTypes, HookId, Settings, read};
use crate::secret::SecretSource;

const UUID: (&str, &str) = (
    "STRIPE_WEBHOOK_UUID",
    "0b7f8c1e-6f0a-4a51-9d55-0a4d3f6b7c21",
);

fn read_from(given: &[(&'static str, &str)]) -> Result<Settings, Problems> {
    let given: Given = given
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    read(given, |_| false)
}

fn problems(given: &[(&'static str, &str)]) -> Vec<String> {
    read_from(given)
        .map(|_| ())
        .expect_err("something is wrong")
        .0
}

#[test]
fn only_the_uuid_is_required() {
    let settings = read_from(&[UUID]).expect("the defaults are valid");
    assert!(
        matches!(settings.secrets, SecretSource::File(path) if path == Path::new("/run/secrets_djstripe/djstripe_webhook_secret"))
    );
    assert_eq!(settings.tolerance, Duration::from_secs(300));
    assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(settings.body_limit, 1 << 20);
    assert!(
        HANDLED_TYPES
            .iter()
            .all(|name| settings.event_types.contains(name))
    );
    assert!(!settings.event_types.contains("invoice.paid"));
}

#[test]
fn every_problem_is_reported_by_name_and_without_its_value() {
    let problems = problems(&[
        ("STRIPE_WEBHOOK_UUID", "hunter2"),
        ("STRIPE_WEBHOOK_SECRET", "hunter2"),
        ("STRIPE_WEBHOOK_TOLERANCE", "hunter2"),
        ("LITESTRIPE_LISTEN", "hunter2"),
        ("LITESTRIPE_EVENT_TYPES", "Hunter2"),
        ("LITESTRIPE_BODY_LIMIT", "hunter2"),
        ("NATS_URL", "nats://user:hunter2@:::"),
        ("LITESTRIPE_LOG_FORMAT", "hunter2"),
    ]);
    let names: Vec<_> = problems
        .iter()
        .filter_map(|problem| problem.split(' ').next())
        .collect();
    assert_eq!(
        names,
        [
            "STRIPE_WEBHOOK_UUID",
            "STRIPE_WEBHOOK_SECRET",
            "STRIPE_WEBHOOK_TOLERANCE",
            "LITESTRIPE_LISTEN",
            "LITESTRIPE_EVENT_TYPES",
            "LITESTRIPE_BODY_LIMIT",
            "NATS_URL",
            "LITESTRIPE_LOG_FORMAT"
        ]
    );
    assert!(!problems.concat().to_lowercase().contains("hunter2"));
}

#[test]
fn a_missing_secret_is_reported_with_the_other_problems() {
    let problems = problems(&[]);
    assert!(
        problems
            .iter()
            .any(|problem| problem.starts_with("STRIPE_WEBHOOK_UUID is missing")),
        "{problems:?}"
    );
    assert!(
        problems
            .iter()
            .any(|problem| problem.starts_with("STRIPE_WEBHOOK_SECRET is missing")),
        "{problems:?}"
    );
    let given: Given = [
        ("LITESTRIPE_LISTEN", "no".to_owned()),
        (UUID.0, UUID.1.to_owned()),
    ]
    .into_iter()
    .collect();
    let Problems(problems) = read(given, |_| true)
        .map(|_| ())
        .expect_err("the address is wrong");
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn a_file_that_can_be_read_once_is_left_for_the_start() {
    let given: Given = [(UUID.0, UUID.1.to_owned())].into_iter().collect();
    let asked = Cell::new(false);
    let settings = read(given, |_| asked.replace(true));
    assert!(settings.is_ok() && !asked.get());
}

#[test]
fn a_uuid_is_accepted_with_hyphens_in_either_case() {
    let id = HookId::parse(UUID.1).expect("it is a UUID");
    assert_eq!(HookId::parse(&UUID.1.to_uppercase()), Some(id));
    for other in [
        &UUID.1.replace('-', ""),
        &format!("{{{}}}", UUID.1),
        &format!("urn:uuid:{}", UUID.1),
        "",
        "é",
    ] {
        assert_eq!(HookId::parse(other), None, "{other}");
    }
    assert!(!format!("{id:?}").contains("0b7f"));
}

#[test]
fn event_types_are_a_list_or_an_asterisk() {
    let check = |text: &str, expected: Option<EventTypes>| {
        assert_eq!(EventTypes::parse(text), expected, "{text}")
    };
    let some = |names: &[&str]| {
        Some(EventTypes::Some {
            types: names
                .iter()
                .copied()
                .map(str::to_owned)
                .collect::<BTreeSet<_>>(),
            prefixes: Vec::new(),
        })
    };
    check("*", Some(EventTypes::All));
    check("invoice.paid", some(&["invoice.paid"]));
    check(
        "invoice.paid, customer.deleted",
        some(&["customer.deleted", "invoice.paid"]),
    );
    for wrong in [
        "",
        "*.paid",
        "invoice.*.paid",
        "invoice*",
        ".*",
        "invoice.paid,",
        "*,invoice.paid",
        "Invoice.paid",
        "all",
        "invoice.paid,any",
    ] {
        check(wrong, None);
    }
}

#[test]
fn a_body_limit_has_bounds() {
    let limit = |text| {
        read_from(&[UUID, ("LITESTRIPE_BODY_LIMIT", text)])
            .map(|settings| settings.body_limit)
            .ok()
    };
    assert_eq!(limit("1KiB"), Some(1024));
    assert_eq!(limit("32MiB"), Some(32 << 20));
    for wrong in ["1023", "0", "33MiB", "-1", "much"] {
        assert_eq!(limit(wrong), None, "{wrong}");
    }
}

#[test]
fn an_asterisk_at_the_end_stands_for_any_rest() {
    let types = EventTypes::parse("ping, invoice.*").expect("they are types");
    for (name, is_stored) in [
        ("ping", true),
        ("invoice.paid", true),
        ("invoice.payment.overpaid", true),
        ("invoice", false),
        ("invoice.", false),
        ("invoiceitem.created", false),
        ("v1.invoice.paid", false),
    ] {
        assert_eq!(types.contains(name), is_stored, "{name}");
    }
}

#[test]
fn thin_events_that_the_worker_handles_are_stored_by_default() {
    let types = EventTypes::handled();
    for (name, is_stored) in [
        ("v1.customer.subscription.updated", true),
        ("v1.customer.subscription.item_price_changed", true),
        ("v1.customer.subscription.something_new", true),
        ("v1.checkout.session.completed", true),
        ("v1.checkout.session.something_new", false),
        ("v1.customer.updated", false),
        ("v2.core.health.api_error", false),
        ("customer.subscription.something_new", false),
    ] {
        assert_eq!(types.contains(name), is_stored, "{name}");
    }
}
