use std::path::Path;

use clap::ValueEnum as _;

use super::{Document, pretty};

#[test]
fn committed_documents_match_the_rust_types() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/signals");
    for document in Document::value_variants() {
        let path = folder.join(document.file_name());
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == pretty(&document.content()) + "\n",
            "{} is stale: run `litestripe-worker schema --write docs/signals`",
            path.display()
        );
    }
}

#[test]
fn no_signal_has_a_field_for_an_email() {
    for document in Document::value_variants() {
        assert!(
            !pretty(&document.content())
                .to_lowercase()
                .contains("\"email"),
            "{document:?}"
        );
    }
}
