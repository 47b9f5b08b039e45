//! Guest page-table walk in software.
//!
//! Needed where the processor reports an access but not its instruction: the
//! bytes are fetched through the guest's own tables. The walk only reads;
//! accessed and dirty bits are left alone, because the processor has set them
//! before it could exit. Protection keys are not looked at: they don't apply
//! to fetches. Formats: AMD64 manual, volume 2, chapter 5.

use vmm_shared::addr::{Gpa, Gva};

use super::GuestMemory;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The longest instruction, in bytes.
pub const MAX_INSTRUCTION: usize = 15;

/// The registers that decide how a virtual address is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingState {
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the root table.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enable register.
    pub efer: u64,
    /// Flags, for the alignment-check flag that suspends SMAP.
    pub rflags: u64,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum AccessKind {
    Read,
    Write,
    Execute,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2, or a descriptor-table access at any CPL.
    Supervisor,
}

/// An access to a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// For whom.
    pub privilege: Privilege,
}

/// Why a virtual address could not be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The processor would raise #PF.
    PageFault {
        /// The address, as CR2 would show it.
        gva: Gva,
        /// The error code that #PF would push.
        error_code: u32,
        /// Level of the table at which the walk ended; 1 is the last.
        level: u32,
    },
    /// The address is not canonical: #GP, or #SS for a stack access.
    NonCanonical {
        /// The address.
        gva: Gva,
    },
    /// A page table, or the instruction itself, is not in guest memory.
    OutsideMemory {
        /// What should have been read.
        gpa: Gpa,
    },
}

/// Bytes of an instruction, as many as can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchedInstruction {
    bytes: [u8; MAX_INSTRUCTION],
    len: usize,
}

impl FetchedInstruction {
    /// The bytes, which may go on after the instruction's end and, at the
    /// edge of what is mapped, may end before it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The shape of one translation mode's tables.
#[derive(Clone, Copy)]
struct Format {
    levels: u32,
    index_bits: u32,
    entry_bytes: u64,
    root: u64,
}

impl PagingState {
    /// The format in use, or `None` without paging.
    fn format(&self) -> Option<Format> {
        if self.cr0 & CR0_PG == 0 {
            return None;
        }
        Some(if self.efer & EFER_LMA != 0 {
            Format {
                levels: if self.cr4 & CR4_LA57 == 0 { 4 } else { 5 },
                index_bits: 9,
                entry_bytes: 8,
                root: self.cr3 & ADDRESS,
            }
        } else if self.cr4 & CR4_PAE != 0 {
            Format {
                levels: 3,
                index_bits: 9,
                entry_bytes: 8,
                root: self.cr3 & 0xffff_ffe0,
            }
        } else {
            Format {
                levels: 2,
                index_bits: 10,
                entry_bytes: 4,
                root: self.cr3 & 0xffff_f000,
            }
        })
    }

    fn is_long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// The error code of a page fault without its cause bits (present and
    /// reserved).
    fn error_code(&self, access: Access) -> u32 {
        let no_execute = self.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0;
        let kind = match access.kind {
            AccessKind::Write => 1 << 1,
            AccessKind::Execute if no_execute || self.cr4 & CR4_SMEP != 0 => 1 << 4,
            AccessKind::Read | AccessKind::Execute => 0,
        };
        let privilege = match access.privilege {
            Privilege::User => 1 << 2,
            Privilege::Supervisor => 0,
        };
        kind | privilege
    }

    /// Whether the rights gathered on the way to a page permit the access.
    fn permits(&self, access: Access, rights: u64) -> bool {
        let user_page = rights & USER != 0;
        let writable = rights & WRITABLE != 0;
        let executable = rights & NO_EXECUTE == 0;
        match (access.privilege, access.kind) {
            (Privilege::User, AccessKind::Read) => user_page,
            (Privilege::User, AccessKind::Write) => user_page && writable,
            (Privilege::User, AccessKind::Execute) => user_page && executable,
            (Privilege::Supervisor, AccessKind::Execute) => {
                executable && !(user_page && self.cr4 & CR4_SMEP != 0)
            }
            (Privilege::Supervisor, kind) => {
                let smap = self.cr4 & CR4_SMAP != 0 && self.rflags & RFLAGS_AC == 0;
                let write_ok = kind == AccessKind::Read || writable || self.cr0 & CR0_WP == 0;
                write_ok && !(user_page && smap)
            }
        }
    }

    /// The bits that must be clear in an entry of this format.
    fn reserved(&self, format: Format, level: u32, entry: u64) -> u64 {
        if format.entry_bytes == 4 {
            // A 4 MiB page carries address bits 32 to 39 in bits 13 to 20.
            let large = level == 2 && self.cr4 & CR4_PSE != 0 && entry & LARGE != 0;
            return if large { 1 << 21 } else { 0 };
        }
        let mut reserved = 0;
        if self.efer & EFER_NXE == 0 {
            reserved |= NO_EXECUTE;
        }
        if !self.is_long_mode() {
            // Bits 52 to 62 are free for software only in long mode.
            reserved |= 0x7ff0_0000_0000_0000;
            if level == 3 {
                reserved |= NO_EXECUTE | 0x1e6;
            }
        } else if level >= 4 {
            reserved |= LARGE;
        }
        if entry & LARGE != 0 && (level == 2 || (level == 3 && self.is_long_mode())) {
            // Between the page's PAT bit (12) and its address.
            reserved |= ((1 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
        }
        reserved
    }

    fn is_large(&self, format: Format, level: u32, entry: u64) -> bool {
        entry & LARGE != 0
            && match format.levels {
                2 => level == 2 && self.cr4 & CR4_PSE != 0,
                3 => level == 2,
                _ => level == 2 || level == 3,
            }
    }
}

/// The guest physical address behind a virtual (linear) address.
///
/// # Errors
/// Says what the processor would have raised, or that a table lies outside
/// guest memory.
pub fn translate(
    memory: &impl GuestMemory,
    paging: &PagingState,
    gva: Gva,
    access: Access,
) -> Result<Gpa, WalkError> {
    let address = if paging.is_long_mode() {
        gva.0
    } else {
        gva.0 & 0xffff_ffff
    };
    let Some(format) = paging.format() else {
        return Ok(Gpa(address));
    };
    if paging.is_long_mode() && !is_canonical(address, 12 + 9 * format.levels) {
        return Err(WalkError::NonCanonical { gva });
    }

    let fault = |level, cause: u32| WalkError::PageFault {
        gva: Gva(address),
        error_code: paging.error_code(access) | cause,
        level,
    };
    let mut table = format.root;
    let mut rights = WRITABLE | USER;
    let mut level = format.levels;
    loop {
        let shift = 12 + format.index_bits * (level - 1);
        let index = (address >> shift) & ((1 << format.index_bits) - 1);
        let entry = read_entry(memory, format, Gpa(table + index * format.entry_bytes))?;
        if entry & PRESENT == 0 {
            return Err(fault(level, 0));
        }
        if entry & paging.reserved(format, level, entry) != 0 {
            return Err(fault(level, 0b1001));
        }
        // The four PAE directory pointers carry no rights.
        if format.levels != 3 || level != 3 {
            rights &= entry | !(WRITABLE | USER);
            rights |= entry & NO_EXECUTE;
        }
        if level == 1 || paging.is_large(format, level, entry) {
            if !paging.permits(access, rights) {
                return Err(fault(level, 0b0001));
            }
            let offset_mask = (1_u64 << shift) - 1;
            let page = frame(format, level, entry) & !offset_mask;
            return Ok(Gpa(page | (address & offset_mask)));
        }
        table = entry & ADDRESS;
        level -= 1;
    }
}

/// Reads the instruction at a linear address, as far as it can be read.
///
/// # Errors
/// If not even its first byte can be.
pub fn fetch(
    memory: &impl GuestMemory,
    paging: &PagingState,
    privilege: Privilege,
    rip: Gva,
) -> Result<FetchedInstruction, WalkError> {
    let access = Access {
        kind: AccessKind::Execute,
        privilege,
    };
    let mut bytes = [0; MAX_INSTRUCTION];
    let gpa = translate(memory, paging, rip, access)?;
    let to_page_end = 0x1000 - (gpa.0 & 0xfff);
    let first = usize::try_from(to_page_end).map_or(MAX_INSTRUCTION, |n| n.min(MAX_INSTRUCTION));
    memory
        .read_bytes(gpa, &mut bytes[..first])
        .map_err(|_| WalkError::OutsideMemory { gpa })?;
    let mut len = first;
    if first < MAX_INSTRUCTION {
        let next = Gva(rip.0.wrapping_add(to_page_end));
        let rest = translate(memory, paging, next, access)
            .ok()
            .and_then(|gpa| memory.read_bytes(gpa, &mut bytes[first..]).ok());
        if rest.is_some() {
            len = MAX_INSTRUCTION;
        }
    }
    Ok(FetchedInstruction { bytes, len })
}

fn is_canonical(address: u64, bits: u32) -> bool {
    // All bits from the sign bit on are alike.
    let sign_bits = address >> (bits - 1);
    sign_bits == 0 || sign_bits == u64::MAX >> (bits - 1)
}

fn read_entry(memory: &impl GuestMemory, format: Format, gpa: Gpa) -> Result<u64, WalkError> {
    if format.entry_bytes == 4 {
        memory.read::<u32>(gpa).map(u64::from)
    } else {
        memory.read::<u64>(gpa)
    }
    .map_err(|_| WalkError::OutsideMemory { gpa })
}

/// The frame address in a leaf entry, before low bits are masked.
fn frame(format: Format, level: u32, entry: u64) -> u64 {
    if format.entry_bytes == 4 && level == 2 {
        let high = (entry >> 13) & 0xff;
        (entry & 0xffc0_0000) | (high << 32)
    } else {
        entry & ADDRESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sparse::SparseMemory;

    const READ: Access = Access {
        kind: AccessKind::Read,
        privilege: Privilege::Supervisor,
    };
    const WRITE: Access = Access {
        kind: AccessKind::Write,
        ..READ
    };
    const EXECUTE: Access = Access {
        kind: AccessKind::Execute,
        ..READ
    };
    const USER_READ: Access = Access {
        privilege: Privilege::User,
        ..READ
    };
    const ALL: u64 = PRESENT | WRITABLE | USER;

    const LONG: PagingState = PagingState {
        cr0: CR0_PG | CR0_WP | 1,
        cr3: 0x1000,
        cr4: CR4_PAE,
        efer: EFER_LMA | EFER_NXE | 1 << 8,
        rflags: 2,
    };

    fn memory(entries: &[(u64, u64)]) -> SparseMemory {
        let memory = SparseMemory::new(0x10000);
        for (at, entry) in entries {
            memory.write(Gpa(*at), entry).expect("inside");
        }
        memory
    }

    fn fault_code(result: Result<Gpa, WalkError>) -> u32 {
        match result {
            Err(WalkError::PageFault { error_code, .. }) => error_code,
            other => panic!("no page fault: {other:?}"),
        }
    }

    /// Maps virtual 0x1234_5678_9000 at physical 0x7000 with these last rights.
    fn four_levels(leaf: u64) -> SparseMemory {
        let gva = 0x1234_5678_9000_u64;
        memory(&[
            (0x1000 + ((gva >> 39) & 0x1ff) * 8, 0x2000 | ALL),
            (0x2000 + ((gva >> 30) & 0x1ff) * 8, 0x3000 | ALL),
            (0x3000 + ((gva >> 21) & 0x1ff) * 8, 0x4000 | ALL),
            (0x4000 + ((gva >> 12) & 0x1ff) * 8, 0x7000 | leaf),
        ])
    }

    const GVA: Gva = Gva(0x1234_5678_9abc);

    #[test]
    fn without_paging_addresses_are_physical_and_32_bits_wide() {
        let paging = PagingState::default();
        let result = translate(&memory(&[]), &paging, Gva(0x1_0000_fff0), READ);
        assert_eq!(result, Ok(Gpa(0xfff0)));
    }

    #[test]
    fn four_levels_reach_a_small_page() {
        let result = translate(&four_levels(ALL), &LONG, GVA, WRITE);
        assert_eq!(result, Ok(Gpa(0x7abc)));
    }

    #[test]
    fn five_levels_use_bits_48_to_56() {
        let paging = PagingState {
            cr4: CR4_PAE | CR4_LA57,
            ..LONG
        };
        let gva = Gva(0x0055_0000_0000_0123);
        let memory = memory(&[
            (0x1000 + 0x55 * 8, 0x2000 | ALL),
            (0x2000, 0x3000 | ALL),
            (0x3000, 0x4000 | ALL),
            (0x4000, 0x5000 | ALL),
            (0x5000, 0x6000 | ALL),
        ]);
        assert_eq!(translate(&memory, &paging, gva, READ), Ok(Gpa(0x6123)));
        let beyond = Gva(1 << 56);
        assert_eq!(
            translate(&memory, &paging, beyond, READ),
            Err(WalkError::NonCanonical { gva: beyond })
        );
    }

    #[test]
    fn large_pages_keep_their_offset_bits() {
        let memory = memory(&[
            (0x1000, 0x2000 | ALL),
            (0x2000, 0x4000_0000 | LARGE | ALL),
            (0x2008, 0x3000 | ALL),
            (0x3008, 0x0060_0000 | LARGE | ALL | 1 << 12),
        ]);
        let giant = translate(&memory, &LONG, Gva(0x1234_5678), READ);
        assert_eq!(giant, Ok(Gpa(0x5234_5678)));
        let large = translate(&memory, &LONG, Gva(0x4032_1fed), READ);
        assert_eq!(large, Ok(Gpa(0x0072_1fed)));
    }

    #[test]
    fn high_half_addresses_are_canonical_and_holes_are_not() {
        let memory = memory(&[(0x1ff8, 0x2000 | ALL), (0x2ff8, 0x4000_0000 | LARGE | ALL)]);
        let top = Gva(0xffff_ffff_ffff_ffff);
        assert_eq!(translate(&memory, &LONG, top, READ), Ok(Gpa(0x7fff_ffff)));
        for hole in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff] {
            let gva = Gva(hole);
            let result = translate(&memory, &LONG, gva, READ);
            assert_eq!(result, Err(WalkError::NonCanonical { gva }));
        }
    }

    #[test]
    fn missing_rights_fault_with_the_processors_code() {
        let cases = [
            (0, READ, 0b0_0000),
            (0, WRITE, 0b0_0010),
            (0, USER_READ, 0b0_0100),
            (0, EXECUTE, 0b1_0000),
            (PRESENT | USER, WRITE, 0b0_0011),
            (PRESENT | WRITABLE, USER_READ, 0b0_0101),
            (ALL | NO_EXECUTE, EXECUTE, 0b1_0001),
        ];
        for (leaf, access, code) in cases {
            let result = translate(&four_levels(leaf), &LONG, GVA, access);
            assert_eq!(fault_code(result), code, "leaf {leaf:#x}, {access:?}");
        }
    }

    #[test]
    fn without_write_protect_a_supervisor_writes_read_only_pages() {
        let paging = PagingState {
            cr0: CR0_PG | 1,
            ..LONG
        };
        let result = translate(&four_levels(PRESENT), &paging, GVA, WRITE);
        assert_eq!(result, Ok(Gpa(0x7abc)));
    }

    #[test]
    fn smep_and_smap_keep_a_supervisor_off_user_pages() {
        let memory = four_levels(ALL);
        let smep = PagingState {
            cr4: CR4_PAE | CR4_SMEP,
            ..LONG
        };
        assert_eq!(
            fault_code(translate(&memory, &smep, GVA, EXECUTE)),
            0b1_0001
        );
        assert!(translate(&memory, &smep, GVA, READ).is_ok());
        let smap = PagingState {
            cr4: CR4_PAE | CR4_SMAP,
            ..LONG
        };
        assert_eq!(fault_code(translate(&memory, &smap, GVA, READ)), 0b0_0001);
        let suspended = PagingState {
            rflags: RFLAGS_AC,
            ..smap
        };
        assert!(translate(&memory, &suspended, GVA, READ).is_ok());
    }

    #[test]
    fn reserved_bits_fault_as_such() {
        let no_nx = PagingState {
            efer: EFER_LMA,
            ..LONG
        };
        let result = translate(&four_levels(ALL | NO_EXECUTE), &no_nx, GVA, READ);
        assert_eq!(fault_code(result), 0b0_1001);
        let large_top = memory(&[(0x1000, 0x2000 | LARGE | ALL)]);
        let result = translate(&large_top, &LONG, Gva(0), READ);
        assert_eq!(fault_code(result), 0b0_1001);
        let unaligned = memory(&[(0x1000, 0x2000 | ALL), (0x2000, 0x2000 | LARGE | ALL)]);
        let result = translate(&unaligned, &LONG, Gva(0), READ);
        assert_eq!(fault_code(result), 0b0_1001);
    }

    #[test]
    fn pae_walks_three_levels_from_an_unaligned_root() {
        let paging = PagingState {
            cr0: CR0_PG | 1,
            cr3: 0x1020,
            cr4: CR4_PAE,
            efer: EFER_NXE,
            rflags: 2,
        };
        let memory = memory(&[
            (0x1020 + 3 * 8, 0x2000 | PRESENT),
            (0x2000, 0x3000 | ALL),
            (0x2008, 0x1_0020_0000 | LARGE | ALL),
            (0x3008, 0x5000 | ALL),
        ]);
        let small = translate(&memory, &paging, Gva(0xc000_1042), WRITE);
        assert_eq!(small, Ok(Gpa(0x5042)));
        let large = translate(&memory, &paging, Gva(0xc020_1042), WRITE);
        assert_eq!(large, Ok(Gpa(0x1_0020_1042)));
    }

    #[test]
    fn two_levels_have_4_byte_entries_and_4_mib_pages() {
        let paging = PagingState {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PSE,
            efer: 0,
            rflags: 2,
        };
        let memory = SparseMemory::new(0x10000);
        let entries: [(u64, u32); 3] = [
            (0x1000, 0x2007),
            (0x1004, 0x0080_0087 | 1 << 13),
            (0x2004, 0x6007),
        ];
        for (at, entry) in entries {
            memory.write(Gpa(at), &entry).expect("inside");
        }
        assert_eq!(
            translate(&memory, &paging, Gva(0x1042), READ),
            Ok(Gpa(0x6042))
        );
        assert_eq!(
            translate(&memory, &paging, Gva(0x0043_2100), READ),
            Ok(Gpa(0x1_0083_2100))
        );
    }

    #[test]
    fn tables_outside_memory_are_an_error_not_a_panic() {
        let paging = PagingState {
            cr3: ADDRESS,
            ..LONG
        };
        assert_eq!(
            translate(&memory(&[]), &paging, Gva(0), READ),
            Err(WalkError::OutsideMemory { gpa: Gpa(ADDRESS) })
        );
    }

    #[test]
    fn a_fetch_crosses_pages_that_are_not_adjacent() {
        let memory = four_levels(ALL);
        let next = 0x4000 + (((GVA.0 >> 12) + 1) & 0x1ff) * 8;
        memory.write(Gpa(next), &(0x9000 | ALL)).expect("inside");
        memory.write_bytes(Gpa(0x7ffd), &[1, 2, 3]).expect("inside");
        memory.write_bytes(Gpa(0x9000), &[4; 12]).expect("inside");
        let rip = Gva((GVA.0 & !0xfff) + 0xffd);
        let fetched = fetch(&memory, &LONG, Privilege::Supervisor, rip).expect("mapped");
        assert_eq!(
            fetched.as_bytes(),
            [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
        );
    }

    #[test]
    fn a_fetch_ends_where_the_mapping_does() {
        let memory = four_levels(ALL);
        memory.write_bytes(Gpa(0x7ffe), &[0x90; 2]).expect("inside");
        let rip = Gva((GVA.0 & !0xfff) + 0xffe);
        let fetched = fetch(&memory, &LONG, Privilege::Supervisor, rip).expect("mapped");
        assert_eq!(fetched.as_bytes(), [0x90; 2]);
        let unmapped = Gva((GVA.0 & !0xfff) + 0x1000);
        assert!(fetch(&memory, &LONG, Privilege::Supervisor, unmapped).is_err());
    }
}
