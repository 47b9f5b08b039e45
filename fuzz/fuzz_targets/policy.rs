//! Policies, as text and in their binary form.
//!
//! Text that is accepted has a binary form that is accepted, too, and says the
//! same. Bytes that are accepted are their own binary form.

#![no_main]

use control_plane::policy::Policy;
use control_plane::policy::text::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Ok(policy) = Policy::from_bytes(input) {
        assert_eq!(policy.as_bytes(), input);
    }
    let Ok(text) = core::str::from_utf8(input) else {
        return;
    };
    match parse(text) {
        Ok(policy) => assert_eq!(Policy::from_bytes(policy.as_bytes()), Ok(policy)),
        Err(error) => {
            assert!(error.line >= 1 && error.line <= text.lines().count().max(1) + 1);
            assert!(!error.reason.contains('\n'));
        }
    }
});
