use super::*;

const OURS: &str = "NATS_PASSWORD";

fn read(text: &str) -> Result<Vec<(String, String)>, Vec<String>> {
    parse(text, |name| name == OURS).map_err(|Problems(problems)| problems)
}

/// Checks the value of the only variable, which python-dotenv 1.0 and docker compose 2.40 read
/// alike unless the case says otherwise.
fn check(line: &str, value: &str) {
    for end in ["", "\n", "\r\n", "\nOTHER=1"] {
        let read = read(&format!("{line}{end}")).expect("it can be read");
        assert_eq!(
            read.first(),
            Some(&("A".to_owned(), value.to_owned())),
            "{line}"
        );
    }
}

#[test]
fn values_are_read_as_other_tools_read_them() {
    check("A=plain", "plain");
    check("  export  A = spaced \t", "spaced");
    check("A=My App Name", "My App Name");
    check("A=", "");
    check("A=value # comment", "value");
    check("A=value#part", "value#part");
    check("A=#hash", "#hash");
    check(r#"A=a\b "c" d"#, r#"a\b "c" d"#);
    check("A=it's", "it's");
    check("A=\"two words # part\" # comment", "two words # part");
    check("A='two words # part'# comment", "two words # part");
    check(
        r#"A="a \"quoted\" \n\t word \\ \q""#,
        "a \"quoted\" \n\t word \\ \\q",
    );
    check(r"A='it\'s'", "it's");
    check("A=\"first\nsecond\"", "first\nsecond");
    check("A='first\nsecond'", "first\nsecond");
    check("\u{feff}A=☺", "☺");
    check("# A=comment\n\n\r\nA=value", "value");
    check("A=first\nA=last", "last");
}

#[test]
fn some_values_are_read_differently_by_other_tools() {
    // They take the comment for the value; shells, and the dotenv of Node, do not.
    check("A=   # comment", "");
    // python-dotenv reads one backslash, docker compose two.
    check(r"A='back\\slash'", r"back\\slash");
    // python-dotenv keeps the backslash.
    check(r#"A="\$""#, "$");
}

#[test]
fn a_dollar_sign_is_never_expanded() {
    // docker compose expands it unless it is in single quotes, python-dotenv does not.
    for line in [
        "A=pa$word",
        "A=\"pa$word\"",
        "A='pa$word'",
        r#"A="pa\$word""#,
    ] {
        check(line, "pa$word");
    }
    check("A='${HOME}'", "${HOME}");
    check(r#"A="\${HOME}""#, "${HOME}");
    // All tools expand it, so it is refused.
    for value in ["pre${HOME}", "\"${HOME:-x}\""] {
        let problems = read(&format!("# one\n{OURS}={value}\n")).expect_err("it is refused");
        assert!(
            problems[0].starts_with(".env line 2: NATS_PASSWORD holds ${…}"),
            "{problems:?}"
        );
    }
}

#[test]
fn lines_about_other_tools_never_stop_a_program() {
    let lines = [
        "TITLE=My App Name",
        "APP: of docker compose",
        "EXPANDED=${HOME}/x",
        "OPEN=\"no end",
        "TAIL='a' b",
        "JUST_A_NAME",
        "export EXPORTED",
        "with.dot=1",
        "with-dash=1",
        "AFTER='last'",
    ];
    let read = read(&lines.join("\n")).expect("none of them stops us");
    let names: Vec<_> = read.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["TITLE", "with.dot", "with-dash", "AFTER"]);
}

#[test]
fn each_bad_line_is_named_with_its_number_and_not_shown() {
    let text = "A='over\ntwo lines'\nsome words and hunter2\nNATS_PASSWORD: hunter2\n\
        NATS_PASSWORD='hunter2' hunter2\n=hunter2\nNATS_PASSWORD=\"hunter2\n";
    let problems = read(text).expect_err("most of them are wrong");
    let lines: Vec<_> = problems
        .iter()
        .filter_map(|problem| problem.get(..11))
        .collect();
    assert_eq!(
        lines,
        [
            ".env line 3",
            ".env line 4",
            ".env line 5",
            ".env line 6",
            ".env line 7"
        ]
    );
    assert!(!problems.concat().contains("hunter2"), "{problems:?}");
}

#[test]
fn every_value_reaches_the_environment_unchanged() {
    let values = [
        "",
        " a ",
        "it's",
        "\"",
        r"\",
        r"a\nb",
        "$HOME ${HOME}",
        "a\nb\tc\r",
        "#",
        "☺",
    ];
    for value in values {
        let line = canonical(&("NAME".to_owned(), value.to_owned()));
        let read: Result<Vec<_>, _> = dotenvy::from_read_iter(line.as_bytes()).collect();
        let expected = vec![("NAME".to_owned(), value.to_owned())];
        assert_eq!(read.expect("it can be read"), expected, "{line}");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[A-Z\"'\\\\#=$\\{\\} \t\r\n☺export:.-]{0,40}") {
        let _ = read(&text);
    }
}
