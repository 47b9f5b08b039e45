//! Hands the linker script to the bare-metal image, and makes the vDSO that
//! the kernel maps into programs.

use std::env::var;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed=linker.ld");
    if var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let script = root.join("linker.ld");
        println!("cargo:rustc-link-arg-bins=-T{}", script.display());
        println!("cargo:rustc-link-arg-bins=--gc-sections");
    }
    println!("cargo:rerun-if-changed=vdso");
    make_vdso(&root.join("vdso"), Path::new(&var("OUT_DIR").expect("set")));
}

/// Compiles the vDSO for programs of Linux, which the building machine is one
/// of, whatever the kernel is compiled for.
fn make_vdso(sources: &Path, out: &Path) {
    let rustc = || Command::new(var("RUSTC").expect("cargo sets it"));
    let (object, image) = (out.join("vdso.o"), out.join("vdso.so"));
    run(rustc()
        .args(["--edition=2024", "--crate-type=lib", "--emit=obj"])
        .args(["-Copt-level=3", "-Cpanic=abort", "-Ccodegen-units=1"])
        .args(["-Crelocation-model=pic", "-Coverflow-checks=off"])
        .arg(sources.join("vdso.rs"))
        .arg("-o")
        .arg(&object));
    let libraries = run(rustc().args(["--print", "target-libdir"]));
    let linker = Path::new(libraries.trim()).with_file_name("bin/rust-lld");
    run(Command::new(linker)
        .args(["-flavor", "gnu", "-shared", "-soname=linux-vdso.so.1"])
        .args(["--hash-style=both", "--eh-frame-hdr", "--gc-sections"])
        .args(["-z", "text", "-z", "max-page-size=4096", "--strip-all"])
        .arg(format!("-T{}", sources.join("vdso.ld").display()))
        .arg(&object)
        .arg("-o")
        .arg(&image));
}

/// Runs a command; returns what it prints.
fn run(command: &mut Command) -> String {
    let output = command.output().expect("it can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).expect("paths in UTF-8")
}
