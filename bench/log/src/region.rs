//! Memory that stands in for a shared region, and the host's clock.
#![expect(unsafe_code, reason = "hands out a leaked buffer as shared memory")]

use std::ptr::NonNull;
use std::time::Instant;

use vmm_shared::log::{Clock, Geometry, Log};
use vmm_shared::shm::SharedMem;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; 4096]);

/// A new log in memory of its own, which is never given back.
pub(crate) fn new_log(geometry: Geometry) -> Log {
    let pages = geometry.total_bytes().div_ceil(4096);
    let memory = Box::leak(vec![Page([0; 4096]); pages].into_boxed_slice());
    let len = size_of_val(memory);
    let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
    // SAFETY: 1. leaked; 2. page-aligned; 3. the only reference ends here.
    let memory = unsafe { SharedMem::new(base, len) };
    Log::create(memory, geometry).expect("large enough")
}

/// Yields when a wait gets long: there may be more threads than processors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostClock(Instant);

impl HostClock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).expect("not for 500 years")
    }
    fn pause(&self, round: u32) {
        if round < 64 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}
