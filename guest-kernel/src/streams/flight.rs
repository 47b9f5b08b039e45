//! Open files on their way between sockets.
//!
//! A socket may be sent to itself, or two to each other. When nobody has them
//! open any more, each is held by a message that nobody can receive: counting
//! uses never ends them. So whenever somebody lets go of a socket that is
//! still in use, those that nobody can reach are looked for, if any socket is
//! on its way at all.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::socket::{SocketId, Sockets};
use crate::process::files::{FileId, Object, OpenFile};
use crate::table::Table;

/// The sockets that are held by nothing but messages to such sockets; `None`
/// if no socket is on its way.
pub(crate) fn lost(sockets: &Sockets, files: &Table<OpenFile>) -> Option<Vec<SocketId>> {
    let socket = |file: FileId| match files.get(file)?.object {
        Object::Socket(id) => Some(id),
        _ => None,
    };
    let mut flying: BTreeMap<FileId, u32> = BTreeMap::new();
    for file in sockets.iter().flat_map(|(_, to)| to.files()) {
        if socket(file).is_some() {
            *flying.entry(file).or_default() += 1;
        }
    }
    if flying.is_empty() {
        return None;
    }
    // From those that somebody has open, to all that can be received there.
    let held = |(id, file): (FileId, &OpenFile)| {
        let on_its_way = flying.get(&id).copied().unwrap_or(0);
        socket(id).filter(|_| file.uses > on_its_way)
    };
    let mut next: Vec<_> = files.iter().filter_map(held).collect();
    let mut reached = BTreeSet::new();
    while let Some(id) = next.pop() {
        if reached.insert(id)
            && let Ok(at) = sockets.get(id)
        {
            next.extend(at.files().filter_map(socket));
            next.extend(&at.waiting);
        }
    }
    let all = flying.into_keys().filter_map(socket);
    Some(all.filter(|id| !reached.contains(id)).collect())
}

#[cfg(test)]
mod tests {
    use super::super::address::{Family, Kind};
    use super::super::socket::{Message, Sender, Socket};
    use super::*;

    /// Sockets, each with one descriptor, and their files.
    fn open(count: u32) -> (Sockets, Table<OpenFile>, Vec<(SocketId, FileId)>) {
        let (mut sockets, mut files) = (Sockets::default(), Table::default());
        let ids = (0..count).map(|_| {
            let socket = Socket::new(Family::Unix, Kind::Stream, Sender::default());
            let id = sockets.insert(socket);
            let mut file = OpenFile::new(Object::Socket(id), None, 0);
            file.uses = 1;
            (id, files.insert(file))
        });
        let ids = ids.collect();
        (sockets, files, ids)
    }

    fn send(sockets: &mut Sockets, files: &mut Table<OpenFile>, file: FileId, to: SocketId) {
        let mut message = Message::new(vec![0], Sender::default());
        message.files = vec![file];
        sockets.get_mut(to).expect("there").push(message);
        files.get_mut(file).expect("there").uses += 1;
    }

    fn close(files: &mut Table<OpenFile>, file: FileId) {
        files.get_mut(file).expect("there").uses -= 1;
    }

    #[test]
    fn who_holds_only_itself_is_lost() {
        let (mut sockets, mut files, ids) = open(2);
        let (me, file) = ids[0];
        assert_eq!(lost(&sockets, &files), None);
        send(&mut sockets, &mut files, file, me);
        assert_eq!(lost(&sockets, &files), Some(vec![]));
        close(&mut files, file);
        assert_eq!(lost(&sockets, &files), Some(vec![me]));
    }

    #[test]
    fn a_ring_is_lost_with_its_last_descriptor() {
        let (mut sockets, mut files, ids) = open(3);
        for at in 0..3 {
            send(&mut sockets, &mut files, ids[at].1, ids[(at + 1) % 3].0);
        }
        close(&mut files, ids[0].1);
        close(&mut files, ids[2].1);
        assert_eq!(lost(&sockets, &files), Some(vec![]));
        close(&mut files, ids[1].1);
        assert_eq!(lost(&sockets, &files), Some(vec![0, 1, 2]));
    }

    #[test]
    fn who_can_be_received_is_not_lost_nor_what_waits_there() {
        let (mut sockets, mut files, ids) = open(3);
        let [(one, first), (two, second), (listener, third)] = ids[..] else {
            unreachable!("three");
        };
        send(&mut sockets, &mut files, first, one);
        send(&mut sockets, &mut files, first, two);
        close(&mut files, first);
        // The second is open, and the first in its queue.
        assert_eq!(lost(&sockets, &files), Some(vec![]));
        // A connection that nobody has accepted holds the second.
        let end = Socket::new(Family::Unix, Kind::Stream, Sender::default());
        let end = sockets.insert(end);
        send(&mut sockets, &mut files, second, end);
        sockets
            .get_mut(listener)
            .expect("there")
            .waiting
            .push_back(end);
        close(&mut files, second);
        assert_eq!(lost(&sockets, &files), Some(vec![]));
        close(&mut files, third);
        files.remove(third);
        assert_eq!(lost(&sockets, &files), Some(vec![one, two]));
    }
}
