//! What a program's ELF file says. It may be broken in any way.

use alloc::vec::Vec;

use elf::abi::{
    EM_X86_64, ET_DYN, ET_EXEC, PF_R, PF_W, PF_X, PT_GNU_STACK, PT_INTERP, PT_LOAD, PT_PHDR,
};
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParseAt;
use elf::segment::ProgramHeader;

use crate::errno::{Errno, Result};
use crate::mem::page_up;
use crate::mem::regions::Prot;
use crate::mem::tables::USER_END;

/// Bytes of the file's header.
pub(crate) const HEADER: usize = 64;
/// Bytes of each program header.
const ENTRY: usize = 56;
/// Most program headers.
const MOST_HEADERS: u16 = 128;
/// Longest path of an interpreter.
const LONGEST_PATH: u64 = 4096;

/// A piece of the program in memory, at addresses that its base is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) memory: u64,
    pub(crate) offset: u64,
    pub(crate) file: u64,
    pub(crate) prot: Prot,
}

/// A program.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) segments: Vec<Segment>,
    pub(crate) entry: u64,
    /// It can be anywhere.
    pub(crate) relocatable: bool,
    /// Where the program headers are in memory, and how many.
    pub(crate) headers: (u64, u16),
    /// Where the interpreter's path is in the file, and its length with the
    /// zero byte.
    pub(crate) interpreter: Option<(u64, usize)>,
    /// The stack may hold code.
    pub(crate) executable_stack: bool,
}

impl Image {
    /// Reads a program by `read`, which says how much of the buffer it has
    /// filled from an offset of the file on.
    ///
    /// # Errors
    /// `ENOEXEC` if it is no program of this machine, or broken.
    pub(crate) fn parse(read: impl Fn(u64, &mut [u8]) -> usize) -> Result<Self> {
        let mut bytes = [0; HEADER];
        if read(0, &mut bytes) < HEADER {
            return Err(Errno::ENOEXEC);
        }
        let header = parse_ident::<LittleEndian>(&bytes)
            .and_then(|ident| FileHeader::parse_tail(ident, &bytes[elf::abi::EI_NIDENT..]))
            .map_err(|_| Errno::ENOEXEC)?;
        let sound = header.class == Class::ELF64
            && header.e_machine == EM_X86_64
            && [ET_EXEC, ET_DYN].contains(&header.e_type)
            && usize::from(header.e_phentsize) == ENTRY
            && header.e_phnum <= MOST_HEADERS;
        if !sound {
            return Err(Errno::ENOEXEC);
        }
        let mut image = Self {
            segments: Vec::new(),
            entry: header.e_entry,
            relocatable: header.e_type == ET_DYN,
            headers: (0, header.e_phnum),
            interpreter: None,
            executable_stack: false,
        };
        for index in 0..header.e_phnum {
            let offset = header.e_phoff.checked_add(u64::from(index) * ENTRY as u64);
            let mut bytes = [0; ENTRY];
            if offset.is_none_or(|offset| read(offset, &mut bytes) < ENTRY) {
                return Err(Errno::ENOEXEC);
            }
            let entry = ProgramHeader::parse_at(LittleEndian, Class::ELF64, &mut 0, &bytes)
                .map_err(|_| Errno::ENOEXEC)?;
            image.add(&entry, header.e_phoff)?;
        }
        if image.segments.is_empty() {
            return Err(Errno::ENOEXEC);
        }
        Ok(image)
    }

    fn add(&mut self, entry: &ProgramHeader, headers_offset: u64) -> Result<()> {
        match entry.p_type {
            PT_LOAD => {
                let end = entry.p_vaddr.checked_add(entry.p_memsz);
                let sound = entry.p_filesz <= entry.p_memsz
                    && end.and_then(page_up).is_some_and(|end| end <= USER_END)
                    && entry.p_offset.checked_add(entry.p_filesz).is_some()
                    && entry.p_vaddr % 4096 == entry.p_offset % 4096;
                if !sound {
                    return Err(Errno::ENOEXEC);
                }
                let within = headers_offset.checked_sub(entry.p_offset);
                if let Some(within) = within.filter(|within| *within < entry.p_filesz)
                    && self.headers.0 == 0
                {
                    self.headers.0 = entry.p_vaddr + within;
                }
                let flags = [
                    (PF_R, Prot::READ),
                    (PF_W, Prot::WRITE),
                    (PF_X, Prot::EXECUTE),
                ];
                let prot = flags
                    .into_iter()
                    .filter(|(flag, _)| entry.p_flags & flag != 0)
                    .fold(Prot::empty(), |all, (_, prot)| all | prot);
                if entry.p_memsz > 0 {
                    self.segments.push(Segment {
                        address: entry.p_vaddr,
                        memory: entry.p_memsz,
                        offset: entry.p_offset,
                        file: entry.p_filesz,
                        prot,
                    });
                }
            }
            PT_INTERP => {
                if entry.p_filesz < 2 || entry.p_filesz > LONGEST_PATH {
                    return Err(Errno::ENOEXEC);
                }
                let len = usize::try_from(entry.p_filesz).map_err(|_| Errno::ENOEXEC)?;
                self.interpreter = Some((entry.p_offset, len));
            }
            PT_PHDR => self.headers.0 = entry.p_vaddr,
            PT_GNU_STACK => self.executable_stack = entry.p_flags & PF_X != 0,
            _ => {}
        }
        Ok(())
    }

    /// The lowest address, and the bytes from there to the highest.
    pub(crate) fn extent(&self) -> Result<(u64, u64)> {
        let start = self.segments.iter().map(|segment| segment.address).min();
        let end = self
            .segments
            .iter()
            .filter_map(|segment| page_up(segment.address.checked_add(segment.memory)?))
            .max();
        let start = crate::mem::page_down(start.ok_or(Errno::ENOEXEC)?);
        let len = end.and_then(|end| end.checked_sub(start));
        Ok((start, len.ok_or(Errno::ENOEXEC)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Image> {
        Image::parse(|offset, into| {
            let Some(rest) = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)) else {
                return 0;
            };
            let len = rest.len().min(into.len());
            into[..len].copy_from_slice(&rest[..len]);
            len
        })
    }

    /// This test's own program.
    fn own() -> Vec<u8> {
        std::fs::read(std::env::current_exe().expect("has a path")).expect("readable")
    }

    #[test]
    fn a_real_program_is_understood() {
        let image = parse(&own()).expect("it runs");
        assert!(image.segments.len() > 1);
        let (start, len) = image.extent().expect("sound");
        assert!((start..start + len).contains(&image.entry));
        assert!((start..start + len).contains(&image.headers.0));
        let (offset, len) = image.interpreter.expect("tests are dynamic");
        let at = usize::try_from(offset).expect("64-bit");
        assert!(own()[at..at + len].starts_with(b"/lib"));
    }

    #[test]
    fn any_change_of_the_headers_is_refused_or_harmless() {
        let mut bytes = own();
        bytes.truncate(4096);
        for at in 0..1024 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let old = std::mem::replace(&mut bytes[at], value);
                if let Ok(image) = parse(&bytes) {
                    let (start, len) = image.extent().expect("segments end somewhere");
                    assert!(start + len <= USER_END, "byte {at} = {value:#x}");
                }
                bytes[at] = old;
            }
        }
        for len in 0..HEADER {
            assert_eq!(parse(&bytes[..len]).err(), Some(Errno::ENOEXEC));
        }
    }
}
