//! Why an image can't be booted.

use core::fmt;

/// Why an image can't be booted. Displayed, it is half a sentence that
/// follows the image's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// None of the known formats.
    Unknown,
    /// An ELF file without multiboot header and without PVH note.
    NoEntry,
    /// A multiboot header outside of an ELF file.
    NotElf,
    /// A multiboot header that demands something we don't know.
    UnknownDemand {
        /// Its flags.
        flags: u32,
    },
    /// An ELF file whose headers make no sense.
    BadHeader,
    /// An ELF file that isn't a program.
    NotAProgram {
        /// Its type.
        kind: u16,
    },
    /// An ELF file for another processor.
    WrongMachine {
        /// The processor's number.
        machine: u16,
    },
    /// More program headers than anybody needs.
    TooManySegments {
        /// How many.
        count: u16,
    },
    /// The file ends before what it promises does.
    Truncated {
        /// Bytes there should be, at least.
        expected: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// A segment has more bytes in the file than in memory.
    SegmentShrinks {
        /// Where it is to be loaded.
        at: u64,
    },
    /// A segment ends beyond what 32-bit code reaches.
    SegmentTooHigh {
        /// Where it is to be loaded.
        at: u64,
        /// Its bytes in memory.
        len: u64,
    },
    /// Two segments want the same memory.
    SegmentsOverlap {
        /// Where the second starts.
        at: u64,
    },
    /// Nothing is to be loaded.
    NoSegments,
    /// The entry point is in no segment.
    EntryOutside {
        /// Where it is.
        entry: u64,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unknown => write!(f, "neither a bzImage nor an ELF file"),
            Self::NoEntry => {
                write!(f, "an ELF file with neither multiboot header nor PVH note")
            }
            Self::NotElf => write!(f, "a multiboot image that is not an ELF file"),
            Self::UnknownDemand { flags } => {
                write!(
                    f,
                    "its multiboot header demands what is unknown (flags {flags:#x})"
                )
            }
            Self::BadHeader => write!(f, "its ELF header is damaged"),
            Self::NotAProgram { kind } => {
                write!(
                    f,
                    "an ELF file of type {kind}, not an executable at fixed addresses"
                )
            }
            Self::WrongMachine { machine } => {
                write!(f, "for another processor (ELF machine {machine})")
            }
            Self::TooManySegments { count } => write!(f, "it has {count} program headers"),
            Self::Truncated { expected, len } => {
                write!(f, "truncated: it has {len} bytes and needs {expected}")
            }
            Self::SegmentShrinks { at } => write!(
                f,
                "its segment at {at:#x} is larger in the file than in memory"
            ),
            Self::SegmentTooHigh { at, len } => write!(
                f,
                "its segment at {at:#x} with {len:#x} bytes ends above 4 GiB"
            ),
            Self::SegmentsOverlap { at } => {
                write!(f, "its segment at {at:#x} overlaps another")
            }
            Self::NoSegments => write!(f, "it has nothing to load"),
            Self::EntryOutside { entry } => {
                write!(f, "its entry point {entry:#x} is in no segment")
            }
        }
    }
}

impl core::error::Error for ImageError {}
