//! Page frames: the VM's RAM, counted, and the root image's pages, which are
//! used in place, read-only and for ever.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use spin::{Mutex, MutexGuard};
use vmm_shared::addr::PAGE_SIZE;
use vmm_shared::shm::SharedMem;

use super::losses::Losses;
use super::places::Places;
use super::{PAGE, index};

/// A page frame by its guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frame(pub(crate) u64);

/// Frames in a row.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Run {
    first: Frame,
    count: usize,
}

/// The free frames of a piece of RAM.
#[derive(Debug)]
struct Free {
    /// Frames given back, by their numbers.
    single: Vec<u32>,
    /// Runs given back.
    runs: Vec<Run>,
    /// Frames never used yet.
    fresh: Range<u64>,
}

impl Free {
    fn take(&mut self) -> Option<u64> {
        if let Some(number) = self.single.pop() {
            return Some(number.into());
        }
        if let Some(frame) = self.take_fresh(1) {
            return Some(frame.0 / PAGE_SIZE);
        }
        let run = self.runs.pop()?;
        let first = u32::try_from(run.first.0 / PAGE_SIZE).expect("RAM has fewer frames");
        let count = u32::try_from(run.count).expect("RAM has fewer frames");
        self.single.extend(first + 1..first + count);
        Some(first.into())
    }

    fn take_run(&mut self, count: usize) -> Option<Run> {
        if let Some(at) = self.runs.iter().position(|run| run.count == count) {
            return Some(self.runs.swap_remove(at));
        }
        let first = self.take_fresh(count)?;
        Some(Run { first, count })
    }

    fn take_fresh(&mut self, count: usize) -> Option<Frame> {
        let start = self.fresh.start;
        let end = start.checked_add(count as u64 * PAGE_SIZE)?;
        if end > self.fresh.end {
            return None;
        }
        self.fresh.start = end;
        Some(Frame(start))
    }
}

/// A piece of RAM.
#[derive(Debug)]
struct Pool {
    node: usize,
    all: Range<u64>,
    /// How many are kept for the machine.
    reserve: usize,
    free: Mutex<Free>,
    /// How many are free.
    available: AtomicUsize,
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Programs and files: of a pool's reserve only if there is nothing else.
    Data,
    /// What the machine can't go on without: page tables and process 1.
    Machine,
}

impl Pool {
    /// Whether it has frames for that beside what it keeps.
    fn has_for(&self, what: For) -> bool {
        // Relaxed: about so many.
        what == For::Machine || self.available.load(Ordering::Relaxed) > self.reserve
    }

    /// Its free frames, unless its node is lost: a processor of that may have
    /// them locked.
    fn lock(&self, losses: &Losses) -> Option<MutexGuard<'_, Free>> {
        loop {
            if losses.has_taken(self.node) || losses.has_lost_node(self.node) {
                return None;
            }
            if let Some(free) = self.free.try_lock() {
                return Some(free);
            }
            core::hint::spin_loop();
        }
    }
}

/// Part of the kept node's memory that is the machine's as long as another
/// node has some: a page in so many.
const KEPT_FOR_MACHINE: u64 = 16;

/// All frames. Any processor may take and count them at any time; what is
/// said to need the kernel's lock changes what processors can reach.
///
/// Without that lock a processor takes from its own node's pools alone: so if
/// it is lost at any instruction, no lock of another pool is held for ever.
/// What the kernel needs to go on (page tables that all nodes use, logs) comes
/// from the *kept* node, which is lost with the kernel alone.
#[derive(Debug)]
pub(crate) struct Frames {
    /// RAM from guest physical address 0 on.
    ram: SharedMem,
    image: Option<SharedMem>,
    image_base: u64,
    /// Uses of each frame of RAM.
    counts: Box<[AtomicU32]>,
    /// Free frames, by pieces of RAM.
    pools: Box<[Pool]>,
    /// Frames without a use that a processor may still have a translation to.
    leaving: Mutex<Vec<u32>>,
    /// The node of the processor that holds the kernel's lock.
    here: AtomicUsize,
    /// The node whose memory the kernel is in.
    kept: usize,
    /// The nodes.
    pub(crate) places: Places,
}

impl Frames {
    /// The frames in `usable` ranges of `ram`, each with the node that gives
    /// it, and those of the image.
    pub(crate) fn new(
        ram: SharedMem,
        usable: &[(Range<u64>, u32)],
        image: Option<SharedMem>,
        image_base: u64,
        places: Places,
    ) -> Self {
        let limit = ram.len() as u64;
        let kept = usable.first().map_or(0, |(_, node)| *node as usize);
        let has_others = usable.iter().any(|(_, node)| *node as usize != kept);
        let clip = |(range, node): &(Range<u64>, u32)| {
            let start = range.start.next_multiple_of(PAGE_SIZE);
            let end = super::page_down(range.end.min(limit));
            let node = *node as usize;
            let count = index(end.saturating_sub(start) / PAGE_SIZE);
            let reserve = match node == kept && has_others {
                true => count / index(KEPT_FOR_MACHINE),
                false => 0,
            };
            (start < end).then(|| Pool {
                node,
                all: start..end,
                reserve,
                available: AtomicUsize::new(count),
                free: Mutex::new(Free {
                    single: Vec::new(),
                    runs: Vec::new(),
                    fresh: start..end,
                }),
            })
        };
        Self {
            counts: (0..ram.len() / PAGE).map(|_| AtomicU32::new(0)).collect(),
            ram,
            image,
            image_base,
            pools: usable.iter().filter_map(clip).collect(),
            leaving: Mutex::new(Vec::new()),
            here: AtomicUsize::new(kept),
            kept,
            places,
        }
    }

    /// A frame of RAM with one use and any contents, of the node that holds
    /// the kernel's lock if it has one.
    fn alloc(&self, what: For) -> Option<Frame> {
        let here = self.here();
        let near = self.pools_of(here).chain(self.pools_but(here));
        let spare = near.clone().filter(|pool| pool.has_for(what));
        self.alloc_of(spare.chain(near))
    }

    /// The same, of a node alone, and of its reserve only for the machine.
    fn alloc_on(&self, node: usize, what: For) -> Option<Frame> {
        self.alloc_of(self.pools_of(node).filter(|pool| pool.has_for(what)))
    }

    fn alloc_of<'a>(&self, mut pools: impl Iterator<Item = &'a Pool>) -> Option<Frame> {
        let number = pools.find_map(|pool| self.take(pool, 1, Free::take))?;
        self.counts[index(number)].store(1, Ordering::Relaxed);
        Some(Frame(number * PAGE_SIZE))
    }

    /// Takes frames of a pool, and counts them.
    fn take<T>(
        &self,
        pool: &Pool,
        count: usize,
        how: impl FnOnce(&mut Free) -> Option<T>,
    ) -> Option<T> {
        let taken = how(&mut *pool.lock(&self.places.losses)?)?;
        pool.available.fetch_sub(count, Ordering::Relaxed);
        Some(taken)
    }

    /// Pools that are there.
    fn pools(&self) -> impl Iterator<Item = &Pool> + Clone {
        let losses = &self.places.losses;
        self.pools
            .iter()
            .filter(|pool| !losses.has_taken(pool.node))
    }

    fn pools_of(&self, node: usize) -> impl Iterator<Item = &Pool> + Clone {
        self.pools().filter(move |pool| pool.node == node)
    }

    fn pools_but(&self, node: usize) -> impl Iterator<Item = &Pool> + Clone {
        self.pools().filter(move |pool| pool.node != node)
    }

    /// The node whose memory the kernel is in.
    pub(crate) fn kept(&self) -> usize {
        self.kept
    }

    /// Whether a frame is lost, or what has just been read from it may be.
    pub(crate) fn is_lost(&self, frame: Frame) -> bool {
        let pool = self.pools.iter().find(|pool| pool.all.contains(&frame.0));
        pool.is_some_and(|pool| self.places.losses.is_lost(pool.node, frame.0))
    }

    /// Takes in what has been lost, under the kernel's lock; the nodes, and
    /// how many frames.
    pub(crate) fn lose(&self) -> (Box<[usize]>, usize) {
        let before = self.total();
        let node_of = |address: u64| {
            let pool = self.pools.iter().find(|pool| pool.all.contains(&address));
            pool.map(|pool| pool.node)
        };
        let nodes = self.places.losses.take(node_of);
        (nodes, before - self.total())
    }

    /// A frame of zeros.
    pub(crate) fn alloc_zeroed(&self, what: For) -> Option<Frame> {
        self.alloc(what).map(|frame| self.zeroed(frame))
    }

    /// The same, of a node alone, and of its reserve only for the machine.
    /// The only one that needs no lock.
    pub(crate) fn alloc_zeroed_on(&self, node: usize, what: For) -> Option<Frame> {
        self.alloc_on(node, what).map(|frame| self.zeroed(frame))
    }

    /// The same for a table, of a node if that has one, else of the kept one.
    pub(crate) fn alloc_table(&self, node: usize) -> Option<Frame> {
        let on = |node| self.alloc_zeroed_on(node, For::Machine);
        on(node).or_else(|| on(self.kept))
    }

    fn zeroed(&self, frame: Frame) -> Frame {
        self.page(frame)
            .write_bytes(0, &[0; PAGE])
            .expect("a whole page");
        frame
    }

    /// A copy of a frame; of one that is lost, anything.
    pub(crate) fn alloc_copy(&self, from: Frame, what: For) -> Option<Frame> {
        let frame = self.alloc(what)?;
        let mut bytes = [0; PAGE];
        self.page(from)
            .read_bytes(0, &mut bytes)
            .expect("a whole page");
        self.page(frame)
            .write_bytes(0, &bytes)
            .expect("a whole page");
        Some(frame)
    }

    /// Frames in a row for so many bytes, of the kept node.
    pub(crate) fn alloc_run(&self, bytes: usize) -> Option<Run> {
        let count = bytes.div_ceil(PAGE);
        let take = |pool: &Pool| self.take(pool, count, |free| free.take_run(count));
        self.pools_of(self.kept).find_map(take)
    }

    /// Gives a run back, which nobody uses any more.
    pub(crate) fn release_run(&self, run: Run) {
        let pool = self.pool(run.first);
        if let Some(mut free) = pool.lock(&self.places.losses) {
            pool.available.fetch_add(run.count, Ordering::Relaxed);
            free.runs.push(run);
        }
    }

    /// The memory of a run.
    pub(crate) fn run(&self, run: &Run) -> SharedMem {
        let window = self.ram.window(index(run.first.0), run.count * PAGE);
        window.expect("runs lie in RAM")
    }

    fn pool(&self, frame: Frame) -> &Pool {
        let mut pools = self.pools.iter();
        let pool = pools.find(|pool| pool.all.contains(&frame.0));
        pool.expect("frames come from pools")
    }

    fn count(&self, frame: Frame) -> Option<&AtomicU32> {
        self.counts.get(index(frame.0 / PAGE_SIZE))
    }

    /// One use more, by who has one or holds the kernel's lock.
    pub(crate) fn share(&self, frame: Frame) {
        if let Some(count) = self.count(frame) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One use less; without any, the frame is free once things have settled.
    /// Under the kernel's lock.
    pub(crate) fn release(&self, frame: Frame) {
        let Some(count) = self.count(frame) else {
            return;
        };
        // AcqRel: what each user did with it was before.
        let before = count.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "only frames in use are released");
        if before == 1 {
            let number = u32::try_from(frame.0 / PAGE_SIZE).expect("RAM has fewer frames");
            self.leaving.lock().push(number);
        }
    }

    /// Gives back a frame that nobody but the caller has ever seen.
    pub(crate) fn put_back(&self, frame: Frame) {
        if let Some(count) = self.count(frame) {
            count.store(0, Ordering::Relaxed);
        }
        self.give(u32::try_from(frame.0 / PAGE_SIZE).expect("RAM has fewer frames"));
    }

    fn give(&self, number: u32) {
        let pool = self.pool(Frame(u64::from(number) * PAGE_SIZE));
        if let Some(mut free) = pool.lock(&self.places.losses) {
            free.single.push(number);
            pool.available.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets frames without a use be given again: no processor can reach them
    /// any more. Under the kernel's lock.
    pub(crate) fn settle(&self) {
        for number in self.leaving.lock().drain(..) {
            self.give(number);
        }
    }

    /// Whether there are frames to settle.
    pub(crate) fn must_settle(&self) -> bool {
        !self.leaving.lock().is_empty()
    }

    /// The kernel's lock is held on a node from now on.
    pub(crate) fn enter(&self, node: u32) {
        let node = (node as usize).min(self.places.slots() - 1);
        self.here.store(node, Ordering::Relaxed);
    }

    /// The node of the processor that holds the kernel's lock.
    pub(crate) fn here(&self) -> usize {
        self.here.load(Ordering::Relaxed)
    }

    /// Whether a frame has a single use, so that who has that may write it.
    pub(crate) fn is_exclusive(&self, frame: Frame) -> bool {
        // Acquire: what former users did with it was before.
        self.count(frame)
            .is_some_and(|count| count.load(Ordering::Acquire) == 1)
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
        let pools = self.pools();
        let bytes: u64 = pools.map(|pool| pool.all.end - pool.all.start).sum();
        index(bytes / PAGE_SIZE)
    }

    /// Frames that are free.
    pub(crate) fn available(&self) -> usize {
        let of = |pool: &Pool| pool.available.load(Ordering::Relaxed);
        self.pools().map(of).sum()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::super::losses::Sources;
    use super::*;
    use core::ptr::NonNull;

    /// RAM of the test's, leaked on purpose.
    #[expect(unsafe_code, reason = "makes memory for tests")]
    fn ram(count: usize) -> SharedMem {
        #[repr(C, align(4096))]
        #[derive(Clone, Copy)]
        struct Page([u8; PAGE]);
        let pages = vec![Page([0xaa; PAGE]); count].leak();
        let base = NonNull::from(&mut *pages).cast();
        // SAFETY: leaked, aligned, and the only reference ends here.
        unsafe { SharedMem::new(base, count * PAGE) }
    }

    /// Memory that holds a copy of some bytes, and zeros to the next page.
    pub(crate) fn memory_of(bytes: &[u8]) -> SharedMem {
        let count = bytes.len().div_ceil(PAGE);
        let memory = ram(count);
        memory.write_bytes(0, &vec![0; count * PAGE]).expect("all");
        memory.write_bytes(0, bytes).expect("there is room");
        memory
    }

    /// So many frames on each of some nodes, with a processor each.
    pub(crate) fn frames_of_nodes(nodes: u32, each: usize) -> Frames {
        frames_that_lose(nodes, each, None)
    }

    /// The same, of nodes that can be lost.
    pub(crate) fn frames_that_lose(nodes: u32, each: usize, losses: Option<Sources>) -> Frames {
        let bytes = (each * PAGE) as u64;
        let range = |node: u32| (u64::from(node) * bytes..u64::from(node + 1) * bytes, node);
        let ranges: Vec<_> = (0..nodes).map(range).collect();
        let processors: Vec<_> = (0..nodes).collect();
        let places = Places::new(&processors, || 0, losses);
        Frames::new(ram(each * nodes as usize), &ranges, None, 1 << 40, places)
    }

    pub(crate) fn frames(count: usize) -> Frames {
        frames_of_nodes(1, count)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{frames, frames_of_nodes};
    use super::{For, PAGE, PAGE_SIZE};

    #[test]
    fn every_frame_is_given_once_and_again_when_released() {
        let frames = frames(8);
        let all: Vec<_> = std::iter::from_fn(|| frames.alloc(For::Data)).collect();
        assert_eq!((all.len(), frames.available()), (8, 0));
        let mut sorted = all.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), 8);
        frames.share(all[3]);
        assert!(!frames.is_exclusive(all[3]));
        frames.release(all[3]);
        assert_eq!(frames.alloc(For::Data), None, "it has one use left");
        frames.release(all[3]);
        assert_eq!(frames.alloc(For::Data), None, "others may still reach it");
        frames.settle();
        assert_eq!(frames.alloc_zeroed(For::Data), Some(all[3]));
        let mut bytes = [1; 4096];
        frames.page(all[3]).read_bytes(0, &mut bytes).expect("all");
        assert_eq!(bytes, [0; 4096]);
        frames.put_back(all[3]);
        assert_eq!(
            frames.alloc(For::Data),
            Some(all[3]),
            "nobody else has seen it"
        );
    }

    #[test]
    fn a_nodes_own_frames_are_given_first() {
        let frames = frames_of_nodes(2, 4);
        let far = |frame: &super::Frame| frame.0 >= 4 * PAGE_SIZE;
        frames.enter(1);
        let first = frames.alloc(For::Data).expect("some");
        assert!(far(&first));
        frames.enter(0);
        let given: Vec<_> = std::iter::from_fn(|| frames.alloc(For::Data)).collect();
        assert!(!given[..4].iter().any(far));
        assert_eq!(given.len(), 7, "then the others'");
        frames.release(first);
        frames.release(given[0]);
        frames.settle();
        assert_eq!(
            frames.alloc(For::Data),
            Some(given[0]),
            "each goes back to its own"
        );
    }

    #[test]
    fn runs_lie_in_a_row_and_are_used_again() {
        let frames = frames(8);
        let run = frames.alloc_run(3 * PAGE - 1).expect("there is room");
        assert_eq!((frames.run(&run).len(), frames.available()), (3 * PAGE, 5));
        assert_eq!(frames.alloc_run(6 * PAGE), None);
        let first = run.first;
        frames.release_run(run);
        let again = frames.alloc_run(3 * PAGE).expect("there is room");
        assert_eq!(again.first, first);
        let single = std::iter::from_fn(|| frames.alloc(For::Data)).count();
        assert_eq!((single, frames.available()), (5, 0));
    }
}
