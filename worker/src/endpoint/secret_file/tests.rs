use super::*;

fn exposed(secret: Option<SecretString>) -> Option<String> {
    secret.map(|secret| secret.expose_secret().to_owned())
}

#[test]
fn a_secret_is_added_to_those_that_are_there() {
    let check = |before: &str, after: &str| {
        let added = with(before, "we_2", "whsec_b");
        assert_eq!(added, after);
        assert_eq!(exposed(find(&added, "we_2")).as_deref(), Some("whsec_b"));
    };
    check("", "whsec_b # we_2\n");
    check("whsec_a", "whsec_a\nwhsec_b # we_2\n");
    check("whsec_a # we_1\n", "whsec_a # we_1\nwhsec_b # we_2\n");
    check("# a comment\n\nA=1", "# a comment\n\nA=1\nwhsec_b # we_2\n");
    check("whsec_b # we_2\nwhsec_c\n", "whsec_c\nwhsec_b # we_2\n");
}

#[test]
fn only_the_secrets_of_the_named_endpoints_are_removed() {
    let content = "whsec_a # we_1\r\nwhsec_x # not an id\nwhsec_b # we_12 since May\n\nwhsec_c";
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    assert_eq!(without(content, &ids(&["we_2"])), content);
    assert_eq!(
        without(content, &ids(&["we_1"])),
        "whsec_x # not an id\nwhsec_b # we_12 since May\n\nwhsec_c"
    );
    assert_eq!(
        without(content, &ids(&["we_1", "we_12"])),
        "whsec_x # not an id\n\nwhsec_c"
    );
}

#[test]
fn a_secret_is_found_by_its_endpoint() {
    let check = |line: &str, secret: Option<&str>| {
        assert_eq!(exposed(find(line, "we_1")).as_deref(), secret, "{line}");
    };
    check("whsec_a # we_1", Some("whsec_a"));
    check("  whsec_a#we_1", Some("whsec_a"));
    check("SECRET=\"whsec_a\" # we_1 and more", Some("whsec_a"));
    check("whsec_a # we_12", None);
    check("whsec_a", None);
    check("# we_1", None);
    check("whsec_ # we_1", None);
    check("# whsec_a we_1", None);
}
