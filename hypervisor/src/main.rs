//! The bare-metal image: the library, entered by its own boot code.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
hypervisor::entry!(hypervisor::node::run);

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is a bare-metal image: build it for x86_64-unknown-none");
    std::process::exit(2);
}
