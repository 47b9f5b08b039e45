//! The host's side of a byte-stream device.

use vmm_shared::ring::ByteRing;

/// Where a device sends bytes.
pub trait ByteSink {
    /// Bytes that [`send`](Self::send) would take now.
    fn space(&self) -> usize;

    /// Appends as much of `bytes` as fits; returns how much.
    fn send(&mut self, bytes: &[u8]) -> usize;

    /// Asks the host for a doorbell once there is space; false if there is
    /// some already.
    fn await_space(&mut self) -> bool;

    /// Whether the host waits for what was sent and needs a doorbell.
    fn owes_doorbell(&mut self) -> bool;
}

/// Where a device's bytes come from.
pub trait ByteSource {
    /// Bytes that [`receive`](Self::receive) would give now.
    fn waiting(&self) -> usize;

    /// Takes as much as is there, up to `into.len()`; returns how much.
    fn receive(&mut self, into: &mut [u8]) -> usize;

    /// Asks the host for a doorbell once there are bytes; false if there are
    /// some already.
    fn await_bytes(&mut self) -> bool;

    /// Whether the host waits for the space that was made and needs a
    /// doorbell.
    fn owes_doorbell(&mut self) -> bool;
}

impl ByteSink for ByteRing {
    fn space(&self) -> usize {
        Self::space(self)
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        self.write(bytes)
    }

    fn await_space(&mut self) -> bool {
        self.arm_producer()
    }

    fn owes_doorbell(&mut self) -> bool {
        self.must_wake_consumer()
    }
}

impl ByteSource for ByteRing {
    fn waiting(&self) -> usize {
        self.len()
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        self.read(into)
    }

    fn await_bytes(&mut self) -> bool {
        self.arm_consumer()
    }

    fn owes_doorbell(&mut self) -> bool {
        self.must_wake_producer()
    }
}

/// Both directions of one device.
#[derive(Debug)]
pub struct Pipes<O, I> {
    /// From the guest to the host.
    pub to_host: O,
    /// From the host to the guest.
    pub from_host: I,
}
