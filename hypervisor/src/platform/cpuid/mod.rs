//! The guest's CPUID: a table built once from the host's leaves.
//!
//! The guest sees one AMD CPU of family 0x19 on all nodes. Instruction-set
//! features are those of the host that are on the list in `features`; what the
//! hypervisor emulates itself (x2APIC, TSC deadline, MTRRs, KVM's
//! paravirtual interface) is there whatever the host has. Topology is a package
//! of single-threaded cores for each node of the rack, numbered as
//! [`Topology`] says, with one last-level cache each.
//!
//! The family number is not the host's, so the bits by which a kernel would
//! know that it is *not* subject to a flaw of that family are set when the
//! host's own number says so: see [`host_has_zen_flaws`].
//!
//! Source: AMD64 APM volume 3, appendix E.

mod features;
#[cfg(test)]
mod tests;
mod xsave;

use features::{
    ExtendedEcx, ExtendedEdx, KvmFeatures, Leaf1Ecx, Leaf1Edx, Leaf7Ebx, Leaf7Ecx, Leaf7Edx,
    Leaf7Sub1Eax, Leaf8000_0008Ebx, Leaf8000_0021Eax, Leaf8000_0021Ecx, VectorHints, xcr0,
};
use vmm_shared::addr::ApicId;
use xsave::XsaveLeaves;

use super::{Domain, Topology};
use crate::vcpu::lapic::Mode;

/// What one CPUID leaf holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidResult {
    const ZERO: Self = Self::new(0, 0, 0, 0);

    /// A leaf from its registers.
    #[must_use]
    pub const fn new(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

/// The CPU that the table is made from.
pub trait HostCpuid {
    /// What the CPU's own CPUID instruction answers.
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult;
}

/// What the table depends on besides the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig<'a> {
    /// Which node gives which vCPUs.
    pub topology: &'a Topology,
    /// Rate of the time-stamp counter.
    pub tsc_khz: u32,
    /// State components that the hypervisor can switch; [`ALL_STATE`] unless
    /// there is less room.
    pub xcr0: u64,
}

/// All state components that the table knows of: x87, SSE, AVX, AVX-512.
pub const ALL_STATE: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512;

/// CR4.OSXSAVE as the guest has set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OsXsave {
    /// XSETBV faults.
    Off,
    /// The guest's kernel manages XCR0.
    On,
}

/// What an answer depends on besides the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidVcpu {
    /// The vCPU's own APIC id.
    pub apic_id: ApicId,
    /// From the vCPU's CR4.
    pub osxsave: OsXsave,
    /// The vCPU's XCR0.
    pub xcr0: u64,
    /// The vCPU's local APIC: one that is off is not there.
    pub apic: Mode,
}

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_MTRR: u32 = 1 << 12;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED_ECX_TOPOEXT: u32 = 1 << 22;
const LEAF8000_0007_EDX_INVARIANT_TSC: u32 = 1 << 8;

const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0021;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const MAX_HYPERVISOR: u32 = 0x4000_0001;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// Rate of the emulated APIC's bus: its timer counts nanoseconds.
pub const APIC_BUS_KHZ: u32 = 1_000_000;

const BASIC_LEAVES: usize = MAX_BASIC as usize + 1;
const EXTENDED_LEAVES: usize = (MAX_EXTENDED - 0x8000_0000) as usize + 1;
const CACHE_LEAVES: usize = 4;

/// Family 0x19, model 1, stepping 1.
const SIGNATURE: u32 = 0x00a0_0f11;
/// Linear address bits: four-level paging.
const LINEAR_BITS: u32 = 48;
/// 48 bytes, as leaves 0x8000_0002 to 4 give them.
const BRAND: &[u8; 48] =
    b"Viaduct virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The guest's CPUID leaves.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    basic: [CpuidResult; BASIC_LEAVES],
    leaf7_sub1: CpuidResult,
    xsave: XsaveLeaves,
    extended: [CpuidResult; EXTENDED_LEAVES],
    caches: [CpuidResult; CACHE_LEAVES],
    hypervisor: [CpuidResult; 2],
    timing: CpuidResult,
    topology: Topology,
}

impl CpuidTable {
    /// The table for a VM on this host.
    #[must_use]
    pub fn new(host: &dyn HostCpuid, config: &CpuidConfig<'_>) -> Self {
        let host = Host(host);
        let xsave = XsaveLeaves::new(&host, config.xcr0);
        let mut table = Self {
            basic: [CpuidResult::ZERO; BASIC_LEAVES],
            leaf7_sub1: CpuidResult::ZERO,
            extended: [CpuidResult::ZERO; EXTENDED_LEAVES],
            caches: caches(&host, config.topology),
            hypervisor: [
                with_vendor(MAX_HYPERVISOR, b"KVMKVMKVM\0\0\0"),
                CpuidResult::new(KvmFeatures::all().bits(), 0, 0, 0),
            ],
            timing: CpuidResult::new(config.tsc_khz, APIC_BUS_KHZ, 0, 0),
            topology: config.topology.clone(),
            xsave,
        };
        table.fill_basic(&host);
        table.fill_extended(&host);
        table
    }

    /// What the guest's CPUID instruction answers on this vCPU.
    #[must_use]
    pub fn get(&self, leaf: u32, subleaf: u32, vcpu: &CpuidVcpu) -> CpuidResult {
        match leaf {
            1 => self.leaf1(vcpu),
            7 => match subleaf {
                0 => self.basic[7],
                1 => self.leaf7_sub1,
                _ => CpuidResult::ZERO,
            },
            0xb => self.extended_topology(subleaf, vcpu.apic_id),
            0xd => self.xsave.get(subleaf, vcpu.xcr0),
            0..=MAX_BASIC => at(&self.basic, leaf),
            HYPERVISOR_BASE..=MAX_HYPERVISOR => at(&self.hypervisor, leaf - HYPERVISOR_BASE),
            HYPERVISOR_TIMING => self.timing,
            0x8000_001d => at(&self.caches, subleaf),
            0x8000_0008 => self.address_sizes_and_cores(vcpu.apic_id),
            0x8000_001e => self.node_ids(vcpu.apic_id),
            0x8000_0000..=MAX_EXTENDED => at(&self.extended, leaf - 0x8000_0000),
            _ => CpuidResult::ZERO,
        }
    }

    /// The bits of XCR0 that the guest may set: XSETBV of any other faults.
    #[must_use]
    pub const fn supported_xcr0(&self) -> u64 {
        self.xsave.supported()
    }

    /// Bits of a physical address.
    #[must_use]
    pub const fn physical_bits(&self) -> u32 {
        self.extended[8].eax & 0xff
    }

    fn leaf1(&self, vcpu: &CpuidVcpu) -> CpuidResult {
        let mut leaf = self.basic[1];
        leaf.ebx |= self.cores_beside(vcpu.apic_id) << 16 | vcpu.apic_id.0 << 24;
        if vcpu.osxsave == OsXsave::On {
            leaf.ecx |= LEAF1_ECX_OSXSAVE;
        }
        if vcpu.apic == Mode::Disabled {
            leaf.edx &= !LEAF1_EDX_APIC;
        }
        leaf
    }

    /// Cores in the package of the CPU with this id, itself among them.
    fn cores_beside(&self, apic_id: ApicId) -> u32 {
        let package = self.topology.package(apic_id);
        let node = package.and_then(|Domain(node)| self.topology.nodes().get(usize::from(node)));
        node.map_or(1, |node| u32::from(node.vcpus))
    }

    /// Extended topology: threads, then cores. The widths are the same for all
    /// CPUs, the numbers of CPUs are those of the own package.
    fn extended_topology(&self, subleaf: u32, apic_id: ApicId) -> CpuidResult {
        let id = apic_id.0;
        let core_bits = self.topology.core_bits();
        match subleaf {
            0 => CpuidResult::new(0, 1, 1 << 8, id),
            1 => CpuidResult::new(core_bits, self.cores_beside(apic_id), 2 << 8 | 1, id),
            _ => CpuidResult::new(0, 0, subleaf & 0xff, id),
        }
    }

    fn address_sizes_and_cores(&self, apic_id: ApicId) -> CpuidResult {
        let others = self.cores_beside(apic_id).saturating_sub(1);
        let mut leaf = self.extended[8];
        leaf.ecx = self.topology.core_bits() << 12 | others;
        leaf
    }

    /// AMD's own ids: of the core in its package, with one thread, and of the
    /// node, with one in each package.
    fn node_ids(&self, apic_id: ApicId) -> CpuidResult {
        let core = self.topology.core(apic_id);
        let node = apic_id.0 >> self.topology.core_bits();
        CpuidResult::new(apic_id.0, core & 0xff, node & 0xff, 0)
    }

    fn fill_basic(&mut self, host: &Host<'_>) {
        let avx = self.has_state(xcr0::AVX);
        let avx512 = self.has_state(xcr0::AVX512);
        self.basic[0] = with_vendor(MAX_BASIC, b"AuthenticAMD");

        let leaf1 = host.leaf(1);
        let mut ecx = Leaf1Ecx::from_bits_truncate(leaf1.ecx);
        if !self.has_state(xcr0::SSE) {
            ecx -= Leaf1Ecx::XSAVE;
        }
        if !avx {
            ecx -= Leaf1Ecx::AVX | Leaf1Ecx::FMA | Leaf1Ecx::F16C;
        }
        let edx = Leaf1Edx::from_bits_truncate(leaf1.edx);
        // Features are the same on all CPUs, although one may be alone.
        let htt = match self.topology.most_vcpus() {
            0..=1 => 0,
            _ => LEAF1_EDX_HTT,
        };
        self.basic[1] = CpuidResult::new(
            SIGNATURE,
            leaf1.ebx & 0xff00,
            ecx.bits() | LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR,
            edx.bits() | LEAF1_EDX_APIC | LEAF1_EDX_MTRR | htt,
        );

        self.basic[6].eax = LEAF6_EAX_ARAT;

        let leaf7 = host.leaf(7);
        let mut ebx = Leaf7Ebx::from_bits_truncate(leaf7.ebx);
        let mut ecx = Leaf7Ecx::from_bits_truncate(leaf7.ecx);
        let mut edx = Leaf7Edx::from_bits_truncate(leaf7.edx);
        let mut sub1 = match leaf7.eax {
            0 => Leaf7Sub1Eax::empty(),
            _ => Leaf7Sub1Eax::from_bits_truncate(host.subleaf(7, 1).eax),
        };
        if !avx512 {
            ebx -= Leaf7Ebx::AVX512;
            ecx -= Leaf7Ecx::AVX512;
            edx -= Leaf7Edx::AVX512;
            sub1 -= Leaf7Sub1Eax::AVX512BF16;
        }
        if !avx {
            ebx -= Leaf7Ebx::AVX2;
            ecx -= Leaf7Ecx::VAES | Leaf7Ecx::VPCLMULQDQ;
            sub1 -= Leaf7Sub1Eax::AVXVNNI | Leaf7Sub1Eax::AVXIFMA;
        }
        let max_subleaf = u32::from(!sub1.is_empty());
        self.basic[7] = CpuidResult::new(max_subleaf, ebx.bits(), ecx.bits(), edx.bits());
        self.leaf7_sub1 = CpuidResult::new(sub1.bits(), 0, 0, 0);
    }

    fn fill_extended(&mut self, host: &Host<'_>) {
        self.extended[0] = with_vendor(MAX_EXTENDED, b"AuthenticAMD");

        let leaf = host.leaf(0x8000_0001);
        let mut ecx = ExtendedEcx::from_bits_truncate(leaf.ecx);
        if !self.has_state(xcr0::AVX) {
            ecx -= ExtendedEcx::XOP | ExtendedEcx::FMA4;
        }
        let multicore = match self.topology.most_vcpus() {
            0..=1 => 0,
            _ => EXTENDED_ECX_CMP_LEGACY,
        };
        // AMD repeats most of leaf 1's EDX here.
        let repeated =
            Leaf1Edx::all() - Leaf1Edx::SEP - Leaf1Edx::CLFSH - Leaf1Edx::SSE - Leaf1Edx::SSE2;
        let edx = ExtendedEdx::from_bits_truncate(leaf.edx).bits()
            | self.basic[1].edx & (repeated.bits() | LEAF1_EDX_APIC | LEAF1_EDX_MTRR);
        self.extended[1] = CpuidResult::new(
            SIGNATURE,
            0,
            ecx.bits() | multicore | EXTENDED_ECX_TOPOEXT,
            edx,
        );

        for (leaf, part) in self.extended[2..5].iter_mut().zip(BRAND.as_chunks().0) {
            *leaf = from_bytes(part);
        }
        // TLBs, and caches in the older form.
        self.extended[5] = host.leaf(0x8000_0005);
        self.extended[6] = host.leaf(0x8000_0006);
        self.extended[0x19] = host.leaf(0x8000_0019);
        if !has_cache_leaves(host) {
            (self.extended[5].ecx, self.extended[5].edx) = DEFAULT_CACHES_1;
            (self.extended[6].ecx, self.extended[6].edx) = DEFAULT_CACHES_2_3;
        }
        self.extended[7].edx = LEAF8000_0007_EDX_INVARIANT_TSC;

        let leaf = host.leaf(0x8000_0008);
        let physical_bits = match leaf.eax & 0xff {
            0 => 36,
            bits => bits.min(52),
        };
        self.extended[8] = CpuidResult::new(
            LINEAR_BITS << 8 | physical_bits,
            Leaf8000_0008Ebx::from_bits_truncate(leaf.ebx).bits(),
            0,
            0,
        );

        let hints = host.leaf(0x8000_001a).eax;
        self.extended[0x1a].eax = VectorHints::from_bits_truncate(hints).bits();

        let leaf = host.leaf(0x8000_0021);
        let mut eax = Leaf8000_0021Eax::from_bits_truncate(leaf.eax);
        let mut ecx = Leaf8000_0021Ecx::from_bits_truncate(leaf.ecx);
        if !host_has_zen_flaws(host) {
            eax |= Leaf8000_0021Eax::SRSO_NO;
            ecx |= Leaf8000_0021Ecx::all();
        }
        self.extended[0x21] = CpuidResult::new(eax.bits(), 0, ecx.bits(), 0);
    }

    const fn has_state(&self, components: u64) -> bool {
        self.xsave.supported() & components == components
    }
}

/// Whether the host is of the AMD or Hygon families 0x17 to 0x19, which are
/// subject to speculative return stack overflow and transient scheduler
/// attacks. A host that is of none of them is not subject to these, although
/// the family number in the guest's table would make a kernel think so.
fn host_has_zen_flaws(host: &Host<'_>) -> bool {
    let vendor = host.leaf(0);
    let amd = [b"AuthenticAMD", b"HygonGenuine"]
        .into_iter()
        .map(|name| with_vendor(vendor.eax, name))
        .any(|known| known == vendor);
    amd && matches!(family(host.leaf(1).eax), 0x17..=0x19)
}

const fn family(signature: u32) -> u32 {
    match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        base => base,
    }
}

/// The caches that a guest sees if the host does not describe its own in leaf
/// 0x8000_001D: 32 KiB of data and as much of instructions, 512 KiB, 32 MiB;
/// 8 ways (the last: 16), lines of 64 bytes.
const DEFAULT_CACHES: [CpuidResult; CACHE_LEAVES] = [
    CpuidResult::new(1 | 1 << 5 | 1 << 8, 7 << 22 | 63, 63, 0),
    CpuidResult::new(2 | 1 << 5 | 1 << 8, 7 << 22 | 63, 63, 0),
    CpuidResult::new(3 | 2 << 5 | 1 << 8, 7 << 22 | 63, 1023, 2),
    CpuidResult::new(3 | 3 << 5 | 1 << 8, 15 << 22 | 63, 32767, 1),
];
/// The same in leaf 0x8000_0005: level 1 data and instructions.
const DEFAULT_CACHES_1: (u32, u32) = (
    32 << 24 | 8 << 16 | 1 << 8 | 64,
    32 << 24 | 8 << 16 | 1 << 8 | 64,
);
/// The same in leaf 0x8000_0006: levels 2 and 3, with codes for their ways.
const DEFAULT_CACHES_2_3: (u32, u32) = (
    512 << 16 | 6 << 12 | 1 << 8 | 64,
    64 << 18 | 8 << 12 | 1 << 8 | 64,
);

fn has_cache_leaves(host: &Host<'_>) -> bool {
    host.leaf(0x8000_001d).eax & 0x1f != 0
}

/// Caches in the form of leaf 0x8000_001D.
///
/// Whose cache it is follows from an APIC id by a shift, by as many bits as it
/// takes to count the sharers. So the sharers of the third level are those
/// that the largest package has: with fewer the shift would be too small, and
/// two packages could get the same cache.
fn caches(host: &Host<'_>, topology: &Topology) -> [CpuidResult; CACHE_LEAVES] {
    let mut leaves = DEFAULT_CACHES;
    if has_cache_leaves(host) {
        for (subleaf, leaf) in (0..).zip(&mut leaves) {
            *leaf = host.subleaf(0x8000_001d, subleaf);
        }
    }
    for leaf in &mut leaves {
        if leaf.eax & 0x1f != 0 {
            // Every core has its own first levels.
            let sharers = match leaf.eax >> 5 & 7 {
                0..=2 => 1,
                _ => u32::from(topology.most_vcpus()),
            };
            leaf.eax = leaf.eax & !(0xfff << 14) | (sharers - 1) << 14;
        }
    }
    leaves
}

/// A leaf whose EBX, EDX and ECX spell a name, or EBX, ECX and EDX do if it
/// is the hypervisor's.
fn with_vendor(eax: u32, name: &[u8; 12]) -> CpuidResult {
    let mut bytes = [0; 16];
    bytes[4..].copy_from_slice(name);
    let leaf = from_bytes(&bytes);
    if eax >> 28 == HYPERVISOR_BASE >> 28 {
        CpuidResult { eax, ..leaf }
    } else {
        CpuidResult::new(eax, leaf.ebx, leaf.edx, leaf.ecx)
    }
}

const fn from_bytes(bytes: &[u8; 16]) -> CpuidResult {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
    CpuidResult::new(
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
        u32::from_le_bytes([i, j, k, l]),
        u32::from_le_bytes([m, n, o, p]),
    )
}

fn at(leaves: &[CpuidResult], index: u32) -> CpuidResult {
    leaves.get(index as usize).copied().unwrap_or_default()
}

/// The host's leaves, with zeros where it has none.
///
/// Past its highest leaf a CPU may answer with any other one.
struct Host<'a>(&'a dyn HostCpuid);

impl Host<'_> {
    fn leaf(&self, leaf: u32) -> CpuidResult {
        self.subleaf(leaf, 0)
    }

    fn subleaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let base = leaf & 0x8000_0000;
        let max = self.0.leaf(base, 0).eax;
        if max >> 31 == base >> 31 && leaf <= max {
            self.0.leaf(leaf, subleaf)
        } else {
            CpuidResult::ZERO
        }
    }
}
