//! The hypervisor's own address space: one to one, and no page both writable
//! and executable.
#![expect(unsafe_code, reason = "builds and loads page tables")]

use alloc::alloc::{Layout, alloc_zeroed};
use core::ops::Range;

use vmm_shared::addr::{Hpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::mapper::{MapToError, Mapper};
use x86_64::structures::paging::{
    FrameAllocator, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags as Flags, PhysFrame,
    Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// What a range of the address space is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Instructions: read and execute.
    Code,
    /// Constants: read.
    Constants,
    /// Everything else in RAM or shared memory: read and write, write-back.
    Data,
    /// Device registers: read and write, uncached.
    Device,
}

impl Use {
    fn flags(self) -> Flags {
        // Accessed and dirty from the start: nobody looks at them, and the
        // processor need not set them.
        let common = Flags::PRESENT | Flags::GLOBAL | Flags::ACCESSED;
        match self {
            Self::Code => common,
            Self::Constants => common | Flags::NO_EXECUTE,
            Self::Data => common | Flags::NO_EXECUTE | Flags::WRITABLE | Flags::DIRTY,
            Self::Device => {
                common
                    | Flags::NO_EXECUTE
                    | Flags::WRITABLE
                    | Flags::DIRTY
                    | Flags::NO_CACHE
                    | Flags::WRITE_THROUGH
            }
        }
    }
}

/// A zeroed page from the heap, never given back.
///
/// # Panics
/// If the heap is exhausted.
#[must_use]
pub fn zeroed_page() -> Hpa {
    zeroed_pages(1)
}

/// `count` zeroed pages in a row from the heap, never given back.
///
/// # Panics
/// If the heap is exhausted.
#[must_use]
pub fn zeroed_pages(count: usize) -> Hpa {
    let page = usize::try_from(PAGE_SIZE).expect("a small number");
    let layout = Layout::from_size_align(count * page, page).expect("a page is a valid layout");
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    assert!(!memory.is_null(), "the node's memory is used up");
    Hpa(memory.expose_provenance() as u64)
}

struct Heap;

// SAFETY: each frame comes fresh from the heap and is given out once.
unsafe impl FrameAllocator<Size4KiB> for Heap {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        Some(PhysFrame::containing_address(PhysAddr::new(
            zeroed_page().0,
        )))
    }
}

/// Where shared code is mapped while it is tried: no memory has this address.
const TRIAL: VirtAddr = VirtAddr::new(0x4000_0000_0000);

/// Calls code in a page that other nodes write, and returns what it returns.
/// The page is executable for that long only, and not writable under the
/// address where it is.
///
/// # Safety
/// 1. The page is mapped as data, and its first bytes are code that follows
///    the C calling convention, whatever a peer does in the meantime.
/// 2. Only one core is at work in this address space.
pub unsafe fn call_shared_code(page: Hpa) -> u64 {
    let (root, _) = Cr3::read();
    // SAFETY: 1. the tables lie where their physical address says, as all
    // memory does; 2. nobody else changes them, by the caller's duty.
    let mut tables = unsafe {
        let at = usize::try_from(root.start_address().as_u64()).expect("64-bit");
        let root = &mut *core::ptr::with_exposed_provenance_mut::<PageTable>(at);
        OffsetPageTable::new(root, VirtAddr::zero())
    };
    let trial = Page::<Size4KiB>::containing_address(TRIAL);
    let frame = PhysFrame::containing_address(PhysAddr::new(page.0));
    let flags = Flags::PRESENT | Flags::ACCESSED;
    // SAFETY: nothing else is mapped there, and the page is no secret.
    let mapped = unsafe { tables.map_to(trial, frame, flags, &mut Heap) };
    mapped.expect("nothing is there").flush();
    // Code may have changed since it was last fetched: this serialises.
    super::cpu::serialize();
    // SAFETY: a function without arguments, by the caller's duty.
    let returned = unsafe {
        let code: extern "sysv64" fn() -> u64 = core::mem::transmute(TRIAL.as_u64());
        code()
    };
    let (_, flush) = tables.unmap(trial).expect("just mapped");
    flush.flush();
    returned
}

/// The page tables while they are being built.
pub struct AddressSpace {
    tables: OffsetPageTable<'static>,
    root: Hpa,
}

impl AddressSpace {
    /// An address space with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        let root = zeroed_page();
        // SAFETY: 1. the page is zeroed, so a valid table; 2. nobody else has
        // it; 3. all memory is mapped one to one, now and later.
        let tables = unsafe {
            let root = &mut *core::ptr::with_exposed_provenance_mut::<PageTable>(
                usize::try_from(root.0).expect("64-bit"),
            );
            OffsetPageTable::new(root, VirtAddr::zero())
        };
        Self { tables, root }
    }

    /// Maps a range one to one, in large pages where it can.
    ///
    /// # Panics
    /// If part of the range is mapped already, or it is not page-aligned.
    pub fn map(&mut self, range: Range<Hpa>, purpose: Use) {
        assert!(
            range.start.is_aligned(PAGE_SIZE) && range.end.is_aligned(PAGE_SIZE),
            "ranges are whole pages"
        );
        let mut at = range.start;
        while at < range.end {
            let large = at.is_aligned(LARGE_PAGE_SIZE) && range.end.0 - at.0 >= LARGE_PAGE_SIZE;
            let size = if large {
                self.map_page::<Size2MiB>(at, purpose);
                LARGE_PAGE_SIZE
            } else {
                self.map_page::<Size4KiB>(at, purpose);
                PAGE_SIZE
            };
            at = Hpa(at.0 + size);
        }
    }

    fn map_page<S>(&mut self, at: Hpa, purpose: Use)
    where
        S: PageSize + core::fmt::Debug,
        OffsetPageTable<'static>: Mapper<S>,
    {
        let page = Page::<S>::containing_address(VirtAddr::new(at.0));
        let frame = PhysFrame::containing_address(PhysAddr::new(at.0));
        // SAFETY: the new mapping shows memory under its own address, with
        // the rights that its one purpose needs.
        let done: Result<_, MapToError<S>> =
            unsafe { self.tables.map_to(page, frame, purpose.flags(), &mut Heap) };
        // Not loaded yet, or not mapped before: there is nothing to flush.
        done.expect("ranges do not overlap").ignore();
    }

    /// The same without the pages at `guards`, in order: running into one
    /// faults.
    ///
    /// # Panics
    /// As [`map`](Self::map).
    pub fn map_around(&mut self, range: Range<Hpa>, guards: &[Hpa], purpose: Use) {
        let mut start = range.start;
        for guard in guards.iter().filter(|guard| range.contains(guard)) {
            self.map(start..*guard, purpose);
            start = Hpa(guard.0 + PAGE_SIZE);
        }
        self.map(start..range.end, purpose);
    }

    /// The value of CR3 for this address space.
    #[must_use]
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// Makes this the address space of the calling core.
    ///
    /// # Safety
    /// Code, stack and all data in use must be mapped.
    pub unsafe fn load(&self) {
        let frame = PhysFrame::containing_address(PhysAddr::new(self.root.0));
        // SAFETY: the caller's duty.
        unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    }
}

impl Default for AddressSpace {
    fn default() -> Self {
        Self::new()
    }
}
