//! Memory: frames, page tables, address spaces.

pub(crate) mod entry;
pub(crate) mod frames;
mod list;
pub(crate) mod losses;
pub(crate) mod pages;
pub(crate) mod places;
pub(crate) mod regions;
pub(crate) mod space;
pub(crate) mod tables;

use vmm_shared::addr::PAGE_SIZE;

/// Bytes of a page, as an index.
pub(crate) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// A 64-bit size or offset as an index; the machine is 64-bit.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).expect("64-bit")
}

/// The start of the page that holds an address.
pub(crate) const fn page_down(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// The next page boundary, or `None` beyond the end of the address space.
pub(crate) fn page_up(address: u64) -> Option<u64> {
    address.checked_next_multiple_of(PAGE_SIZE)
}
