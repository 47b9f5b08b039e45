//! Going on without nodes that are lost.
//!
//! The kernel's memory is that of one node, without which there is no VM.
//! Every other may be lost at any time. What was there is taken in as lost by
//! the first processor that comes into the kernel afterwards:
//!
//! | on the node | then |
//! | --- | --- |
//! | a thread that ran there | ends, as if killed; with the last one its process |
//! | a thread that was queued there or waits | goes on elsewhere, wherever it was allowed to run |
//! | a page of a program's | `SIGBUS` for who touches it, `EFAULT` for calls |
//! | a page of a file's | `EIO` for calls, `SIGBUS` for mappings, if it was changed; else it comes anew |
//! | a futex that a thread waits for | it is woken, and finds that |
//! | page tables and replicas of the node's own | nobody else's concern |
//!
//! A processor that is lost *in the kernel* leaves its state half-changed:
//! that is the end of the VM (see [`crate::arch`]), as is a node that is lost
//! in part, because processors or memory had been moved.

use alloc::format;
use alloc::vec::Vec;

use linux_raw_sys::general::{SIGBUS, SIGKILL, SIGSEGV};

use crate::kernel::Kernel;
use crate::mem::PAGE;
use crate::process::Ending;
use crate::process::life::INIT;
use crate::sched::CpuSet;
use crate::wait::Tid;

impl Kernel {
    /// Whether there are losses that have not been taken in.
    pub(crate) fn has_lost(&self) -> bool {
        self.objects.frames.places.losses.has_news()
    }

    /// Where a thread may run. Process 1, without which there is no VM, stays
    /// where the kernel is.
    pub(crate) fn may_run(&self, tid: Tid) -> CpuSet {
        let Some(thread) = self.threads.get(&tid) else {
            return CpuSet::NONE;
        };
        match thread.pid {
            INIT => self.scheduler.kept(),
            _ => thread.allowed,
        }
    }

    /// The signal for a thread whose memory at an address the kernel could not
    /// use: whether that is lost.
    pub(crate) fn memory_signal(&mut self, tid: Tid, address: u64) -> u8 {
        let space = self.memory_of(tid);
        let is_lost = space.is_some_and(|(_, space)| space.has_lost(address));
        let signal = if is_lost { SIGBUS } else { SIGSEGV };
        u8::try_from(signal).expect("a small number")
    }

    /// Takes in what has been lost, if anything has. The translations that
    /// others have of it go before any program runs (see
    /// [`Kernel::run_next`]).
    pub(crate) fn take_losses_in(&mut self) {
        if !self.has_lost() {
            return;
        }
        // The last one in may have been of such a node.
        let here = self.machine.cpu();
        self.objects.frames.enter(self.scheduler.node(here));
        let (nodes, frames) = self.objects.frames.lose();
        if nodes.is_empty() {
            return;
        }
        let (mut running, mut queued) = (Vec::new(), Vec::new());
        let is_lost = |cpu: &usize| nodes.contains(&(self.scheduler.node(*cpu) as usize));
        let cpus: Vec<_> = self.scheduler.all().iter().filter(is_lost).collect();
        for cpu in &cpus {
            self.machine.lose(*cpu);
            let (current, ready) = self.scheduler.lose(*cpu);
            running.extend(current);
            queued.extend(ready);
        }
        for space in self.spaces.values_mut() {
            space.lose();
        }
        self.objects.lose();
        self.write_online();
        let left = self.scheduler.all();
        for thread in self.threads.values_mut() {
            if thread.allowed.and(left) == CpuSet::NONE {
                thread.allowed = CpuSet::ALL;
            }
        }
        self.wake_from_lost();
        let killed = Ending::Signal(u8::try_from(SIGKILL).expect("a small number"));
        // The processes of some may have ended.
        running.retain(|tid| self.threads.contains_key(tid));
        for tid in &running {
            self.end_thread(*tid, killed);
        }
        queued.retain(|tid| self.threads.contains_key(tid));
        for tid in queued {
            self.make_ready(tid);
        }
        let (threads, mib) = (running.len(), (frames * PAGE) >> 20);
        self.say(&format!(
            "lost nodes {nodes:?}: processors {cpus:?}, {threads} threads, {mib} MiB\n"
        ));
    }
}

#[cfg(test)]
mod tests {
    use core::ops::Range;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use linux_raw_sys::general::S_IFREG;
    use vmm_shared::addr::{NodeId, PAGE_SIZE, VcpuId};

    use crate::errno::Errno;
    use crate::fs::node::{FileData, Kind, Maker, Objects, Use};
    use crate::kernel::RESERVED_FRAMES;
    use crate::mem::frames::For;
    use crate::mem::frames::testing::frames_that_lose;
    use crate::mem::losses::testing::sources;
    use crate::mem::regions::testing::zeros;
    use crate::mem::regions::{Access, Prot};
    use crate::mem::space::{Fault, Flush, Space};

    const EACH: usize = RESERVED_FRAMES + 2048;
    const AT: u64 = 0x4000_0000;
    const RW: Prot = Prot::READ.union(Prot::WRITE);

    /// Node 1's memory.
    fn next(at: u64) -> Option<Range<u64>> {
        let len = EACH as u64 * PAGE_SIZE;
        (at < 2 * len).then_some(len..2 * len)
    }

    fn write(space: &mut Space, objects: &mut Objects, page: u64) {
        let bytes = space.write(objects, AT + page * PAGE_SIZE, b"bytes");
        bytes.expect("mapped");
    }

    fn read(space: &mut Space, objects: &mut Objects, page: u64) -> Result<[u8; 5], Errno> {
        let mut bytes = [0; 5];
        space.read(objects, AT + page * PAGE_SIZE, &mut bytes)?;
        Ok(bytes)
    }

    /// More changes than the log holds. The first hundred take nothing away.
    fn change_often(space: &mut Space, objects: &mut Objects) {
        let size = space.size();
        for round in 0..10 {
            let mut map = |_| space.map(objects, None, false, PAGE_SIZE, zeros(RW));
            let mapped: Vec<_> = (0..100).map(&mut map).collect();
            for at in mapped {
                let at = at.expect("room");
                space.unmap(objects, at, PAGE_SIZE).expect("legal");
            }
            assert_eq!(space.size(), size, "round {round}");
        }
    }

    /// Pages 0 and 2 of a process on node 0, 1 and 3 on node 1; with or
    /// without a log.
    fn loses_what_was_there(spreads: bool) {
        let sources = sources(next);
        let mut objects = Objects::new(frames_that_lose(2, EACH, Some(sources)));
        let model = objects.frames.alloc_zeroed(For::Data).expect("some");
        let free = objects.frames.available();
        let mut space = Space::new(&objects.frames, model, For::Data).expect("memory");
        let mapped = space.map(&mut objects, Some(AT), true, 8 * PAGE_SIZE, zeros(RW));
        assert_eq!(mapped, Ok(AT));
        let pages = space.pages().clone();
        let roots = [0, 1].map(|node| pages.root(node, spreads));
        assert_eq!(roots[0] != roots[1], spreads);
        let file = Kind::File(FileData::default());
        let maker = Maker {
            uid: 0,
            gid: 0,
            now: 0,
        };
        let file = objects.make(file, S_IFREG, 1, maker);
        for page in 0..4 {
            let node = u32::from(page % 2 == 1);
            objects.frames.enter(node);
            let node = node as usize;
            let frame = pages.fault(node, AT + page * PAGE_SIZE, Access::Write);
            // Tables come from the kernel's memory, under its lock.
            assert_eq!(frame.is_some(), page > 0 || spreads || node == 0);
            write(&mut space, &mut objects, page);
            let written = objects.write(file, page * PAGE_SIZE, b"bytes");
            assert_eq!(written, Ok(5));
        }
        objects.write(file, 8 * PAGE_SIZE, b"bytes").expect("room");
        for page in [5, 7] {
            let seen = objects.own_page(file, page, Use::Read);
            assert!(objects.frames.is_exclusive(seen.expect("room")));
        }
        objects.frames.enter(0);
        let mut child = space.fork(&mut objects, model).expect("memory");

        // A processor there falls asleep in a fault, and is put out.
        let ((asleep, sleeps), (wake, wakes)) = (channel(), channel::<()>());
        let theirs = pages.clone();
        let sleeper = std::thread::spawn(move || {
            theirs.sleep_inside(1, || {
                asleep.send(()).expect("somebody waits");
                // Or the test has failed.
                let _ = wakes.recv();
            });
        });
        sleeps.recv().expect("it is there");
        let noted = std::thread::spawn(move || {
            // Others wait for it by then.
            std::thread::sleep(Duration::from_millis(10));
            sources.record.note(NodeId(1), core::iter::once(VcpuId(1)));
        });
        change_often(&mut space, &mut objects);
        noted.join().expect("no panic");
        // Though nobody has been told.
        assert_eq!(read(&mut space, &mut objects, 0), Ok(*b"bytes"));
        assert_eq!(
            pages.fault(1, AT, Access::Read),
            None,
            "it is no node any more"
        );
        assert_eq!(read(&mut space, &mut objects, 1), Err(Errno::EFAULT));
        let (nodes, frames) = objects.frames.lose();
        assert_eq!((&*nodes, frames), (&[1][..], EACH));
        for space in [&mut space, &mut child] {
            space.flush = Flush::None;
            space.lose();
            assert_eq!(space.flush, Flush::All);
            for page in [1, 3] {
                assert_eq!(pages.fault(0, AT + page * PAGE_SIZE, Access::Read), None);
                assert!(space.has_lost(AT + page * PAGE_SIZE + 7) && !space.has_lost(AT));
                assert_eq!(read(space, &mut objects, page), Err(Errno::EFAULT));
                for access in [Access::Read, Access::Write] {
                    let fault = space.fault(&mut objects, AT + page * PAGE_SIZE, access);
                    assert_eq!(fault, Err(Fault::Lost));
                }
            }
        }
        // What is changed about it brings it back only if that is new.
        let protected = space.protect(&mut objects, AT, 4 * PAGE_SIZE, RW);
        assert_eq!(protected, Ok(()));
        assert_eq!(read(&mut space, &mut objects, 3), Err(Errno::EFAULT));
        space.discard(AT + PAGE_SIZE, AT + 2 * PAGE_SIZE);
        assert_eq!(read(&mut space, &mut objects, 1), Ok([0; 5]));
        assert_eq!(read(&mut child, &mut objects, 2), Ok(*b"bytes"));

        let mut bytes = [0; 5];
        for page in [0, 2] {
            assert_eq!(objects.read(file, page * PAGE_SIZE, &mut bytes), Ok(5));
            assert_eq!(&bytes, b"bytes");
        }
        // A hole that somebody has only looked at is one again.
        objects.lose();
        for page in [5, 7] {
            assert_eq!(objects.read(file, page * PAGE_SIZE, &mut bytes), Ok(5));
            assert_eq!(bytes, [0; 5]);
        }
        for page in [1, 3] {
            let at = page * PAGE_SIZE;
            assert_eq!(objects.read(file, at, &mut bytes), Err(Errno::EIO));
            assert_eq!(objects.write(file, at, b"new"), Err(Errno::EIO));
        }
        // A new file in its place, and many changes, wait for nobody.
        objects.truncate(file, 0).expect("shorter");
        assert_eq!(objects.write(file, PAGE_SIZE, b"new"), Ok(3));
        objects.truncate(file, 0).expect("shorter");
        change_often(&mut space, &mut objects);
        wake.send(()).expect("it waits");
        sleeper.join().expect("no panic");
        space.free(&mut objects);
        child.free(&mut objects);
        drop(pages);
        objects.frames.settle();
        assert_eq!(objects.frames.available(), free - EACH);
    }

    #[test]
    fn a_process_of_one_node_loses_what_it_had_on_another() {
        loses_what_was_there(false);
    }

    #[test]
    fn a_process_that_spans_nodes_loses_what_it_had_on_one() {
        loses_what_was_there(true);
    }
}
