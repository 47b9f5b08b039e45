//! SLIT and HMAT: how far the nodes' memories are from their vCPUs.
//!
//! Every node is as far from every other. A kernel orders nodes by these
//! figures and never adds them up, so what counts is that remote is worse
//! than local, and by how much: the figures are those of hardware that the
//! design is for, not of an emulated rack.
//!
//! - Local: the DRAM of the CPU that CPUID tells of, eight channels of
//!   DDR4-3200 at 25.6 GB/s each; about 100 ns.
//! - Remote: a CXL link of sixteen PCIe 5.0 lanes (32 GT/s, 128 of 130 bits):
//!   63 GB/s. Memory behind CXL about doubles the latency (Pond, ASPLOS 2023:
//!   70 to 90 ns more), which is also what the SLIT's 20 means beside 10.
//!
//! Source: ACPI specification 6.5, sections 5.2.17 and 5.2.28.

use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;
use zerocopy::little_endian::U64;
use zerocopy::{Immutable, IntoBytes};

use super::table;
use crate::platform::{Domain, PlatformNode, Topology};

const SLIT_REVISION: u8 = 1;
/// From this one on, latencies are in picoseconds.
const HMAT_REVISION: u8 = 2;

/// What some quantity is within a node and between two.
#[derive(Clone, Copy)]
struct Distance<T> {
    local: T,
    remote: T,
}

impl<T: Copy> Distance<T> {
    fn between(self, a: Domain, b: Domain) -> T {
        if a == b { self.local } else { self.remote }
    }
}

/// Relative: 10 is what a node's own memory has by definition.
const RELATIVE: Distance<u8> = Distance {
    local: 10,
    remote: 20,
};
const LATENCY_NS: Distance<u16> = Distance {
    local: 100,
    remote: 200,
};
const BANDWIDTH_GB_PER_S: Distance<u16> = Distance {
    local: 205,
    remote: 63,
};

/// What a matrix of the HMAT tells of.
#[derive(Clone, Copy)]
#[repr(u8)]
enum DataType {
    /// Read and write latency, unit: 1 ps.
    AccessLatency = 0,
    /// Read and write bandwidth, unit: 1 MB/s.
    AccessBandwidth = 3,
}

/// From units to nanoseconds and GB/s.
const BASE_UNIT: u64 = 1000;

/// A memory and the CPUs that it is attached to, structure type 0.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryDomain {
    kind: u16,
    reserved: u16,
    len: u32,
    flags: u16,
    reserved_2: u16,
    initiator: u32,
    memory: u32,
    reserved_3: [u32; 5],
}

/// `initiator` says something.
const INITIATOR_VALID: u16 = 1;

/// A matrix of memories by CPUs, structure type 1. Behind it: the domains of
/// the CPUs, those of the memories, and the entries, CPU by CPU.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Locality {
    kind: u16,
    reserved: u16,
    len: u32,
    flags: u8,
    data_type: u8,
    min_transfer_size: u8,
    reserved_2: u8,
    initiators: u32,
    targets: u32,
    reserved_3: u32,
    base_unit: U64,
}

const _: () = assert!(size_of::<MemoryDomain>() == 40);
const _: () = assert!(size_of::<Locality>() == 32);

pub(super) fn slit(topology: &Topology) -> Sdt {
    let domains = topology.domains().map(|(domain, _)| domain);
    let mut body = Vec::from((topology.nodes().len() as u64).to_le_bytes());
    for from in domains.clone() {
        body.extend(domains.clone().map(|to| RELATIVE.between(from, to)));
    }
    table(*b"SLIT", SLIT_REVISION, &body)
}

pub(super) fn hmat(topology: &Topology) -> Sdt {
    let mut body = Vec::from(0_u32.to_le_bytes());
    for (domain, node) in topology.domains().filter(|it| topology.gives_memory(it.0)) {
        let flags = match node.vcpus {
            0 => 0,
            _ => INITIATOR_VALID,
        };
        let memory = MemoryDomain {
            kind: 0,
            reserved: 0,
            len: 40,
            flags,
            reserved_2: 0,
            initiator: domain.0.into(),
            memory: domain.0.into(),
            reserved_3: [0; 5],
        };
        body.extend_from_slice(memory.as_bytes());
    }
    locality(&mut body, topology, DataType::AccessLatency, LATENCY_NS);
    locality(
        &mut body,
        topology,
        DataType::AccessBandwidth,
        BANDWIDTH_GB_PER_S,
    );
    table(*b"HMAT", HMAT_REVISION, &body)
}

fn locality(body: &mut Vec<u8>, topology: &Topology, what: DataType, distance: Distance<u16>) {
    let initiators: Vec<Domain> = names(topology.domains().filter(gives_vcpus));
    let targets: Vec<Domain> = names(topology.domains().filter(|it| topology.gives_memory(it.0)));
    let len = size_of::<Locality>()
        + (initiators.len() + targets.len()) * size_of::<u32>()
        + initiators.len() * targets.len() * size_of::<u16>();
    let few = "at most 64 nodes";
    let head = Locality {
        kind: 1,
        reserved: 0,
        len: u32::try_from(len).expect(few),
        // Of memory itself, not of a cache before it.
        flags: 0,
        data_type: what as u8,
        min_transfer_size: 0,
        reserved_2: 0,
        initiators: u32::try_from(initiators.len()).expect(few),
        targets: u32::try_from(targets.len()).expect(few),
        reserved_3: 0,
        base_unit: BASE_UNIT.into(),
    };
    body.extend_from_slice(head.as_bytes());
    for domain in initiators.iter().chain(&targets) {
        body.extend_from_slice(&u32::from(domain.0).to_le_bytes());
    }
    for from in &initiators {
        for to in &targets {
            body.extend_from_slice(&distance.between(*from, *to).to_le_bytes());
        }
    }
}

fn names(nodes: impl Iterator<Item = (Domain, PlatformNode)>) -> Vec<Domain> {
    nodes.map(|(domain, _)| domain).collect()
}

fn gives_vcpus((_, node): &(Domain, PlatformNode)) -> bool {
    node.vcpus > 0
}
