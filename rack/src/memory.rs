//! The memory that a rack shares: the control region and what each node
//! gives.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use vmm_shared::addr::{MAX_NODES, NodeId, PAGE_SIZE};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::cluster::ClusterLayout;
use vmm_shared::control::{
    BUNDLE_OFFSET, Blob, BootBy, BootConfig, ControlRegion, MAX_COMMAND_LINE, MAX_MODULES, Module,
    NodeShare, Place, Platform, coherence_geometry, first_places,
};
use vmm_shared::pieces::{MapGeometry, PieceMap};
use vmm_shared::region::RegionKind;
use vmm_shared::shm::SharedMem;
use zerocopy::FromZeros;

use crate::boot::{BootFiles, Bundle};
use crate::error::RackError;
use crate::image::Image;
use crate::qemu::{RegionWindow, Sharing};
use crate::region::Region;
use crate::spec::{BootBySpec, PlatformSpec, VmSpec};

/// The regions of a rack, without the root image.
#[derive(Debug)]
pub(crate) struct Memory {
    pub control: ControlRegion,
    /// The nodes that decide.
    deciding: NodeSet,
    cluster: Blob,
    control_region: Region,
    /// Bytes of that region for the files to boot, all of them touched.
    files: u64,
    /// In the order of the nodes.
    pub given: Vec<Region>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.control_region.release();
    }
}

impl Memory {
    /// Makes the regions and puts the boot bundle into the control region.
    pub(crate) fn create(
        uuid: [u8; 16],
        bundle: &Bundle,
        shares: &[NodeShare],
        deciding: NodeSet,
    ) -> Result<Self, RackError> {
        let cluster = bundle.cluster_blob(shares, deciding);
        let end = cluster.offset + cluster.len;
        let region = Region::create(RegionKind::Control, uuid, 0, end)?;
        let control = ControlRegion::new(region.map()?).expect("made large enough");
        let modules = bundle.modules.iter().zip(bundle.module_blobs());
        let modules = modules.flat_map(|((content, words), module)| {
            [(module.content, content), (module.words, words)]
        });
        let files = [
            (bundle.kernel_blob(), &bundle.kernel),
            (bundle.initramfs_blob(), &bundle.initramfs),
        ];
        for (blob, bytes) in files.into_iter().chain(modules) {
            control
                .blob(blob)
                .and_then(|to| to.write_bytes(0, bytes))
                .expect("made large enough");
        }
        let give = |(owner, share): (u16, &NodeShare)| {
            Region::create(RegionKind::Memory, uuid, owner, share.room())
        };
        Ok(Self {
            control,
            deciding,
            cluster,
            control_region: region,
            files: bundle.coherence_blob(shares, deciding).offset - BUNDLE_OFFSET,
            given: (0..).zip(shares).map(give).collect::<Result<_, _>>()?,
        })
    }

    /// Writes the boot configuration, the last thing before nodes start.
    pub(crate) fn configure(
        &self,
        vm: &VmSpec,
        shares: &[NodeShare],
        boot: &BootFiles,
        bundle: &Bundle,
        image: Option<&Image>,
    ) {
        let words = boot.command_line.as_bytes();
        let mut command_line = [0; MAX_COMMAND_LINE];
        command_line[..words.len()].copy_from_slice(words);
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall_clock_ns = u64::try_from(since_1970.unwrap_or_default().as_nanos());
        let mut all_shares = [NodeShare::new_zeroed(); MAX_NODES];
        all_shares[..shares.len()].copy_from_slice(shares);
        let mut modules = [Module::new_zeroed(); MAX_MODULES];
        modules[..bundle.modules.len()].copy_from_slice(&bundle.module_blobs());
        let platform = match boot.platform {
            PlatformSpec::Lean => Platform::Lean,
            PlatformSpec::Legacy => Platform::Legacy,
        };
        let boot_by = match boot.boot_by {
            BootBySpec::Image => BootBy::Image,
            BootBySpec::Paravirtual => BootBy::Paravirtual,
        };
        for (vcpu, at) in first_places(shares) {
            let record = self.control.vcpu(vcpu);
            record.expect("checked to be few").set_place(Place::New(at));
        }
        self.pieces(shares, bundle).lay_out(shares);
        let desired = self.control.vm();
        desired
            .desired_memory()
            .store(vm.memory.0, Ordering::Relaxed);
        self.control.set_boot_config(&BootConfig {
            nodes: u32::try_from(shares.len()).expect("checked to be few"),
            vcpus: vm.vcpus,
            memory: vm.memory.0,
            wall_clock_ns: wall_clock_ns.unwrap_or(u64::MAX),
            kernel: bundle.kernel_blob(),
            initramfs: bundle.initramfs_blob(),
            coherence: bundle.coherence_blob(shares, self.deciding),
            pieces: bundle.pieces_blob(shares, self.deciding),
            image_len: image.map_or(0, |image| image.content_len),
            command_line_len: u32::try_from(words.len()).expect("checked to be short"),
            platform: platform as u32,
            boot_by: boot_by as u32,
            reserved: 0,
            control: self.deciding.bits(),
            cluster: self.cluster,
            command_line,
            modules,
            shares: all_shares,
        });
    }

    /// Bytes of the control region that have been touched, without the files
    /// to boot.
    pub(crate) fn metadata(&self) -> u64 {
        // It can always be looked at: this process made it.
        let touched = self.control_region.touched().unwrap_or_default();
        touched.saturating_sub(self.files)
    }

    /// Where the pieces of guest memory are.
    pub(crate) fn pieces(&self, shares: &[NodeShare], bundle: &Bundle) -> PieceMap {
        let blob = bundle.pieces_blob(shares, self.deciding);
        let window = self.control.blob(blob).expect("made large enough");
        PieceMap::new(window, MapGeometry::of(shares)).expect("checked to be a possible VM")
    }

    /// Where the cluster's log and queues are.
    pub(crate) fn cluster(&self) -> (ClusterLayout, SharedMem) {
        let layout = ClusterLayout::new(self.given.len()).expect("checked to be a possible rack");
        let area = self.control.blob(self.cluster).expect("made large enough");
        (layout, area)
    }

    /// The control region, as nodes get it.
    pub(crate) fn control_file(&self) -> BorrowedFd<'_> {
        self.control_region.file().as_fd()
    }

    /// The windows of any node: what all nodes give, and the root image.
    pub(crate) fn windows(&self, image: Option<&Image>) -> Result<Vec<RegionWindow>, RackError> {
        let given = self.given.iter().map(|region| (region, Sharing::Shared));
        let image = image.map(|image| (&image.region, image.sharing));
        given
            .chain(image)
            .map(|(region, sharing)| {
                let file = region.file().try_clone();
                Ok(RegionWindow {
                    file: file
                        .map_err(RackError::host("share a memory region"))?
                        .into(),
                    len: region.len(),
                    sharing,
                })
            })
            .collect()
    }

    /// The first region whose header is not what it was made as, and what is
    /// wrong with it: any node can write there.
    pub(crate) fn damage(&self) -> Option<(String, String)> {
        let control = (
            "control region".to_owned(),
            self.control_region.check(RegionKind::Control),
        );
        let given = (0..).map(NodeId).zip(&self.given).map(|(node, region)| {
            let name = format!("memory region of node {}", node.0);
            (name, region.check(RegionKind::Memory))
        });
        std::iter::once(control)
            .chain(given)
            .find_map(|(name, check)| Some((name, check.err()?.to_string())))
    }
}

impl Bundle {
    fn kernel_blob(&self) -> Blob {
        Blob {
            offset: BUNDLE_OFFSET,
            len: self.kernel.len() as u64,
        }
    }

    /// Behind the kernel, on a page of its own.
    fn initramfs_blob(&self) -> Blob {
        let kernel = self.kernel_blob();
        Blob {
            offset: (kernel.offset + kernel.len).next_multiple_of(PAGE_SIZE),
            len: self.initramfs.len() as u64,
        }
    }

    /// Behind that, each part on a page of its own.
    fn module_blobs(&self) -> Vec<Module> {
        let initramfs = self.initramfs_blob();
        let mut next = initramfs.offset + initramfs.len;
        let mut place = |bytes: &Vec<u8>| {
            let blob = Blob {
                offset: next.next_multiple_of(PAGE_SIZE),
                len: bytes.len() as u64,
            };
            next = blob.offset + blob.len;
            blob
        };
        let parts = self.modules.iter();
        parts
            .map(|(content, words)| Module {
                content: place(content),
                words: place(words),
            })
            .collect()
    }

    /// Behind that, zeroed: what the nodes need to keep instruction fetch
    /// coherent. One node needs nothing.
    fn coherence_blob(&self, shares: &[NodeShare], deciding: NodeSet) -> Blob {
        let last = match self.module_blobs().last() {
            Some(module) => module.words,
            None => self.initramfs_blob(),
        };
        let len = match shares.len() - deciding.count() {
            1 => 0,
            _ => coherence_geometry(shares)
                .table_size()
                .expect("checked to be a possible rack"),
        };
        Blob {
            offset: (last.offset + last.len).next_multiple_of(PAGE_SIZE),
            len: len as u64,
        }
    }

    /// Behind that: where the pieces of guest memory are.
    fn pieces_blob(&self, shares: &[NodeShare], deciding: NodeSet) -> Blob {
        let before = self.coherence_blob(shares, deciding);
        let size = MapGeometry::of(shares).size();
        Blob {
            offset: (before.offset + before.len).next_multiple_of(PAGE_SIZE),
            len: size.expect("checked to be a possible VM") as u64,
        }
    }

    /// Behind that: the cluster's log and queues.
    fn cluster_blob(&self, shares: &[NodeShare], deciding: NodeSet) -> Blob {
        let before = self.pieces_blob(shares, deciding);
        let layout = ClusterLayout::new(shares.len()).expect("checked to be a possible rack");
        Blob {
            offset: (before.offset + before.len).next_multiple_of(PAGE_SIZE),
            len: layout.size() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::HostClock;
    use crate::founding::found;
    use crate::size::Size;
    use crate::spec::{NodeSpec, RackSpec};
    use vmm_shared::addr::LARGE_PAGE_SIZE;
    use vmm_shared::control::PIECES_PER_BLOCK;
    use vmm_shared::pieces::HostPiece;

    fn memory() -> (VmSpec, Vec<NodeShare>, Memory) {
        let rack = RackSpec::equal(2, NodeSpec::data(2, None)).expect("few");
        let vm = VmSpec {
            vcpus: 3,
            max_vcpus: 4,
            memory: Size::mib(130),
        };
        let shares = found(&rack, &vm, &HostClock::new()).expect("placed").shares;
        let bundle = bundle();
        let memory = Memory::create([7; 16], &bundle, &shares, NodeSet::EMPTY).expect("made");
        (vm, shares, memory)
    }

    fn bundle() -> Bundle {
        Bundle {
            kernel: b"kernel".to_vec(),
            initramfs: b"initramfs".to_vec(),
            modules: vec![(b"module".to_vec(), b"words".to_vec())],
        }
    }

    #[test]
    fn nodes_are_told_who_gives_what() {
        let (vm, shares, memory) = memory();
        let boot = BootFiles {
            kernel: "k".into(),
            boot_by: BootBySpec::Paravirtual,
            initramfs: None,
            modules: Vec::new(),
            platform: PlatformSpec::Legacy,
            image: None,
            command_line: "quiet".into(),
        };
        memory.configure(&vm, &shares, &boot, &bundle(), None);
        let config = memory.control.boot_config();
        assert_eq!((config.nodes, config.vcpus), (2, 3));
        assert_eq!(config.shares[..2], shares[..]);
        assert_eq!(config.platform, Platform::Legacy as u32);
        assert_eq!(config.boot_by, BootBy::Paravirtual as u32);
        let module = memory.control.blob(config.modules[0].content);
        let mut bytes = [0; 6];
        let copied = module.expect("inside").read_bytes(0, &mut bytes);
        assert_eq!(copied, Some(()));
        assert_eq!(bytes, *b"module");
        assert!(config.coherence.offset >= config.modules[0].words.offset + 5);
        assert_eq!(config.modules[1].content.len, 0);
        assert!(config.shares[2..].iter().all(|share| share.cores == 0));
        let sum: u64 = config.shares.iter().map(|share| share.memory).sum();
        assert_eq!(sum, config.memory);
        // In order, and each from the start of its region.
        let pieces = memory.control.pieces(&config).expect("laid out");
        let mut piece = 0;
        for (node, share) in (0..).map(NodeId).zip(&shares) {
            for number in 0..u32::try_from(share.memory / LARGE_PAGE_SIZE).expect("few") {
                let seen = pieces.look(piece).expect("inside");
                assert_eq!(seen.host(), Some(HostPiece { node, number }));
                piece += 1;
            }
            let given = share.memory / LARGE_PAGE_SIZE;
            assert_eq!(pieces.free(node) as u64, u64::from(share.room) - given);
        }
        let later = shares.iter().map(|share| usize::from(share.blocks));
        assert_eq!(
            piece + later.sum::<usize>() * PIECES_PER_BLOCK,
            pieces.pieces()
        );
    }

    #[test]
    fn what_nodes_share_about_a_vm_is_a_hundredth_of_its_memory_at_most() {
        // Counters, vCPUs' homes, membership and proofs; rings hold what is on
        // its way, and pages that nobody touches cost nothing.
        let fixed = 1 << 20;
        let vm = VmSpec {
            vcpus: 2,
            max_vcpus: 2,
            memory: Size(1 << 30),
        };
        for (nodes, deciding) in [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)] {
            let rack = RackSpec::equal(nodes, NodeSpec::data(2, None)).expect("few");
            let rack = rack.with_control(deciding).expect("few");
            let shares = found(&rack, &vm, &HostClock::new()).expect("placed").shares;
            let deciding = rack.control_nodes();
            let parts = [
                bundle().coherence_blob(&shares, deciding),
                bundle().pieces_blob(&shares, deciding),
                bundle().cluster_blob(&shares, deciding),
            ];
            let sum: u64 = parts.iter().map(|blob| blob.len).sum();
            // What may come has its place from the start; untouched, it costs
            // nothing.
            let room: u64 = shares.iter().map(NodeShare::room).sum();
            let most = room / 100;
            assert!(
                fixed + sum <= most,
                "{nodes} nodes: {} KiB",
                (fixed + sum) >> 10
            );
        }
    }

    #[test]
    fn every_node_gets_what_all_nodes_give() {
        let (_, shares, memory) = memory();
        let windows = memory.windows(None).expect("shared");
        assert_eq!(windows.len(), 2);
        for (owner, (region, share)) in (0..).zip(memory.given.iter().zip(&shares)) {
            let header = region.header().expect("readable");
            assert_eq!((header.owner, header.content_len), (owner, share.room()));
            assert!(region.len() >= (2 << 20) + share.room());
        }
    }

    #[test]
    fn damage_names_the_region_and_what_is_wrong() {
        let (_, _, memory) = memory();
        assert_eq!(memory.damage(), None);
        memory.given[1]
            .change_header(|header| header.magic = 0)
            .expect("writable");
        let (name, what) = memory.damage().expect("damaged");
        assert_eq!(name, "memory region of node 1");
        assert!(what.contains("no header"), "{what}");
    }
}
