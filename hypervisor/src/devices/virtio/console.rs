//! A virtio console (specification section 5.3) with one generic port, named
//! "viaduct.agent": a byte stream between an agent in the guest and the host.
//!
//! Port 0 is set aside for a console by Linux's driver and is never added;
//! the agent's is port 1. Bytes from the host wait until the guest has the
//! port open, because its driver throws away what comes before.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;

use bitflags::bitflags;

use super::chain::Chain;
use super::mmio::{Transport, TransportEffect};
use super::queue::{Kicks, QueueError};
use crate::devices::pipe::{ByteSink, ByteSource, Pipes};
use crate::devices::{IrqLevel, Width};
use crate::mem::GuestMemory;

/// The name of the port in the guest.
pub const AGENT_PORT_NAME: &str = "viaduct.agent";

const DEVICE_ID: u32 = 3;
const F_MULTIPORT: u64 = 1 << 1;
const AGENT_PORT: u32 = 1;

const CONTROL_TO_GUEST: u16 = 2;
const CONTROL_FROM_GUEST: u16 = 3;
const AGENT_TO_GUEST: u16 = 4;
const AGENT_FROM_GUEST: u16 = 5;
/// The driver puts a page into each entry of queues that go to the guest.
const QUEUE_SIZES: [u16; 6] = [16, 16, 32, 16, 128, 128];

/// Columns, rows, number of ports, emergency write.
const CONFIG: [u8; 12] = [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];

/// Bytes copied at once.
const SCRATCH: usize = 16 << 10;
/// Bytes moved in one direction by one call.
const BYTES_PER_CALL: usize = 256 << 10;
/// Control messages that wait for the driver's buffers; a driver that lets
/// more of them gather loses the rest.
const MAX_PENDING: usize = 8;

bitflags! {
    /// What is left to do after work on the queues.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Effects: u8 {
        /// The device asks for an interrupt.
        const INTERRUPT = 1 << 0;
        /// Bytes have moved that the host waits for.
        const DOORBELL = 1 << 1;
        /// There is more to do now than one call does: poll again soon.
        const AGAIN = 1 << 2;
        /// The driver has broken the rules; see [`Console::error`].
        const BROKEN = 1 << 3;
    }
}

/// Control events, by their number.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// A control message to the guest about the agent's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Add,
    Name,
    Open,
}

/// Whether the guest has the agent's port open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PortState {
    /// No process in the guest has it open.
    #[default]
    Closed,
    /// An agent listens.
    Open,
}

/// The buffer whose bytes are on their way to the host.
#[derive(Debug, Default)]
struct Sending {
    chain: Chain,
    /// Whether `chain` has been taken and not yet been given back.
    in_flight: bool,
}

/// The state of the device.
#[derive(Debug)]
pub struct Console {
    transport: Transport,
    pending: VecDeque<Control>,
    port: PortState,
    sending: Sending,
    chain: Chain,
    scratch: Box<[u8]>,
    error: Option<QueueError>,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// A device after reset.
    #[must_use]
    pub fn new() -> Self {
        Self {
            transport: Transport::new(DEVICE_ID, F_MULTIPORT, &QUEUE_SIZES),
            pending: VecDeque::with_capacity(MAX_PENDING),
            port: PortState::Closed,
            sending: Sending::default(),
            chain: Chain::default(),
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            error: None,
        }
    }

    /// Reads a register.
    #[must_use]
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        self.transport.read(offset, width, &CONFIG)
    }

    /// Writes a register. A kick is for [`kick`](Self::kick); of the other
    /// effects the device has already taken note.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) -> TransportEffect {
        let effect = self.transport.write(offset, width, value);
        match effect {
            TransportEffect::None | TransportEffect::Kick(_) => {}
            TransportEffect::QueueStopped(AGENT_FROM_GUEST) => self.sending.in_flight = false,
            TransportEffect::QueueStopped(_) => {}
            TransportEffect::Reset => {
                self.pending.clear();
                self.port = PortState::Closed;
                self.sending.in_flight = false;
                self.error = None;
            }
        }
        effect
    }

    /// The level of the interrupt line; look after every call.
    #[must_use]
    pub const fn irq_level(&self) -> IrqLevel {
        self.transport.irq_level()
    }

    /// Whether an agent listens.
    #[must_use]
    pub const fn port(&self) -> PortState {
        self.port
    }

    /// What the driver did wrong, until it resets the device.
    #[must_use]
    pub const fn error(&self) -> Option<QueueError> {
        self.error
    }

    /// Works on a queue that the driver has put buffers into.
    pub fn kick<O: ByteSink, I: ByteSource>(
        &mut self,
        queue: u16,
        memory: &impl GuestMemory,
        pipes: &mut Pipes<O, I>,
    ) -> Effects {
        let result = match queue {
            CONTROL_TO_GUEST => self.send_control(memory),
            CONTROL_FROM_GUEST => self.run_control(memory, &mut pipes.from_host),
            AGENT_TO_GUEST => self.feed_guest(memory, &mut pipes.from_host),
            AGENT_FROM_GUEST => self.drain_guest(memory, &mut pipes.to_host),
            _ => Ok(Effects::empty()),
        };
        self.settle(result)
    }

    /// Works on everything; for when the host's pipes have changed.
    pub fn poll<O: ByteSink, I: ByteSource>(
        &mut self,
        memory: &impl GuestMemory,
        pipes: &mut Pipes<O, I>,
    ) -> Effects {
        let control = self.run_control(memory, &mut pipes.from_host);
        let mut effects = self.settle(control);
        let drained = self.drain_guest(memory, &mut pipes.to_host);
        effects |= self.settle(drained);
        effects
    }

    /// The effects of some work, an error among them.
    fn settle(&mut self, result: Result<Effects, QueueError>) -> Effects {
        result.unwrap_or_else(|error| {
            self.error = Some(error);
            self.transport.fail();
            Effects::INTERRUPT | Effects::BROKEN
        })
    }

    /// Takes the guest's control messages and does all that they allow.
    fn run_control(
        &mut self,
        memory: &impl GuestMemory,
        from_host: &mut impl ByteSource,
    ) -> Result<Effects, QueueError> {
        let mut effects = self.take_control(memory)?;
        effects |= self.send_control(memory)?;
        effects |= self.feed_guest(memory, from_host)?;
        Ok(effects)
    }

    fn take_control(&mut self, memory: &impl GuestMemory) -> Result<Effects, QueueError> {
        let mut effects = Effects::empty();
        // Once round the ring; a driver that adds buffers as fast as they
        // are taken must not keep us here.
        for _ in 0..QUEUE_SIZES[usize::from(CONTROL_FROM_GUEST)] {
            let Some(queue) = self.transport.queue(CONTROL_FROM_GUEST) else {
                return Ok(effects);
            };
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_kicks(memory, Kicks::Wanted)?;
                if !queue.has_available(memory)? {
                    return Ok(effects);
                }
                continue;
            }
            let mut message = [0; 8];
            let len = self.chain.read(memory, &mut message)?;
            queue.push(memory, &self.chain)?;
            if queue.publish(memory)? {
                self.transport.raise();
                effects |= Effects::INTERRUPT;
            }
            if len == message.len() {
                self.handle_control(message);
            }
        }
        Ok(effects | Effects::AGAIN)
    }

    fn handle_control(&mut self, message: [u8; 8]) {
        let [a, b, c, d, e, f, g, h] = message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let event = u16::from_le_bytes([e, f]);
        let value = u16::from_le_bytes([g, h]);
        let answers: &[Control] = match (event, port, value) {
            (event::DEVICE_READY, _, 1) => &[Control::Add],
            (event::PORT_READY, AGENT_PORT, 1) => &[Control::Name, Control::Open],
            (event::PORT_OPEN, AGENT_PORT, 0) => {
                self.port = PortState::Closed;
                &[]
            }
            (event::PORT_OPEN, AGENT_PORT, _) => {
                self.port = PortState::Open;
                &[]
            }
            _ => &[],
        };
        let room = MAX_PENDING.saturating_sub(self.pending.len());
        self.pending.extend(answers.iter().take(room));
    }

    fn send_control(&mut self, memory: &impl GuestMemory) -> Result<Effects, QueueError> {
        let Some(queue) = self.transport.queue(CONTROL_TO_GUEST) else {
            return Ok(Effects::empty());
        };
        while let Some(control) = self.pending.front() {
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_kicks(memory, Kicks::Wanted)?;
                if !queue.has_available(memory)? {
                    break;
                }
                continue;
            }
            let mut message = [0; 8 + AGENT_PORT_NAME.len()];
            let len = control.encode(&mut message);
            if self.chain.write(memory, &message[..len])? < len {
                let head = self.chain.head();
                return Err(QueueError::TooSmall { head });
            }
            queue.push(memory, &self.chain)?;
            self.pending.pop_front();
        }
        let mut effects = Effects::empty();
        if queue.publish(memory)? {
            self.transport.raise();
            effects |= Effects::INTERRUPT;
        }
        Ok(effects)
    }

    /// Moves bytes from the host into the driver's buffers.
    fn feed_guest(
        &mut self,
        memory: &impl GuestMemory,
        from_host: &mut impl ByteSource,
    ) -> Result<Effects, QueueError> {
        let Some(queue) = self.transport.queue(AGENT_TO_GUEST) else {
            return Ok(Effects::empty());
        };
        let mut effects = Effects::empty();
        let mut budget = BYTES_PER_CALL;
        loop {
            let closed = self.port == PortState::Closed;
            if closed || (from_host.waiting() == 0 && from_host.await_bytes()) {
                queue.set_kicks(memory, Kicks::Unwanted)?;
                break;
            }
            if budget == 0 {
                effects |= Effects::AGAIN;
                break;
            }
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_kicks(memory, Kicks::Wanted)?;
                if !queue.has_available(memory)? {
                    break;
                }
                continue;
            }
            if self.chain.writable_left() == 0 {
                let head = self.chain.head();
                return Err(QueueError::TooSmall { head });
            }
            loop {
                let room = usize::try_from(self.chain.writable_left()).unwrap_or(usize::MAX);
                let limit = room.min(budget).min(self.scratch.len());
                let count = from_host.receive(&mut self.scratch[..limit]);
                if count == 0 {
                    break;
                }
                self.chain.write(memory, &self.scratch[..count])?;
                budget -= count;
            }
            if self.chain.written() == 0 {
                // The pipe was not as full as it said. An empty buffer would
                // look like the end of the stream to the agent.
                queue.put_back();
                break;
            }
            queue.push(memory, &self.chain)?;
        }
        if budget < BYTES_PER_CALL && from_host.owes_doorbell() {
            effects |= Effects::DOORBELL;
        }
        if queue.publish(memory)? {
            self.transport.raise();
            effects |= Effects::INTERRUPT;
        }
        Ok(effects)
    }

    /// Moves bytes from the driver's buffers to the host.
    fn drain_guest(
        &mut self,
        memory: &impl GuestMemory,
        to_host: &mut impl ByteSink,
    ) -> Result<Effects, QueueError> {
        let Some(queue) = self.transport.queue(AGENT_FROM_GUEST) else {
            return Ok(Effects::empty());
        };
        let Sending { chain, in_flight } = &mut self.sending;
        let mut effects = Effects::empty();
        let mut budget = BYTES_PER_CALL;
        // Empty buffers use no budget, so their number is bounded as well.
        let mut buffers = queue.size();
        loop {
            if !*in_flight {
                if buffers == 0 {
                    effects |= Effects::AGAIN;
                    break;
                }
                buffers -= 1;
                if !queue.pop(memory, chain)? {
                    queue.set_kicks(memory, Kicks::Wanted)?;
                    if !queue.has_available(memory)? {
                        break;
                    }
                    continue;
                }
                *in_flight = true;
            }
            if chain.readable_left() == 0 {
                queue.push(memory, chain)?;
                *in_flight = false;
                continue;
            }
            if budget == 0 {
                effects |= Effects::AGAIN;
                break;
            }
            let limit = to_host.space().min(budget).min(self.scratch.len());
            if limit == 0 {
                if to_host.await_space() {
                    // The host is behind; it says when it has caught up.
                    queue.set_kicks(memory, Kicks::Unwanted)?;
                } else {
                    effects |= Effects::AGAIN;
                }
                break;
            }
            let count = chain.read(memory, &mut self.scratch[..limit])?;
            to_host.send(&self.scratch[..count]);
            budget -= count;
        }
        if budget < BYTES_PER_CALL && to_host.owes_doorbell() {
            effects |= Effects::DOORBELL;
        }
        if queue.publish(memory)? {
            self.transport.raise();
            effects |= Effects::INTERRUPT;
        }
        Ok(effects)
    }
}

impl Control {
    /// Writes the message; returns its length.
    fn encode(self, into: &mut [u8; 8 + AGENT_PORT_NAME.len()]) -> usize {
        let (event, tail) = match self {
            Self::Add => (event::PORT_ADD, ""),
            Self::Name => (event::PORT_NAME, AGENT_PORT_NAME),
            Self::Open => (event::PORT_OPEN, ""),
        };
        into[..4].copy_from_slice(&AGENT_PORT.to_le_bytes());
        into[4..6].copy_from_slice(&event.to_le_bytes());
        into[6..8].copy_from_slice(&1_u16.to_le_bytes());
        let len = 8 + tail.len();
        into[8..len].copy_from_slice(tail.as_bytes());
        len
    }
}

#[cfg(test)]
mod tests;
