//! What a guest's RDMSR and WRMSR mean: one table.
//!
//! An MSR that is not in the table raises #GP in the guest and is counted. It
//! must never reach the real register: an emulated host answers unknown
//! registers with 0 instead of faulting, and a guest's write could change the
//! host. Registers of features that [`cpuid`](super::cpuid) hides are left
//! out on purpose.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Machine;

/// What happens on a write to a register whose value never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteRule {
    /// The write is dropped.
    Ignore,
    /// The write raises #GP.
    Fault,
}

/// A register of KVM's paravirtual interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PvMsr {
    /// Where to store the wall-clock time at boot.
    WallClock,
    /// Where this vCPU's clock page is, and whether it is on.
    SystemTime,
    /// Where this vCPU's steal-time record is, and whether it is on.
    StealTime,
    /// Where this vCPU's end-of-interrupt word is, and whether it is on.
    EoiEnable,
}

/// What an access to an MSR means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRule {
    /// Raises #GP and is counted.
    Unknown,
    /// Always reads as `value`.
    Fixed {
        /// What it reads as.
        value: u64,
        /// What a write does.
        writes: WriteRule,
    },
    /// Reads back what was written and has no other effect.
    Stored(StoredMsr),
    /// APIC_BASE.
    ApicBase,
    /// An x2APIC register by its index: MSR 0x800 + index.
    X2Apic(u8),
    /// TSC_DEADLINE.
    TscDeadline,
    /// EFER.
    Efer,
    /// PAT, which lives in the VMCB.
    Pat,
    /// The time-stamp counter.
    Tsc,
    /// TSC_AUX, which the VMCB does not hold.
    TscAux,
    /// A register of KVM's paravirtual interface.
    Pv(PvMsr),
    /// Never intercepted: VMLOAD and VMSAVE switch it.
    PassThrough,
}

const TSC: u32 = 0x10;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const APIC_BASE: u32 = 0x1b;
const MICROCODE_LEVEL: u32 = 0x8b;
const MTRR_CAP: u32 = 0xfe;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUG_CTL: u32 = 0x1d9;
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_VARIABLE_LAST: u32 = 0x20f;
const MTRR_FIXED_64K: u32 = 0x250;
const MTRR_FIXED_16K: u32 = 0x258;
const MTRR_FIXED_16K_LAST: u32 = 0x259;
const MTRR_FIXED_4K: u32 = 0x268;
const MTRR_FIXED_4K_LAST: u32 = 0x26f;
const PAT: u32 = 0x277;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const KVM_EOI_ENABLE: u32 = 0x4b56_4d04;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const SYSCALL_MASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
const SYSCFG: u32 = 0xc001_0010;
const PERF_FIRST: u32 = 0xc001_0000;
const PERF_LAST: u32 = 0xc001_0007;
const HWCR: u32 = 0xc001_0015;
const NB_CFG: u32 = 0xc001_001f;
const PATCH_LOADER: u32 = 0xc001_0020;
const DE_CFG: u32 = 0xc001_1029;

/// A revision for the microcode level register; no kernel acts on it when it
/// runs under a hypervisor.
const MICROCODE_REVISION: u64 = 0x0a00_11d1;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRR_CAP_VALUE: u64 = 0x508;
/// Ranges and fixed ranges on, default type write-back.
const MTRR_DEFAULT_WRITE_BACK: u64 = 0xc06;
/// Eight fixed ranges, all write-back.
const MTRR_FIXED_WRITE_BACK: u64 = 0x0606_0606_0606_0606;
/// The TSC counts at P0 rate: goes with CPUID's invariant TSC.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// LFENCE serialises. Already set, a kernel has nothing to write.
const DE_CFG_LFENCE_SERIALIZE: u64 = 1 << 1;
/// Fast string operations are on.
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// A register that only remembers, by its place in [`StoredMsrs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredMsr(u8);

impl StoredMsr {
    const MTRR_VARIABLE: u8 = 0;
    const MTRR_FIXED_64K: u8 = 16;
    const MTRR_FIXED_16K: u8 = 17;
    const MTRR_FIXED_4K: u8 = 19;
    const MTRR_DEFAULT_TYPE: u8 = 27;
    const MISC_ENABLE: u8 = 28;
    const DEBUG_CTL: u8 = 29;
    const HWCR: u8 = 30;
    const DE_CFG: u8 = 31;
    const COUNT: usize = 32;

    /// The register `msr - first` places behind `base`.
    const fn nth(base: u8, msr: u32, first: u32) -> MsrRule {
        MsrRule::Stored(Self(base + (msr - first).to_le_bytes()[0]))
    }

    const fn reset_value(self) -> u64 {
        match self.0 {
            Self::MTRR_FIXED_64K..Self::MTRR_DEFAULT_TYPE => MTRR_FIXED_WRITE_BACK,
            Self::MTRR_DEFAULT_TYPE => MTRR_DEFAULT_WRITE_BACK,
            Self::MISC_ENABLE => MISC_ENABLE_FAST_STRING,
            Self::HWCR => HWCR_TSC_FREQ_SEL,
            Self::DE_CFG => DE_CFG_LFENCE_SERIALIZE,
            _ => 0,
        }
    }

    /// Bits that read as 1 whatever was written.
    const fn always_set(self) -> u64 {
        match self.0 {
            Self::HWCR => HWCR_TSC_FREQ_SEL,
            _ => 0,
        }
    }
}

/// One vCPU's values of the registers that only remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StoredMsrs([u64; StoredMsr::COUNT]);

impl StoredMsrs {
    /// The values after reset.
    #[must_use]
    pub const fn new() -> Self {
        let mut values = [0; StoredMsr::COUNT];
        let mut index = 0_u8;
        while (index as usize) < StoredMsr::COUNT {
            values[index as usize] = StoredMsr(index).reset_value();
            index += 1;
        }
        Self(values)
    }

    /// What a read gives.
    #[must_use]
    pub const fn read(&self, msr: StoredMsr) -> u64 {
        self.0[msr.0 as usize]
    }

    /// Remembers what was written.
    pub const fn write(&mut self, msr: StoredMsr, value: u64) {
        self.0[msr.0 as usize] = value | msr.always_set();
    }
}

impl Default for StoredMsrs {
    fn default() -> Self {
        Self::new()
    }
}

/// The rule for an MSR.
#[must_use]
pub const fn rule(msr: u32, machine: Machine) -> MsrRule {
    match msr {
        // Every AMD processor has these counters, and programs for bare metal
        // switch them off without asking. Linux asks, and is told the truth.
        PERF_FIRST..=PERF_LAST if machine.is_bare() => fixed(0, WriteRule::Ignore),

        TSC_DEADLINE => MsrRule::TscDeadline,
        X2APIC..=X2APIC_LAST => MsrRule::X2Apic(msr.to_le_bytes()[0]),

        SYSENTER_CS..=SYSENTER_EIP | STAR..=SYSCALL_MASK | FS_BASE..=KERNEL_GS_BASE => {
            MsrRule::PassThrough
        }
        TSC => MsrRule::Tsc,
        APIC_BASE => MsrRule::ApicBase,
        PAT => MsrRule::Pat,
        EFER => MsrRule::Efer,
        TSC_AUX => MsrRule::TscAux,

        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => MsrRule::Pv(PvMsr::WallClock),
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => MsrRule::Pv(PvMsr::SystemTime),
        KVM_STEAL_TIME => MsrRule::Pv(PvMsr::StealTime),
        KVM_EOI_ENABLE => MsrRule::Pv(PvMsr::EoiEnable),

        // Memory types: the nested page tables decide them, so what the guest
        // sets here has no effect.
        MTRR_CAP => fixed(MTRR_CAP_VALUE, WriteRule::Fault),
        MTRR_VARIABLE..=MTRR_VARIABLE_LAST => {
            StoredMsr::nth(StoredMsr::MTRR_VARIABLE, msr, MTRR_VARIABLE)
        }
        MTRR_FIXED_64K => MsrRule::Stored(StoredMsr(StoredMsr::MTRR_FIXED_64K)),
        MTRR_FIXED_16K..=MTRR_FIXED_16K_LAST => {
            StoredMsr::nth(StoredMsr::MTRR_FIXED_16K, msr, MTRR_FIXED_16K)
        }
        MTRR_FIXED_4K..=MTRR_FIXED_4K_LAST => {
            StoredMsr::nth(StoredMsr::MTRR_FIXED_4K, msr, MTRR_FIXED_4K)
        }
        MTRR_DEFAULT_TYPE => MsrRule::Stored(StoredMsr(StoredMsr::MTRR_DEFAULT_TYPE)),

        MICROCODE_LEVEL => fixed(MICROCODE_REVISION, WriteRule::Ignore),
        PATCH_LOADER | SYSCFG | NB_CFG => fixed(0, WriteRule::Ignore),
        MISC_ENABLE => MsrRule::Stored(StoredMsr(StoredMsr::MISC_ENABLE)),
        // Branch stepping for debuggers: a step per instruction instead.
        DEBUG_CTL => MsrRule::Stored(StoredMsr(StoredMsr::DEBUG_CTL)),
        HWCR => MsrRule::Stored(StoredMsr(StoredMsr::HWCR)),
        DE_CFG => MsrRule::Stored(StoredMsr(StoredMsr::DE_CFG)),

        _ => MsrRule::Unknown,
    }
}

const fn fixed(value: u64, writes: WriteRule) -> MsrRule {
    MsrRule::Fixed { value, writes }
}

/// The MSRs whose accesses never exit: the MSR permission map's clear bits.
pub fn passthrough() -> impl Iterator<Item = u32> {
    (SYSENTER_CS..=SYSENTER_EIP)
        .chain(STAR..=SYSCALL_MASK)
        .chain(FS_BASE..=KERNEL_GS_BASE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_image::Protocol;

    fn rule(msr: u32) -> MsrRule {
        super::rule(msr, Machine::LINUX)
    }

    #[test]
    fn counters_of_bare_machines_stand_still() {
        let bare = Machine {
            protocol: Protocol::Multiboot,
            ..Machine::LINUX
        };
        for msr in [0xc001_0000, 0xc001_0007] {
            assert_eq!(super::rule(msr, bare), fixed(0, WriteRule::Ignore));
            assert_eq!(rule(msr), MsrRule::Unknown);
        }
        assert_eq!(super::rule(0xc001_0008, bare), MsrRule::Unknown);
    }

    fn stored(msr: u32) -> StoredMsr {
        match rule(msr) {
            MsrRule::Stored(stored) => stored,
            other => panic!("MSR {msr:#x} is {other:?}"),
        }
    }

    /// Every MSR number that could be special, and its neighbours.
    fn interesting() -> impl Iterator<Item = u32> {
        (0..0x2000)
            .chain(0x4b56_4cf0..0x4b56_4e00)
            .chain(0xc000_0000..0xc000_2000)
            .chain(0xc001_0000..0xc001_2000)
    }

    #[test]
    fn stored_registers_do_not_share_a_place() {
        let mut seen = [None; StoredMsr::COUNT];
        for msr in interesting() {
            if let MsrRule::Stored(StoredMsr(index)) = rule(msr) {
                let place = &mut seen[usize::from(index)];
                assert_eq!(*place, None, "MSR {msr:#x} shares a place");
                *place = Some(msr);
            }
        }
        assert!(
            seen.iter().all(Option::is_some),
            "unused place in {seen:x?}"
        );
    }

    #[test]
    fn stored_registers_read_back() {
        let mut values = StoredMsrs::new();
        for msr in interesting() {
            if let MsrRule::Stored(stored) = rule(msr) {
                values.write(stored, u64::from(msr) << 32 | 0x55);
            }
        }
        for msr in interesting() {
            if let MsrRule::Stored(stored) = rule(msr) {
                let always = stored.always_set();
                assert_eq!(values.read(stored), u64::from(msr) << 32 | 0x55 | always);
            }
        }
    }

    #[test]
    fn memory_is_write_back_after_reset() {
        let values = StoredMsrs::new();
        assert_eq!(values.read(stored(0x2ff)), 0xc06);
        assert_eq!(values.read(stored(0x250)), 0x0606_0606_0606_0606);
        assert_eq!(values.read(stored(0x26f)), 0x0606_0606_0606_0606);
        assert_eq!(values.read(stored(0x200)), 0);
        assert_eq!(
            rule(0xfe),
            MsrRule::Fixed {
                value: 0x508,
                writes: WriteRule::Fault
            }
        );
    }

    #[test]
    fn the_tsc_rate_bit_cannot_be_cleared() {
        let mut values = StoredMsrs::new();
        values.write(stored(0xc001_0015), 0);
        assert_eq!(values.read(stored(0xc001_0015)), 1 << 24);
    }

    #[test]
    fn passthrough_agrees_with_the_table() {
        let listed: Vec<u32> = passthrough().collect();
        for msr in interesting() {
            assert_eq!(
                rule(msr) == MsrRule::PassThrough,
                listed.contains(&msr),
                "MSR {msr:#x}"
            );
        }
        assert_eq!(listed.len(), 10);
    }

    #[test]
    fn hidden_features_have_no_registers() {
        // TSC_ADJUST, SPEC_CTRL, PRED_CMD, ARCH_CAPABILITIES, MCG_CAP, XSS,
        // counters, VM_CR, VM_HSAVE_PA, VIRT_SPEC_CTRL, SEV_STATUS.
        let hidden = [
            0x3b,
            0x48,
            0x49,
            0x10a,
            0x179,
            0xda0,
            0xc1,
            0xc001_0000,
            0xc001_0003,
            0xc001_0007,
            0xc001_0114,
            0xc001_0117,
            0xc001_011f,
            0xc001_0131,
            0xc001_0200,
            0x4b56_4d02,
            0x4b56_4d05,
        ];
        for msr in hidden {
            assert_eq!(rule(msr), MsrRule::Unknown, "MSR {msr:#x}");
        }
    }

    #[test]
    fn x2apic_registers_are_numbered_from_their_base() {
        assert_eq!(rule(0x800), MsrRule::X2Apic(0));
        assert_eq!(rule(0x830), MsrRule::X2Apic(0x30));
        assert_eq!(rule(0x8ff), MsrRule::X2Apic(0xff));
        assert_eq!(rule(0x900), MsrRule::Unknown);
        assert_eq!(rule(0x7ff), MsrRule::Unknown);
    }
}
