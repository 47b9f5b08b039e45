//! A hostile driver behind the agent's console.
//!
//! The driver may write any register and any ring at any time. Nothing may
//! panic or go on for ever, and after a reset the device works again.
#![no_main]

use hypervisor::devices::Width;
use hypervisor::devices::pipe::{ByteSink, ByteSource, Pipes};
use hypervisor::devices::virtio::console::{Console, Effects};
use hypervisor::devices::virtio::mmio::TransportEffect;
use hypervisor::mem::GuestMemory;
use hypervisor::mem::sparse::SparseMemory;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

/// Few bytes, so that random addresses hit something.
const MEMORY: u64 = 0x1_0000;
const QUEUES: u64 = 6;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Writes a register.
    Register {
        offset: u16,
        value: u32,
    },
    /// Reads a register or configuration bytes.
    Look {
        offset: u16,
        bytes: u8,
    },
    /// Sets up the device and all its queues as a good driver does.
    Probe {
        event_index: bool,
    },
    /// Writes a descriptor of a queue.
    Descriptor {
        queue: u8,
        index: u8,
        address: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Makes descriptor chains available.
    Available {
        queue: u8,
        heads: [u8; 3],
    },
    /// Writes anywhere.
    Poke {
        address: u16,
        value: u64,
    },
    /// Says something on the control queue.
    Control {
        port: u8,
        event: u8,
        value: u8,
    },
    Kick {
        queue: u8,
    },
    HostSends {
        len: u16,
    },
    HostReads {
        len: u16,
    },
}

/// Only counts: what the bytes are does not matter here.
struct Pipe {
    fill: usize,
}

impl Pipe {
    const CAPACITY: usize = 1 << 16;
}

impl ByteSink for Pipe {
    fn space(&self) -> usize {
        Self::CAPACITY - self.fill
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.space());
        self.fill += count;
        count
    }

    fn await_space(&mut self) -> bool {
        self.space() == 0
    }

    fn owes_doorbell(&mut self) -> bool {
        true
    }
}

impl ByteSource for Pipe {
    fn waiting(&self) -> usize {
        self.fill
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.fill);
        self.fill -= count;
        count
    }

    fn await_bytes(&mut self) -> bool {
        self.fill == 0
    }

    fn owes_doorbell(&mut self) -> bool {
        true
    }
}

struct Machine {
    memory: SparseMemory,
    console: Console,
    pipes: Pipes<Pipe, Pipe>,
    available: [u16; QUEUES as usize],
}

/// Where a queue's rings start; they take less than 2 KiB.
fn rings(queue: u64) -> u64 {
    0x1000 + 0x800 * queue
}

impl Machine {
    fn write(&mut self, offset: u64, value: u64) {
        match self.console.write(offset, Width::Dword, value) {
            TransportEffect::Kick(queue) => {
                self.console.kick(queue, &self.memory, &mut self.pipes);
            }
            TransportEffect::Reset => self.available = [0; QUEUES as usize],
            TransportEffect::None | TransportEffect::QueueStopped(_) => {}
        }
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        // A step may aim past the end; then nothing is written.
        let _ = self.memory.write_bytes(Gpa(address), bytes);
    }

    fn probe(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        self.write(0x24, 1);
        self.write(0x20, features >> 32);
        self.write(0x24, 0);
        self.write(0x20, features & 0xffff_ffff);
        self.write(0x70, 0xb);
        for queue in 0..QUEUES {
            self.poke(rings(queue), &[0; 0x800]);
            self.write(0x30, queue);
            self.write(0x38, 16);
            self.write(0x80, rings(queue));
            self.write(0x90, rings(queue) + 0x200);
            self.write(0xa0, rings(queue) + 0x400);
            self.write(0x44, 1);
        }
        self.write(0x70, 0xf);
        assert_eq!(self.console.read(0x70, Width::Dword), 0xf);
    }

    fn descriptor(&self, queue: u64, index: u64, fields: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = fields;
        let at = rings(queue) + 16 * index;
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &len.to_le_bytes());
        self.poke(at + 12, &flags.to_le_bytes());
        self.poke(at + 14, &next.to_le_bytes());
    }

    fn offer(&mut self, queue: u64, heads: &[u8]) {
        let index = &mut self.available[usize::try_from(queue).expect("small")];
        let ring = rings(queue) + 0x200;
        let mut slots = Vec::new();
        for head in heads {
            slots.push((u64::from(*index % 16), u16::from(*head)));
            *index = index.wrapping_add(1);
        }
        let index = *index;
        for (slot, head) in slots {
            self.poke(ring + 4 + 2 * slot, &head.to_le_bytes());
        }
        self.poke(ring + 2, &index.to_le_bytes());
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Register { offset, value } => self.write(offset.into(), value.into()),
            Step::Look { offset, bytes } => {
                let width = Width::from_bytes(bytes.into()).unwrap_or(Width::Dword);
                let value = self.console.read(offset.into(), width);
                assert_eq!(value & !width.mask(), 0);
            }
            Step::Probe { event_index } => {
                self.probe(1 << 32 | 1 << 1 | u64::from(event_index) << 29);
            }
            Step::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let fields = (address.into(), len.into(), (flags & 7).into(), next.into());
                self.descriptor(u64::from(queue) % QUEUES, (index % 16).into(), fields);
            }
            Step::Available { queue, heads } => {
                self.offer(u64::from(queue) % QUEUES, &heads);
            }
            Step::Poke { address, value } => self.poke(address.into(), &value.to_le_bytes()),
            Step::Control { port, event, value } => {
                let mut message = u32::from(port).to_le_bytes().to_vec();
                message.extend(u16::from(event).to_le_bytes());
                message.extend(u16::from(value).to_le_bytes());
                self.poke(0x8000, &message);
                self.descriptor(3, 0, (0x8000, 8, 0, 0));
                self.offer(3, &[0]);
                self.write(0x50, 3);
            }
            Step::Kick { queue } => self.write(0x50, (queue % 8).into()),
            Step::HostSends { len } => {
                self.pipes.from_host.send(&vec![0; len.into()]);
                self.poll();
            }
            Step::HostReads { len } => {
                self.pipes.to_host.receive(&mut vec![0; len.into()]);
                self.poll();
            }
        }
    }

    fn poll(&mut self) {
        let effects = self.console.poll(&self.memory, &mut self.pipes);
        if effects.contains(Effects::BROKEN) {
            assert!(self.console.error().is_some());
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut machine = Machine {
        memory: SparseMemory::new(MEMORY),
        console: Console::new(),
        pipes: Pipes {
            to_host: Pipe { fill: 0 },
            from_host: Pipe { fill: 0 },
        },
        available: [0; QUEUES as usize],
    };
    machine.probe(1 << 32 | 1 << 1);
    for step in steps {
        machine.step(step);
    }
    machine.probe(1 << 32 | 1 << 1);
    assert!(machine.console.error().is_none());
});
