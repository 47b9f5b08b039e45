//! The paravirtual guest reads whatever claims to be its root image.
//!
//! Start with one that mke2fs has made, as the reader's own tests do: from
//! nothing it takes long to get past the super block.

#![no_main]

use std::ptr::NonNull;

use libfuzzer_sys::fuzz_target;
use vmm_shared::shm::SharedMem;

const PAGE: usize = 4096;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; PAGE]);

fuzz_target!(|bytes: &[u8]| {
    let mut pages: Vec<_> = bytes
        .chunks(PAGE)
        .map(|chunk| {
            let mut page = Page([0; PAGE]);
            page.0[..chunk.len()].copy_from_slice(chunk);
            page
        })
        .collect();
    let Some(base) = NonNull::new(pages.as_mut_ptr()) else {
        return;
    };
    // SAFETY: 1. it lives until the end of this; 2. aligned; 3. no reference
    // is made into it meanwhile.
    let image = unsafe { SharedMem::new(base.cast(), pages.len() * PAGE) };
    guest_kernel::fuzzing::root_image(image);
});
