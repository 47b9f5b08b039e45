//! The VM's memory as this node sees it: pieces of shared regions.

use alloc::vec::Vec;

use vmm_shared::addr::{Gpa, Hpa, LARGE_PAGE_SIZE};
use vmm_shared::pieces::{HostPiece, PieceError, PieceMap, Seen};
use vmm_shared::shm::SharedMem;

use super::guest::{GuestMemory, GuestMemoryError};

const PIECE: usize = 2 << 20;
const _: () = assert!(PIECE as u64 == LARGE_PAGE_SIZE);

/// Where pieces appear in a row to the guest.
#[derive(Clone, Copy, Debug)]
struct Range {
    gpa: Gpa,
    /// The number of the first of them.
    first: usize,
    pieces: usize,
}

/// All memory of the VM: where its pieces are, and all regions that they may
/// be in.
#[derive(Debug)]
pub struct Slices {
    /// In order.
    ranges: Vec<Range>,
    map: PieceMap,
    /// What each node has, in order.
    regions: Vec<SharedMem>,
}

impl Slices {
    /// Memory that appears at these addresses, in order, so many bytes each;
    /// the pieces of the map are numbered through them.
    ///
    /// `None` if they don't fit.
    #[must_use]
    pub fn new(
        ranges: impl IntoIterator<Item = (Gpa, u64)>,
        map: PieceMap,
        regions: Vec<SharedMem>,
    ) -> Option<Self> {
        let mut first = 0;
        let ranges: Vec<_> = ranges
            .into_iter()
            .map(|(gpa, len)| {
                let pieces = usize::try_from(len / LARGE_PAGE_SIZE).ok()?;
                let range = Range { gpa, first, pieces };
                first += pieces;
                let is_even = len.is_multiple_of(LARGE_PAGE_SIZE);
                (is_even && gpa.is_aligned(LARGE_PAGE_SIZE)).then_some(range)
            })
            .collect::<Option<_>>()?;
        let in_order = ranges.is_sorted_by(|one, next| one.end() <= next.gpa.0);
        (first == map.pieces() && in_order).then_some(Self {
            ranges,
            map,
            regions,
        })
    }

    /// Where the pieces are.
    #[must_use]
    pub const fn map(&self) -> &PieceMap {
        &self.map
    }

    /// The piece that an address is in, and the offset in it in bytes.
    #[must_use]
    pub fn piece(&self, gpa: Gpa) -> Option<(usize, usize)> {
        let after = self.ranges.partition_point(|range| range.gpa <= gpa);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = usize::try_from(gpa.0 - range.gpa.0).ok()?;
        let number = offset / PIECE;
        (number < range.pieces).then_some((range.first + number, offset % PIECE))
    }

    /// The address of a piece.
    #[must_use]
    pub fn gpa(&self, piece: usize) -> Option<Gpa> {
        let after = self.ranges.partition_point(|range| range.first <= piece);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let number = piece - range.first;
        (number < range.pieces).then(|| Gpa(range.gpa.0 + number as u64 * LARGE_PAGE_SIZE))
    }

    /// Where a piece is.
    ///
    /// # Errors
    /// See [`PieceMap::look`].
    pub fn look(&self, piece: usize) -> Result<Seen, PieceError> {
        self.map.look(piece)
    }

    /// The bytes of a host piece; `None` if a region has no such piece.
    #[must_use]
    pub fn memory(&self, host: HostPiece) -> Option<SharedMem> {
        let region = self.regions.get(usize::from(host.node.0))?;
        region.window(host.index().checked_mul(PIECE)?, PIECE)
    }

    /// Where this node sees the byte at `offset` of a host piece.
    #[must_use]
    pub fn hpa(&self, host: HostPiece, offset: u64) -> Option<Hpa> {
        let memory = self.memory(host)?;
        Some(Hpa(memory.as_ptr().addr() as u64 + offset))
    }

    /// That a range is guest memory.
    ///
    /// # Errors
    /// If any byte of it is not.
    pub fn check(&self, gpa: Gpa, len: usize) -> Result<(), GuestMemoryError> {
        self.parts(gpa, len, |_, _, _| Some(()))
    }

    /// Splits an access where pieces meet, and calls `copy` with the memory,
    /// the offset in it and the range of the buffer, for each part; again, if
    /// the piece has changed its place meanwhile.
    fn parts(
        &self,
        gpa: Gpa,
        len: usize,
        mut copy: impl FnMut(&SharedMem, usize, core::ops::Range<usize>) -> Option<()>,
    ) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        let mut part = || {
            let at = gpa.checked_add(done as u64)?;
            let (piece, offset) = self.piece(at)?;
            let end = len.min(done + (PIECE - offset));
            let seen = self.look(piece).ok()?;
            copy(&self.memory(seen.host()?)?, offset, done..end)?;
            if self.map.is_still(piece, seen) {
                done = end;
            }
            Some(done == len)
        };
        let error = GuestMemoryError { gpa, len };
        while len > 0 && !part().ok_or(error)? {}
        Ok(())
    }
}

impl Range {
    /// First address behind it.
    const fn end(&self) -> u64 {
        self.gpa
            .0
            .saturating_add(self.pieces as u64 * LARGE_PAGE_SIZE)
    }
}

/// Reads are of what was there at some instant, wherever a piece moves. Writes
/// are for the time before the guest runs, when nothing moves.
impl GuestMemory for Slices {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.parts(gpa, into.len(), |memory, offset, range| {
            memory.read_bytes(offset, &mut into[range])
        })
    }

    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        // All or nothing.
        self.check(gpa, from.len())?;
        self.parts(gpa, from.len(), |memory, offset, range| {
            memory.write_bytes(offset, &from[range])
        })
    }
}

#[cfg(test)]
pub(super) mod testing {
    #![expect(unsafe_code, reason = "windows over leaked memory")]

    use super::*;
    use core::ptr::NonNull;
    use std::alloc::{Layout, alloc_zeroed};
    use vmm_shared::control::NodeShare;
    use vmm_shared::pieces::MapGeometry;
    use zerocopy::FromZeros;

    /// Zeroed memory, aligned to a piece.
    pub(in crate::mem) fn leaked(bytes: usize) -> SharedMem {
        let layout = Layout::from_size_align(bytes, PIECE).expect("legal");
        // SAFETY: not of size 0; leaked, aligned, and reached through the
        // window only.
        unsafe {
            let base = NonNull::new(alloc_zeroed(layout)).expect("memory");
            SharedMem::new(base, bytes)
        }
    }

    /// What the nodes of a rack share: each gives so many pieces of so many
    /// that it has, and `later` pieces may come.
    pub(in crate::mem) struct Rack {
        pub(in crate::mem) map: PieceMap,
        pub(in crate::mem) regions: Vec<SharedMem>,
    }

    pub(in crate::mem) fn rack(nodes: &[(u64, u32)], later: usize) -> Rack {
        let mut shares = vec![NodeShare::new_zeroed(); nodes.len()];
        for (share, (pieces, room)) in shares.iter_mut().zip(nodes) {
            (share.memory, share.room) = (pieces * LARGE_PAGE_SIZE, *room);
        }
        let mut geometry = MapGeometry::of(&shares);
        geometry.pieces += later;
        let window = leaked(geometry.size().expect("legal"));
        let map = PieceMap::new(window, geometry).expect("large enough");
        map.lay_out(&shares);
        let region = |(_, room): &(u64, u32)| leaked(*room as usize * PIECE);
        Rack {
            map,
            regions: nodes.iter().map(region).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::rack;
    use super::*;
    use vmm_shared::addr::NodeId;

    const MIB: u64 = 1 << 20;

    /// Three pieces of node 0 and one of node 1, with a hole behind the
    /// second.
    fn slices() -> Slices {
        let rack = rack(&[(3, 4), (1, 2)], 0);
        let ranges = [(Gpa(0), 4 * MIB), (Gpa(6 * MIB), 4 * MIB)];
        Slices::new(ranges, rack.map, rack.regions).expect("they fit")
    }

    #[test]
    fn pieces_are_counted_without_the_holes() {
        let slices = slices();
        assert_eq!(slices.piece(Gpa(0)), Some((0, 0)));
        assert_eq!(slices.piece(Gpa(4 * MIB - 1)), Some((1, PIECE - 1)));
        assert_eq!(slices.piece(Gpa(4 * MIB)), None);
        assert_eq!(slices.piece(Gpa(6 * MIB + 8)), Some((2, 8)));
        assert_eq!(slices.piece(Gpa(10 * MIB)), None);
        assert_eq!(slices.piece(Gpa(u64::MAX)), None);
        for piece in 0..4 {
            let gpa = slices.gpa(piece).expect("it is there");
            assert_eq!(slices.piece(gpa), Some((piece, 0)));
        }
        assert_eq!(slices.gpa(4), None);
    }

    #[test]
    fn an_access_may_cross_from_one_piece_to_the_next() {
        let slices = slices();
        let data: Vec<u8> = (0..40).collect();
        for gpa in [2 * MIB - 8, 8 * MIB - 20] {
            slices.write_bytes(Gpa(gpa), &data).expect("contiguous");
            let mut back = vec![0; 40];
            slices.read_bytes(Gpa(gpa), &mut back).expect("contiguous");
            assert_eq!(back, data);
        }
    }

    #[test]
    fn nothing_is_written_if_not_everything_fits() {
        let slices = slices();
        assert!(slices.write_bytes(Gpa(4 * MIB - 8), &[1; 9]).is_err());
        assert!(slices.write_bytes(Gpa(10 * MIB - 1), &[1; 2]).is_err());
        assert!(slices.write_bytes(Gpa(u64::MAX), &[1; 2]).is_err());
        assert!(slices.write_bytes(Gpa(5 * MIB), &[]).is_ok(), "nothing");
        for gpa in [4 * MIB - 8, 10 * MIB - 8] {
            assert_eq!(slices.read::<u64>(Gpa(gpa)), Ok(0));
        }
    }

    #[test]
    fn a_piece_is_read_where_it_is() {
        let slices = slices();
        let map = *slices.map();
        slices.write(Gpa(6 * MIB), &7_u64).expect("inside");
        let claim = map.claim(2, NodeId(1)).expect("sound").expect("free");
        assert_eq!(slices.read::<u64>(Gpa(6 * MIB)), Ok(7), "where it was");
        let to = map.take_host(NodeId(1), 2).expect("room");
        let there = slices.memory(to).expect("inside");
        there.write_bytes(0, &8_u64.to_le_bytes()).expect("inside");
        assert!(map.publish(&claim, to));
        assert_eq!(slices.read::<u64>(Gpa(6 * MIB)), Ok(8));
        let claim = map.claim(2, NodeId(0)).expect("sound").expect("free");
        assert!(map.remove(&claim));
        assert!(slices.read::<u64>(Gpa(6 * MIB)).is_err(), "absent");
    }

    #[test]
    fn ranges_that_do_not_fit_are_refused() {
        for ranges in [
            &[(Gpa(0), 2 * MIB)][..],
            &[(Gpa(0), 4 * MIB), (Gpa(2 * MIB), 4 * MIB)],
            &[(Gpa(4096), 8 * MIB)],
            &[(Gpa(0), 8 * MIB + 1)],
        ] {
            let rack = rack(&[(3, 4), (1, 2)], 0);
            let slices = Slices::new(ranges.iter().copied(), rack.map, rack.regions);
            assert!(slices.is_none(), "{ranges:?}");
        }
    }
}
