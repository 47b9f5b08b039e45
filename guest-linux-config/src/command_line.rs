//! The guest kernel's command line, and the reason for each word.

use crate::Root;

/// The words that every guest gets.
pub const DEFAULT_WORDS: [(&str, &str); 0] = [];

/// The default command line for a root.
#[must_use]
pub fn command_line(_root: Root, _extra: &str) -> String {
    String::new()
}
