//! What a moving vCPU is carried in, written by a peer.
#![no_main]

use hypervisor::vcpu::{carry, image_with};
use libfuzzer_sys::fuzz_target;

fn check(bytes: &[u8]) {
    if let Some(once) = carry(bytes) {
        assert_eq!(carry(&once).as_ref(), Some(&once));
    }
}

fuzz_target!(|input: (&[u8], Vec<(u16, u8)>)| {
    let (noise, flips) = input;
    check(noise);
    let mut bytes = image_with(noise);
    for (at, byte) in flips {
        if let Some(place) = bytes.get_mut(usize::from(at)) {
            *place = byte;
        }
    }
    check(&bytes);
});
