//! Loading kernels, sound and broken ones.

use super::bzimage::field;
use super::*;
use crate::mem::sparse::SparseMemory;
use crate::platform::layout::{MIN_MEMORY, PMEM_BASE, RamRange};
use crate::platform::{Machine, PlatformNode, PmemInterface, PmemRange, Topology, golden};

pub(super) const MEMORY: u64 = MIN_MEMORY;
const SETUP_SECTORS: usize = 3;
const SETUP_LEN: usize = (SETUP_SECTORS + 1) * 512;
const PAYLOAD_LEN: usize = 0x1800;
const LOAD: u64 = 16 << 20;
const INIT_SIZE: u32 = 8 << 20;

/// A machine on one node, without a root image.
pub(super) fn platform(memory: u64) -> PlatformConfig {
    PlatformConfig {
        topology: Topology::one_node(2, memory).expect("possible"),
        image: None,
        machine: Machine::LINUX,
    }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A sound kernel file with a recognisable payload.
fn kernel() -> Vec<u8> {
    let mut file = vec![0; SETUP_LEN + PAYLOAD_LEN];
    for (byte, value) in file[SETUP_LEN..].iter_mut().zip((1..=251).cycle()) {
        *byte = value;
    }
    put(&mut file, field::SETUP_SECTORS, &[3]);
    put(&mut file, field::SYSTEM_SIZE, &0x180_u32.to_le_bytes());
    put(&mut file, field::BOOT_FLAG, &[0x55, 0xaa]);
    put(&mut file, 0x200, &[0xeb, 0x6a]);
    put(&mut file, field::MAGIC, b"HdrS");
    put(&mut file, field::VERSION, &0x020f_u16.to_le_bytes());
    put(&mut file, field::LOAD_FLAGS, &[1]);
    put(
        &mut file,
        field::INITRAMFS_MAX,
        &0x7fff_ffff_u32.to_le_bytes(),
    );
    put(&mut file, field::ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    put(&mut file, field::RELOCATABLE, &[1]);
    put(&mut file, field::EXTRA_LOAD_FLAGS, &0x7f_u16.to_le_bytes());
    put(&mut file, field::COMMAND_LINE_SIZE, &2047_u32.to_le_bytes());
    put(&mut file, field::SETUP_DATA, &0xdead_u64.to_le_bytes());
    put(&mut file, field::PREFERRED_ADDRESS, &LOAD.to_le_bytes());
    put(&mut file, field::INIT_SIZE, &INIT_SIZE.to_le_bytes());
    file
}

/// A kernel file with one field changed.
fn kernel_with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = kernel();
    put(&mut file, at, bytes);
    file
}

pub(super) const fn memory() -> SparseMemory {
    SparseMemory::new(MEMORY)
}

fn load_into(
    memory: &SparseMemory,
    kernel: &dyn ByteSource,
    initramfs: &dyn ByteSource,
    command_line: &[u8],
) -> Result<LinuxEntry, LoadError> {
    let boot = LinuxBoot {
        platform: &platform(MEMORY),
        kernel,
        initramfs,
        command_line,
    };
    load_linux(memory, &boot)
}

fn load(kernel: &[u8]) -> Result<LinuxEntry, LoadError> {
    load_into(&memory(), &kernel, &&b"initramfs"[..], b"quiet")
}

fn bytes_at(memory: &SparseMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory
        .read_bytes(Gpa(at), &mut bytes)
        .expect("inside of memory");
    bytes
}

fn zero_page_u32(memory: &SparseMemory, at: usize) -> u32 {
    memory
        .read(Gpa(ZERO_PAGE.0 + at as u64))
        .expect("inside of memory")
}

#[test]
fn a_sound_kernel_is_where_the_zero_page_says() {
    let memory = memory();
    let kernel = kernel();
    let initramfs: Vec<u8> = (0..=255).cycle().take(300 << 10).collect();
    let entry = load_into(
        &memory,
        &&kernel[..],
        &&initramfs[..],
        b"console=ttyS0 quiet",
    )
    .expect("sound");

    assert_eq!(entry.rip, LOAD + 0x200);
    assert_eq!(entry.rsi, ZERO_PAGE.0);
    assert_eq!(bytes_at(&memory, LOAD, PAYLOAD_LEN), kernel[SETUP_LEN..]);

    let start = zero_page_u32(&memory, field::INITRAMFS);
    assert_eq!(u64::from(start), MEMORY - (300 << 10));
    assert_eq!(zero_page_u32(&memory, field::INITRAMFS_SIZE), 300 << 10);
    assert_eq!(bytes_at(&memory, start.into(), initramfs.len()), initramfs);

    let line = zero_page_u32(&memory, field::COMMAND_LINE);
    assert_eq!(bytes_at(&memory, line.into(), 20), b"console=ttyS0 quiet\0");

    let rsdp = zero_page_u32(&memory, 0x70);
    assert_eq!(bytes_at(&memory, rsdp.into(), 8), b"RSD PTR ");
}

#[test]
fn the_zero_page_carries_the_header_and_our_mark() {
    let memory = memory();
    load_into(&memory, &&kernel()[..], &&[][..], b"").expect("sound");
    let page = bytes_at(&memory, ZERO_PAGE.0, 4096);
    assert_eq!(page[0x202..0x206], *b"HdrS");
    assert_eq!(page[field::LOADER_TYPE], 0xff);
    assert_eq!(page[0x1ef], 0, "the sentinel");
    assert_eq!(zero_page_u32(&memory, field::CODE32_START), 16 << 20);
    assert_eq!(zero_page_u32(&memory, field::SETUP_DATA), 0);
    assert_eq!(zero_page_u32(&memory, field::INITRAMFS), 0);
    assert_eq!(zero_page_u32(&memory, field::INITRAMFS_SIZE), 0);
}

/// The E820 of a zero page: start, end, kind.
fn e820(page: &[u8]) -> Vec<(u64, u64, u32)> {
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight"));
    let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("four"));
    (0..usize::from(page[0x1e8]))
        .map(|index| 0x2d0 + index * 20)
        .map(|at| (u64_at(at), u64_at(at) + u64_at(at + 8), u32_at(at + 16)))
        .collect()
}

fn zero_page(platform: &PlatformConfig) -> ZeroPage {
    let kernel = kernel();
    let header = SetupHeader::read(&&kernel[..]).expect("sound");
    let mut page = ZeroPage::new(&header);
    page.set_kernel(Gpa(LOAD));
    page.set_initramfs(Initramfs {
        gpa: Gpa(0xb000_0000),
        len: 0x12_3456,
    });
    page.set_command_line(COMMAND_LINE);
    page.set_rsdp(Gpa(0xe_0000));
    let acpi = RamRange {
        gpa: Gpa(0xe_0000),
        len: 0x1234,
    };
    page.set_memory_map(&memory_map(platform, acpi));
    page
}

fn large_platform(interface: PmemInterface) -> PlatformConfig {
    let image = PmemRange {
        gpa: PMEM_BASE,
        len: 1 << 30,
        interface,
    };
    PlatformConfig {
        image: Some(image),
        ..platform(4 << 30)
    }
}

#[test]
fn zero_page_of_a_large_machine() {
    let page = zero_page(&large_platform(PmemInterface::E820));
    golden::check("zero-page-4-gib.bin", page.as_bytes());
}

#[test]
fn the_memory_map_is_complete() {
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0xe_0000, 2),
        (0xe_0000, 0xe_2000, 3),
        (0xe_2000, 0x10_0000, 2),
        (0x10_0000, 3 << 30, 1),
        (4 << 30, 5 << 30, 1),
        (256 << 30, 257 << 30, 12),
    ];
    let large = large_platform(PmemInterface::E820);
    assert_eq!(e820(zero_page(&large).as_bytes()), expected);
    let nvdimm = large_platform(PmemInterface::Nfit);
    assert_eq!(e820(zero_page(&nvdimm).as_bytes()), expected[..6]);

    let small = platform(128 << 20);
    let ranges = e820(zero_page(&small).as_bytes());
    assert_eq!(ranges.last(), Some(&(0x10_0000, 128 << 20, 1)));
    assert_eq!(ranges.len(), 5);
}

#[test]
fn nodes_make_no_difference_to_the_memory_map() {
    let node = PlatformNode {
        vcpus: 1,
        memory: 1 << 30,
    };
    let nodes = PlatformConfig {
        topology: Topology::new(vec![node; 4]).expect("possible"),
        ..large_platform(PmemInterface::E820)
    };
    let one_node = large_platform(PmemInterface::E820);
    assert_eq!(
        e820(zero_page(&nodes).as_bytes()),
        e820(zero_page(&one_node).as_bytes())
    );
}

#[test]
fn the_first_four_gib_are_mapped_to_themselves() {
    let memory = memory();
    let entry = load_into(&memory, &&kernel()[..], &&[][..], b"").expect("sound");
    let read = |at: u64| memory.read::<u64>(Gpa(at)).expect("inside of memory");
    for address in [0, 0x1234, LOAD, (1 << 30) - 1, 3 << 30, (4 << 30) - 1] {
        let mut table = entry.cr3;
        for shift in [39, 30, 21] {
            let item = read(table + (address >> shift & 511) * 8);
            assert_eq!(item & 3, 3, "present and writable at {address:#x}");
            assert_eq!(item >> 7 & 1, u64::from(shift == 21), "page size");
            table = item & !0xfff;
        }
        assert_eq!(table, address & !0x1f_ffff);
    }
    assert_eq!(read(entry.cr3 + 8), 0, "nothing above");
    assert_eq!(entry.cr3 & 0xfff, 0);
}

#[test]
fn the_descriptors_are_flat() {
    let memory = memory();
    let entry = load_into(&memory, &&kernel()[..], &&[][..], b"").expect("sound");
    let descriptor = |selector: u16| {
        assert!(selector + 7 <= entry.gdt.limit);
        memory
            .read::<u64>(Gpa(entry.gdt.base + u64::from(selector)))
            .expect("inside of memory")
    };
    assert_eq!(descriptor(CODE_SELECTOR), 0x00af_9b00_0000_ffff);
    assert_eq!(descriptor(DATA_SELECTOR), 0x00cf_9300_0000_ffff);
}

#[test]
fn files_that_are_no_kernels_are_named_as_such() {
    assert_eq!(load(b""), Err(LoadError::TooShort { len: 0 }));
    assert_eq!(load(&[0; 0x263]), Err(LoadError::TooShort { len: 0x263 }));
    assert_eq!(load(&[0; 0x1000]), Err(LoadError::NotBzImage));
    assert_eq!(load(&[0xff; 0x1000]), Err(LoadError::NotBzImage));
    let not_high = kernel_with(field::LOAD_FLAGS, &[0]);
    assert_eq!(load(&not_high), Err(LoadError::NotBzImage));
    let old = kernel_with(field::VERSION, &0x020b_u16.to_le_bytes());
    assert_eq!(load(&old), Err(LoadError::OldProtocol { version: 0x20b }));
    let fixed = kernel_with(field::RELOCATABLE, &[0]);
    assert_eq!(load(&fixed), Err(LoadError::NotRelocatable));
    let only_32 = kernel_with(field::EXTRA_LOAD_FLAGS, &[0x7e, 0]);
    assert_eq!(load(&only_32), Err(LoadError::No64BitEntry));
    for alignment in [0_u32, 3, 2048, 0x30_0000] {
        let odd = kernel_with(field::ALIGNMENT, &alignment.to_le_bytes());
        assert_eq!(load(&odd), Err(LoadError::BadAlignment { alignment }));
    }
    let short_header = kernel_with(field::JUMP_OFFSET, &[0x20]);
    assert_eq!(load(&short_header), Err(LoadError::TooShort { len: 0x222 }));
}

#[test]
fn a_kernel_cut_off_anywhere_is_refused() {
    let whole = kernel();
    for len in (0..whole.len()).step_by(7).chain(0x1f0..0x2a0) {
        let result = load(&whole[..len]);
        let len = len as u64;
        let expected = whole.len() as u64;
        assert!(
            result == Err(LoadError::TooShort { len })
                || result == Err(LoadError::Truncated { expected, len }),
            "cut off at {len:#x}: {result:?}"
        );
    }
    assert!(load(&whole).is_ok());
}

#[test]
fn what_follows_the_kernel_is_not_loaded() {
    let mut signed = kernel();
    signed.extend_from_slice(&[0xee; 100]);
    let memory = memory();
    load_into(&memory, &&signed[..], &&[][..], b"").expect("sound");
    let behind = LOAD + PAYLOAD_LEN as u64;
    assert_eq!(bytes_at(&memory, behind, 100), [0; 100]);
}

#[test]
fn kernels_without_room_are_refused() {
    let limit = MEMORY;
    let large = kernel_with(field::INIT_SIZE, &u32::MAX.to_le_bytes());
    let end = LOAD + u64::from(u32::MAX);
    assert_eq!(
        load(&large),
        Err(LoadError::KernelDoesNotFit { end, limit })
    );
    let far = kernel_with(field::PREFERRED_ADDRESS, &u64::MAX.to_le_bytes());
    let end = u64::MAX;
    assert_eq!(load(&far), Err(LoadError::KernelDoesNotFit { end, limit }));
    let exact = u32::try_from(MEMORY - LOAD).expect("small");
    let exact = kernel_with(field::INIT_SIZE, &exact.to_le_bytes());
    let empty = &&[][..];
    assert!(load_into(&memory(), &&exact[..], empty, b"").is_ok());
    assert_eq!(
        load(&exact),
        Err(LoadError::InitramfsDoesNotFit { len: 9, room: 0 })
    );
}

#[test]
fn kernels_are_kept_out_of_low_memory() {
    for address in [0_u64, 0x1000, 0xf_ffff] {
        let low = kernel_with(field::PREFERRED_ADDRESS, &address.to_le_bytes());
        assert_eq!(load(&low).map(|entry| entry.rip), Ok(LOAD + 0x200));
    }
    let uneven = kernel_with(field::PREFERRED_ADDRESS, &0x110_1000_u64.to_le_bytes());
    assert_eq!(load(&uneven).map(|entry| entry.rip), Ok(0x120_0200));
}

/// A file that claims a length and has zeros, or nothing.
struct Claimed {
    len: u64,
    readable: u64,
}

impl ByteSource for Claimed {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Option<()> {
        into.fill(0);
        (offset.checked_add(into.len() as u64)? <= self.readable).then_some(())
    }
}

#[test]
fn an_initramfs_goes_as_high_as_the_kernel_reaches() {
    let place = |max: u32, len| {
        let kernel = kernel_with(field::INITRAMFS_MAX, &max.to_le_bytes());
        let file = Claimed { len, readable: len };
        let memory = memory();
        load_into(&memory, &&kernel[..], &file, b"")
            .map(|_| zero_page_u32(&memory, field::INITRAMFS))
    };
    assert_eq!(place(u32::MAX, 1), Ok(0x7ff_f000));
    assert_eq!(place(0x1ff_ffff, 0x1001), Ok(0x1ff_e000));
    assert_eq!(place(0x1ff_ffff, 8 << 20), Ok(0x180_0000));
    let room = 8 << 20;
    for len in [room + 1, u64::MAX] {
        assert_eq!(
            place(0x1ff_ffff, len),
            Err(LoadError::InitramfsDoesNotFit { len, room })
        );
    }
    assert_eq!(
        place(0, 1),
        Err(LoadError::InitramfsDoesNotFit { len: 1, room: 0 })
    );
}

#[test]
fn files_that_cannot_be_read_are_refused() {
    let unreadable = Claimed {
        len: 1 << 20,
        readable: 300 << 10,
    };
    assert_eq!(
        load_into(&memory(), &&kernel()[..], &unreadable, b""),
        Err(LoadError::Unreadable { offset: 256 << 10 })
    );
    let nothing = Claimed {
        len: u64::MAX,
        readable: 0,
    };
    assert_eq!(
        load_into(&memory(), &nothing, &nothing, b""),
        Err(LoadError::TooShort { len: u64::MAX })
    );
}

#[test]
fn command_lines_are_checked() {
    let load = |line: &[u8]| load_into(&memory(), &&kernel()[..], &&[][..], line);
    assert!(load(&[b'a'; 2047]).is_ok());
    let (len, limit) = (2048, 2047);
    assert_eq!(
        load(&[b'a'; 2048]),
        Err(LoadError::CommandLineTooLong { len, limit })
    );
    assert_eq!(
        load(b"quiet\0init=/x"),
        Err(LoadError::CommandLineHasZero { at: 5 })
    );
    // A kernel that takes any length still gets no more than there is room.
    let any = kernel_with(field::COMMAND_LINE_SIZE, &u32::MAX.to_le_bytes());
    let (len, limit) = (4096, 4095);
    assert_eq!(
        load_into(&memory(), &&any[..], &&[][..], &[b'a'; 4096]),
        Err(LoadError::CommandLineTooLong { len, limit })
    );
}

#[test]
fn memory_that_is_not_there_is_noticed() {
    let liar = platform(1 << 30);
    let boot = LinuxBoot {
        platform: &liar,
        kernel: &&kernel()[..],
        initramfs: &&b"x"[..],
        command_line: b"",
    };
    let gpa = Gpa((1 << 30) - 4096);
    let error = GuestMemoryError { gpa, len: 1 };
    assert_eq!(
        load_linux(&memory(), &boot),
        Err(LoadError::GuestMemory(error))
    );
}

/// What must hold of whatever was accepted: the pieces are inside of RAM and do
/// not overlap, and the entry point is in the kernel.
fn check_accepted(memory: &SparseMemory, entry: &LinuxEntry, initramfs_len: u64) {
    let load = u64::from(zero_page_u32(memory, field::CODE32_START));
    let size = u64::from(zero_page_u32(memory, field::INIT_SIZE));
    assert_eq!(entry.rip, load + 0x200);
    assert!(load >= 1 << 20 && load + size <= MEMORY);
    let start = u64::from(zero_page_u32(memory, field::INITRAMFS));
    assert!(start >= load + size && start + initramfs_len <= MEMORY);
    assert_eq!(start % 4096, 0);
}

#[test]
fn no_flipped_bit_in_the_header_does_harm() {
    let memory = memory();
    let sound = kernel();
    let mut accepted = 0;
    for bit in 0x1f1 * 8..0x290 * 8 {
        let mut broken = sound.clone();
        broken[bit / 8] ^= 1 << (bit % 8);
        let result = load_into(&memory, &&broken[..], &&b"initramfs"[..], b"quiet");
        if let Ok(entry) = result {
            accepted += 1;
            check_accepted(&memory, &entry, 9);
        }
    }
    assert!(accepted > 100, "most fields don't matter, {accepted} did");
}

#[test]
fn no_random_header_does_harm() {
    let memory = memory();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..3000 {
        let mut broken = kernel();
        // A few fields at once, so that one bad value does not hide the next.
        for _ in 0..random() % 4 + 1 {
            let at = 0x1f1 + usize::try_from(random() % 0x9f).expect("small");
            let value = random().to_le_bytes();
            let len = usize::try_from(random() % 8 + 1).expect("small");
            put(&mut broken, at, &value[..len]);
        }
        let result = load_into(&memory, &&broken[..], &&b"initramfs"[..], b"quiet");
        if let Ok(entry) = result {
            check_accepted(&memory, &entry, 9);
        }
    }
}
