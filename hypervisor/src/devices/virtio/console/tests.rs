use std::collections::VecDeque as Fifo;

use vmm_shared::addr::Gpa;

use super::super::testing::DriverQueue;
use super::*;
use crate::mem::sparse::SparseMemory;

const WRITE: u16 = 2;
/// Where queue n's rings are: 4 KiB each from here.
const RINGS: u64 = 0x1000;
/// Where its buffers are: 512 KiB each from here.
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u32 = 4096;

/// A pipe end with a limited capacity.
struct TestPipe {
    bytes: Fifo<u8>,
    capacity: usize,
    /// Whether the device has asked for a doorbell.
    awaited: bool,
}

impl TestPipe {
    fn new(capacity: usize) -> Self {
        Self {
            bytes: Fifo::new(),
            capacity,
            awaited: false,
        }
    }
}

impl ByteSink for TestPipe {
    fn space(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.space());
        self.bytes.extend(&bytes[..count]);
        count
    }

    fn await_space(&mut self) -> bool {
        self.awaited = self.space() == 0;
        self.awaited
    }

    fn owes_doorbell(&mut self) -> bool {
        true
    }
}

impl ByteSource for TestPipe {
    fn waiting(&self) -> usize {
        self.bytes.len()
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.bytes.len());
        for (to, from) in into.iter_mut().zip(self.bytes.drain(..count)) {
            *to = from;
        }
        count
    }

    fn await_bytes(&mut self) -> bool {
        self.awaited = self.bytes.is_empty();
        self.awaited
    }

    fn owes_doorbell(&mut self) -> bool {
        true
    }
}

/// A guest's driver that behaves as Linux's does.
struct Guest {
    ram: SparseMemory,
    console: Console,
    pipes: Pipes<TestPipe, TestPipe>,
    queues: Vec<DriverQueue>,
}

impl Guest {
    /// A guest whose driver accepts these features and is set up.
    fn new(features: u64) -> Self {
        let mut guest = Self {
            ram: SparseMemory::new(0x50_0000),
            console: Console::new(),
            pipes: Pipes {
                to_host: TestPipe::new(1 << 20),
                from_host: TestPipe::new(1 << 20),
            },
            queues: Vec::new(),
        };
        guest.probe(features);
        guest
    }

    fn set(&mut self, offset: u64, value: u64) -> TransportEffect {
        self.console.write(offset, Width::Dword, value)
    }

    /// Resets the device and starts its queues.
    fn probe(&mut self, features: u64) {
        assert_eq!(self.set(0x70, 0), TransportEffect::Reset);
        let mut writes = vec![(0x70, 3), (0x24, 1), (0x20, features >> 32), (0x24, 0)];
        writes.extend([(0x20, features & 0xffff_ffff), (0x70, 0xb)]);
        self.queues.clear();
        for (index, size) in (0_u64..).zip(QUEUE_SIZES) {
            let queue = DriverQueue::new(RINGS + 0x1000 * index, size);
            let layout = queue.layout();
            writes.extend([(0x30, index), (0x38, u64::from(size))]);
            writes.extend([(0x80, layout.descriptors.0), (0x90, layout.available.0)]);
            writes.extend([(0xa0, layout.used.0), (0x44, 1)]);
            self.ram
                .write_bytes(layout.descriptors, &[0; 0x1000])
                .expect("rings are in memory");
            self.queues.push(queue);
        }
        writes.push((0x70, 0xf));
        for (offset, value) in writes {
            assert_eq!(self.set(offset, value), TransportEffect::None);
        }
        assert_eq!(self.console.read(0x70, Width::Dword), 0xf);
        for _ in 0..4 {
            self.offer_room(CONTROL_TO_GUEST);
        }
    }

    fn buffer(queue: u16, head: u16) -> u64 {
        BUFFERS + u64::from(queue - 2) * 0x8_0000 + u64::from(head) * u64::from(BUFFER_LEN)
    }

    /// Offers an empty buffer in a queue that goes to the guest.
    fn offer_room(&mut self, queue: u16) {
        let driver = &mut self.queues[usize::from(queue)];
        let head = driver.next_head();
        let at = Self::buffer(queue, head);
        driver.offer(&self.ram, &[(at, BUFFER_LEN, WRITE)]);
    }

    /// Offers bytes in a queue that comes from the guest, and kicks it.
    fn send(&mut self, queue: u16, bytes: &[u8]) -> Effects {
        let driver = &mut self.queues[usize::from(queue)];
        let at = Self::buffer(queue, driver.next_head());
        self.ram.write_bytes(Gpa(at), bytes).expect("inside");
        let len = u32::try_from(bytes.len()).expect("short");
        driver.offer(&self.ram, &[(at, len, 0)]);
        self.kick(queue)
    }

    fn kick(&mut self, queue: u16) -> Effects {
        let effect = self.set(0x50, u64::from(queue));
        assert_eq!(effect, TransportEffect::Kick(queue));
        self.console.kick(queue, &self.ram, &mut self.pipes)
    }

    fn poll(&mut self) -> Effects {
        self.console.poll(&self.ram, &mut self.pipes)
    }

    /// Takes a buffer that came back, and asks for an interrupt at the next.
    fn take(&mut self, queue: u16) -> Option<(u16, u32)> {
        let driver = &mut self.queues[usize::from(queue)];
        let taken = driver.take(&self.ram);
        driver.rearm(&self.ram);
        taken
    }

    /// Takes a filled buffer from a queue that goes to the guest and offers
    /// it again.
    fn receive(&mut self, queue: u16) -> Option<Vec<u8>> {
        let (head, len) = self.take(queue)?;
        let mut bytes = vec![0; usize::try_from(len).expect("short")];
        let at = Self::buffer(queue, head);
        self.ram.read_bytes(Gpa(at), &mut bytes).expect("inside");
        self.offer_room(queue);
        Some(bytes)
    }

    fn control(&mut self, port: u32, event: u16, value: u16) -> Effects {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let effects = self.send(CONTROL_FROM_GUEST, &message);
        let taken = self.take(CONTROL_FROM_GUEST);
        assert!(taken.is_some(), "the driver spins for it");
        effects
    }

    /// The handshake up to an agent that has the port open.
    fn open(&mut self) {
        self.control(u32::MAX, event::DEVICE_READY, 1);
        assert_eq!(
            self.receive(CONTROL_TO_GUEST).as_deref(),
            Some(&[1, 0, 0, 0, 1, 0, 1, 0][..]),
            "port 1 is added"
        );
        for _ in 0..QUEUE_SIZES[usize::from(AGENT_TO_GUEST)] {
            self.offer_room(AGENT_TO_GUEST);
        }
        self.control(1, event::PORT_READY, 1);
        let name = [&[1, 0, 0, 0, 7, 0, 1, 0][..], b"viaduct.agent"].concat();
        assert_eq!(self.receive(CONTROL_TO_GUEST), Some(name));
        assert_eq!(
            self.receive(CONTROL_TO_GUEST).as_deref(),
            Some(&[1, 0, 0, 0, 6, 0, 1, 0][..]),
            "the host's side is open"
        );
        assert_eq!(self.receive(CONTROL_TO_GUEST), None);
        assert_eq!(self.console.port(), PortState::Closed);
        self.control(1, event::PORT_OPEN, 1);
        assert_eq!(self.console.port(), PortState::Open);
        self.acknowledge();
    }

    fn acknowledge(&mut self) {
        assert_eq!(self.set(0x64, 3), TransportEffect::None);
        assert_eq!(self.console.irq_level(), IrqLevel::Deasserted);
    }
}

const FEATURES: u64 = super::super::F_VERSION_1 | F_MULTIPORT;
const WITH_EVENT_INDEX: u64 = FEATURES | super::super::F_EVENT_IDX;

fn pattern(len: usize) -> Vec<u8> {
    (0_u8..251).cycle().take(len).collect()
}

#[test]
fn the_configuration_names_two_ports() {
    let console = Console::new();
    assert_eq!(console.read(0x08, Width::Dword), 3);
    assert_eq!(console.read(0x104, Width::Dword), 2);
}

#[test]
fn the_handshake_adds_names_and_opens_the_port() {
    for features in [FEATURES, WITH_EVENT_INDEX] {
        Guest::new(features).open();
    }
}

#[test]
fn a_driver_may_reset_and_probe_again_and_again() {
    let mut guest = Guest::new(FEATURES);
    for _ in 0..3 {
        guest.open();
        guest.probe(FEATURES);
        assert_eq!(guest.console.port(), PortState::Closed);
    }
}

#[test]
fn control_answers_wait_for_buffers() {
    let mut guest = Guest::new(FEATURES);
    for _ in 0..4 {
        guest.control(u32::MAX, event::DEVICE_READY, 1);
    }
    // The fifth answer finds no buffer.
    guest.control(1, event::PORT_READY, 1);
    for _ in 0..4 {
        assert!(guest.receive(CONTROL_TO_GUEST).is_some());
    }
    assert!(guest.receive(CONTROL_TO_GUEST).is_none());
    assert!(guest.kick(CONTROL_TO_GUEST).contains(Effects::INTERRUPT));
    let name = guest.receive(CONTROL_TO_GUEST).expect("an answer");
    assert!(name.ends_with(b"viaduct.agent"));
}

#[test]
fn floods_of_control_messages_are_bounded() {
    let mut guest = Guest::new(FEATURES);
    for _ in 0..1000 {
        guest.control(u32::MAX, event::DEVICE_READY, 1);
    }
    assert!(guest.console.pending.len() <= MAX_PENDING);
}

#[test]
fn messages_that_are_short_or_unknown_are_given_back_and_ignored() {
    let mut guest = Guest::new(FEATURES);
    guest.send(CONTROL_FROM_GUEST, &[1, 0, 0]);
    for (port, event, value) in [(0, 6, 1), (7, 3, 1), (1, 99, 1), (1, 3, 0)] {
        guest.send(CONTROL_FROM_GUEST, &[]);
        guest.control(port, event, value);
    }
    assert!(guest.receive(CONTROL_TO_GUEST).is_none());
    assert_eq!(guest.console.port(), PortState::Closed);
    assert_eq!(guest.console.error(), None);
}

#[test]
fn bytes_from_the_host_wait_for_the_agent() {
    let mut guest = Guest::new(FEATURES);
    guest.pipes.from_host.send(b"early");
    assert_eq!(guest.poll(), Effects::empty());
    guest.open();
    assert_eq!(
        guest.receive(AGENT_TO_GUEST).as_deref(),
        Some(&b"early"[..])
    );
    guest.control(1, event::PORT_OPEN, 0);
    guest.pipes.from_host.send(b"late");
    assert_eq!(guest.poll(), Effects::empty());
    assert_eq!(guest.pipes.from_host.waiting(), 4);
}

#[test]
fn many_bytes_reach_the_guest_in_order() {
    for features in [FEATURES, WITH_EVENT_INDEX] {
        let mut guest = Guest::new(features);
        guest.open();
        let sent = pattern(3_000_000);
        let mut offered = 0;
        let mut received = Vec::new();
        while received.len() < sent.len() {
            offered += guest.pipes.from_host.send(&sent[offered..]);
            let effects = guest.poll();
            assert!(effects.contains(Effects::DOORBELL));
            while let Some(bytes) = guest.receive(AGENT_TO_GUEST) {
                assert!(!bytes.is_empty());
                received.extend(bytes);
            }
        }
        assert_eq!(received, sent);
    }
}

#[test]
fn a_guest_without_buffers_is_served_when_it_offers_some() {
    let mut guest = Guest::new(WITH_EVENT_INDEX);
    guest.open();
    let sent = pattern(128 * 4096 + 5);
    guest.pipes.from_host.send(&sent);
    while guest.poll().contains(Effects::AGAIN) {}
    assert_eq!(guest.pipes.from_host.waiting(), 5);
    let mut received = Vec::new();
    let queue = usize::from(AGENT_TO_GUEST);
    let suppression = super::super::queue::Suppression::EventIndex;
    guest.queues[queue].wants_kick(&guest.ram, suppression);
    received.extend(guest.receive(AGENT_TO_GUEST).expect("a buffer"));
    assert!(guest.queues[queue].wants_kick(&guest.ram, suppression));
    guest.kick(AGENT_TO_GUEST);
    while let Some(bytes) = guest.receive(AGENT_TO_GUEST) {
        received.extend(bytes);
    }
    assert_eq!(received, sent);
    assert!(
        !guest.queues[queue].wants_kick(&guest.ram, suppression),
        "with an empty pipe, buffers need no kick"
    );
}

#[test]
fn bytes_from_the_guest_reach_the_host_with_doorbell_and_interrupt() {
    let mut guest = Guest::new(FEATURES);
    guest.open();
    let effects = guest.send(AGENT_FROM_GUEST, b"hello");
    assert_eq!(effects, Effects::DOORBELL | Effects::INTERRUPT);
    assert_eq!(guest.console.irq_level(), IrqLevel::Asserted);
    assert_eq!(guest.pipes.to_host.bytes, b"hello");
    let taken = guest.take(AGENT_FROM_GUEST);
    assert_eq!(taken.map(|(_, len)| len), Some(0));
}

#[test]
fn a_full_pipe_holds_buffers_back_until_polled() {
    for features in [FEATURES, WITH_EVENT_INDEX] {
        let mut guest = Guest::new(features);
        guest.open();
        guest.pipes.to_host = TestPipe::new(100);
        let sent = pattern(4000);
        guest.send(AGENT_FROM_GUEST, &sent);
        guest.send(AGENT_FROM_GUEST, b"end");
        let mut received = Vec::new();
        for _ in 0..38 {
            assert_eq!(guest.take(AGENT_FROM_GUEST), None);
            assert_eq!(guest.pipes.to_host.space(), 0);
            assert!(guest.pipes.to_host.awaited);
            received.extend(guest.pipes.to_host.bytes.drain(..));
            assert!(!guest.poll().contains(Effects::INTERRUPT));
        }
        // The pipe gets full again, but the first buffer is all in it.
        received.extend(guest.pipes.to_host.bytes.drain(..));
        assert!(guest.poll().contains(Effects::INTERRUPT));
        assert!(guest.take(AGENT_FROM_GUEST).is_some());
        received.extend(guest.pipes.to_host.bytes.drain(..));
        assert!(guest.poll().contains(Effects::INTERRUPT));
        received.extend(guest.pipes.to_host.bytes.drain(..));
        assert!(guest.take(AGENT_FROM_GUEST).is_some());
        assert_eq!(received, [&sent[..], b"end"].concat());
    }
}

#[test]
fn a_huge_chain_is_worked_off_in_pieces() {
    let mut guest = Guest::new(FEATURES);
    guest.open();
    let pieces = [(BUFFERS, 0x8_0000, 0); 3];
    let driver = &mut guest.queues[usize::from(AGENT_FROM_GUEST)];
    driver.offer(&guest.ram, &pieces);
    let mut effects = guest.kick(AGENT_FROM_GUEST);
    let mut total = 0;
    loop {
        let moved = guest.pipes.to_host.bytes.drain(..).count();
        assert!(moved <= BYTES_PER_CALL);
        total += moved;
        if !effects.contains(Effects::AGAIN) {
            break;
        }
        effects = guest.poll();
    }
    assert_eq!(total, 3 * 0x8_0000);
    assert!(effects.contains(Effects::INTERRUPT));
}

#[test]
fn a_broken_queue_stops_the_device_until_reset() {
    let mut guest = Guest::new(FEATURES);
    guest.open();
    guest.queues[usize::from(AGENT_FROM_GUEST)].set_available_index(&guest.ram, 0x8000);
    let effects = guest.kick(AGENT_FROM_GUEST);
    assert_eq!(effects, Effects::INTERRUPT | Effects::BROKEN);
    assert!(matches!(
        guest.console.error(),
        Some(QueueError::AvailableIndex { .. })
    ));
    assert_eq!(guest.console.read(0x70, Width::Dword), 0x4f);
    assert_eq!(guest.console.read(0x60, Width::Dword) & 2, 2);
    guest.pipes.from_host.send(b"x");
    assert_eq!(guest.poll(), Effects::empty());
    assert_eq!(guest.pipes.from_host.waiting(), 1);
    guest.probe(FEATURES);
    assert_eq!(guest.console.error(), None);
    guest.open();
}

#[test]
fn buffers_outside_memory_stop_the_device() {
    let mut guest = Guest::new(FEATURES);
    guest.open();
    let driver = &mut guest.queues[usize::from(AGENT_FROM_GUEST)];
    driver.offer(&guest.ram, &[(u64::MAX - 4, 64, 0)]);
    assert!(guest.kick(AGENT_FROM_GUEST).contains(Effects::BROKEN));
}

#[test]
fn a_reset_in_the_middle_of_a_buffer_forgets_it() {
    let mut guest = Guest::new(FEATURES);
    guest.open();
    guest.pipes.to_host = TestPipe::new(10);
    guest.send(AGENT_FROM_GUEST, &pattern(100));
    guest.probe(FEATURES);
    guest.open();
    guest.pipes.to_host = TestPipe::new(1000);
    guest.poll();
    assert_eq!(guest.pipes.to_host.bytes.len(), 0);
    guest.send(AGENT_FROM_GUEST, b"new");
    assert_eq!(guest.pipes.to_host.bytes, b"new");
}

#[test]
fn kicks_of_other_queues_or_before_the_start_do_nothing() {
    let mut guest = Guest::new(FEATURES);
    for queue in [0, 1, 6, 0xffff] {
        assert_eq!(guest.kick(queue), Effects::empty());
    }
    let mut console = Console::new();
    for queue in 0..6 {
        let effects = console.kick(queue, &guest.ram, &mut guest.pipes);
        assert_eq!(effects, Effects::empty());
    }
}
