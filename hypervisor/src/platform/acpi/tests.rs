//! The firmware tables: golden files, and what must hold for any machine.

use super::*;
use crate::platform::layout;
use crate::platform::layout::PMEM_BASE;
use crate::platform::{Machine, PlatformNode, PmemRange, Topology, golden};
use vmm_shared::addr::MAX_VCPUS;
use vmm_shared::control::MAX_BLOCKS;

/// Nodes with these vCPUs and so many MiB.
fn topology(nodes: &[(u16, u64)]) -> Topology {
    let node = |(vcpus, mib): &(u16, u64)| PlatformNode {
        vcpus: *vcpus,
        memory: mib << 20,
    };
    Topology::new(nodes.iter().map(node).collect()).expect("possible")
}

fn config(vcpus: u16, image: Option<PmemInterface>) -> PlatformConfig {
    rack(&[(vcpus, 512)], image)
}

fn rack(nodes: &[(u16, u64)], image: Option<PmemInterface>) -> PlatformConfig {
    PlatformConfig {
        topology: topology(nodes),
        image: image.map(|interface| PmemRange {
            gpa: PMEM_BASE,
            len: 1 << 30,
            interface,
        }),
        machine: Machine::LINUX,
    }
}

/// A table that the XSDT lists, or the DSDT.
struct Found<'a> {
    signature: &'a [u8],
    bytes: &'a [u8],
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest address, its checksum verified.
fn table_at(tables: &AcpiTables, gpa: u64) -> Found<'_> {
    let start = usize::try_from(gpa - tables.base.0).expect("in the tables");
    let len = u32_at(&tables.bytes, start + 4) as usize;
    let bytes = &tables.bytes[start..start + len];
    assert_eq!(sum(bytes), 0, "checksum of {:?}", &bytes[..4]);
    Found {
        signature: &bytes[..4],
        bytes,
    }
}

/// Walks the tables as a kernel does: root pointer, XSDT, FADT, DSDT.
fn walk(tables: &AcpiTables) -> Vec<Found<'_>> {
    let rsdp = &tables.bytes[usize::try_from(tables.rsdp.0 - tables.base.0).expect("small")..];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(&rsdp[..36]), 0);
    let xsdt = table_at(tables, u64_at(rsdp, 24));
    assert_eq!(xsdt.signature, b"XSDT");
    let mut found: Vec<_> = xsdt.bytes[36..]
        .chunks_exact(8)
        .map(|entry| table_at(tables, u64_at(entry, 0)))
        .collect();
    let dsdt = u64_at(found[0].bytes, 140);
    found.push(table_at(tables, dsdt));
    found
}

#[test]
fn tables_of_a_small_machine() {
    let tables = build(&config(2, Some(PmemInterface::E820)));
    golden::check("acpi-2-vcpus.bin", &tables.bytes);
}

#[test]
fn tables_of_a_machine_with_an_nvdimm() {
    let tables = build(&config(1, Some(PmemInterface::Nfit)));
    golden::check("acpi-1-vcpu-nvdimm.bin", &tables.bytes);
}

#[test]
fn a_kernel_finds_all_tables() {
    let tables = build(&config(4, Some(PmemInterface::Nfit)));
    let names: Vec<_> = walk(&tables)
        .iter()
        .map(|table| table.signature.to_vec())
        .collect();
    assert_eq!(names, [b"FACP", b"APIC", b"NFIT", b"DSDT"]);
    let without = build(&config(4, Some(PmemInterface::E820)));
    assert_eq!(walk(&without).len(), 3);
}

#[test]
fn the_fadt_says_what_is_absent() {
    let tables = build(&config(1, None));
    let found = walk(&tables);
    let fadt = found[0].bytes;
    assert_eq!(fadt.len(), 276);
    assert_eq!(fadt[8], 6, "major revision");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch, 1 << 2 | 1 << 5);
    // Reset, sleep control, sleep status: a byte-wide port each.
    for offset in [116, 244, 256] {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
        assert_eq!(u64_at(fadt, offset + 4), 0x600);
    }
    assert_eq!(fadt[128], 1, "reset value");
}

/// The structures of a table, from `start` on, whose second byte is their
/// length.
fn structures(table: &[u8], start: usize) -> Vec<&[u8]> {
    let mut rest = &table[start..];
    let mut found = Vec::new();
    while let [_, len, ..] = *rest {
        let (structure, behind) = rest.split_at(usize::from(len));
        found.push(structure);
        rest = behind;
    }
    assert!(rest.is_empty());
    found
}

/// The table with this signature.
fn named<'a>(found: &[Found<'a>], signature: &[u8]) -> &'a [u8] {
    let mut tables = found.iter().filter(|table| table.signature == signature);
    let table = tables.next().expect("there is one").bytes;
    assert!(tables.next().is_none(), "two of {signature:?}");
    table
}

/// vCPUs in the MADT: number and APIC id.
fn cpus(found: &[Found<'_>]) -> Vec<(u32, u32)> {
    structures(named(found, b"APIC"), 44)
        .into_iter()
        .filter(|entry| entry[0] == 9)
        .inspect(|entry| assert_eq!(u32_at(entry, 8), 1, "enabled"))
        .map(|entry| (u32_at(entry, 12), u32_at(entry, 4)))
        .collect()
}

#[test]
fn the_madt_lists_every_vcpu_by_its_x2apic_id() {
    let tables = build(&config(3, None));
    assert_eq!(cpus(&walk(&tables)), [(0, 0), (1, 1), (2, 2)]);
    let tables = build(&rack(&[(1, 64), (2, 64), (3, 64)], None));
    let expected = [(0, 0), (1, 4), (2, 5), (3, 8), (4, 9), (5, 10)];
    assert_eq!(cpus(&walk(&tables)), expected);
}

#[test]
fn tables_of_two_equal_nodes() {
    let nodes = [(2, 512), (2, 512)];
    let tables = build(&rack(&nodes, Some(PmemInterface::E820)));
    golden::check("acpi-2-nodes.bin", &tables.bytes);
}

#[test]
fn tables_of_three_unequal_nodes() {
    // The second node's memory lies on both sides of the hole.
    let nodes = [(1, 2048), (3, 2048), (2, 512)];
    let tables = build(&rack(&nodes, Some(PmemInterface::E820)));
    golden::check("acpi-3-unequal-nodes.bin", &tables.bytes);
}

/// Racks from two nodes up: equal, unequal, across the hole, with nodes that
/// give only one kind.
fn racks() -> Vec<Vec<(u16, u64)>> {
    vec![
        vec![(2, 512), (2, 512)],
        vec![(1, 2048), (3, 2048), (2, 512)],
        vec![(1, 3072), (1, 1024)],
        vec![(0, 512), (4, 0), (2, 256)],
        vec![(1, 128), (0, 0), (1, 0)],
        vec![(3, 4098), (1, 2), (5, 6), (2, 10240)],
        vec![(1, 64); 64],
        vec![(127, 1024), (127, 1024)],
    ]
}

#[test]
fn more_than_one_node_has_three_tables_more() {
    for nodes in racks() {
        let tables = build(&rack(&nodes, Some(PmemInterface::Nfit)));
        let names: Vec<_> = walk(&tables)
            .iter()
            .map(|table| table.signature.to_vec())
            .collect();
        let expected = [
            b"FACP", b"APIC", b"SRAT", b"SLIT", b"HMAT", b"NFIT", b"DSDT",
        ];
        assert_eq!(names, expected);
    }
}

#[test]
fn the_srat_has_every_vcpu_once() {
    for nodes in racks() {
        let tables = build(&rack(&nodes, None));
        let found = walk(&tables);
        let mut counts = vec![0; nodes.len()];
        let mut ids = Vec::new();
        for entry in structures(named(&found, b"SRAT"), 48) {
            if entry[0] == 2 {
                assert_eq!((entry.len(), u32_at(entry, 12)), (24, 1));
                counts[u32_at(entry, 4) as usize] += 1;
                ids.push(u32_at(entry, 8));
            }
        }
        let expected: Vec<u16> = nodes.iter().map(|node| node.0).collect();
        assert_eq!(counts, expected);
        assert!(ids.iter().all(|id| *id < 255));
        let madt: Vec<u32> = cpus(&found).iter().map(|cpu| cpu.1).collect();
        assert_eq!(ids, madt, "same ids, same order");
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), madt.len(), "no id twice");
    }
}

#[test]
fn the_srat_has_all_memory_once() {
    for nodes in racks() {
        let shape = topology(&nodes);
        let tables = build(&rack(&nodes, None));
        let found = walk(&tables);
        let mut sums = vec![0; nodes.len()];
        let mut ranges: Vec<RamRange> = Vec::new();
        for entry in structures(named(&found, b"SRAT"), 48) {
            if entry[0] == 1 {
                assert_eq!((entry.len(), u32_at(entry, 28)), (40, 1));
                let (gpa, len) = (Gpa(u64_at(entry, 8)), u64_at(entry, 16));
                sums[u32_at(entry, 2) as usize] += len >> 20;
                match ranges.last_mut() {
                    Some(last) if last.end() == gpa => last.len += len,
                    _ => ranges.push(RamRange { gpa, len }),
                }
            }
        }
        let expected: Vec<u64> = nodes.iter().map(|node| node.1).collect();
        assert_eq!(sums, expected);
        // Put together, they are what E820 is made from.
        let ram: Vec<RamRange> = layout::ram_ranges(shape.memory()).collect();
        assert_eq!(ranges, ram);
    }
}

/// A rack whose nodes may give so many blocks later.
fn growing(nodes: &[(u16, u64)], blocks: &[u32]) -> PlatformConfig {
    let mut config = rack(nodes, Some(PmemInterface::E820));
    let topology = config.topology.with_blocks(blocks.iter().copied());
    config.topology = topology.expect("room");
    config
}

#[test]
fn tables_of_two_nodes_with_room_for_memory() {
    let tables = build(&growing(&[(2, 512), (2, 512)], &[1, 2]));
    golden::check("acpi-2-nodes-3-blocks.bin", &tables.bytes);
}

#[test]
fn memory_that_may_come_is_in_the_srat_and_nowhere_else() {
    let cases = [
        (vec![(1, 512)], vec![4], vec![(0, 4096, 512)]),
        (
            vec![(1, 512), (1, 0), (1, 3072)],
            vec![2, 1, 3],
            vec![(0, 4608, 256), (1, 4864, 128), (2, 4992, 384)],
        ),
    ];
    for (nodes, blocks, expected) in cases {
        let config = growing(&nodes, &blocks);
        let tables = build(&config);
        let found = walk(&tables);
        let windows: Vec<_> = structures(named(&found, b"SRAT"), 48)
            .into_iter()
            .filter(|entry| entry[0] == 1 && u32_at(entry, 28) == 3)
            .map(|entry| {
                (
                    u32_at(entry, 2),
                    u64_at(entry, 8) >> 20,
                    u64_at(entry, 16) >> 20,
                )
            })
            .collect();
        assert_eq!(windows, expected);
        let ram = layout::ram_ranges(config.topology.memory()).last();
        assert!(ram.expect("some").end().0 >> 20 <= windows[0].1);
    }
    let other = PlatformConfig {
        machine: Machine {
            protocol: guest_image::Protocol::Pvh,
            ..Machine::LINUX
        },
        ..growing(&[(1, 512)], &[4])
    };
    let tables = build(&other);
    let has = |name: &[u8]| tables.bytes.windows(4).any(|bytes| bytes == name);
    assert!(!has(b"MEMS"), "a guest without a driver has no devices");
}

#[test]
fn every_block_is_a_device_with_its_addresses_and_domain() {
    let config = growing(&[(1, 512), (1, 512)], &[2, 3]);
    let tables = build(&config);
    let found = walk(&tables);
    let dsdt = named(&found, b"DSDT");
    // Behind each EISA id of a memory device: _UID, _PXM, _CRS.
    let id = [0x0c, 0x41, 0xd0, 0x0c, 0x80];
    let devices: Vec<usize> = (0..dsdt.len() - 5)
        .filter(|at| dsdt[*at..].starts_with(&id))
        .collect();
    assert_eq!(devices.len(), 5);
    for ((block, domain), at) in config.topology.blocks().zip(devices) {
        let device = &dsdt[at..at + 110];
        let range = config.topology.block_range(block);
        let place = |bytes: &[u8]| device.windows(bytes.len()).position(|found| found == bytes);
        let first = place(&range.gpa.0.to_le_bytes()).expect("its first address");
        let last = place(&(range.end().0 - 1).to_le_bytes()).expect("its last");
        let len = place(&range.len.to_le_bytes()).expect("its size");
        assert_eq!((last, len), (first + 8, first + 24));
        let pxm = place(b"_PXM").expect("its domain");
        // The opcodes for zero and one.
        assert_eq!(u16::from(device[pxm + 4]), domain.0);
    }
}

#[test]
fn remote_memory_is_farther_than_local() {
    for nodes in racks() {
        let tables = build(&rack(&nodes, None));
        let found = walk(&tables);
        let count = nodes.len();
        let slit = named(&found, b"SLIT");
        assert_eq!(u64_at(slit, 36), count as u64);
        assert_eq!(slit.len(), 44 + count * count);
        for (at, distance) in slit[44..].iter().enumerate() {
            let local = at / count == at % count;
            assert_eq!(*distance, if local { 10 } else { 20 });
        }
    }
}

#[test]
fn the_hmat_has_every_pair_of_vcpus_and_memory() {
    for nodes in racks() {
        let tables = build(&rack(&nodes, None));
        let found = walk(&tables);
        let mut rest = &named(&found, b"HMAT")[40..];
        let (mut memories, mut matrices) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let (structure, behind) = rest.split_at(u32_at(rest, 4) as usize);
            match structure[0] {
                0 => memories.push(structure),
                1 => matrices.push(structure),
                kind => panic!("structure of type {kind}"),
            }
            rest = behind;
        }
        let numbers = |gives: fn(&(u16, u64)) -> bool| -> Vec<u32> {
            (0..)
                .zip(&nodes)
                .filter(|(_, node)| gives(node))
                .map(|(number, _)| number)
                .collect()
        };
        let with_vcpus = numbers(|node| node.0 > 0);
        let with_memory = numbers(|node| node.1 > 0);

        assert_eq!(memories.len(), with_memory.len());
        for (memory, number) in memories.iter().zip(&with_memory) {
            assert_eq!((memory.len(), u32_at(memory, 16)), (40, *number));
            let attached = with_vcpus.contains(number);
            assert_eq!(memory[8] == 1, attached, "attached to vCPUs");
            assert!(!attached || u32_at(memory, 12) == *number);
        }
        // Latency in ps, bandwidth in MB/s.
        assert_eq!(matrices.len(), 2);
        for (matrix, (kind, local, remote)) in matrices
            .iter()
            .zip([(0, 100_000, 200_000), (3, 205_000, 63_000)])
        {
            assert_eq!(matrix[8..10], [0, kind]);
            let unit = u64_at(matrix, 24);
            let mut domains = matrix[32..].chunks_exact(4).map(|bytes| u32_at(bytes, 0));
            for expected in [&with_vcpus, &with_memory] {
                let listed: Vec<u32> = domains.by_ref().take(expected.len()).collect();
                assert_eq!(listed, *expected);
            }
            let start = 32 + 4 * (with_vcpus.len() + with_memory.len());
            let pairs = with_vcpus
                .iter()
                .flat_map(|from| with_memory.iter().map(move |to| from == to));
            let entries = matrix[start..].chunks_exact(2);
            assert_eq!(entries.len(), pairs.clone().count());
            assert!(entries.remainder().is_empty());
            for (entry, is_local) in entries.zip(pairs) {
                let entry = u64::from(u16::from_le_bytes([entry[0], entry[1]]));
                assert_eq!(entry * unit, if is_local { local } else { remote });
            }
        }
    }
}

#[test]
fn processors_tell_their_node() {
    // _PXM, then an integer of one byte behind its prefix, or the opcodes for
    // zero and one.
    let nodes = [(1, 2048), (3, 2048), (2, 512)];
    let tables = build(&rack(&nodes, None));
    let found = walk(&tables);
    let dsdt = named(&found, b"DSDT");
    let domains: Vec<&[u8]> = (0..dsdt.len() - 6)
        .filter(|at| dsdt[*at..].starts_with(b"_PXM"))
        .map(|at| &dsdt[at + 4..at + 6])
        .collect();
    let opcodes: Vec<u8> = domains.iter().take(4).map(|bytes| bytes[0]).collect();
    assert_eq!(opcodes, [0, 1, 1, 1]);
    assert_eq!(domains[4..], [&[0x0a, 2], &[0x0a, 2]]);
    let one_node = build(&config(4, None));
    assert!(!one_node.bytes.windows(4).any(|bytes| bytes == b"_PXM"));
}

#[test]
fn the_largest_machines_fit() {
    let most = u16::try_from(MAX_VCPUS).expect("fits");
    let mut many = [(3, 64); 64];
    many[0].0 = 4;
    for nodes in [&[(most, 512)][..], &many] {
        let tables = build(&rack(nodes, Some(PmemInterface::Nfit)));
        assert!(tables.range().end() <= ACPI_END);
        assert_eq!(walk(&tables).len(), if nodes.len() == 1 { 4 } else { 7 });
        let blocks = u32::try_from(MAX_BLOCKS / nodes.len()).expect("few");
        let tables = build(&growing(nodes, &vec![blocks; nodes.len()]));
        assert!(tables.range().end() <= ACPI_END);
    }
}
