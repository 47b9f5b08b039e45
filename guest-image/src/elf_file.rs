//! ELF images: which protocol, which segments, where to start.

use core::ops::Range;

use elf::abi::{EM_386, EM_X86_64, ET_EXEC, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::note::{Note, NoteIterator};
use elf::segment::{ProgramHeader, SegmentTable};
use vmm_shared::addr::Gpa;

use crate::{ByteSource, ImageError, Protocol, multiboot};

const IDENT_LEN: usize = 16;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Program headers of an image; linkers make a handful.
const MAX_HEADERS: usize = 32;
/// Segments that are loaded.
const MAX_SEGMENTS: usize = 16;
const LARGEST_HEADER: usize = 56;
/// Bytes of a note segment that are searched.
const MAX_NOTES: usize = 4096;
const XEN_NAME: &[u8] = b"Xen";
/// `XEN_ELFNOTE_PHYS32_ENTRY`: Xen, include/public/elfnote.h.
const PHYS32_ENTRY: u64 = 18;
/// What 32-bit code reaches.
const LIMIT: u64 = 1 << 32;

/// A part of the image, as it goes into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it goes.
    pub gpa: Gpa,
    /// Its bytes in memory; what the file doesn't have is zero.
    pub len: u64,
    /// Where it is in the file.
    pub file_offset: u64,
    /// Its bytes in the file, at most `len`.
    pub file_len: u64,
}

impl Segment {
    /// First address behind it, at most 4 GiB.
    #[must_use]
    pub const fn end(&self) -> Gpa {
        Gpa(self.gpa.0 + self.len)
    }

    /// Whether it shares memory with a range.
    #[must_use]
    pub const fn overlaps(&self, range: &Range<Gpa>) -> bool {
        self.gpa.0 < range.end.0 && range.start.0 < self.end().0
    }
}

/// An ELF image that has been found bootable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// How to boot it.
    pub protocol: Protocol,
    /// Where it starts: in 64-bit code the paravirtual guest, others in 32-bit
    /// code.
    pub entry: u32,
    segments: [Segment; MAX_SEGMENTS],
    count: usize,
}

impl Image {
    /// Reads and checks the headers of an image that declares its protocol.
    ///
    /// # Errors
    /// Why it can't be booted.
    pub fn read(file: &dyn ByteSource) -> Result<Self, ImageError> {
        let multiboot = multiboot::find(file);
        let Some(ident) = read_ident(file) else {
            return Err(match multiboot {
                Ok(false) => ImageError::Unknown,
                _ => ImageError::NotElf,
            });
        };
        let (class, header) = read_header(file, &ident)?;
        let mut bytes = [0; MAX_HEADERS * LARGEST_HEADER];
        let headers = read_program_headers(file, class, &header, &mut bytes)?;
        let mut image = Self::with_segments(file, &headers)?;
        let entry = if multiboot? {
            // Linked somewhere else than loaded: the entry point moves along.
            physical(header.e_entry, &headers).unwrap_or(header.e_entry)
        } else {
            image.protocol = Protocol::Pvh;
            pvh_entry(file, class, &headers).ok_or(ImageError::NoEntry)?
        };
        image.enter_at(entry)
    }

    /// Reads and checks the headers of an image for the paravirtual guest,
    /// which declares nothing.
    ///
    /// # Errors
    /// Why it can't be booted.
    pub fn read_paravirtual(file: &dyn ByteSource) -> Result<Self, ImageError> {
        let ident = read_ident(file).ok_or(ImageError::Unknown)?;
        let (class, header) = read_header(file, &ident)?;
        if class != Class::ELF64 || header.e_machine != EM_X86_64 {
            return Err(ImageError::WrongMachine {
                machine: header.e_machine,
            });
        }
        let mut bytes = [0; MAX_HEADERS * LARGEST_HEADER];
        let headers = read_program_headers(file, class, &header, &mut bytes)?;
        let mut image = Self::with_segments(file, &headers)?;
        image.protocol = Protocol::Paravirtual;
        image.enter_at(header.e_entry)
    }

    /// A multiboot image with these segments, so far without an entry point.
    fn with_segments(
        file: &dyn ByteSource,
        headers: &SegmentTable<'_, LittleEndian>,
    ) -> Result<Self, ImageError> {
        let mut image = Self {
            protocol: Protocol::Multiboot,
            entry: 0,
            segments: [Segment {
                gpa: Gpa(0),
                len: 0,
                file_offset: 0,
                file_len: 0,
            }; MAX_SEGMENTS],
            count: 0,
        };
        for header in headers.iter().filter(|header| header.p_type == PT_LOAD) {
            image.add(file, &header)?;
        }
        if image.count == 0 {
            return Err(ImageError::NoSegments);
        }
        Ok(image)
    }

    /// The image with its entry point, if that is in a segment.
    fn enter_at(mut self, entry: u64) -> Result<Self, ImageError> {
        let inside = |segment: &Segment| segment.gpa.0 <= entry && entry < segment.end().0;
        if !self.segments().iter().any(inside) {
            return Err(ImageError::EntryOutside { entry });
        }
        self.entry = u32::try_from(entry).expect("segments end at 4 GiB");
        Ok(self)
    }

    /// What is to be loaded; no two share memory.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments[..self.count]
    }

    /// First address behind the highest segment.
    #[must_use]
    pub fn end(&self) -> Gpa {
        let ends = self.segments().iter().map(Segment::end);
        ends.max().unwrap_or(Gpa(0))
    }

    fn add(&mut self, file: &dyn ByteSource, header: &ProgramHeader) -> Result<(), ImageError> {
        let (at, len) = (header.p_paddr, header.p_memsz);
        let file_end = header.p_offset.checked_add(header.p_filesz);
        if file_end.is_none_or(|end| end > file.len()) {
            return Err(ImageError::Truncated {
                expected: file_end.unwrap_or(u64::MAX),
                len: file.len(),
            });
        }
        if header.p_filesz > len {
            return Err(ImageError::SegmentShrinks { at });
        }
        if len == 0 {
            return Ok(());
        }
        if at.checked_add(len).is_none_or(|end| end > LIMIT) {
            return Err(ImageError::SegmentTooHigh { at, len });
        }
        let segment = Segment {
            gpa: Gpa(at),
            len,
            file_offset: header.p_offset,
            file_len: header.p_filesz,
        };
        let range = segment.gpa..segment.end();
        if self.segments().iter().any(|other| other.overlaps(&range)) {
            return Err(ImageError::SegmentsOverlap { at });
        }
        let count = u16::try_from(self.count + 1).unwrap_or(u16::MAX);
        let place = self.segments.get_mut(self.count);
        *place.ok_or(ImageError::TooManySegments { count })? = segment;
        self.count += 1;
        Ok(())
    }
}

/// The file's identification, if it is an ELF file.
fn read_ident(file: &dyn ByteSource) -> Option<[u8; IDENT_LEN]> {
    let mut ident = [0; IDENT_LEN];
    file.read_at(0, &mut ident)?;
    ident.starts_with(&ELF_MAGIC).then_some(ident)
}

/// Where the code at a virtual address is loaded. The segments have been
/// checked.
fn physical(address: u64, headers: &SegmentTable<'_, LittleEndian>) -> Option<u64> {
    let loaded = headers.iter().filter(|header| header.p_type == PT_LOAD);
    loaded
        .filter_map(|header| {
            let offset = address.checked_sub(header.p_vaddr)?;
            (offset < header.p_memsz).then_some(header.p_paddr + offset)
        })
        .last()
}

fn read_header(
    file: &dyn ByteSource,
    ident: &[u8],
) -> Result<(Class, FileHeader<LittleEndian>), ImageError> {
    let ident = parse_ident::<LittleEndian>(ident).map_err(|_| ImageError::BadHeader)?;
    let class = ident.1;
    let mut tail = [0; 48];
    let len = match class {
        Class::ELF32 => 36,
        Class::ELF64 => 48,
    };
    let tail = &mut tail[..len];
    file.read_at(IDENT_LEN as u64, tail)
        .ok_or(ImageError::Truncated {
            expected: (IDENT_LEN + len) as u64,
            len: file.len(),
        })?;
    let header = FileHeader::parse_tail(ident, tail).map_err(|_| ImageError::BadHeader)?;
    if !matches!(header.e_machine, EM_386 | EM_X86_64) {
        return Err(ImageError::WrongMachine {
            machine: header.e_machine,
        });
    }
    if header.e_type != ET_EXEC {
        return Err(ImageError::NotAProgram {
            kind: header.e_type,
        });
    }
    Ok((class, header))
}

fn read_program_headers<'a>(
    file: &dyn ByteSource,
    class: Class,
    header: &FileHeader<LittleEndian>,
    bytes: &'a mut [u8; MAX_HEADERS * LARGEST_HEADER],
) -> Result<SegmentTable<'a, LittleEndian>, ImageError> {
    let size = match class {
        Class::ELF32 => 32,
        Class::ELF64 => LARGEST_HEADER,
    };
    if usize::from(header.e_phentsize) != size && header.e_phnum != 0 {
        return Err(ImageError::BadHeader);
    }
    let count = header.e_phnum;
    let len = usize::from(count) * size;
    let bytes = bytes
        .get_mut(..len)
        .filter(|_| usize::from(count) <= MAX_HEADERS)
        .ok_or(ImageError::TooManySegments { count })?;
    file.read_at(header.e_phoff, bytes)
        .ok_or(ImageError::Truncated {
            expected: header.e_phoff.saturating_add(len as u64),
            len: file.len(),
        })?;
    Ok(SegmentTable::new(LittleEndian, class, bytes))
}

/// The entry point in the note that says so.
fn pvh_entry(
    file: &dyn ByteSource,
    class: Class,
    headers: &SegmentTable<'_, LittleEndian>,
) -> Option<u64> {
    headers
        .iter()
        .filter(|header| header.p_type == PT_NOTE)
        .find_map(|header| {
            let mut bytes = [0; MAX_NOTES];
            let len = usize::try_from(header.p_filesz).ok()?.min(MAX_NOTES);
            let notes = &mut bytes[..len];
            file.read_at(header.p_offset, notes)?;
            NoteIterator::new(LittleEndian, class, 4, notes).find_map(|note| match note {
                Note::Unknown(note) if note.n_type == PHYS32_ENTRY => {
                    let name = note.name.strip_suffix(b"\0").unwrap_or(note.name);
                    (name == XEN_NAME).then(|| entry_of(note.desc))?
                }
                _ => None,
            })
        })
}

/// Four or eight bytes, as the file's class has it, or as the tool did it.
fn entry_of(description: &[u8]) -> Option<u64> {
    match *description {
        [a, b, c, d] => Some(u32::from_le_bytes([a, b, c, d]).into()),
        [a, b, c, d, e, f, g, h] => Some(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    }
}
