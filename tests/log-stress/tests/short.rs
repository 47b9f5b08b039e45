//! The short form of the stress; the long one is run by hand or at night.

use std::process::Command;

#[test]
fn survivors_agree_after_a_few_kills() {
    let output = Command::new(env!("CARGO_BIN_EXE_log-stress"))
        .args(["--kills", "24", "--processes", "3", "--threads", "2"])
        .output()
        .expect("the binary was built for this test");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("replicas equal"), "{text}");
}
