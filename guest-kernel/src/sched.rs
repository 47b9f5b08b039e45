//! Which processor runs which thread.
//!
//! Each processor has a queue. A thread that wakes goes back to where it ran
//! last; if that runs another one meanwhile, to a processor that sleeps. What
//! the running thread has just woken stays behind it for a moment, as the
//! waker often waits next; what is still there then is handed to those that
//! sleep. A processor with nothing to do takes from the others.
//!
//! All of it is changed under the kernel's lock. No wake-up is lost: a
//! processor marks itself asleep under the lock, with interrupts off, and
//! lets them in only together with HLT; who queues something for it under the
//! lock later sees the mark and interrupts it, and that interrupt stays
//! requested until HLT lets it in.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::wait::Tid;

/// Most processors: as many as a set has bits.
pub const MAX_CPUS: usize = 64;

/// How long a thread runs while others are ready, in ns.
pub(crate) const SLICE_NS: u64 = 10_000_000;
/// How long a thread that is ready waits behind a running one while a
/// processor sleeps, in ns: longer than most wakers go on.
const SPREAD_NS: u64 = 500_000;

/// A set of processors, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSet(pub(crate) u64);

impl CpuSet {
    pub(crate) const ALL: Self = Self(u64::MAX);
    pub(crate) const NONE: Self = Self(0);

    pub(crate) fn add(&mut self, cpu: usize) {
        self.0 |= 1 << cpu;
    }

    pub(crate) fn has(self, cpu: usize) -> bool {
        cpu < MAX_CPUS && self.0 >> cpu & 1 != 0
    }

    /// Those in both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// From the lowest on.
    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        let mut left = self.0;
        core::iter::from_fn(move || {
            let cpu = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            (cpu < MAX_CPUS).then_some(cpu)
        })
    }
}

/// A thread that could run.
#[derive(Clone, Copy, Debug)]
struct Ready {
    tid: Tid,
    allowed: CpuSet,
}

/// A processor.
#[derive(Debug, Default)]
struct Cpu {
    node: u32,
    ready: VecDeque<Ready>,
    /// The thread that it runs, from when it leaves the kernel with it until
    /// the kernel has looked at why it is back.
    current: Option<Tid>,
    slice_end: u64,
    /// When it hands what is ready to others.
    spread_at: Option<u64>,
    /// When it entered the kernel, or left it: for processor times.
    since: u64,
    /// It has come up.
    online: bool,
    /// It is gone, with its node.
    lost: bool,
    asleep: bool,
    /// The event that its timer announces to all.
    announces: Option<u64>,
    /// Its timer ends the running thread's slice.
    watches: bool,
    /// An interrupt is on its way to it.
    called: bool,
}

/// All processors.
#[derive(Debug)]
pub(crate) struct Scheduler {
    cpus: Vec<Cpu>,
}

impl Scheduler {
    /// Processors by the nodes that they are on; at least one.
    pub(crate) fn new(nodes: &[u32]) -> Self {
        let cpu = |node: &u32| Cpu {
            node: *node,
            ..Cpu::default()
        };
        let mut cpus: Vec<_> = nodes.iter().take(MAX_CPUS).map(cpu).collect();
        if cpus.is_empty() {
            cpus.push(Cpu::default());
        }
        Self { cpus }
    }

    pub(crate) fn count(&self) -> usize {
        self.cpus.len()
    }

    /// All there are.
    pub(crate) fn all(&self) -> CpuSet {
        self.those(|cpu| !cpu.lost)
    }

    /// Those of the node that has the kernel's memory.
    pub(crate) fn kept(&self) -> CpuSet {
        self.those(|cpu| cpu.node == self.cpus[0].node)
    }

    fn those(&self, which: impl Fn(&Cpu) -> bool) -> CpuSet {
        let mut set = CpuSet::NONE;
        for at in (0..self.cpus.len()).filter(|at| which(&self.cpus[*at])) {
            set.add(at);
        }
        set
    }

    /// A processor is gone: the thread that it ran, and those that were
    /// queued there.
    pub(crate) fn lose(&mut self, at: usize) -> (Option<Tid>, Vec<Tid>) {
        let cpu = &mut self.cpus[at];
        let queued = cpu.ready.iter().map(|ready| ready.tid).collect();
        let ran = cpu.current;
        *cpu = Cpu {
            node: cpu.node,
            lost: true,
            ..Cpu::default()
        };
        (ran, queued)
    }

    pub(crate) fn node(&self, cpu: usize) -> u32 {
        self.cpus[cpu].node
    }

    /// Threads that run or could.
    pub(crate) fn running(&self) -> usize {
        let of = |cpu: &Cpu| cpu.ready.len() + usize::from(cpu.current.is_some());
        self.cpus.iter().map(of).sum()
    }

    /// A processor has entered the kernel.
    pub(crate) fn enter(&mut self, cpu: usize) {
        let cpu = &mut self.cpus[cpu];
        cpu.online = true;
        cpu.asleep = false;
        cpu.called = false;
        cpu.watches = false;
        cpu.announces = None;
    }

    /// A processor is about to sleep.
    pub(crate) fn sleep(&mut self, cpu: usize) {
        self.cpus[cpu].asleep = true;
    }

    pub(crate) fn current(&self, cpu: usize) -> Option<Tid> {
        self.cpus[cpu].current
    }

    pub(crate) fn set_current(&mut self, cpu: usize, tid: Option<Tid>) {
        self.cpus[cpu].current = tid;
    }

    /// Whether a processor runs a thread: it goes on with it unless told
    /// otherwise.
    pub(crate) fn runs(&self, tid: Tid) -> bool {
        self.cpus.iter().any(|cpu| cpu.current == Some(tid))
    }

    /// The time that has passed for a processor since the last call.
    pub(crate) fn spend(&mut self, cpu: usize, now: u64) -> u64 {
        let since = core::mem::replace(&mut self.cpus[cpu].since, now);
        // Clocks of two nodes may differ by a little.
        now.saturating_sub(since)
    }

    /// The processor for a thread that last ran on `last`, as seen on `here`.
    fn choose(&self, allowed: CpuSet, last: usize, here: usize) -> usize {
        let is_free = |cpu: usize| {
            let cpu = &self.cpus[cpu];
            cpu.online && cpu.asleep && cpu.ready.is_empty()
        };
        let may = |cpu: &usize| allowed.has(*cpu) && !self.cpus[*cpu].lost;
        let near = self.cpus.get(last).map(|cpu| cpu.node);
        let far = |cpu: usize| Some(self.cpus[cpu].node) != near;
        if last < self.cpus.len() && may(&last) && (last == here || is_free(last)) {
            return last;
        }
        let free = (0..self.cpus.len()).filter(may).filter(|cpu| is_free(*cpu));
        if let Some(cpu) = free.min_by_key(|cpu| far(*cpu)) {
            return cpu;
        }
        if last < self.cpus.len() && may(&last) {
            return last;
        }
        let load = |cpu: &usize| {
            let it = &self.cpus[*cpu];
            let busy = usize::from(it.current.is_some());
            (!it.online, it.ready.len() + busy, far(*cpu))
        };
        (0..self.cpus.len())
            .filter(may)
            .min_by_key(load)
            .unwrap_or(here)
    }

    /// Queues a thread that last ran on `last`; `here` is the caller's.
    pub(crate) fn make_ready(&mut self, tid: Tid, allowed: CpuSet, last: usize, here: usize) {
        let cpu = self.choose(allowed, last, here);
        self.cpus[cpu].ready.push_back(Ready { tid, allowed });
    }

    /// Takes a thread off its queue; whether it was on one.
    pub(crate) fn forget(&mut self, tid: Tid) -> bool {
        let mut found = false;
        for cpu in &mut self.cpus {
            let before = cpu.ready.len();
            cpu.ready.retain(|ready| ready.tid != tid);
            found |= cpu.ready.len() < before;
        }
        found
    }

    /// The running thread lets others go first.
    pub(crate) fn end_slice(&mut self, cpu: usize) {
        self.cpus[cpu].slice_end = 0;
    }

    /// What a processor runs next; `last` is what it ran and could go on with.
    pub(crate) fn pick(
        &mut self,
        here: usize,
        last: Option<(Tid, CpuSet)>,
        now: u64,
    ) -> Option<Tid> {
        let cpu = &mut self.cpus[here];
        if cpu.ready.is_empty() {
            cpu.spread_at = None;
        } else if cpu.spread_at.is_some_and(|at| at <= now) {
            cpu.spread_at = None;
            self.spread(here);
        }
        let cpu = &mut self.cpus[here];
        if let Some((tid, allowed)) = last {
            if now < cpu.slice_end || cpu.ready.is_empty() {
                return Some(tid);
            }
            cpu.ready.push_back(Ready { tid, allowed });
        }
        let next = cpu.ready.pop_front().or_else(|| self.steal(here))?;
        self.cpus[here].slice_end = now + SLICE_NS;
        Some(next.tid)
    }

    /// Hands what waits here to processors that sleep.
    fn spread(&mut self, here: usize) {
        let waiting = core::mem::take(&mut self.cpus[here].ready);
        for ready in waiting {
            let cpu = self.free_for(here, ready.allowed).unwrap_or(here);
            self.cpus[cpu].ready.push_back(ready);
        }
    }

    /// A processor that sleeps and may run something, the nearest first.
    fn free_for(&self, here: usize, allowed: CpuSet) -> Option<usize> {
        let free = |at: &usize| {
            let cpu = &self.cpus[*at];
            *at != here && allowed.has(*at) && cpu.online && cpu.asleep && cpu.ready.is_empty()
        };
        let far = |at: &usize| self.cpus[*at].node != self.cpus[here].node;
        (0..self.cpus.len()).filter(free).min_by_key(far)
    }

    /// Takes what waits longest behind a running thread, near ones first.
    fn steal(&mut self, here: usize) -> Option<Ready> {
        let may = |ready: &Ready| ready.allowed.has(here);
        let has = |at: &usize| {
            let cpu = &self.cpus[*at];
            *at != here && !cpu.asleep && cpu.ready.iter().any(may)
        };
        let order = |at: &usize| {
            let cpu = &self.cpus[*at];
            (
                cpu.node != self.cpus[here].node,
                core::cmp::Reverse(cpu.ready.len()),
            )
        };
        let from = (0..self.cpus.len()).filter(has).min_by_key(order)?;
        let at = self.cpus[from].ready.iter().position(may)?;
        self.cpus[from].ready.remove(at)
    }

    /// When a processor that leaves the kernel must be interrupted, in ns.
    /// `event` is the next that concerns all: who has said that it announces
    /// one as early spares the others.
    pub(crate) fn interrupt_at(
        &mut self,
        here: usize,
        now: u64,
        event: Option<u64>,
    ) -> Option<u64> {
        let announced = self.cpus.iter().filter_map(|cpu| cpu.announces).min();
        let event = event.filter(|at| announced.is_none_or(|earliest| earliest > *at));
        self.cpus[here].announces = event;
        if self.cpus[here].ready.is_empty() || self.cpus[here].asleep {
            return event;
        }
        let mut slice = self.cpus[here].slice_end;
        let could = |ready: &Ready| self.free_for(here, ready.allowed).is_some();
        let spreads = self.cpus[here].ready.iter().any(could);
        let cpu = &mut self.cpus[here];
        cpu.watches = true;
        if spreads {
            slice = slice.min(*cpu.spread_at.get_or_insert(now + SPREAD_NS));
        }
        Some(event.map_or(slice, |at| at.min(slice)))
    }

    /// Whether a processor must be interrupted to see what has changed for
    /// it; it is taken to be, from then on. `recalled` says that its thread must
    /// not simply go on.
    pub(crate) fn call(&mut self, cpu: usize, recalled: bool) -> bool {
        let it = &mut self.cpus[cpu];
        if it.called || !it.online {
            return false;
        }
        let waiting = !it.ready.is_empty();
        it.called = match it.current {
            Some(_) => waiting && !it.watches || recalled,
            None => waiting && it.asleep,
        };
        it.called
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processors that all sleep.
    fn sleeping(nodes: &[u32]) -> Scheduler {
        let mut scheduler = Scheduler::new(nodes);
        for cpu in 0..nodes.len() {
            scheduler.enter(cpu);
            scheduler.sleep(cpu);
        }
        scheduler
    }

    fn queue(scheduler: &Scheduler, cpu: usize) -> Vec<Tid> {
        scheduler.cpus[cpu]
            .ready
            .iter()
            .map(|ready| ready.tid)
            .collect()
    }

    #[test]
    fn a_thread_wakes_where_it_ran_or_near_it() {
        let mut scheduler = sleeping(&[0, 0, 1, 1]);
        scheduler.make_ready(7, CpuSet::ALL, 3, 0);
        assert_eq!(queue(&scheduler, 3), [7]);
        assert!(scheduler.call(3, false) && !scheduler.call(3, false));
        // That one is about to run it: its neighbour gets the next.
        scheduler.make_ready(8, CpuSet::ALL, 3, 0);
        assert_eq!(queue(&scheduler, 2), [8]);
        scheduler.make_ready(9, CpuSet(1 << 1), 3, 0);
        assert_eq!(queue(&scheduler, 1), [9]);
    }

    #[test]
    fn what_the_running_thread_wakes_stays_until_it_has_waited() {
        let mut scheduler = sleeping(&[0, 1]);
        scheduler.enter(0);
        scheduler.set_current(0, Some(1));
        scheduler.cpus[0].slice_end = u64::MAX;
        scheduler.make_ready(2, CpuSet::ALL, 0, 0);
        assert_eq!(queue(&scheduler, 0), [2]);
        let at = scheduler.interrupt_at(0, 1000, None);
        assert_eq!(at, Some(1000 + SPREAD_NS));
        scheduler.enter(0);
        let last = Some((1, CpuSet::ALL));
        assert_eq!(scheduler.pick(0, last, 2000), Some(1));
        assert_eq!(queue(&scheduler, 0), [2]);
        assert_eq!(scheduler.pick(0, last, 1000 + SPREAD_NS), Some(1));
        assert_eq!(queue(&scheduler, 1), [2]);
        assert!(scheduler.call(1, false));
    }

    #[test]
    fn threads_take_turns() {
        let mut scheduler = Scheduler::new(&[0]);
        scheduler.enter(0);
        scheduler.make_ready(1, CpuSet::ALL, 0, 0);
        scheduler.make_ready(2, CpuSet::ALL, 0, 0);
        assert_eq!(scheduler.pick(0, None, 0), Some(1));
        let at = scheduler.interrupt_at(0, 0, Some(SLICE_NS * 9));
        assert_eq!(at, Some(SLICE_NS));
        let last = |tid| Some((tid, CpuSet::ALL));
        assert_eq!(scheduler.pick(0, last(1), SLICE_NS - 1), Some(1));
        assert_eq!(scheduler.pick(0, last(1), SLICE_NS), Some(2));
        scheduler.end_slice(0);
        assert_eq!(scheduler.pick(0, last(2), SLICE_NS + 1), Some(1));
        assert!(scheduler.forget(2) && !scheduler.forget(2));
        assert_eq!(scheduler.pick(0, last(1), u64::MAX - SLICE_NS), Some(1));
        assert_eq!(scheduler.pick(0, None, 0), None);
    }

    #[test]
    fn who_has_nothing_takes_what_waits_elsewhere() {
        let mut scheduler = Scheduler::new(&[0, 1, 0]);
        (0..3).for_each(|cpu| scheduler.enter(cpu));
        for (tid, allowed) in [(1, CpuSet(1)), (2, CpuSet::ALL)] {
            scheduler.make_ready(tid, allowed, 0, 0);
        }
        scheduler.make_ready(3, CpuSet::ALL, 1, 1);
        assert_eq!(scheduler.pick(2, None, 0), Some(2), "the near one");
        assert_eq!(scheduler.pick(2, None, 0), Some(3));
        assert_eq!(scheduler.pick(2, None, 0), None, "it may not");
        assert_eq!(scheduler.running(), 1);
    }

    #[test]
    fn one_processor_announces_events_to_all() {
        let mut scheduler = Scheduler::new(&[0, 0]);
        (0..2).for_each(|cpu| scheduler.enter(cpu));
        assert_eq!(scheduler.interrupt_at(0, 0, Some(50)), Some(50));
        assert_eq!(scheduler.interrupt_at(1, 0, Some(50)), None);
        assert_eq!(scheduler.interrupt_at(1, 0, Some(40)), Some(40));
        scheduler.enter(1);
        assert_eq!(scheduler.interrupt_at(1, 0, Some(50)), None);
        scheduler.enter(0);
        assert_eq!(scheduler.interrupt_at(1, 0, Some(50)), Some(50));
    }

    #[test]
    fn a_running_thread_is_called_back_only_for_a_reason() {
        let mut scheduler = Scheduler::new(&[0, 0]);
        assert!(!scheduler.call(1, true), "it has not come up");
        scheduler.enter(1);
        scheduler.set_current(1, Some(5));
        assert!(scheduler.runs(5) && !scheduler.runs(6));
        assert!(!scheduler.call(1, false));
        assert!(scheduler.call(1, true));
        scheduler.enter(1);
        // Nobody ends its slice for the other.
        scheduler.make_ready(6, CpuSet(2), 1, 0);
        assert!(scheduler.call(1, false));
        scheduler.enter(1);
        assert!(scheduler.interrupt_at(1, 0, None).is_some());
        assert!(!scheduler.call(1, false));
    }
}
