use secrecy::ExposeSecret as _;
use tempfile::TempDir;

use super::super::{Given, Problems, Reader, Setting};
use super::{FILE_BYTES_MAX, Secret};

const KEY: Setting = Setting {
    name: "KEY",
    default: None,
    help: "",
};
const KEY_FILE: Setting = Setting {
    name: "KEY_FILE",
    default: None,
    help: "",
};

/// Accepts what begins with `key:`.
fn parse(text: &str) -> Option<()> {
    text.starts_with("key:").then_some(())
}

fn read(key: Option<&str>, file: Option<&str>) -> Result<Option<Secret>, Problems> {
    let given = [("KEY", key), ("KEY_FILE", file)];
    let given = given.into_iter();
    let given: Given = given
        .filter_map(|(name, text)| Some((name, text?.to_owned())))
        .collect();
    let mut reader = Reader::new(given);
    let found = reader.secret(&KEY, &KEY_FILE, "a key (key:…)", parse);
    reader.finish(Some(found.map(|(secret, ())| secret)))
}

struct File(TempDir);

impl File {
    fn new(content: impl AsRef<[u8]>) -> Self {
        let file = Self(tempfile::tempdir().expect("a folder can be made"));
        file.write(content);
        file
    }

    fn write(&self, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(), content).expect("the folder is ours");
    }

    fn path(&self) -> String {
        self.0.path().join("secret").display().to_string()
    }
}

#[test]
fn a_secret_is_a_text_or_the_content_of_a_file() {
    assert!(read(None, None).is_ok_and(|found| found.is_none()));
    let given = read(Some("key:1"), None)
        .expect("it is a key")
        .expect("it is given");
    assert_eq!(given.at_start().expose_secret(), "key:1");
    assert!(given.reread("a key", parse).is_none());
    for content in ["key:1", "key:1\n", "key:1\r\n"] {
        let file = File::new(content);
        let found = read(None, Some(&file.path()))
            .expect(content)
            .expect(content);
        assert_eq!(found.at_start().expose_secret(), "key:1");
        file.write("key:2\n");
        let text = |text: &str| Some(text.to_owned());
        let again = found.reread("a key", text).expect("it has a file");
        assert_eq!(again.expect("it can be read"), "key:2");
        assert_eq!(found.at_start().expose_secret(), "key:1");
    }
}

/// Checks the one problem of a file with this content.
fn check_refused(content: impl AsRef<[u8]>, why: &str) {
    let file = File::new(content);
    let Problems(problems) = read(None, Some(&file.path())).map(|_| ()).expect_err(why);
    let expected = format!(
        "KEY_FILE names {}, which cannot be used: {why}",
        file.path()
    );
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with(&expected), "{problems:?}");
    // Later it is an error that its caller logs.
    let valid = File::new("key:1");
    let secret = read(None, Some(&valid.path()))
        .expect("a key")
        .expect("given");
    valid.write(std::fs::read(file.path()).expect("it is there"));
    let error = secret
        .reread("a key (key:…)", parse)
        .expect("it has a file");
    let error = error.expect_err(why);
    assert!(error.source.to_string().starts_with(why), "{error:?}");
    for said in [problems.concat(), format!("{error} {error:?} {secret:?}")] {
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[test]
fn a_file_that_holds_no_secret_is_named_without_its_content() {
    check_refused("", "it is empty");
    check_refused("\n", "it is empty");
    check_refused("hunter2", "it must hold a key (key:…)");
    check_refused("\u{feff}key:hunter2", "it begins with a byte order mark");
    check_refused("key:hunter2\nkey:hunter2\n", "it holds several lines");
    check_refused(b"key:hunter2\xff", "stream did not contain valid UTF-8");
    let large = format!("hunter2{}", "x".repeat(2 * FILE_BYTES_MAX as usize));
    check_refused(large, "it is larger than 64 KiB");
}

#[test]
fn a_missing_file_and_two_sources_are_problems() {
    let missing = File::new("");
    let path = format!("{}-not-there", missing.path());
    let Problems(problems) = read(None, Some(&path))
        .map(|_| ())
        .expect_err("it is missing");
    assert!(problems[0].starts_with(&format!("KEY_FILE names {path}, which")));
    let Problems(problems) = read(Some("key:1"), Some(&path))
        .map(|_| ())
        .expect_err("both");
    assert_eq!(
        problems,
        ["KEY_FILE and KEY are both set: set only one of them"]
    );
}
