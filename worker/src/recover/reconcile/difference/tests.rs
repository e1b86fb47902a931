//! Tests of which columns differ, and of what repairs them.

use litestripe_domain::merge::State;

use super::*;

const STRIPE: &str = r#"{"status": "active", "client_reference_id": "user_1"}"#;
const RIGHT: &str = r#"{"status": "active", "client_reference_id": "user_1", "metadata": {}}"#;
const WRONG: &str = r#"{"status": "past_due", "client_reference_id": "user_1", "metadata": {}}"#;
const EMPTY: &str = r#"{"status": null, "client_reference_id": null, "metadata": {}}"#;
const MORE: &str =
    r#"{"status": "active", "client_reference_id": "user_1", "metadata": {"created.seats": "1"}}"#;

fn fields(text: &str) -> Fields {
    serde_json::from_str(text).expect("it is an object")
}

fn row(columns: &str, state: Option<&str>) -> RawRow {
    let (columns, expected) = (Some(fields(columns)), state.map(fields));
    RawRow {
        version: 1,
        columns,
        state: expected.as_ref().map(|_| State::default()),
        expected,
        is_withheld: false,
    }
}

#[test]
fn columns_are_compared_with_stripe_and_with_the_merge_state() {
    let check = |columns, state, expected: &[&str], columns_only: bool| {
        let (stripe, row) = (fields(STRIPE), row(columns, state));
        let found: Vec<_> = differences(&stripe, &row)
            .into_iter()
            .map(|difference| difference.field)
            .collect();
        assert_eq!(found, expected, "{columns} over {state:?}");
        assert_eq!(
            only_columns_differ(&stripe, &row),
            columns_only,
            "{columns} over {state:?}"
        );
    };
    check(RIGHT, Some(RIGHT), &[], true);
    check(WRONG, Some(RIGHT), &["status"], true);
    check(WRONG, Some(WRONG), &["status"], false);
    check(RIGHT, Some(WRONG), &["merge_state"], false);
    check(EMPTY, Some(RIGHT), &["client_reference_id", "status"], true);
    check(
        EMPTY,
        Some(EMPTY),
        &["client_reference_id", "status"],
        false,
    );
    // Only the merge state has the expected metadata by event type, unless the state itself is
    // wrong.
    check(MORE, Some(RIGHT), &["metadata"], true);
    check(MORE, Some(WRONG), &["merge_state"], false);
    check(MORE, None, &[], false);
    check(WRONG, None, &["status"], false);
}

#[test]
fn user_that_neither_stripe_nor_the_merge_state_knows_is_only_in_the_column() {
    let check = |stripe, columns, state, expected| {
        assert_eq!(
            only_the_column_knows_the_user(&fields(stripe), &row(columns, state)),
            expected
        );
    };
    check("{}", RIGHT, Some(EMPTY), true);
    check("{}", RIGHT, None, true);
    check(STRIPE, RIGHT, None, false);
    check("{}", RIGHT, Some(WRONG), false);
    check("{}", EMPTY, Some(EMPTY), false);
}

#[test]
fn metadata_difference_shows_only_the_keys() {
    let found = differences(&fields(STRIPE), &row(MORE, Some(RIGHT)));
    assert_eq!(
        (&found[0].row, &found[0].stripe),
        (&json!(["created.seats"]), &json!([]))
    );
}
