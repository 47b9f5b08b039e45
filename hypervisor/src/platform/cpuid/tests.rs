//! The guest's CPUID on two hosts: one recorded, one put together by hand.

use super::*;
use crate::platform::{PlatformNode, golden};
use crate::vcpu::lapic::Mode;
use std::collections::HashMap;
use std::fmt::Write;

const TCG: &str = include_str!("../golden/host-tcg-7.2.txt");
const ZEN4: &str = include_str!("../golden/host-zen4.txt");

/// A CPU that answers from a file.
struct FromFile(HashMap<(u32, u32), CpuidResult>);

impl FromFile {
    fn parse(text: &str) -> Self {
        let number = |word: &str| {
            u32::from_str_radix(word.trim_end_matches(':'), 16).expect("a hexadecimal number")
        };
        let leaves = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let numbers: Vec<u32> = line.split_whitespace().map(number).collect();
                let [leaf, subleaf, eax, ebx, ecx, edx] = numbers[..] else {
                    panic!("six numbers in {line:?}");
                };
                ((leaf, subleaf), CpuidResult::new(eax, ebx, ecx, edx))
            });
        Self(leaves.collect())
    }
}

impl HostCpuid for FromFile {
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.0.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }
}

/// A CPU with all bits set in every leaf that has features.
struct Everything;

impl HostCpuid for Everything {
    fn leaf(&self, leaf: u32, _: u32) -> CpuidResult {
        match leaf {
            0 => CpuidResult::new(0x20, 0, 0, 0),
            0x8000_0000 => CpuidResult::new(0x8000_0021, 0, 0, 0),
            _ => CpuidResult::new(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
        }
    }
}

/// One package for each number of cores.
fn packages(cores: &[u16]) -> Topology {
    let node = |vcpus: &u16| PlatformNode {
        vcpus: *vcpus,
        memory: 128 << 20,
    };
    Topology::new(cores.iter().map(node).collect()).expect("possible")
}

fn table_with(host: &dyn HostCpuid, topology: &Topology, xcr0: u64) -> CpuidTable {
    let config = CpuidConfig {
        topology,
        tsc_khz: 2_500_000,
        xcr0,
    };
    CpuidTable::new(host, &config)
}

fn vcpu(apic_id: u32) -> CpuidVcpu {
    CpuidVcpu {
        apic_id: ApicId(apic_id),
        osxsave: OsXsave::On,
        xcr0: 7,
        apic: Mode::X2Apic,
    }
}

fn table(host: &str, vcpus: u16) -> CpuidTable {
    table_with(&FromFile::parse(host), &packages(&[vcpus]), ALL_STATE)
}

fn render(table: &CpuidTable, vcpu: &CpuidVcpu) -> String {
    let mut text = String::from("# leaf subleaf: eax ebx ecx edx; zero leaves left out\n");
    let basic = 0..0x20;
    let hypervisor = 0x4000_0000..0x4000_0020;
    let extended = 0x8000_0000..0x8000_0030;
    for leaf in basic.chain(hypervisor).chain(extended) {
        let subleaves = match leaf {
            4 | 7 | 0xb | 0xd | 0x8000_001d => 0..64,
            _ => 0..1,
        };
        for subleaf in subleaves {
            let result = table.get(leaf, subleaf, vcpu);
            let past_topology = leaf == 0xb && subleaf > 2;
            if result != CpuidResult::default() && !past_topology {
                let CpuidResult { eax, ebx, ecx, edx } = result;
                writeln!(
                    text,
                    "{leaf:08x} {subleaf:x}: {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"
                )
                .expect("a string takes all");
            }
        }
    }
    text
}

#[test]
fn guest_on_an_emulated_host() {
    golden::check(
        "guest-tcg-7.2-vcpu2of4.txt",
        render(&table(TCG, 4), &vcpu(2)).as_bytes(),
    );
}

#[test]
fn guest_on_a_zen4_host() {
    golden::check(
        "guest-zen4-vcpu0of1.txt",
        render(&table(ZEN4, 1), &vcpu(0)).as_bytes(),
    );
}

#[test]
fn identity_is_the_same_on_all_hosts() {
    for host in [TCG, ZEN4] {
        let table = table(host, 4);
        let name = table.get(0, 0, &vcpu(0));
        assert_eq!(
            (name.ebx, name.edx, name.ecx),
            (0x6874_7541, 0x6974_6e65, 0x444d_4163)
        );
        assert_eq!(table.get(1, 0, &vcpu(0)).eax, 0x00a0_0f11);
        let kvm = table.get(0x4000_0000, 0, &vcpu(0));
        assert_eq!(kvm.eax, 0x4000_0001);
        let spelt: Vec<u8> = [kvm.ebx, kvm.ecx, kvm.edx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(spelt, b"KVMKVMKVM\0\0\0");
    }
}

#[test]
fn kvm_features_are_those_that_exist() {
    let features = table(TCG, 4).get(0x4000_0001, 0, &vcpu(0));
    let bits: u32 = [0, 1, 3, 5, 6, 7, 9, 11, 24]
        .into_iter()
        .map(|bit| 1 << bit)
        .sum();
    assert_eq!(features, CpuidResult::new(bits, 0, 0, 0));
}

#[test]
fn other_hypervisors_bases_are_empty() {
    for base in (0x4000_0100..0x4001_0000).step_by(0x100) {
        assert_eq!(
            table(ZEN4, 4).get(base, 0, &vcpu(0)),
            CpuidResult::default(),
            "leaf {base:#x}"
        );
    }
}

#[test]
fn what_needs_state_that_is_not_switched_is_hidden() {
    let table = table_with(&Everything, &packages(&[4]), ALL_STATE);
    let get = |leaf, subleaf| table.get(leaf, subleaf, &vcpu(0));
    // MONITOR, DTES64, DS-CPL, VMX, SMX, EIST, TM2, xTPR, PDCM, DCA.
    for bit in [2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18] {
        assert_eq!(get(1, 0).ecx >> bit & 1, 0, "leaf 1 ECX bit {bit}");
    }
    // MCE, MCA, DS, ACPI, TM, PBE.
    for bit in [7, 14, 21, 22, 29, 31] {
        assert_eq!(get(1, 0).edx >> bit & 1, 0, "leaf 1 EDX bit {bit}");
    }
    // TSC_ADJUST, SGX, HLE, RTM, MPX, PT.
    for bit in [1, 2, 4, 11, 12, 14, 15, 25] {
        assert_eq!(get(7, 0).ebx >> bit & 1, 0, "leaf 7 EBX bit {bit}");
    }
    // PKU, OSPKE, WAITPKG, CET_SS, LA57, KL, PKS.
    for bit in [3, 4, 5, 7, 16, 23, 29, 30, 31] {
        assert_eq!(get(7, 0).ecx >> bit & 1, 0, "leaf 7 ECX bit {bit}");
    }
    // UINTR, CET_IBT, AMX, SPEC_CTRL … SSBD.
    for bit in [5, 20, 22, 24, 25, 26, 27, 28, 29, 30, 31] {
        assert_eq!(get(7, 0).edx >> bit & 1, 0, "leaf 7 EDX bit {bit}");
    }
    // SVM, EXTAPIC, OSVW, IBS, SKINIT, WDT, LWP, TCE, NodeId, counters,
    // breakpoint extensions, MONITORX.
    for bit in [2, 3, 9, 10, 12, 13, 15, 17, 19, 23, 24, 26, 27, 28, 29] {
        assert_eq!(get(0x8000_0001, 0).ecx >> bit & 1, 0, "ECX bit {bit}");
    }
    // IBPB, IBRS, STIBP, SSBD, RDPRU, MCOMMIT.
    for bit in [4, 8, 12, 14, 15, 16, 17, 18, 19, 24, 25, 26] {
        assert_eq!(get(0x8000_0008, 0).ebx >> bit & 1, 0, "EBX bit {bit}");
    }
    // No XSAVES, no extended feature disable; no supervisor state.
    assert_eq!(get(0xd, 1).eax, 7);
    assert_eq!((get(0xd, 1).ecx, get(0xd, 1).edx), (0, 0));
    for leaf in [
        2,
        3,
        4,
        5,
        0xa,
        0xf,
        0x10,
        0x8000_000a,
        0x8000_001b,
        0x8000_001f,
    ] {
        assert_eq!(get(leaf, 0), CpuidResult::default(), "leaf {leaf:#x}");
    }
}

#[test]
fn what_the_host_lacks_is_not_offered() {
    let table = table(TCG, 4);
    let get = |leaf, subleaf| table.get(leaf, subleaf, &vcpu(0));
    assert_eq!(get(1, 0).ecx >> 17 & 1, 0, "PCID");
    assert_eq!(get(7, 0).ebx >> 18 & 1, 0, "RDSEED");
    assert_eq!(get(7, 0).ecx >> 22 & 1, 0, "RDPID");
    assert_eq!(get(0xd, 1).eax & 2, 0, "XSAVEC");
    assert_eq!(get(7, 1), CpuidResult::default());
}

#[test]
fn what_is_emulated_is_always_there() {
    let table = table(TCG, 4);
    let leaf1 = table.get(1, 0, &vcpu(0));
    for (bit, name) in [(21, "x2APIC"), (24, "TSC deadline"), (31, "hypervisor")] {
        assert_eq!(leaf1.ecx >> bit & 1, 1, "{name}");
    }
    for (bit, name) in [(9, "APIC"), (12, "MTRR")] {
        assert_eq!(leaf1.edx >> bit & 1, 1, "{name}");
    }
    assert_eq!(table.get(6, 0, &vcpu(0)).eax, 4);
    assert_eq!(table.get(0x8000_0007, 0, &vcpu(0)).edx, 0x100);
}

#[test]
fn osxsave_follows_the_guest() {
    let table = table(ZEN4, 1);
    let off = CpuidVcpu {
        osxsave: OsXsave::Off,
        ..vcpu(0)
    };
    assert_eq!(table.get(1, 0, &off).ecx >> 27 & 1, 0);
    assert_eq!(table.get(1, 0, &vcpu(0)).ecx >> 27 & 1, 1);
}

#[test]
fn one_package_has_all_cores() {
    for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)] {
        let table = table(TCG, vcpus);
        let id = u32::from(vcpus) - 1;
        let get = |leaf, subleaf| table.get(leaf, subleaf, &vcpu(id));
        assert_eq!(get(0xb, 0), CpuidResult::new(0, 1, 0x100, id));
        assert_eq!(get(0xb, 1), CpuidResult::new(bits, id + 1, 0x201, id));
        assert_eq!(get(0xb, 2), CpuidResult::new(0, 0, 2, id));
        assert_eq!(get(1, 0).ebx >> 24, id);
        assert_eq!(get(1, 0).ebx >> 16 & 0xff, id + 1);
        assert_eq!(get(0x8000_0008, 0).ecx, bits << 12 | id);
        assert_eq!(get(0x8000_001e, 0), CpuidResult::new(id, id, 0, 0));
        // The last-level cache belongs to all, the others to one.
        assert_eq!(get(0x8000_001d, 3).eax >> 14, id);
        assert_eq!(get(0x8000_001d, 0).eax >> 14, 0);
        assert_eq!(get(0x8000_001d, 4), CpuidResult::default());
    }
}

/// What a kernel makes of the leaves that tell where a CPU is: package, core,
/// node and last-level cache, each found as family 0x19's code does it.
fn place(table: &CpuidTable, id: u32) -> (u32, u32, u32, u32) {
    let get = |leaf, subleaf| table.get(leaf, subleaf, &vcpu(id));
    let cores = get(0xb, 1);
    assert_eq!(get(1, 0).ebx >> 24, id);
    for subleaf in 0..3 {
        assert_eq!(get(0xb, subleaf).edx, id);
    }
    let amd = get(0x8000_001e, 0);
    assert_eq!(amd.eax, id);
    assert_eq!(amd.ebx >> 8 & 0xff, 0, "one thread in a core");
    assert_eq!(amd.ecx >> 8 & 7, 0, "one node in a package");
    let sharers = (get(0x8000_001d, 3).eax >> 14 & 0xfff) + 1;
    let cache = id >> sharers.next_power_of_two().trailing_zeros();
    // The older ways to the same numbers.
    let older = get(0x8000_0008, 0).ecx;
    assert_eq!(older >> 12 & 0xf, cores.eax);
    assert_eq!((older & 0xff) + 1, cores.ebx);
    assert_eq!(get(1, 0).ebx >> 16 & 0xff, cores.ebx);
    let core = id & ((1 << cores.eax) - 1);
    assert_eq!(amd.ebx & 0xff, core);
    (id >> cores.eax, core, amd.ecx & 0xff, cache)
}

#[test]
fn every_node_is_a_package_with_a_cache_of_its_own() {
    for shape in [
        &[2, 2][..],
        &[1, 1, 1],
        &[1, 3, 2],
        &[3, 1, 4, 1, 5],
        &[1, 1, 1, 1, 4],
        &[0, 2, 0, 7],
        &[127, 127],
    ] {
        let topology = packages(shape);
        let table = table_with(&FromFile::parse(TCG), &topology, ALL_STATE);
        let mut cores = vec![0; shape.len()];
        for id in topology.vcpu_ids() {
            let node = u32::from(topology.domain(id).0);
            let next = &mut cores[usize::from(topology.domain(id).0)];
            let ApicId(id) = topology.apic_id(id);
            assert_eq!(place(&table, id), (node, *next, node, node), "{shape:?}");
            *next += 1;
        }
        let all: Vec<u32> = shape.iter().map(|count| u32::from(*count)).collect();
        assert_eq!(cores, all);
        for id in topology.vcpu_ids() {
            let package = usize::from(topology.domain(id).0);
            let id = topology.apic_id(id).0;
            assert_eq!(table.get(0xb, 1, &vcpu(id)).ebx, all[package], "{shape:?}");
        }
    }
}

#[test]
fn features_do_not_differ_between_packages() {
    let topology = packages(&[1, 3]);
    let table = table_with(&FromFile::parse(ZEN4), &topology, ALL_STATE);
    for (leaf, what) in [(1, "HTT"), (0x8000_0001, "CMP_LEGACY"), (7, "leaf 7")] {
        let features = |id| {
            let leaf = table.get(leaf, 0, &vcpu(id));
            (leaf.ecx, leaf.edx)
        };
        assert_eq!(features(0), features(5), "{what}");
    }
    assert_eq!(table.get(1, 0, &vcpu(0)).edx >> 28 & 1, 1);
    let alone = table_with(&FromFile::parse(ZEN4), &packages(&[1, 1]), ALL_STATE);
    assert_eq!(alone.get(1, 0, &vcpu(1)).edx >> 28 & 1, 0);
}

#[test]
fn an_id_that_no_vcpu_has_gets_an_answer() {
    let table = table_with(&Everything, &packages(&[3, 1]), ALL_STATE);
    for id in [3, 5, 8, u32::MAX] {
        for leaf in [1, 0xb, 0x8000_0008, 0x8000_001e] {
            let _ = table.get(leaf, 1, &vcpu(id));
        }
    }
}

#[test]
fn guests_on_unequal_nodes() {
    let topology = packages(&[1, 3, 2]);
    let table = table_with(&FromFile::parse(TCG), &topology, ALL_STATE);
    for (number, id) in [(0, 0), (3, 6), (4, 8)] {
        let name = format!("guest-tcg-7.2-vcpu{number}of1+3+2.txt");
        golden::check(&name, render(&table, &vcpu(id)).as_bytes());
    }
}

#[test]
fn xsave_area_follows_the_guests_xcr0() {
    let table = table(ZEN4, 1);
    let sizes = |xcr0, subleaf| {
        let leaf = table.get(0xd, subleaf, &CpuidVcpu { xcr0, ..vcpu(0) });
        (leaf.ebx, leaf.ecx)
    };
    assert_eq!(table.supported_xcr0(), 0xe7);
    assert_eq!(sizes(1, 0), (576, 0x980));
    assert_eq!(sizes(7, 0), (832, 0x980));
    assert_eq!(sizes(0xe7, 0), (0x980, 0x980));
    assert_eq!(sizes(0xe3, 0), (0x980, 0x980), "the standard form has gaps");
    assert_eq!(sizes(7, 1), (832, 0));
    assert_eq!(sizes(0xe7, 1), (0x980, 0));
    assert_eq!(sizes(u64::MAX, 0), (0x980, 0x980), "bits not offered");
    assert_eq!(table.get(0xd, 9, &vcpu(0)), CpuidResult::default());
    assert_eq!(table.get(0xd, u32::MAX, &vcpu(0)), CpuidResult::default());
}

#[test]
fn vector_features_go_with_their_state() {
    let host = FromFile::parse(ZEN4);
    let without = table_with(&host, &packages(&[4]), 3);
    let get = |leaf, subleaf| without.get(leaf, subleaf, &vcpu(0));
    assert_eq!(without.supported_xcr0(), 3);
    assert_eq!(get(1, 0).ecx & (1 << 12 | 1 << 28 | 1 << 29), 0);
    assert_eq!(get(7, 0).ebx & (1 << 5 | 1 << 16 | 1 << 30 | 1 << 31), 0);
    assert_eq!(get(7, 0).ecx & (1 << 9 | 1 << 10 | 1 << 11), 0);
    assert_eq!(get(7, 0).eax, 0);
    let none = table_with(&host, &packages(&[4]), 0);
    assert_eq!(none.get(1, 0, &vcpu(0)).ecx & 1 << 26, 0);
    assert_eq!(none.get(0xd, 0, &vcpu(0)), CpuidResult::default());
}

#[test]
fn flaws_of_the_family_are_denied_only_off_that_family() {
    let srso_no = |host| table(host, 1).get(0x8000_0021, 0, &vcpu(0)).eax >> 29 & 1;
    assert_eq!(srso_no(TCG), 1);
    assert_eq!(srso_no(ZEN4), 0);
}

#[test]
fn a_host_without_leaves_is_not_asked_for_them() {
    struct Small;
    impl HostCpuid for Small {
        fn leaf(&self, leaf: u32, _: u32) -> CpuidResult {
            match leaf {
                0 => CpuidResult::new(1, 0, 0, 0),
                1 => CpuidResult::default(),
                0x8000_0000 => CpuidResult::default(),
                // As some CPUs do: the last leaf's content again.
                _ => CpuidResult::new(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
            }
        }
    }
    let table = table_with(&Small, &packages(&[4]), ALL_STATE);
    assert_eq!(table.get(7, 0, &vcpu(0)), CpuidResult::default());
    assert_eq!(table.supported_xcr0(), 0);
    assert_eq!(table.get(0x8000_0008, 0, &vcpu(0)).eax, 48 << 8 | 36);
}
