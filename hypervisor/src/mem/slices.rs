//! The VM's memory as this node sees it: pieces of shared regions.

use alloc::vec::Vec;

use vmm_shared::addr::{Gpa, Hpa, NodeId};
use vmm_shared::control::{BlockRecord, BlockState};
use vmm_shared::shm::SharedMem;

use super::guest::{GuestMemory, GuestMemoryError};

/// A run of guest memory that is contiguous on this node too.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// The node that gives it.
    pub node: NodeId,
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Where this node sees it.
    pub memory: SharedMem,
    /// Whether the guest has it now, if it comes and goes.
    pub block: Option<BlockRecord>,
}

impl Slice {
    /// Whether it is guest memory now.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.block.is_none_or(|block| block.is_present())
    }

    /// Whether it is being taken away from the guest.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let state = self.block.and_then(|block| block.state());
        matches!(state, Some(BlockState::Leaving(_)))
    }

    /// Where this node sees the byte at `offset`.
    #[must_use]
    pub fn hpa(&self, offset: u64) -> Hpa {
        Hpa(self.memory.as_ptr().addr() as u64 + offset)
    }
}

/// All slices of the VM.
#[derive(Debug, Default)]
pub struct Slices {
    slices: Vec<Slice>,
}

impl Slices {
    /// Memory made of these slices, which don't overlap.
    #[must_use]
    pub fn new(mut slices: Vec<Slice>) -> Self {
        slices.sort_by_key(|slice| slice.gpa);
        Self { slices }
    }

    /// The slices in order of guest addresses.
    pub fn iter(&self) -> impl Iterator<Item = &Slice> {
        self.slices.iter()
    }

    /// The slice that an address is in, if it is guest memory now, and the
    /// offset in it.
    #[must_use]
    pub fn present(&self, gpa: Gpa) -> Option<(&Slice, u64)> {
        let after = self.slices.partition_point(|slice| slice.gpa <= gpa);
        let slice = self.slices.get(after.checked_sub(1)?)?;
        let offset = gpa.0 - slice.gpa.0;
        let is_inside = offset < slice.memory.len() as u64;
        (is_inside && slice.is_present()).then_some((slice, offset))
    }

    /// Where an address lies in guest memory without its holes, in bytes, as
    /// if all of it were there.
    #[must_use]
    pub fn linear(&self, gpa: Gpa) -> Option<u64> {
        let mut before = 0;
        for slice in &self.slices {
            let len = slice.memory.len() as u64;
            match gpa.0.checked_sub(slice.gpa.0) {
                Some(offset) if offset < len => return Some(before + offset),
                _ => before += len,
            }
        }
        None
    }

    /// The other way round: the slice, and the offset in it.
    #[must_use]
    pub fn at_linear(&self, mut linear: u64) -> Option<(&Slice, u64)> {
        for slice in &self.slices {
            let len = slice.memory.len() as u64;
            if linear < len {
                return Some((slice, linear));
            }
            linear -= len;
        }
        None
    }

    /// That a range is guest memory.
    ///
    /// # Errors
    /// If any byte of it is not.
    pub fn check(&self, gpa: Gpa, len: usize) -> Result<(), GuestMemoryError> {
        self.parts(gpa, len, |_, _, _| Some(()))
            .ok_or(GuestMemoryError { gpa, len })
    }

    /// Splits an access where slices meet, and calls `copy` with the memory,
    /// the offset in it and the range of the buffer, for each part.
    fn parts(
        &self,
        gpa: Gpa,
        len: usize,
        mut copy: impl FnMut(&SharedMem, usize, core::ops::Range<usize>) -> Option<()>,
    ) -> Option<()> {
        let mut done = 0;
        while done < len {
            let at = gpa.checked_add(done as u64)?;
            let (slice, offset) = self.present(at)?;
            let offset = usize::try_from(offset).ok()?;
            let end = len.min(done + (slice.memory.len() - offset));
            copy(&slice.memory, offset, done..end)?;
            done = end;
        }
        Some(())
    }
}

impl GuestMemory for Slices {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let error = GuestMemoryError {
            gpa,
            len: into.len(),
        };
        self.parts(gpa, into.len(), |memory, offset, range| {
            memory.read_bytes(offset, &mut into[range])
        })
        .ok_or(error)
    }

    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        let error = GuestMemoryError {
            gpa,
            len: from.len(),
        };
        // All or nothing.
        self.check(gpa, from.len())?;
        self.parts(gpa, from.len(), |memory, offset, range| {
            memory.write_bytes(offset, &from[range])
        })
        .ok_or(error)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "windows over leaked buffers")]
mod tests {
    use super::*;
    use core::ptr::NonNull;

    fn slice(gpa: u64, words: usize) -> Slice {
        let memory = Box::leak(vec![0_u64; words].into_boxed_slice());
        let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
        // SAFETY: leaked, aligned, and reached through the window only.
        let memory = unsafe { SharedMem::new(base, words * 8) };
        Slice {
            node: NodeId(0),
            gpa: Gpa(gpa),
            memory,
            block: None,
        }
    }

    #[test]
    fn a_block_is_memory_while_the_guest_has_it() {
        let mut block = slice(0x1000, 2);
        let record = BlockRecord::new(slice(0, 8).memory).expect("large enough");
        block.block = Some(record);
        let slices = Slices::new(vec![slice(0, 512), block]);
        for (state, is_present) in [
            (BlockState::Absent, false),
            (BlockState::Offered(NodeId(0)), true),
            (BlockState::Used(NodeId(0)), true),
            (BlockState::Leaving(NodeId(0)), false),
        ] {
            record.set_state(state);
            assert_eq!(slices.present(Gpa(0x1008)).is_some(), is_present);
            assert_eq!(slices.read::<u64>(Gpa(0x1000)).is_ok(), is_present);
            assert_eq!(slices.write(Gpa(0xffc), &1_u64).is_ok(), is_present);
            assert_eq!(slices.linear(Gpa(0x1008)), Some(0x1008), "it has a place");
            assert!(slices.read::<u64>(Gpa(0xff8)).is_ok());
        }
    }

    #[test]
    fn an_access_may_cross_from_one_slice_to_the_next() {
        let slices = Slices::new(vec![slice(0x1000, 2), slice(0, 512), slice(0x1010, 8)]);
        let data: Vec<u8> = (0..40).collect();
        slices.write_bytes(Gpa(0xff8), &data).expect("contiguous");
        let mut back = vec![0; 40];
        slices
            .read_bytes(Gpa(0xff8), &mut back)
            .expect("contiguous");
        assert_eq!(back, data);
    }

    #[test]
    fn frames_are_counted_without_the_holes() {
        let slices = Slices::new(vec![slice(0, 2), slice(0x100, 4)]);
        assert_eq!(slices.linear(Gpa(0x108)), Some(24));
        assert_eq!(slices.linear(Gpa(0x10)), None);
        let (slice, offset) = slices.at_linear(24).expect("inside");
        assert_eq!((slice.gpa, offset), (Gpa(0x100), 8));
        assert!(slices.at_linear(48).is_none());
    }

    #[test]
    fn nothing_is_written_if_not_everything_fits() {
        let slices = Slices::new(vec![slice(0, 2), slice(0x100, 2)]);
        assert!(slices.write_bytes(Gpa(8), &[1; 9]).is_err());
        assert!(slices.write_bytes(Gpa(0xff), &[1; 2]).is_err());
        assert!(slices.write_bytes(Gpa(u64::MAX), &[1; 2]).is_err());
        let mut back = [9; 16];
        slices.read_bytes(Gpa(0), &mut back).expect("inside");
        assert_eq!(back, [0; 16]);
    }
}
