//! Changes of names: make, link, remove, rename.
//!
//! Each is a function of the name space, its arguments and the time given.

use alloc::boxed::Box;

use linux_raw_sys::general::S_ISVTX;

use super::node::{Entry, Kind, Maker, NodeId, Objects};
use super::walk::{Slot, Viewer, may, right};
use super::{PROC_DEVICE, Place};
use crate::errno::{Errno, Result};

/// Longest target of a symbolic link, and longest name.
const NAME_MAX: usize = 255;

/// What a name must be for it to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remove {
    File,
    Directory,
}

/// The directory of a slot, if `viewer` may change names in it.
fn writable(objects: &Objects, slot: &Slot, viewer: &Viewer) -> Result<NodeId> {
    let Place::Node(directory) = slot.directory else {
        return Err(Errno::EPERM);
    };
    match may(objects, directory, viewer, right::WRITE | right::EXECUTE) {
        true => Ok(directory),
        false => Err(Errno::EACCES),
    }
}

fn is_sticky(objects: &Objects, directory: NodeId, node: NodeId, viewer: &Viewer) -> bool {
    let folder = &objects.node(directory).meta;
    let owner = objects.node(node).meta.uid;
    folder.mode & S_ISVTX != 0 && viewer.uid != 0 && ![folder.uid, owner].contains(&viewer.uid)
}

fn touch(objects: &mut Objects, directory: NodeId, now: u64) {
    let meta = &mut objects.node_mut(directory).meta;
    (meta.mtime, meta.ctime) = (now, now);
}

/// Gives a new node the free name in `slot`.
pub(crate) fn create(
    objects: &mut Objects,
    slot: &Slot,
    viewer: &Viewer,
    kind: Kind,
    mode: u32,
    maker: Maker,
) -> Result<NodeId> {
    if slot.found.is_some() {
        return Err(Errno::EEXIST);
    }
    if slot.name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let directory = writable(objects, slot, viewer)?;
    if objects.node(directory).meta.links == 0 {
        return Err(Errno::ENOENT);
    }
    let device = objects.node(directory).meta.device;
    let id = match kind {
        Kind::Directory(_) => objects.make_directory(mode, device, maker),
        kind => objects.make(kind, mode, device, maker),
    };
    attach(objects, directory, &slot.name, id, maker.now)?;
    Ok(id)
}

/// Enters a node under a name, whatever was there.
pub(crate) fn attach(
    objects: &mut Objects,
    directory: NodeId,
    name: &[u8],
    id: NodeId,
    now: u64,
) -> Result<()> {
    let entries = &mut objects.directory(directory)?.entries;
    entries.insert(name.into(), Entry::Node(id));
    let node = objects.node_mut(id);
    node.meta.links += 1;
    if let Kind::Directory(inner) = &mut node.kind {
        inner.parent = directory;
        // By its own `.`, and the one above by its `..`.
        node.meta.links += 1;
        objects.node_mut(directory).meta.links += 1;
    }
    touch(objects, directory, now);
    Ok(())
}

/// Takes a node's name away.
fn detach(
    objects: &mut Objects,
    directory: NodeId,
    name: &[u8],
    id: NodeId,
    now: u64,
) -> Result<()> {
    objects.directory(directory)?.entries.remove(name);
    let node = objects.node_mut(id);
    node.meta.ctime = now;
    if node.is_directory() {
        node.meta.links = node.meta.links.saturating_sub(2);
        let above = &mut objects.node_mut(directory).meta;
        above.links = above.links.saturating_sub(1);
    } else {
        node.meta.links = node.meta.links.saturating_sub(1);
    }
    touch(objects, directory, now);
    objects.drop_if_unused(id);
    Ok(())
}

/// Whether a directory's entry stands for another file system.
fn is_mount(objects: &Objects, directory: NodeId, id: NodeId) -> bool {
    objects.node(directory).meta.device != objects.node(id).meta.device
}

/// Removes a name.
pub(crate) fn remove(
    objects: &mut Objects,
    slot: &Slot,
    viewer: &Viewer,
    what: Remove,
    now: u64,
) -> Result<()> {
    let id = match slot.found.ok_or(Errno::ENOENT)? {
        Place::Node(id) => id,
        Place::Proc(_) => return Err(Errno::EPERM),
    };
    if slot.name.is_empty() {
        return Err(match what {
            Remove::Directory => Errno::EBUSY,
            Remove::File => Errno::EISDIR,
        });
    }
    let directory = writable(objects, slot, viewer)?;
    if is_sticky(objects, directory, id, viewer) {
        return Err(Errno::EPERM);
    }
    match (what, objects.node(id).is_directory()) {
        (Remove::File, true) => return Err(Errno::EISDIR),
        (Remove::Directory, false) => return Err(Errno::ENOTDIR),
        (Remove::Directory, true) => {
            if is_mount(objects, directory, id) {
                return Err(Errno::EBUSY);
            }
            if !objects.directory(id)?.entries.is_empty() {
                return Err(Errno::ENOTEMPTY);
            }
        }
        (Remove::File, false) => {}
    }
    detach(objects, directory, &slot.name, id, now)
}

/// Gives a node a second name.
pub(crate) fn link(
    objects: &mut Objects,
    id: NodeId,
    slot: &Slot,
    viewer: &Viewer,
    now: u64,
) -> Result<()> {
    if slot.found.is_some() {
        return Err(Errno::EEXIST);
    }
    let directory = writable(objects, slot, viewer)?;
    if objects.node(id).is_directory() {
        return Err(Errno::EPERM);
    }
    if is_mount(objects, directory, id) {
        return Err(Errno::EXDEV);
    }
    objects.node_mut(id).meta.ctime = now;
    attach(objects, directory, &slot.name, id, now)
}

/// Moves a name.
pub(crate) fn rename(
    objects: &mut Objects,
    from: &Slot,
    to: &Slot,
    viewer: &Viewer,
    replace: bool,
    now: u64,
) -> Result<()> {
    let Some(Place::Node(id)) = from.found else {
        return Err(from.found.map_or(Errno::ENOENT, |_| Errno::EPERM));
    };
    if from.name.is_empty() || to.name.is_empty() {
        return Err(Errno::EBUSY);
    }
    let source = writable(objects, from, viewer)?;
    let target = writable(objects, to, viewer)?;
    if is_mount(objects, source, id)
        || objects.node(source).meta.device != objects.node(target).meta.device
        || objects.node(target).meta.device == PROC_DEVICE
    {
        return Err(Errno::EXDEV);
    }
    if is_sticky(objects, source, id, viewer) {
        return Err(Errno::EPERM);
    }
    let is_directory = objects.node(id).is_directory();
    if !is_directory && (from.must_be_directory || to.must_be_directory) {
        return Err(Errno::ENOTDIR);
    }
    if is_directory && is_below(objects, target, id)? {
        return Err(Errno::EINVAL);
    }
    match to.found {
        Some(_) if !replace => return Err(Errno::EEXIST),
        Some(Place::Proc(_)) => return Err(Errno::EBUSY),
        Some(Place::Node(old)) if old == id => return Ok(()),
        Some(Place::Node(old)) => {
            match (is_directory, objects.node(old).is_directory()) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                (true, true) if !objects.directory(old)?.entries.is_empty() => {
                    return Err(Errno::ENOTEMPTY);
                }
                _ => {}
            }
            detach(objects, target, &to.name, old, now)?;
        }
        None => {}
    }
    // Held, so that it outlives the moment without a name.
    objects.hold(id);
    let moved = detach(objects, source, &from.name, id, now)
        .and_then(|()| attach(objects, target, &to.name, id, now));
    objects.release(id);
    moved
}

/// Whether `place` is `directory` or lies below it.
fn is_below(objects: &mut Objects, mut place: NodeId, directory: NodeId) -> Result<bool> {
    loop {
        if place == directory {
            return Ok(true);
        }
        let above = objects.directory(place)?.parent;
        if above == place {
            return Ok(false);
        }
        place = above;
    }
}

/// Makes a symbolic link.
pub(crate) fn symlink(
    objects: &mut Objects,
    target: &[u8],
    slot: &Slot,
    viewer: &Viewer,
    maker: Maker,
) -> Result<NodeId> {
    let kind = Kind::Link(Box::from(target));
    create(objects, slot, viewer, kind, 0o777, maker)
}
