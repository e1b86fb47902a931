use super::*;

fn check(text: &str, expected: &[(&str, Option<&'static str>)]) {
    let types = EventTypes::parse(text).expect("it can be read");
    let expected: Vec<_> = expected
        .iter()
        .map(|(name, near)| ((*name).to_owned(), *near))
        .collect();
    assert_eq!(types.unhandled(), expected, "{text}");
}

#[test]
fn types_that_no_worker_handles_are_found_with_the_nearest_one_that_it_does() {
    check("*", &[]);
    check(
        "customer.subscription.updated, customer.subscription.*, customer.*, v1.*",
        &[],
    );
    check(
        "v1.customer.subscription.item_added, v1.customer.subscription.item.*",
        &[],
    );
    check("customer.deleted, v1.customer.deleted", &[]);
    let updated = Some("customer.subscription.updated");
    check(
        "customer.subscription.update",
        &[("customer.subscription.update", updated)],
    );
    check(
        "customer.subscriptions.updated",
        &[("customer.subscriptions.updated", updated)],
    );
    check(
        "invoice.paid, checkout.sesion.*",
        &[("invoice.paid", None), ("checkout.sesion.*", None)],
    );
    let thin = Some("v1.customer.subscription.*");
    check(
        "v1.customer.subscriptions.*",
        &[("v1.customer.subscriptions.*", thin)],
    );
}

#[test]
fn the_types_that_are_handled_are_all_handled() {
    assert_eq!(EventTypes::handled().unhandled(), []);
}

#[test]
fn a_word_that_can_be_no_type_is_refused() {
    for text in [
        "all",
        "any",
        "customer.subscription.updated,all",
        "true",
        "customer",
        "**",
        ".*",
        "",
    ] {
        assert_eq!(EventTypes::parse(text), None, "{text}");
    }
}
