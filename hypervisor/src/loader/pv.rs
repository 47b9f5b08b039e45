//! Loads the paravirtual guest kernel, an ELF image (see [`vmm_shared::pv`]).
//!
//! What lies in low memory is as for Linux, with the boot information in
//! place of the zero page. The first program follows the kernel.

use core::mem::offset_of;

use guest_image::{ByteSource, Image};
use vmm_shared::addr::{Gpa, PAGE_SIZE};
use vmm_shared::control::{MAX_COMMAND_LINE, RingId};
use vmm_shared::losses::LossRecord;
use vmm_shared::pv::{BOOT_MAGIC, BOOT_VERSION, BootInfo, Cpu, Range};
use zerocopy::FromZeros;

use super::{LinuxEntry, LoadError, copy, entry};
use crate::mem::GuestMemory;
use crate::platform::layout::{EXTENDED_MEMORY, LOW_RAM_LIMIT, PV_RINGS, PV_RINGS_SIZE};
use crate::platform::{Domain, PlatformConfig};

const BOOT_INFO: Gpa = Gpa(0x1_0000);

/// What a paravirtual guest is started from.
#[derive(Clone, Copy)]
pub struct PvBoot<'a> {
    /// The machine.
    pub platform: &'a PlatformConfig,
    /// The kernel: an ELF image.
    pub kernel: &'a dyn ByteSource,
    /// The first program: an ELF image.
    pub init: &'a dyn ByteSource,
    /// The command line.
    pub command_line: &'a [u8],
    /// Rate of the TSC in kHz.
    pub tsc_khz: u32,
    /// Wall-clock time at guest TSC 0, in ns.
    pub boot_wall_ns: u64,
}

/// The rings that the guest gets and where it sees them: one behind the
/// other, each in pages of its own.
pub fn rings() -> impl Iterator<Item = (RingId, Range)> {
    let order = [RingId::ConsoleOut, RingId::AgentOut, RingId::AgentIn];
    order.into_iter().scan(PV_RINGS.0, |next, ring| {
        let gpa = *next;
        let len = vmm_shared::ring::ring_size(ring.capacity()) as u64;
        *next += len.next_multiple_of(PAGE_SIZE);
        debug_assert!(*next <= PV_RINGS.0 + PV_RINGS_SIZE, "there is room");
        Some((ring, Range { gpa, len }))
    })
}

/// Where the guest sees what it has lost.
pub fn losses() -> Range {
    let end = rings().map(|(_, range)| range.gpa + range.len).max();
    Range {
        gpa: end.unwrap_or(PV_RINGS.0).next_multiple_of(PAGE_SIZE),
        len: LossRecord::SIZE as u64,
    }
}

/// Puts kernel, first program, boot information and the state for entering
/// the kernel into guest memory.
///
/// # Errors
/// What is wrong with the kernel, or what does not fit. Guest memory may have
/// been written then.
pub fn load_pv(memory: &impl GuestMemory, boot: &PvBoot<'_>) -> Result<LinuxEntry, LoadError> {
    let topology = &boot.platform.topology;
    if topology.vcpu_ids().any(|vcpu| !topology.is_present(vcpu)) {
        return Err(LoadError::AbsentVcpus);
    }
    let low_end = topology.memory().min(LOW_RAM_LIMIT.0);
    let image = Image::read_paravirtual(boot.kernel)?;
    for segment in image.segments() {
        if segment.gpa < EXTENDED_MEMORY || segment.end() > Gpa(low_end) {
            return Err(LoadError::Misplaced {
                start: segment.gpa,
                end: segment.end(),
                limit: low_end,
            });
        }
        copy::copy_segment(memory, boot.kernel, segment)?;
    }
    let end = image.end().0;

    let init = Range {
        gpa: end.next_multiple_of(PAGE_SIZE),
        len: boot.init.len(),
    };
    if init.gpa.saturating_add(init.len) > low_end {
        return Err(LoadError::InitramfsDoesNotFit {
            len: init.len,
            room: low_end.saturating_sub(init.gpa),
        });
    }
    copy::copy(memory, boot.init, 0, Gpa(init.gpa), init.len)?;

    let len = boot.command_line.len();
    if len > MAX_COMMAND_LINE {
        return Err(LoadError::CommandLineTooLong {
            len,
            limit: MAX_COMMAND_LINE,
        });
    }
    let mut info = BootInfo::new_zeroed();
    info.magic = BOOT_MAGIC;
    info.version = BOOT_VERSION;
    info.nodes = u32::try_from(topology.nodes().len()).unwrap_or(u32::MAX);
    info.vcpus = topology.vcpus().into();
    info.tsc_khz = boot.tsc_khz;
    info.boot_wall_ns = boot.boot_wall_ns;
    info.entry = image.entry.into();
    info.kernel = Range { gpa: 0, len: end };
    info.init = init;
    if let Some(image) = boot.platform.image {
        info.image = Range {
            gpa: image.gpa.0,
            len: image.len,
        };
    }
    for (ring, range) in rings() {
        match ring {
            RingId::ConsoleOut => info.console_out = range,
            RingId::AgentOut => info.agent_out = range,
            RingId::AgentIn => info.agent_in = range,
            RingId::ConsoleIn => {}
        }
    }
    info.losses = losses();
    info.command_line_len = u32::try_from(len).expect("checked to be short");
    info.command_line[..len].copy_from_slice(boot.command_line);
    for (slot, (Domain(node), ram)) in info.ram.iter_mut().zip(topology.ram_ranges()) {
        slot.range = Range {
            gpa: ram.gpa.0,
            len: ram.len,
        };
        slot.node = node.into();
        info.ram_count += 1;
    }
    for (slot, vcpu) in info.cpu.iter_mut().zip(topology.vcpu_ids()) {
        *slot = Cpu {
            apic_id: topology.apic_id(vcpu).0,
            node: topology.domain(vcpu).0.into(),
        };
    }
    memory.write(BOOT_INFO, &info)?;
    entry::write(memory, info.entry, BOOT_INFO)
}

/// How a vCPU enters that is started with this page; `None` if nothing can be
/// there. Where it enters is up to the guest.
#[must_use]
pub fn start_up(memory: &impl GuestMemory, page: u8) -> Option<LinuxEntry> {
    let info = Gpa(u64::from(page) * PAGE_SIZE);
    let at = Gpa(info.0 + offset_of!(BootInfo, entry) as u64);
    let rip: u64 = memory.read(at).ok()?;
    Some(entry::state(rip, info))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::Protocol;
    use crate::mem::sparse::SparseMemory;
    use crate::platform::{Machine, Topology};

    const MEMORY: u64 = 128 << 20;
    const LOAD: u64 = 2 << 20;

    /// An image with one segment: `code` at the load address, and as many
    /// zeros behind it as are missing to `len` bytes.
    fn image(code: &[u8], len: u64) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        file.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
        file.extend(1_u32.to_le_bytes());
        file.extend(
            [LOAD + 4, 64, 0]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes()),
        );
        file.extend([0; 4]);
        let halves = [64_u16, 56, 1, 0, 0, 0];
        file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        file.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes()));
        let virtual_address = LOAD | 0xffff_ffff_8000_0000;
        let words = [120, virtual_address, LOAD, code.len() as u64, len, 0x1000];
        file.extend(words.iter().flat_map(|word: &u64| word.to_le_bytes()));
        file.extend(code);
        file
    }

    fn load(memory: &SparseMemory, kernel: &[u8], init: &[u8]) -> Result<LinuxEntry, LoadError> {
        load_on(memory, kernel, init, 2)
    }

    /// With so many vCPUs of two.
    fn load_on(
        memory: &SparseMemory,
        kernel: &[u8],
        init: &[u8],
        vcpus: u16,
    ) -> Result<LinuxEntry, LoadError> {
        let topology = Topology::one_node(2, MEMORY).expect("possible");
        let platform = PlatformConfig {
            topology: topology.starting_with([vcpus]),
            image: None,
            machine: Machine {
                protocol: Protocol::Paravirtual,
                ..Machine::LINUX
            },
        };
        load_pv(
            memory,
            &PvBoot {
                platform: &platform,
                kernel: &kernel,
                init: &init,
                command_line: b"quiet",
                tsc_khz: 1_000_000,
                boot_wall_ns: 7,
            },
        )
    }

    fn memory() -> SparseMemory {
        SparseMemory::new(MEMORY)
    }

    #[test]
    fn an_image_is_loaded_with_zeros_and_the_first_program_behind_it() {
        let memory = memory();
        memory.write_bytes(Gpa(LOAD), &[0xff; 64]).expect("fits");
        let entry = load(&memory, &image(b"code", 32), b"init").expect("sound");
        assert_eq!(entry.rip, LOAD + 4);
        let mut bytes = [0; 64];
        memory.read_bytes(Gpa(LOAD), &mut bytes).expect("fits");
        assert_eq!(&bytes[..4], b"code");
        assert_eq!(bytes[4..32], [0; 28]);
        assert_eq!(bytes[32..], [0xff; 32], "nothing else is touched");
        let info: BootInfo = memory.read(Gpa(entry.rsi)).expect("fits");
        assert_eq!(
            (info.magic, info.version, info.vcpus),
            (BOOT_MAGIC, BOOT_VERSION, 2)
        );
        assert_eq!(
            info.kernel,
            Range {
                gpa: 0,
                len: LOAD + 32
            }
        );
        assert_eq!(
            info.init,
            Range {
                gpa: LOAD + 4096,
                len: 4
            }
        );
        memory
            .read_bytes(Gpa(info.init.gpa), &mut bytes[..4])
            .expect("fits");
        assert_eq!(&bytes[..4], b"init");
        assert_eq!(info.entry, entry.rip);
        let ids: Vec<_> = info.cpu[..3].iter().map(|cpu| cpu.apic_id).collect();
        assert_eq!(ids, [0, 1, 0]);
        let page = u8::try_from(entry.rsi >> 12).expect("a start-up page");
        assert_eq!(start_up(&memory, page), Some(entry));
        assert_eq!(info.ram_count, 1);
        assert_eq!(
            info.ram[0].range,
            Range {
                gpa: 0,
                len: MEMORY
            }
        );
    }

    #[test]
    fn vcpus_that_would_come_later_are_refused() {
        let refused = load_on(&memory(), &image(b"code", 32), b"init", 1);
        assert_eq!(refused, Err(LoadError::AbsentVcpus));
    }

    #[test]
    fn broken_images_are_refused() {
        let memory = memory();
        let sound = image(b"code", 32);
        assert!(load(&memory, &[], b"").is_err());
        for len in 0..sound.len() {
            assert!(load(&memory, &sound[..len], b"").is_err(), "{len} bytes");
        }
        let with = |at: usize, value: u64| {
            let mut file = sound.clone();
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            load(&memory, &file, b"")
        };
        let (offset, physical, file_size, size) = (72, 88, 96, 104);
        for at in [32, offset, physical, file_size, size] {
            assert!(with(at, u64::MAX).is_err(), "at {at}");
            assert!(with(at, MEMORY).is_err(), "at {at}");
        }
        assert!(with(physical, 0).is_err(), "low memory is the loader's");
        assert!(with(size, 3).is_err(), "more file than memory");
        let long = vec![0; usize::try_from(MEMORY).expect("64-bit")];
        assert!(matches!(
            load(&memory, &sound, &long),
            Err(LoadError::InitramfsDoesNotFit { .. })
        ));
    }

    #[test]
    fn rings_have_pages_of_their_own() {
        let mut end = PV_RINGS.0;
        for (_, range) in rings() {
            assert!(range.gpa >= end && range.gpa.is_multiple_of(PAGE_SIZE));
            end = range.gpa + range.len;
        }
        let losses = losses();
        assert!(losses.gpa >= end && losses.gpa.is_multiple_of(PAGE_SIZE));
        end = losses.gpa + losses.len;
        assert!(end <= PV_RINGS.0 + PV_RINGS_SIZE);
    }
}
