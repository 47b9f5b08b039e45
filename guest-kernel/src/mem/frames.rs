//! Page frames: the VM's RAM, counted, and the root image's pages, which are
//! used in place, read-only and for ever.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::AtomicU64;

use vmm_shared::addr::PAGE_SIZE;
use vmm_shared::shm::SharedMem;

use super::{PAGE, index};

/// A page frame by its guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frame(pub(crate) u64);

/// The free frames of a piece of RAM.
#[derive(Debug)]
struct Pool {
    node: u32,
    all: Range<u64>,
    /// Frames given back, by their numbers.
    free: Vec<u32>,
    /// Frames never used yet.
    fresh: Range<u64>,
}

impl Pool {
    fn take(&mut self) -> Option<u64> {
        if let Some(number) = self.free.pop() {
            return Some(number.into());
        }
        let start = self.fresh.start;
        if self.fresh.is_empty() {
            return None;
        }
        self.fresh.start += PAGE_SIZE;
        Some(start / PAGE_SIZE)
    }
}

/// All frames.
#[derive(Debug)]
pub(crate) struct Frames {
    /// RAM from guest physical address 0 on.
    ram: SharedMem,
    image: Option<SharedMem>,
    image_base: u64,
    /// Uses of each frame of RAM.
    counts: Vec<u32>,
    /// Free frames, by pieces of RAM.
    pools: Vec<Pool>,
    /// Frames without a use that a processor may still have a translation to.
    leaving: Vec<u32>,
    /// The node whose frames are given first.
    preferred: u32,
    total: usize,
    available: usize,
}

impl Frames {
    /// The frames in `usable` ranges of `ram`, each with the node that gives
    /// it, and those of the image.
    pub(crate) fn new(
        ram: SharedMem,
        usable: &[(Range<u64>, u32)],
        image: Option<SharedMem>,
        image_base: u64,
    ) -> Self {
        let limit = ram.len() as u64;
        let clip = |(range, node): &(Range<u64>, u32)| {
            let start = range.start.next_multiple_of(PAGE_SIZE);
            let end = super::page_down(range.end.min(limit));
            (start < end).then_some(Pool {
                node: *node,
                all: start..end,
                free: Vec::new(),
                fresh: start..end,
            })
        };
        let pools: Vec<_> = usable.iter().filter_map(clip).collect();
        let bytes: u64 = pools.iter().map(|pool| pool.all.end - pool.all.start).sum();
        let total = index(bytes / PAGE_SIZE);
        Self {
            counts: vec![0; ram.len() / PAGE],
            ram,
            image,
            image_base,
            pools,
            leaving: Vec::new(),
            preferred: 0,
            total,
            available: total,
        }
    }

    /// A frame of RAM with one use and any contents.
    pub(crate) fn alloc(&mut self) -> Option<Frame> {
        let preferred = self.preferred;
        let near = |pool: &&mut Pool| pool.node == preferred;
        let mut number = self.pools.iter_mut().filter(near).find_map(Pool::take);
        if number.is_none() {
            number = self.pools.iter_mut().find_map(Pool::take);
        }
        let number = number?;
        self.available -= 1;
        self.counts[index(number)] = 1;
        Some(Frame(number * PAGE_SIZE))
    }

    /// A frame of zeros.
    pub(crate) fn alloc_zeroed(&mut self) -> Option<Frame> {
        let frame = self.alloc()?;
        self.page(frame)
            .write_bytes(0, &[0; PAGE])
            .expect("a whole page");
        Some(frame)
    }

    /// A copy of a frame.
    pub(crate) fn alloc_copy(&mut self, from: Frame) -> Option<Frame> {
        let frame = self.alloc()?;
        let mut bytes = [0; PAGE];
        self.page(from)
            .read_bytes(0, &mut bytes)
            .expect("a whole page");
        self.page(frame)
            .write_bytes(0, &bytes)
            .expect("a whole page");
        Some(frame)
    }

    fn count(&self, frame: Frame) -> Option<usize> {
        let number = index(frame.0 / PAGE_SIZE);
        (number < self.counts.len()).then_some(number)
    }

    /// One use more.
    pub(crate) fn share(&mut self, frame: Frame) {
        if let Some(number) = self.count(frame) {
            self.counts[number] += 1;
        }
    }

    /// One use less; without any, the frame is free once things have settled.
    pub(crate) fn release(&mut self, frame: Frame) {
        let Some(number) = self.count(frame) else {
            return;
        };
        self.counts[number] = self.counts[number]
            .checked_sub(1)
            .expect("only frames in use are released");
        if self.counts[number] == 0 {
            self.leaving
                .push(u32::try_from(number).expect("RAM has fewer frames"));
        }
    }

    /// Lets frames without a use be given again: no processor can reach them
    /// any more.
    pub(crate) fn settle(&mut self) {
        self.available += self.leaving.len();
        for number in self.leaving.drain(..) {
            let address = u64::from(number) * PAGE_SIZE;
            let mut pools = self.pools.iter_mut();
            let pool = pools.find(|pool| pool.all.contains(&address));
            pool.expect("frames come from pools").free.push(number);
        }
    }

    /// Gives a node's frames first from now on.
    pub(crate) fn prefer(&mut self, node: u32) {
        self.preferred = node;
    }

    /// Whether a frame has a single use, so that it may be written.
    pub(crate) fn is_exclusive(&self, frame: Frame) -> bool {
        self.count(frame)
            .is_some_and(|number| self.counts[number] == 1)
    }

    /// A frame's memory.
    pub(crate) fn page(&self, frame: Frame) -> SharedMem {
        let in_image = || {
            let offset = frame.0.checked_sub(self.image_base)?;
            self.image?.window(index(offset), PAGE)
        };
        self.ram
            .window(index(frame.0), PAGE)
            .or_else(in_image)
            .expect("frames lie in RAM or in the image")
    }

    /// A 64-bit word of a frame of RAM, such as an entry of a page table.
    pub(crate) fn word(&self, frame: Frame, offset: usize) -> &AtomicU64 {
        self.ram
            .atomic_u64(index(frame.0) + offset)
            .expect("frames in use lie in RAM")
    }

    /// The frame of the image at this offset, if it is all inside.
    pub(crate) fn image_frame(&self, offset: u64) -> Option<Frame> {
        let end = offset.checked_add(PAGE_SIZE)?;
        let image = self.image?;
        (offset.is_multiple_of(PAGE_SIZE) && end <= image.len() as u64)
            .then_some(Frame(self.image_base + offset))
    }

    /// The image, if there is one.
    pub(crate) fn image(&self) -> Option<SharedMem> {
        self.image
    }

    /// Frames that programs and the kernel can use, in all.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Frames that are free.
    pub(crate) fn available(&self) -> usize {
        self.available
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use core::ptr::NonNull;

    /// Frames of memory of the test's, leaked on purpose.
    #[expect(unsafe_code, reason = "makes memory for tests")]
    pub(crate) fn frames(count: usize) -> Frames {
        #[repr(C, align(4096))]
        #[derive(Clone, Copy)]
        struct Page([u8; PAGE]);
        let pages = vec![Page([0xaa; PAGE]); count].leak();
        let base = NonNull::from(&mut *pages).cast();
        // SAFETY: leaked, aligned, and the only reference ends here.
        let ram = unsafe { SharedMem::new(base, count * PAGE) };
        let range = 0..(count * PAGE) as u64;
        Frames::new(ram, &[(range, 0)], None, 1 << 40)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::frames;

    #[test]
    fn every_frame_is_given_once_and_again_when_released() {
        let mut frames = frames(8);
        let all: Vec<_> = std::iter::from_fn(|| frames.alloc()).collect();
        assert_eq!((all.len(), frames.available()), (8, 0));
        let mut sorted = all.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), 8);
        frames.share(all[3]);
        assert!(!frames.is_exclusive(all[3]));
        frames.release(all[3]);
        assert_eq!(frames.alloc(), None, "it has one use left");
        frames.release(all[3]);
        assert_eq!(frames.alloc(), None, "others may still reach it");
        frames.settle();
        assert_eq!(frames.alloc_zeroed(), Some(all[3]));
        let mut bytes = [1; 4096];
        frames.page(all[3]).read_bytes(0, &mut bytes).expect("all");
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn a_nodes_own_frames_are_given_first() {
        use super::{Frames, PAGE_SIZE};
        let one = frames(8);
        let ranges = [(0..4 * PAGE_SIZE, 0), (4 * PAGE_SIZE..8 * PAGE_SIZE, 1)];
        let mut frames = Frames::new(one.ram, &ranges, None, 1 << 40);
        frames.prefer(1);
        let far = frames.alloc().expect("some");
        assert!(ranges[1].0.contains(&far.0));
        frames.prefer(0);
        let given: Vec<_> = std::iter::from_fn(|| frames.alloc()).collect();
        assert!(
            given[..4]
                .iter()
                .all(|frame| ranges[0].0.contains(&frame.0))
        );
        assert_eq!(given.len(), 7, "then the others'");
        frames.release(far);
        frames.release(given[0]);
        frames.settle();
        assert_eq!(frames.alloc(), Some(given[0]), "each goes back to its own");
    }
}
