//! Files, directories and links in memory.
//!
//! What the root image holds is read when it is first asked for and then
//! changed here alone: a file's pages are the image's until they are written.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use linux_raw_sys::general::{
    S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK,
};
use vmm_shared::addr::PAGE_SIZE;

use super::ext4::{Ext4, Extents};
use crate::errno::{Errno, Result};
use crate::mem::frames::{For, Frame, Frames};
use crate::mem::{PAGE, index};
use crate::table::Table;

/// A node by its number.
pub(crate) type NodeId = u32;

/// Longest file: what fits into a signed offset.
const MOST_BYTES: u64 = i64::MAX.cast_unsigned();
/// Inode numbers of what is not in the image start here.
const FIRST_NEW_INODE: u64 = 1 << 32;

/// What `stat` tells, apart from size and type of contents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u32,
    /// The file system that it is in.
    pub(crate) device: u32,
    /// Its number there.
    pub(crate) inode: u64,
    /// Nanoseconds since 1970.
    pub(crate) atime: u64,
    pub(crate) ctime: u64,
    pub(crate) mtime: u64,
}

/// A page of a file in memory.
#[derive(Clone, Copy, Debug)]
struct Page {
    frame: Frame,
    /// It may differ from what the image holds, or a hole.
    changed: bool,
}

/// What a page of a file's own is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// To be seen by all who map it.
    Read,
    /// To be changed.
    Write,
}

/// The contents of a regular file.
#[derive(Debug, Default)]
pub(crate) struct FileData {
    pub(crate) size: u64,
    pages: BTreeMap<u64, Page>,
    /// The file in the image, as far as it has not been cut off.
    lower: Extents,
    lower_pages: u64,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Node(NodeId),
    /// In the image, not looked at yet.
    Image(u32),
    /// The root of /proc.
    Proc,
}

/// The names in a directory.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) parent: NodeId,
    pub(crate) entries: BTreeMap<Box<[u8]>, Entry>,
    /// The directory in the image whose names are still to be read.
    unread: Option<u32>,
}

impl Directory {
    /// One without names, that is nowhere yet.
    pub(crate) fn empty() -> Self {
        Self {
            parent: 0,
            entries: BTreeMap::new(),
            unread: None,
        }
    }
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Kind {
    File(FileData),
    Directory(Directory),
    Link(Box<[u8]>),
    /// A character or block device: major and minor number.
    Device(u32, u32),
    Fifo(Option<u32>),
    Socket,
}

/// A file, directory or link.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
    /// Open files and mappings of it.
    uses: u32,
}

/// Who makes something, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maker {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) now: u64,
}

/// All nodes, and the frames that hold them.
#[derive(Debug)]
pub(crate) struct Objects {
    pub(crate) frames: Arc<Frames>,
    nodes: Table<Node>,
    image: Option<Ext4>,
    /// Nodes of the image's inodes.
    known: BTreeMap<u32, NodeId>,
    next_inode: u64,
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    pub(crate) fn size(&self) -> u64 {
        match &self.kind {
            Kind::File(data) => data.size,
            Kind::Link(target) => target.len() as u64,
            Kind::Directory(_) => PAGE_SIZE,
            _ => 0,
        }
    }

    /// Memory that its contents occupy, in 512-byte units.
    pub(crate) fn blocks(&self) -> u64 {
        match &self.kind {
            Kind::File(data) => data.size.div_ceil(PAGE_SIZE) * 8,
            Kind::Directory(_) => 8,
            _ => 0,
        }
    }
}

impl Objects {
    pub(crate) fn new(frames: Frames) -> Self {
        let image = frames.image().and_then(Ext4::open);
        Self {
            frames: Arc::new(frames),
            nodes: Table::default(),
            image,
            known: BTreeMap::new(),
            next_inode: FIRST_NEW_INODE,
        }
    }

    /// The node with this number.
    ///
    /// # Panics
    /// If there is none: whoever has a number holds a use or a link of it.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        self.nodes.get(id).expect("nodes in use exist")
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(id).expect("nodes in use exist")
    }

    /// Nodes in memory.
    pub(crate) fn count(&self) -> usize {
        self.nodes.len()
    }

    /// The image's root directory, if there is an image that can be read.
    pub(crate) fn image_root(&mut self) -> Option<NodeId> {
        let root = self.image_node(super::ext4::ROOT).ok()?;
        let node = self.node_mut(root);
        node.uses += 1;
        match &mut node.kind {
            Kind::Directory(directory) => directory.parent = root,
            _ => return None,
        }
        Some(root)
    }

    /// The node of an inode of the image.
    fn image_node(&mut self, number: u32) -> Result<NodeId> {
        if let Some(id) = self.known.get(&number) {
            return Ok(*id);
        }
        let image = self.image.as_ref().ok_or(Errno::EIO)?;
        let inode = image.inode(number).ok_or(Errno::EIO)?;
        let kind = match inode.mode & S_IFMT {
            S_IFREG => Kind::File(FileData {
                size: inode.size.min(MOST_BYTES),
                pages: BTreeMap::new(),
                lower: image.extents(&inode),
                lower_pages: inode.size.div_ceil(PAGE_SIZE),
            }),
            S_IFDIR => Kind::Directory(Directory {
                unread: Some(number),
                ..Directory::empty()
            }),
            S_IFLNK => Kind::Link(image.link(&inode)),
            S_IFCHR | S_IFBLK => Kind::Device(0, 0),
            S_IFIFO => Kind::Fifo(None),
            S_IFSOCK => Kind::Socket,
            _ => return Err(Errno::EIO),
        };
        let id = self.nodes.insert(Node {
            kind,
            meta: Meta {
                mode: inode.mode,
                uid: inode.uid,
                gid: inode.gid,
                links: inode.links.max(1),
                device: super::ROOT_DEVICE,
                inode: number.into(),
                atime: inode.atime,
                ctime: inode.ctime,
                mtime: inode.mtime,
            },
            uses: 0,
        });
        self.known.insert(number, id);
        Ok(id)
    }

    /// Makes a node that has no name and no use yet.
    pub(crate) fn make(&mut self, kind: Kind, mode: u32, device: u32, maker: Maker) -> NodeId {
        let kind_bits = match &kind {
            Kind::File(_) => S_IFREG,
            Kind::Directory(_) => S_IFDIR,
            Kind::Link(_) => S_IFLNK,
            Kind::Device(..) => match mode & S_IFMT {
                S_IFBLK => S_IFBLK,
                _ => S_IFCHR,
            },
            Kind::Fifo(_) => S_IFIFO,
            Kind::Socket => S_IFSOCK,
        };
        let inode = self.next_inode;
        self.next_inode += 1;
        self.nodes.insert(Node {
            kind,
            meta: Meta {
                mode: mode & !S_IFMT | kind_bits,
                uid: maker.uid,
                gid: maker.gid,
                links: 0,
                device,
                inode,
                atime: maker.now,
                ctime: maker.now,
                mtime: maker.now,
            },
            uses: 0,
        })
    }

    /// Makes an empty directory that is nowhere yet.
    pub(crate) fn make_directory(&mut self, mode: u32, device: u32, maker: Maker) -> NodeId {
        let id = self.make(Kind::Directory(Directory::empty()), mode, device, maker);
        if let Kind::Directory(directory) = &mut self.node_mut(id).kind {
            directory.parent = id;
        }
        id
    }

    /// One use more.
    pub(crate) fn hold(&mut self, id: NodeId) {
        self.node_mut(id).uses += 1;
    }

    /// One use less.
    pub(crate) fn release(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        node.uses = node.uses.checked_sub(1).expect("uses are counted");
        self.drop_if_unused(id);
    }

    /// Frees a node that has neither name nor use.
    pub(crate) fn drop_if_unused(&mut self, id: NodeId) {
        let node = self.node(id);
        if node.uses > 0 || node.meta.links > 0 {
            return;
        }
        let Some(node) = self.nodes.remove(id) else {
            return;
        };
        if let Ok(number) = u32::try_from(node.meta.inode)
            && self.known.get(&number) == Some(&id)
        {
            self.known.remove(&number);
        }
        if let Kind::File(data) = node.kind {
            for page in data.pages.into_values() {
                self.frames.release(page.frame);
            }
        }
    }

    /// A directory with its names read.
    pub(crate) fn directory(&mut self, id: NodeId) -> Result<&mut Directory> {
        if let Kind::Directory(directory) = &mut self.node_mut(id).kind
            && let Some(number) = directory.unread.take()
        {
            let image = self.image.as_ref().ok_or(Errno::EIO)?;
            let inode = image.inode(number).ok_or(Errno::EIO)?;
            let names = image.directory(&inode);
            if let Kind::Directory(directory) = &mut self.node_mut(id).kind {
                let entries = names
                    .into_iter()
                    .map(|(name, number)| (name, Entry::Image(number)));
                directory.entries.extend(entries);
            }
        }
        match &mut self.node_mut(id).kind {
            Kind::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// What a name in a directory stands for; never [`Entry::Image`].
    pub(crate) fn entry(&mut self, directory: NodeId, name: &[u8]) -> Result<Entry> {
        let entry = self.directory(directory)?.entries.get(name);
        let entry = *entry.ok_or(Errno::ENOENT)?;
        let Entry::Image(number) = entry else {
            return Ok(entry);
        };
        let id = self.image_node(number)?;
        if let Kind::Directory(found) = &mut self.node_mut(id).kind {
            found.parent = directory;
        }
        let entry = Entry::Node(id);
        self.directory(directory)?
            .entries
            .insert(name.into(), entry);
        Ok(entry)
    }

    /// A named pipe's bytes are gone: nobody has it open.
    pub(crate) fn forget_pipe(&mut self, id: NodeId, pipe: u32) {
        if let Some(node) = self.nodes.get_mut(id)
            && let Kind::Fifo(slot) = &mut node.kind
            && *slot == Some(pipe)
        {
            *slot = None;
        }
    }

    /// A directory that a node has a name in, and the name. A search of all.
    pub(crate) fn find_name(&self, id: NodeId) -> Option<(NodeId, Box<[u8]>)> {
        self.nodes.iter().find_map(|(directory, node)| {
            let Kind::Directory(names) = &node.kind else {
                return None;
            };
            let mut entries = names.entries.iter();
            let hit = entries.find(|(_, entry)| **entry == Entry::Node(id))?;
            Some((directory, hit.0.clone()))
        })
    }

    /// The frame that holds a page of a file, to be read; `None` for a hole.
    pub(crate) fn page(&self, id: NodeId, page: u64) -> Option<Frame> {
        let Kind::File(data) = &self.node(id).kind else {
            return None;
        };
        if let Some(own) = data.pages.get(&page) {
            return Some(own.frame);
        }
        if page >= data.lower_pages {
            return None;
        }
        self.frames.image_frame(data.lower.find(page)?)
    }

    /// The frame that holds a page of a file, and will when it is written.
    pub(crate) fn own_page(&mut self, id: NodeId, page: u64, what: Use) -> Result<Frame> {
        if let Some(Kind::File(data)) = self.nodes.get_mut(id).map(|node| &mut node.kind)
            && let Some(own) = data.pages.get_mut(&page)
        {
            if self.frames.is_lost(own.frame) {
                return Err(Errno::EIO);
            }
            own.changed |= what == Use::Write;
            return Ok(own.frame);
        }
        let frame = match self.page(id, page) {
            Some(frame) => self.frames.alloc_copy(frame, For::Data),
            None => self.frames.alloc_zeroed(For::Data),
        };
        let frame = frame.ok_or(Errno::ENOSPC)?;
        match &mut self.node_mut(id).kind {
            Kind::File(data) => {
                let changed = what == Use::Write;
                data.pages.insert(page, Page { frame, changed });
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(frame)
    }

    /// Forgets pages that are lost, where they can be had again.
    pub(crate) fn lose(&mut self) {
        let frames = &self.frames;
        for node in self.nodes.values_mut() {
            if let Kind::File(data) = &mut node.kind {
                data.pages.retain(|_, page| {
                    let is_gone = !page.changed && frames.is_lost(page.frame);
                    if is_gone {
                        frames.release(page.frame);
                    }
                    !is_gone
                });
            }
        }
    }

    /// Reads from a file; returns how much there was. `EIO` if that is lost.
    pub(crate) fn read(&self, id: NodeId, offset: u64, into: &mut [u8]) -> Result<usize> {
        let left = self.node(id).size().saturating_sub(offset);
        let len = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = index(at % PAGE_SIZE);
            let count = (PAGE - within).min(len - done);
            let piece = &mut into[done..done + count];
            match self.page(id, at / PAGE_SIZE) {
                Some(frame) => {
                    let page = self.frames.page(frame);
                    page.read_bytes(within, piece).expect("inside the page");
                    if self.frames.is_lost(frame) {
                        break;
                    }
                }
                None => piece.fill(0),
            }
            done += count;
        }
        match done {
            0 if len > 0 => Err(Errno::EIO),
            _ => Ok(done),
        }
    }

    /// Writes to a file; returns how much of it had room.
    pub(crate) fn write(&mut self, id: NodeId, offset: u64, from: &[u8]) -> Result<usize> {
        let room = MOST_BYTES.saturating_sub(offset);
        let len = from.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if len == 0 && !from.is_empty() {
            return Err(Errno::EFBIG);
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = index(at % PAGE_SIZE);
            let count = (PAGE - within).min(len - done);
            let frame = match self.own_page(id, at / PAGE_SIZE, Use::Write) {
                Ok(frame) => frame,
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            };
            self.frames
                .page(frame)
                .write_bytes(within, &from[done..done + count])
                .expect("inside the page");
            if self.frames.is_lost(frame) {
                break;
            }
            done += count;
        }
        if done == 0 && len > 0 {
            return Err(Errno::EIO);
        }
        if let Kind::File(data) = &mut self.node_mut(id).kind {
            data.size = data.size.max(offset + done as u64);
        }
        Ok(done)
    }

    /// Gives a file another size.
    pub(crate) fn truncate(&mut self, id: NodeId, size: u64) -> Result<()> {
        if size > MOST_BYTES {
            return Err(Errno::EFBIG);
        }
        let within = index(size % PAGE_SIZE);
        if within > 0 && size < self.node(id).size() && self.page(id, size / PAGE_SIZE).is_some() {
            // What lies behind the end reads as zeros if the file grows.
            let frame = self.own_page(id, size / PAGE_SIZE, Use::Write)?;
            let zeros = [0; PAGE];
            self.frames
                .page(frame)
                .write_bytes(within, &zeros[within..])
                .expect("inside the page");
        }
        let Kind::File(data) = &mut self.node_mut(id).kind else {
            return Err(Errno::EINVAL);
        };
        let first = size.div_ceil(PAGE_SIZE);
        data.size = size;
        data.lower_pages = data.lower_pages.min(first);
        let cut: Vec<_> = data.pages.split_off(&first).into_values().collect();
        for page in cut {
            self.frames.release(page.frame);
        }
        Ok(())
    }
}
