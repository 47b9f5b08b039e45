//! The self-test's image: takes a node instead of the hypervisor, and checks
//! by micro-guests what the platform below does with SVM.
//!
//! A *case* has a name, the section of AMD's manual (volume 2) that it checks,
//! and a function that runs a micro-guest ([`lab`]) and compares. Cases say
//! what they find as records in the node's log ([`vmm_shared::selftest`]).
//! One that ends the node, or hangs, is noticed by the launcher, which starts
//! the image again behind it.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod cases;
#[cfg(target_os = "none")]
mod code;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod lab;
#[cfg(target_os = "none")]
mod run;
#[cfg(target_os = "none")]
mod suite;
#[cfg(target_os = "none")]
mod tables;

#[cfg(target_os = "none")]
hypervisor::entry!(run::main);

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is a bare-metal image: build it for x86_64-unknown-none");
    std::process::exit(2);
}
