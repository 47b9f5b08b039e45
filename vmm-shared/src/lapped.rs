//! Words of a ring that say which lap they belong to.
//!
//! Position `p` of an endless sequence has slot `p mod N` of a ring, and that
//! slot's word holds, when `p` is filled, the lap `p / N + 1` above 26 bits of
//! content:
//!
//! ```text
//!  63                         26 25                 0
//! +-----------------------------+--------------------+
//! | lap                         | content            |
//! +-----------------------------+--------------------+
//! ```
//!
//! The lap is the publication flag. It only grows, and its last value is never
//! passed, so no word ever comes back: a compare-and-swap against a word that
//! was read any time ago can't succeed by mistake.

/// Bits of content in a word.
pub(crate) const CONTENT_BITS: u32 = 26;
const LAST_LAP: u64 = (1 << (64 - CONTENT_BITS)) - 1;

/// What a slot's word means for a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Not filled: the word of the lap before.
    Free,
    /// Filled, with this content.
    Filled(u64),
    /// A later lap's word: the reader was too slow.
    Later,
    /// A word that can't be there yet.
    Corrupt,
}

#[inline]
fn lap(position: u64, slots: u64) -> u64 {
    (position >> slots.trailing_zeros()) + 1
}

/// The slot of `position` in a ring of `slots`, a power of two.
#[inline]
pub(crate) fn index(position: u64, slots: u64) -> usize {
    usize::try_from(position & (slots - 1)).expect("below the slots")
}

/// The word that fills `position`.
#[inline]
pub(crate) fn word(position: u64, slots: u64, content: u64) -> u64 {
    (lap(position, slots) << CONTENT_BITS) | (content & ((1 << CONTENT_BITS) - 1))
}

/// What `word` means for `position`.
#[inline]
pub(crate) fn decode(word: u64, position: u64, slots: u64) -> Found {
    let (found, wanted) = (word >> CONTENT_BITS, lap(position, slots));
    if found == wanted {
        Found::Filled(word & ((1 << CONTENT_BITS) - 1))
    } else if found + 1 == wanted {
        Found::Free
    } else if found > wanted {
        Found::Later
    } else {
        Found::Corrupt
    }
}

/// Whether [`decode`] says [`Found::Free`].
#[inline]
#[cfg(any(feature = "alloc", test, loom))]
pub(crate) fn is_free(word: u64, position: u64, slots: u64) -> bool {
    (word >> CONTENT_BITS) + 1 == lap(position, slots)
}

/// Whether `position` can still be counted.
#[inline]
pub(crate) fn is_countable(position: u64, slots: u64) -> bool {
    lap(position, slots) <= LAST_LAP
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_word_means_its_own_position_and_no_other() {
        for position in [0, 1, 7, 8, 9, 1_000_003] {
            let filled = word(position, 8, 12_345);
            assert_eq!(decode(filled, position, 8), Found::Filled(12_345));
            assert_eq!(decode(filled, position + 8, 8), Found::Free);
            assert_eq!(decode(filled, position + 16, 8), Found::Corrupt);
            if position >= 8 {
                assert_eq!(decode(filled, position - 8, 8), Found::Later);
            }
        }
        assert_eq!(decode(0, 3, 8), Found::Free);
        assert!(is_countable(1 << 40, 8));
        assert!(!is_countable(1 << 41, 8));
        assert_eq!(decode(u64::MAX, u64::MAX, 8), Found::Corrupt);
    }
}
