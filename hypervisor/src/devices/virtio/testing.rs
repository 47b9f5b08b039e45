//! The driver's side of the rings, for tests.

use vmm_shared::addr::Gpa;

use super::queue::{QueueLayout, Suppression};
use crate::mem::GuestMemory;
use crate::mem::sparse::SparseMemory;

/// A descriptor's address, length and flags.
pub(in crate::devices::virtio) type Buffer = (u64, u32, u16);

/// A queue as its driver sees it.
pub(in crate::devices::virtio) struct DriverQueue {
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    kicked: u16,
}

impl DriverQueue {
    /// A queue whose rings lie in the 4 KiB from `base`.
    pub(in crate::devices::virtio) fn new(base: u64, size: u16) -> Self {
        Self {
            base,
            size,
            next_descriptor: 0,
            available: 0,
            used: 0,
            kicked: 0,
        }
    }

    pub(in crate::devices::virtio) fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: u32::from(self.size),
            descriptors: Gpa(self.base),
            available: Gpa(self.base + 0x800),
            used: Gpa(self.base + 0xa00),
        }
    }

    fn write<const N: usize>(&self, ram: &SparseMemory, offset: u64, bytes: [u8; N]) {
        ram.write_bytes(Gpa(self.base + offset), &bytes)
            .expect("rings are in memory");
    }

    fn read(&self, ram: &SparseMemory, offset: u64) -> u16 {
        ram.read(Gpa(self.base + offset))
            .expect("rings are in memory")
    }

    /// The descriptor that the next buffer will start with.
    pub(in crate::devices::virtio) fn next_head(&self) -> u16 {
        self.next_descriptor
    }

    /// Makes a buffer of these pieces available; returns its head. The caller
    /// never has more descriptors in flight than the table holds.
    pub(in crate::devices::virtio) fn offer(
        &mut self,
        ram: &SparseMemory,
        pieces: &[Buffer],
    ) -> u16 {
        let head = self.next_descriptor;
        for (position, (address, len, flags)) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            let next = (index + 1) % self.size;
            let more = u16::from(position + 1 < pieces.len());
            self.set_descriptor(ram, index, (*address, *len, flags | more), next);
            self.next_descriptor = next;
        }
        self.set_available_entry(ram, self.available % self.size, head);
        self.available = self.available.wrapping_add(1);
        self.set_available_index(ram, self.available);
        head
    }

    /// The next buffer that came back: its head and length.
    pub(in crate::devices::virtio) fn take(&mut self, ram: &SparseMemory) -> Option<(u16, u32)> {
        if self.read(ram, 0xa02) == self.used {
            return None;
        }
        let slot = self.base + 0xa04 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let [id, len]: [u32; 2] = ram.read(Gpa(slot)).expect("rings are in memory");
        Some((u16::try_from(id).expect("a descriptor number"), len))
    }

    /// Whether the device asks for a kick for what was offered since the
    /// last call.
    pub(in crate::devices::virtio) fn wants_kick(
        &mut self,
        ram: &SparseMemory,
        suppression: Suppression,
    ) -> bool {
        let (old, new) = (self.kicked, self.available);
        self.kicked = new;
        match suppression {
            Suppression::Flags => self.read(ram, 0xa00) == 0,
            Suppression::EventIndex => {
                let event = self.read(ram, 0xa04 + 8 * u64::from(self.size));
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
        }
    }

    pub(in crate::devices::virtio) fn set_descriptor(
        &self,
        ram: &SparseMemory,
        index: u16,
        buffer: Buffer,
        next: u16,
    ) {
        let at = 16 * u64::from(index);
        let (address, len, flags) = buffer;
        self.write(ram, at, address.to_le_bytes());
        self.write(ram, at + 8, len.to_le_bytes());
        self.write(ram, at + 12, flags.to_le_bytes());
        self.write(ram, at + 14, next.to_le_bytes());
    }

    pub(in crate::devices::virtio) fn set_available_entry(
        &self,
        ram: &SparseMemory,
        slot: u16,
        head: u16,
    ) {
        self.write(ram, 0x804 + 2 * u64::from(slot), head.to_le_bytes());
    }

    pub(in crate::devices::virtio) fn set_available_index(&self, ram: &SparseMemory, index: u16) {
        self.write(ram, 0x802, index.to_le_bytes());
    }

    pub(in crate::devices::virtio) fn set_available_flags(&self, ram: &SparseMemory, flags: u16) {
        self.write(ram, 0x800, flags.to_le_bytes());
    }

    /// Asks for an interrupt at the next buffer that comes back.
    pub(in crate::devices::virtio) fn rearm(&self, ram: &SparseMemory) {
        self.set_used_event(ram, self.used);
    }

    pub(in crate::devices::virtio) fn set_used_event(&self, ram: &SparseMemory, index: u16) {
        let at = 0x804 + 2 * u64::from(self.size);
        self.write(ram, at, index.to_le_bytes());
    }
}
