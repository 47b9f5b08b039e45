//! The programs themselves are right: on this host all of them go well.

use std::process::Command;

#[test]
fn this_host_is_one_machine() {
    let output = Command::new(env!("CARGO_BIN_EXE_viaduct-litmus"))
        .args(["2000", "0,1"])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("ok    ").count(), 17, "{said}");
}
