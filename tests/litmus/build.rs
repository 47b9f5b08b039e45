//! Strips the program that goes into the guest.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let musl = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl");
    if musl {
        println!("cargo::rustc-link-arg-bins=-s");
    }
}
