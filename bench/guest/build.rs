//! Strips the programs that goes into the guest: its debug information would
//! be most of the initial RAM file system.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let musl = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl");
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if musl && release {
        println!("cargo::rustc-link-arg-bins=-s");
    }
}
