//! Golden files: what a table looked like when somebody last looked at it.
//!
//! `VIADUCT_GOLDEN=write cargo test -p hypervisor --lib` writes them anew; the
//! diff is then for the reviewer.

use std::path::PathBuf;

/// Fails unless `actual` is what the golden file `name` holds.
pub(crate) fn check(name: &str, actual: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("src/platform/golden")
        .join(name);
    if std::env::var_os("VIADUCT_GOLDEN").is_some_and(|mode| mode == "write") {
        std::fs::write(&path, actual).expect("the golden directory is writable");
        return;
    }
    let expected = std::fs::read(&path).expect("golden file, see VIADUCT_GOLDEN");
    if let (Ok(expected), Ok(actual)) = (str::from_utf8(&expected), str::from_utf8(actual)) {
        for (number, (expected, actual)) in (1..).zip(expected.lines().zip(actual.lines())) {
            assert_eq!(actual, expected, "{name}, line {number}");
        }
    }
    let differs = expected.iter().zip(actual).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name}: first byte that differs");
    assert_eq!(actual.len(), expected.len(), "{name}: length");
}
