//! Hands the hypervisor's linker script to the bare-metal image.

fn main() {
    println!("cargo:rerun-if-changed=../hypervisor/linker.ld");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
        println!("cargo:rustc-link-arg-bins=-T{root}/../hypervisor/linker.ld");
        println!("cargo:rustc-link-arg-bins=--gc-sections");
    }
}
