//! Guest memory that costs what is used of it.

use std::cell::RefCell;
use std::collections::HashMap;

use hypervisor::mem::{GuestMemory, GuestMemoryError};
use vmm_shared::addr::Gpa;

/// Guest memory of which only what was written takes room.
pub struct Sparse {
    len: u64,
    pages: RefCell<HashMap<u64, [u8; PAGE]>>,
}

const PAGE: usize = 4096;

impl Sparse {
    /// So many bytes, all zero.
    pub fn new(len: u64) -> Self {
        Self {
            len,
            pages: RefCell::default(),
        }
    }

    /// Calls `access` for each page of the range, with the bytes of the page and
    /// where in the whole access they are.
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
            let offset = (at % PAGE as u64) as usize;
            let size = (PAGE - offset).min(len - done);
            let page = pages.entry(at / PAGE as u64).or_insert([0; PAGE]);
            access(&mut page[offset..offset + size], done);
            done += size;
        }
        Ok(())
    }
}

impl GuestMemory for Sparse {
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
