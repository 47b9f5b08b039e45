//! From a path to what it names.

use alloc::boxed::Box;
use alloc::vec::Vec;

use linux_raw_sys::general::{PATH_MAX, S_IFMT};

use super::Place;
use super::node::{Entry, Kind, NodeId, Objects};
use super::proc::{ProcPlace, ProcView};
use crate::errno::{Errno, Result};

/// Most links on the way.
const MOST_LINKS: u32 = 40;
/// Longest name.
const NAME_MAX: usize = 255;
/// Longest path, with its end.
pub(crate) const PATH_LIMIT: usize = PATH_MAX as usize;

/// On whose behalf names are looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Viewer {
    pub(crate) root: NodeId,
    pub(crate) directory: Place,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What is done with a link at the end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Follow,
    Keep,
}

/// A name that may or may not be there yet.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The directory that it is or would be in.
    pub(crate) directory: Place,
    /// The last component; empty for a path that ends in `.`, `..` or `/`.
    pub(crate) name: Box<[u8]>,
    pub(crate) found: Option<Place>,
    /// The path ends in a slash, so that it must be a directory.
    pub(crate) must_be_directory: bool,
}

/// Rights asked for, as in access(2).
pub(crate) mod right {
    pub(crate) const EXECUTE: u32 = 1;
    pub(crate) const WRITE: u32 = 2;
    pub(crate) const READ: u32 = 4;
}

/// Whether `viewer` has `rights` on a node.
pub(crate) fn may(objects: &Objects, id: NodeId, viewer: &Viewer, rights: u32) -> bool {
    let meta = &objects.node(id).meta;
    if viewer.uid == 0 {
        let needs_bit = rights & right::EXECUTE != 0 && !objects.node(id).is_directory();
        return !needs_bit || meta.mode & 0o111 != 0;
    }
    let shift = if viewer.uid == meta.uid {
        6
    } else if viewer.gid == meta.gid {
        3
    } else {
        0
    };
    meta.mode >> shift & rights == rights
}

/// The directory `..` of a place.
fn parent(objects: &mut Objects, proc: &ProcView<'_>, at: Place, root: NodeId) -> Result<Place> {
    match at {
        Place::Node(id) if id == root => Ok(at),
        Place::Node(id) => Ok(Place::Node(objects.directory(id)?.parent)),
        Place::Proc(place) => Ok(proc.parent(place).map_or(Place::Node(root), Place::Proc)),
    }
}

/// What a name in a place stands for.
fn lookup(
    objects: &mut Objects,
    proc: &ProcView<'_>,
    at: Place,
    name: &[u8],
    viewer: &Viewer,
) -> Result<Place> {
    match at {
        Place::Node(id) => {
            if !objects.node(id).is_directory() {
                return Err(Errno::ENOTDIR);
            }
            if !may(objects, id, viewer, right::EXECUTE) {
                return Err(Errno::EACCES);
            }
            if name.len() > NAME_MAX {
                return Err(Errno::ENAMETOOLONG);
            }
            match objects.entry(id, name)? {
                Entry::Node(id) => Ok(Place::Node(id)),
                Entry::Proc => Ok(Place::Proc(ProcPlace::Root)),
                Entry::Image(_) => Err(Errno::EIO),
            }
        }
        Place::Proc(place) => proc.lookup(place, name).map(Place::Proc),
    }
}

/// Where a link leads: text to walk on with, or the very thing.
enum Target {
    Path(Box<[u8]>),
    Place(Place),
}

fn link(objects: &Objects, proc: &ProcView<'_>, at: Place) -> Option<Target> {
    match at {
        Place::Node(id) => match &objects.node(id).kind {
            Kind::Link(target) => Some(Target::Path(target.clone())),
            _ => None,
        },
        Place::Proc(place) => {
            if let Some(there) = proc.jump(place) {
                return Some(Target::Place(there));
            }
            proc.link(place).map(|text| Target::Path(text.into()))
        }
    }
}

/// Walks a path to its last component.
///
/// # Errors
/// As system calls report them: a component before the last is missing, is no
/// directory, may not be searched, or there are too many links.
pub(crate) fn resolve(
    objects: &mut Objects,
    proc: &ProcView<'_>,
    viewer: &Viewer,
    path: &[u8],
    last: Last,
) -> Result<Slot> {
    if path.is_empty() {
        return Err(Errno::ENOENT);
    }
    let mut links = 0;
    let mut at = match path[0] {
        b'/' => Place::Node(viewer.root),
        _ => viewer.directory,
    };
    // Components still to go, the next one last.
    let mut rest: Vec<Box<[u8]>> = components(path);
    let mut must_be_directory = path.ends_with(b"/");
    loop {
        let Some(name) = rest.pop() else {
            return Ok(Slot {
                directory: at,
                name: Box::default(),
                found: Some(at),
                must_be_directory: true,
            });
        };
        if &*name == b"." {
            continue;
        }
        if &*name == b".." {
            at = parent(objects, proc, at, viewer.root)?;
            continue;
        }
        let is_last = rest.is_empty();
        let found = match lookup(objects, proc, at, &name, viewer) {
            Err(Errno::ENOENT) if is_last => None,
            found => Some(found?),
        };
        let follow = !is_last || last == Last::Follow || must_be_directory;
        if let Some(place) = found
            && follow
            && let Some(target) = link(objects, proc, place)
        {
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::ELOOP);
            }
            match target {
                Target::Place(there) if is_last => {
                    return Ok(Slot {
                        directory: at,
                        name,
                        found: Some(there),
                        must_be_directory,
                    });
                }
                Target::Place(there) => at = there,
                Target::Path(text) => {
                    if text.is_empty() {
                        return Err(Errno::ENOENT);
                    }
                    if text[0] == b'/' {
                        at = Place::Node(viewer.root);
                    }
                    must_be_directory |= is_last && text.ends_with(b"/");
                    rest.extend(components(&text));
                }
            }
            continue;
        }
        if is_last {
            if let Some(place) = found
                && must_be_directory
                && !is_directory(objects, place)
            {
                return Err(Errno::ENOTDIR);
            }
            return Ok(Slot {
                directory: at,
                name,
                found,
                must_be_directory,
            });
        }
        at = found.ok_or(Errno::ENOENT)?;
        if !is_directory(objects, at) {
            return Err(Errno::ENOTDIR);
        }
    }
}

/// Whether a place can hold names.
pub(crate) fn is_directory(objects: &Objects, place: Place) -> bool {
    match place {
        Place::Node(id) => objects.node(id).is_directory(),
        Place::Proc(place) => place.mode() & S_IFMT == linux_raw_sys::general::S_IFDIR,
    }
}

/// A path's components, the first one last.
fn components(path: &[u8]) -> Vec<Box<[u8]>> {
    path.split(|byte| *byte == b'/')
        .rev()
        .filter(|name| !name.is_empty())
        .map(Box::from)
        .collect()
}

/// The path of a directory from the root on; `None` if it has none any more.
pub(crate) fn path_of(objects: &mut Objects, root: NodeId, mut id: NodeId) -> Option<Vec<u8>> {
    let mut names = Vec::new();
    while id != root {
        let above = objects.directory(id).ok()?.parent;
        if above == id {
            return None;
        }
        let entries = &objects.directory(above).ok()?.entries;
        let mut named = entries
            .iter()
            .filter(|(_, entry)| **entry == Entry::Node(id));
        names.push(named.next()?.0.clone());
        id = above;
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    if path.is_empty() {
        path.push(b'/');
    }
    Some(path)
}
