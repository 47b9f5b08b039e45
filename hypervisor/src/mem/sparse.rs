//! Guest memory for tests and fuzzing, of any size: it costs what is used.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::cell::RefCell;

use vmm_shared::addr::Gpa;

use super::guest::{GuestMemory, GuestMemoryError};

const PAGE: usize = 4096;

/// Guest memory from address 0, of which only the pages that were used exist.
#[derive(Debug)]
pub struct SparseMemory {
    len: u64,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE]>>>,
}

impl SparseMemory {
    /// So many bytes, all zero.
    #[must_use]
    pub const fn new(len: u64) -> Self {
        Self {
            len,
            pages: RefCell::new(BTreeMap::new()),
        }
    }

    /// Calls `access` for each page of the range, with the bytes of the page
    /// and where in the whole access they are.
    fn each(
        &self,
        gpa: Gpa,
        len: usize,
        mut access: impl FnMut(&mut [u8], usize),
    ) -> Result<(), GuestMemoryError> {
        let end = gpa.checked_add(len as u64);
        if end.is_none_or(|end| end.0 > self.len) {
            return Err(GuestMemoryError { gpa, len });
        }
        let mut pages = self.pages.borrow_mut();
        let mut done = 0;
        while done < len {
            let at = gpa.0 + done as u64;
            let offset = usize::try_from(at % PAGE as u64).expect("small");
            let size = (PAGE - offset).min(len - done);
            let page = pages.entry(at / PAGE as u64);
            let page = page.or_insert_with(|| Box::new([0; PAGE]));
            access(&mut page[offset..offset + size], done);
            done += size;
        }
        Ok(())
    }
}

impl GuestMemory for SparseMemory {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.each(gpa, into.len(), |bytes, at| {
            into[at..at + bytes.len()].copy_from_slice(bytes);
        })
    }

    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.each(gpa, from.len(), |bytes, at| {
            let len = bytes.len();
            bytes.copy_from_slice(&from[at..at + len]);
        })
    }
}
