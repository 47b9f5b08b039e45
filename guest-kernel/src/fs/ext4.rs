//! Reads an ext4 image in place: its files' pages are mapped from where they
//! lie.
//!
//! Layouts: Linux, Documentation/filesystems/ext4. Blocks are pages, files
//! have extents, directories are read entry by entry (hash trees are built so
//! that this works). The image may be broken in any way: reading one never
//! fails but by leaving something out.

use alloc::boxed::Box;
use alloc::vec::Vec;

use vmm_shared::shm::SharedMem;

use crate::mem::{PAGE, index};

const SUPER_BLOCK: usize = 1024;
const MAGIC: u16 = 0xef53;
/// The root directory.
pub(crate) const ROOT: u32 = 2;
const EXTENTS: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const DEEPEST: u16 = 5;
/// Features that change what is read here: 64-bit blocks, extents, file types
/// in directories, flexible groups; others are refused.
const KNOWN_FEATURES: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x2000;

/// Blocks of a file that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Its first block, counted in the file.
    first: u64,
    /// Blocks.
    count: u64,
    /// The same block, counted in the image.
    place: u64,
}

/// Where a file's blocks are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extents(Vec<Extent>);

impl Extents {
    /// The offset in the image of a block of the file; `None` for a hole.
    pub(crate) fn find(&self, block: u64) -> Option<u64> {
        let after = self.0.partition_point(|extent| extent.first <= block);
        let extent = self.0.get(after.checked_sub(1)?)?;
        let within = block - extent.first;
        let place = extent.place.checked_add(within)?;
        (within < extent.count)
            .then(|| place.checked_mul(PAGE as u64))
            .flatten()
    }
}

/// What an inode says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inode {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// Nanoseconds since 1970.
    pub(crate) atime: u64,
    pub(crate) ctime: u64,
    pub(crate) mtime: u64,
    flags: u32,
    blocks: [u8; 60],
}

/// The file system in an image.
#[derive(Debug)]
pub(crate) struct Ext4 {
    image: SharedMem,
    inodes_per_group: u32,
    inode_size: usize,
    descriptor_size: usize,
    inodes: u32,
}

impl Ext4 {
    /// The file system in `image`, if it is one that can be read.
    pub(crate) fn open(image: SharedMem) -> Option<Self> {
        let half = |offset| image.read::<u16>(SUPER_BLOCK + offset);
        let word = |offset| image.read::<u32>(SUPER_BLOCK + offset);
        let features = word(0x60)?;
        // 1024 << 2 is the size of a page.
        let sound = half(0x38)? == MAGIC && word(0x18)? == 2 && features & !KNOWN_FEATURES == 0;
        let descriptor_size = match features & 0x80 {
            0 => 32,
            _ => usize::from(half(0xfe)?).max(32),
        };
        let inodes_per_group = word(0x28)?;
        let inode_size = usize::from(half(0x58)?);
        (sound && inodes_per_group > 0 && inode_size >= 128).then_some(Self {
            image,
            inodes_per_group,
            inode_size,
            descriptor_size,
            inodes: word(0)?,
        })
    }

    /// Reads an inode.
    pub(crate) fn inode(&self, number: u32) -> Option<Inode> {
        if number > self.inodes {
            return None;
        }
        let number = number.checked_sub(1)?;
        let group = number / self.inodes_per_group;
        let within = number % self.inodes_per_group;
        let descriptor = PAGE + group as usize * self.descriptor_size;
        let low: u32 = self.image.read(descriptor + 8)?;
        let high: u32 = match self.descriptor_size {
            0..64 => 0,
            _ => self.image.read(descriptor + 0x28)?,
        };
        let table = (u64::from(high) << 32 | u64::from(low)).checked_mul(PAGE as u64)?;
        let at = index(table).checked_add(within as usize * self.inode_size)?;
        let half = |offset: usize| self.image.read::<u16>(at.checked_add(offset)?);
        let word = |offset: usize| self.image.read::<u32>(at.checked_add(offset)?);
        let extra = match self.inode_size {
            0..160 => 0,
            _ => half(0x80)?,
        };
        let time = |offset, more: usize| {
            let seconds = word(offset)?;
            let more = if usize::from(extra) >= more + 4 - 0x80 {
                word(more)?
            } else {
                0
            };
            let seconds = u64::from(more & 3) << 32 | u64::from(seconds);
            seconds
                .checked_mul(1_000_000_000)?
                .checked_add(u64::from(more >> 2))
        };
        let mut blocks = [0; 60];
        self.image.read_bytes(at.checked_add(0x28)?, &mut blocks)?;
        Some(Inode {
            mode: half(0)?.into(),
            uid: u32::from(half(0x78)?) << 16 | u32::from(half(2)?),
            gid: u32::from(half(0x7a)?) << 16 | u32::from(half(0x18)?),
            links: half(0x1a)?.into(),
            size: u64::from(word(0x6c)?) << 32 | u64::from(word(4)?),
            atime: time(8, 0x8c)?,
            ctime: time(0xc, 0x84)?,
            mtime: time(0x10, 0x88)?,
            flags: word(0x20)?,
            blocks,
        })
    }

    /// Where the blocks of a file or directory are.
    pub(crate) fn extents(&self, inode: &Inode) -> Extents {
        let mut found = Vec::new();
        if inode.flags & EXTENTS != 0 {
            // No tree has more nodes than the image has blocks.
            let mut nodes = self.image.len() / PAGE;
            self.collect(&inode.blocks, DEEPEST, &mut nodes, &mut found);
        }
        found.sort_by_key(|extent| extent.first);
        Extents(found)
    }

    /// Adds the extents in a node of the tree and below it.
    fn collect(&self, node: &[u8], deepest: u16, nodes: &mut usize, found: &mut Vec<Extent>) {
        let (Some(magic), Some(count), Some(depth)) = (half(node, 0), half(node, 2), half(node, 6))
        else {
            return;
        };
        if magic != EXTENT_MAGIC || depth > deepest {
            return;
        }
        for entry in node[12..].chunks_exact(12).take(count.into()) {
            let (Some(first), Some(a), Some(b)) = (word(entry, 0), word(entry, 4), word(entry, 8))
            else {
                return;
            };
            if depth == 0 {
                let [c0, c1, h0, h1] = a.to_le_bytes();
                let count = u16::from_le_bytes([c0, c1]);
                // Longer ones are allocated and not written: holes.
                if count <= 0x8000 {
                    let high = u16::from_le_bytes([h0, h1]);
                    found.push(Extent {
                        first: first.into(),
                        count: count.into(),
                        place: u64::from(high) << 32 | u64::from(b),
                    });
                }
                continue;
            }
            let Some(left) = nodes.checked_sub(1) else {
                return;
            };
            *nodes = left;
            let [h0, h1, ..] = b.to_le_bytes();
            let place = u64::from(u16::from_le_bytes([h0, h1])) << 32 | u64::from(a);
            let mut block = [0; PAGE];
            let read = place
                .checked_mul(PAGE as u64)
                .and_then(|at| self.image.read_bytes(index(at), &mut block));
            if read.is_some() {
                // A tree grows shallower towards its leaves, or it is broken.
                self.collect(&block, depth - 1, nodes, found);
            }
        }
    }

    /// The names in a directory and their inodes, without `.` and `..`.
    pub(crate) fn directory(&self, inode: &Inode) -> Vec<(Box<[u8]>, u32)> {
        let extents = self.extents(inode);
        let mut names = Vec::new();
        // A directory has no holes, so none is larger than the image.
        let size = inode.size.min(self.image.len() as u64);
        for block in 0..size / PAGE as u64 {
            let mut bytes = [0; PAGE];
            let read = extents
                .find(block)
                .and_then(|at| self.image.read_bytes(index(at), &mut bytes));
            if read.is_none() {
                continue;
            }
            let mut rest = &bytes[..];
            while let (Some(number), Some(len)) = (word(rest, 0), half(rest, 4))
                && len >= 8
                && let Some((entry, after)) = rest.split_at_checked(len.into())
            {
                let name = entry.get(8..8 + usize::from(entry[6]));
                if let Some(name) = name
                    && number != 0
                    && !matches!(name, b"" | b"." | b"..")
                    && !name.contains(&b'/')
                    && !name.contains(&0)
                {
                    names.push((name.into(), number));
                }
                rest = after;
            }
        }
        names
    }

    /// Where a symbolic link points.
    pub(crate) fn link(&self, inode: &Inode) -> Box<[u8]> {
        let len = index(inode.size.min(PAGE as u64));
        if inode.flags & EXTENTS == 0 {
            return inode.blocks[..len.min(inode.blocks.len())].into();
        }
        let mut bytes = alloc::vec![0; len];
        if let Some(at) = self.extents(inode).find(0) {
            // A link whose text is outside of the image is empty.
            let _ = self.image.read_bytes(index(at), &mut bytes);
        }
        bytes.into()
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads all that can be reached in an image, and returns the names.
#[cfg(any(test, fuzzing))]
pub(crate) fn walk_image(image: SharedMem) -> Option<Vec<(Box<[u8]>, u32)>> {
    let ext4 = Ext4::open(image)?;
    let (mut seen, mut found) = (alloc::vec![ROOT], Vec::new());
    let mut next = seen.clone();
    while let Some(number) = next.pop() {
        let Some(inode) = ext4.inode(number) else {
            continue;
        };
        ext4.extents(&inode).find(0);
        ext4.link(&inode);
        if inode.mode >> 12 != 4 {
            continue;
        }
        for (name, number) in ext4.directory(&inode) {
            found.push((name, number));
            if !seen.contains(&number) {
                seen.push(number);
                next.push(number);
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::mem::frames::testing::memory_of;

    /// A small file system of all kinds of things, made by the tool that makes
    /// the root images.
    fn image(name: &str) -> Vec<u8> {
        let name = format!("viaduct-ext4-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let (tree, file) = (folder.join("tree"), folder.join("image"));
        std::fs::create_dir_all(tree.join("folder")).expect("a temporary folder");
        std::fs::write(tree.join("empty"), "").expect("written");
        std::fs::write(tree.join("folder/short"), "short").expect("written");
        std::fs::write(tree.join("long"), vec![7; 3 * PAGE + 1]).expect("written");
        for (name, target) in [("near", "long".to_owned()), ("far", "x/".repeat(99))] {
            std::os::unix::fs::symlink(target, tree.join(name)).expect("linked");
        }
        for number in 0..100 {
            std::fs::write(tree.join(format!("folder/{number:040}")), "").expect("written");
        }
        let empty = std::fs::File::create(&file).expect("created");
        empty.set_len(2 << 20).expect("there is room");
        let made = Command::new("mke2fs")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args([
                "-q",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-O",
                "^has_journal,^metadata_csum",
            ])
            .arg("-d")
            .args([&tree, &file])
            .status()
            .expect("mke2fs is installed");
        assert!(made.success());
        let bytes = std::fs::read(&file).expect("it was made");
        std::fs::remove_dir_all(&folder).expect("ours");
        bytes
    }

    #[test]
    fn what_mke2fs_writes_is_read() {
        let memory = memory_of(&image("read"));
        let ext4 = Ext4::open(memory).expect("a file system");
        let names = walk_image(memory).expect("the same");
        let inode = |wanted: &[u8]| {
            let mut names = names.iter();
            let found = names.find(|(name, _)| **name == *wanted).expect("a name");
            ext4.inode(found.1).expect("an inode")
        };
        // Besides ours there is lost+found.
        assert_eq!(names.len(), 5 + 1 + 100 + 1);
        assert_eq!((inode(b"empty").size, inode(b"empty").mode >> 12), (0, 8));
        let long = inode(b"long");
        assert_eq!(long.size, 3 * PAGE as u64 + 1);
        let extents = ext4.extents(&long);
        let mut page = [0; PAGE];
        let at = extents.find(3).expect("its last block");
        ext4.image.read_bytes(index(at), &mut page).expect("inside");
        assert_eq!(page[..2], [7, 0]);
        assert_eq!(extents.find(4), None);
        assert_eq!(&*ext4.link(&inode(b"near")), b"long");
        assert_eq!(ext4.link(&inode(b"far")).len(), 198);
        assert_eq!(inode(b"short").size, 5);
    }

    #[test]
    fn a_broken_image_leaves_something_out_and_nothing_else() {
        let good = image("broken");
        assert!(Ext4::open(memory_of(&good[..1024])).is_none());
        // What is not zero matters: fields, pointers, names.
        let used: Vec<_> = (SUPER_BLOCK..good.len())
            .filter(|at| good[*at] != 0)
            .collect();
        let memory = memory_of(&good);
        for (turn, at) in used.iter().enumerate().step_by(97) {
            for value in [0_u8, 1, 0x80, 0xff] {
                memory.write_bytes(*at, &[value]).expect("inside");
                // Two at once, now and then.
                let other = used[turn * 31 % used.len()];
                memory.write_bytes(other, &[0xff]).expect("inside");
                walk_image(memory);
                for at in [*at, other] {
                    memory.write_bytes(at, &good[at..=at]).expect("inside");
                }
            }
        }
        assert!(walk_image(memory).is_some_and(|names| names.len() == 107));
    }

    #[test]
    fn a_tree_whose_branches_all_meet_again_ends() {
        // A block for each level, all of whose entries lead to the next: 340
        // to the fifth ways to the end, which is no extent.
        let mut bytes = vec![0; 64 * PAGE];
        for level in 0..=DEEPEST {
            let mut node = Vec::new();
            for word in [EXTENT_MAGIC, 340, 340, DEEPEST - level, 0, 0] {
                node.extend_from_slice(&word.to_le_bytes());
            }
            let next = u32::from(level + 1) % 6;
            for _ in 0..340 {
                for word in [0, next, 0] {
                    node.extend_from_slice(&word.to_le_bytes());
                }
            }
            let at = usize::from(level) * PAGE;
            bytes[at..at + node.len()].copy_from_slice(&node);
        }
        let ext4 = Ext4 {
            image: memory_of(&bytes),
            inodes_per_group: 1,
            inode_size: 128,
            descriptor_size: 32,
            inodes: 1,
        };
        let (mut nodes, mut found) = (64, Vec::new());
        ext4.collect(&bytes[..PAGE], DEEPEST, &mut nodes, &mut found);
        assert_eq!((nodes, found.len() <= 64 * 340), (0, true));
    }
}
