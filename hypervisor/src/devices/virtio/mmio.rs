//! The memory-mapped transport (specification section 4.2): registers in
//! front of a device's queues. Version 2 of the layout; no legacy interface.

use alloc::vec::Vec;

use bitflags::bitflags;
use vmm_shared::addr::Gpa;

use super::queue::{Queue, QueueLayout, Suppression};
use super::{F_EVENT_IDX, F_VERSION_1};
use crate::devices::{IrqLevel, Width};

/// Bytes of the register window, configuration space included.
pub const WINDOW_SIZE: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"VDCT");

mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub(super) const QUEUE_SELECT: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const DESCRIPTORS_LOW: u64 = 0x080;
    pub(super) const DESCRIPTORS_HIGH: u64 = 0x084;
    pub(super) const AVAILABLE_LOW: u64 = 0x090;
    pub(super) const AVAILABLE_HIGH: u64 = 0x094;
    pub(super) const USED_LOW: u64 = 0x0a0;
    pub(super) const USED_HIGH: u64 = 0x0a4;
    /// Length and address of a shared memory region, all ones for "none".
    pub(super) const SHARED_MEMORY: core::ops::Range<u64> = 0x0b0..0x0c0;
    pub(super) const CONFIG: u64 = 0x100;
}

bitflags! {
    /// Device status (specification section 2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u8 {
        const ACKNOWLEDGE = 1 << 0;
        const DRIVER = 1 << 1;
        const DRIVER_OK = 1 << 2;
        const FEATURES_OK = 1 << 3;
        const NEEDS_RESET = 1 << 6;
        const FAILED = 1 << 7;
    }

    /// Reasons of the device's interrupt.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Interrupt: u8 {
        const USED_BUFFER = 1 << 0;
        const CONFIGURATION = 1 << 1;
    }
}

/// What a register write asks of the device behind the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum TransportEffect {
    /// Nothing.
    None,
    /// The driver has put buffers into this queue.
    Kick(u16),
    /// The driver has taken this queue away.
    QueueStopped(u16),
    /// The device starts anew; the transport has done its part.
    Reset,
}

#[derive(Clone, Debug)]
struct Slot {
    max_size: u16,
    layout: QueueLayout,
    queue: Option<Queue>,
}

/// Register state of one device.
#[derive(Clone, Debug)]
pub struct Transport {
    device_id: u32,
    device_features: u64,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: Status,
    interrupt: Interrupt,
    slots: Vec<Slot>,
}

impl Transport {
    /// A device after reset. `features` are offered beside those of the
    /// transport; `max_sizes` has the largest size of each queue.
    #[must_use]
    pub fn new(device_id: u32, features: u64, max_sizes: &[u16]) -> Self {
        let slots = max_sizes
            .iter()
            .map(|max_size| Slot {
                max_size: *max_size,
                layout: QueueLayout::default(),
                queue: None,
            })
            .collect();
        Self {
            device_id,
            device_features: features | F_VERSION_1 | F_EVENT_IDX,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            status: Status::empty(),
            interrupt: Interrupt::empty(),
            slots,
        }
    }

    /// Reads a register, or the device's configuration space, whose bytes are
    /// `config`. What does not exist reads as zero.
    #[must_use]
    pub fn read(&self, offset: u64, width: Width, config: &[u8]) -> u64 {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return read_config(offset, width, config);
        }
        if width != Width::Dword {
            return 0;
        }
        let value = match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device_id,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_select {
                0 => low(self.device_features),
                1 => high(self.device_features),
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => self.selected().map_or(0, |slot| u32::from(slot.max_size)),
            register::QUEUE_READY => self
                .selected()
                .map_or(0, |slot| u32::from(slot.queue.is_some())),
            register::INTERRUPT_STATUS => u32::from(self.interrupt.bits()),
            register::STATUS => u32::from(self.status.bits()),
            offset if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            // Among them the configuration generation: it never changes.
            _ => 0,
        };
        u64::from(value)
    }

    /// Writes a register. The configuration space is read-only.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) -> TransportEffect {
        if width != Width::Dword {
            return TransportEffect::None;
        }
        let value = low(value);
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_READY => return self.set_queue_ready(value),
            register::QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value) {
                    return TransportEffect::Kick(queue);
                }
            }
            register::INTERRUPT_ACKNOWLEDGE => {
                let [bits, ..] = value.to_le_bytes();
                self.interrupt.remove(Interrupt::from_bits_truncate(bits));
            }
            register::STATUS => return self.set_status(value),
            offset => self.set_layout(offset, value),
        }
        TransportEffect::None
    }

    /// A queue that the device may work on now.
    pub fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        let broken = self.status.contains(Status::NEEDS_RESET);
        if broken || !self.status.contains(Status::DRIVER_OK) {
            return None;
        }
        self.slots.get_mut(usize::from(index))?.queue.as_mut()
    }

    /// The features that both sides have agreed on.
    #[must_use]
    pub const fn features(&self) -> u64 {
        self.driver_features & self.device_features
    }

    /// Asks for an interrupt because of used buffers.
    pub fn raise(&mut self) {
        self.interrupt.insert(Interrupt::USED_BUFFER);
    }

    /// Stops the device until the driver resets it.
    pub fn fail(&mut self) {
        if self.status.contains(Status::DRIVER_OK) {
            self.interrupt.insert(Interrupt::CONFIGURATION);
        }
        self.status.insert(Status::NEEDS_RESET);
    }

    /// Whether the device waits for a reset after an error.
    #[must_use]
    pub const fn is_broken(&self) -> bool {
        self.status.contains(Status::NEEDS_RESET)
    }

    /// The level of the device's interrupt line.
    #[must_use]
    pub const fn irq_level(&self) -> IrqLevel {
        if self.interrupt.is_empty() {
            IrqLevel::Deasserted
        } else {
            IrqLevel::Asserted
        }
    }

    fn selected(&self) -> Option<&Slot> {
        self.slots.get(usize::try_from(self.queue_select).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(self.queue_select).ok()?)
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status.contains(Status::FEATURES_OK) {
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) -> TransportEffect {
        let [bits, ..] = value.to_le_bytes();
        if bits == 0 {
            self.reset();
            return TransportEffect::Reset;
        }
        let mut status = Status::from_bits_truncate(bits) - Status::NEEDS_RESET;
        status |= self.status & Status::NEEDS_RESET;
        let negotiated = self.driver_features & !self.device_features == 0
            && self.driver_features & F_VERSION_1 != 0;
        if !negotiated {
            status.remove(Status::FEATURES_OK | Status::DRIVER_OK);
        }
        self.status = status;
        TransportEffect::None
    }

    fn set_queue_ready(&mut self, value: u32) -> TransportEffect {
        let suppression = if self.features() & F_EVENT_IDX == 0 {
            Suppression::Flags
        } else {
            Suppression::EventIndex
        };
        let Ok(index) = u16::try_from(self.queue_select) else {
            return TransportEffect::None;
        };
        let Some(slot) = self.selected_mut() else {
            return TransportEffect::None;
        };
        match (value, &slot.queue) {
            (0, Some(_)) => {
                slot.queue = None;
                return TransportEffect::QueueStopped(index);
            }
            (1, None) => match Queue::new(slot.layout, slot.max_size, suppression) {
                Ok(queue) => slot.queue = Some(queue),
                Err(error) => {
                    log::warn!("virtio: queue {index} is refused: {error:?}");
                    self.fail();
                }
            },
            _ => {}
        }
        TransportEffect::None
    }

    fn set_layout(&mut self, offset: u64, value: u32) {
        let Some(slot) = self.selected_mut() else {
            return;
        };
        if slot.queue.is_some() {
            return;
        }
        let layout = &mut slot.layout;
        let set: (fn(&mut u64, u32), &mut Gpa) = match offset {
            register::QUEUE_SIZE => {
                layout.size = value;
                return;
            }
            register::DESCRIPTORS_LOW => (set_low, &mut layout.descriptors),
            register::DESCRIPTORS_HIGH => (set_high, &mut layout.descriptors),
            register::AVAILABLE_LOW => (set_low, &mut layout.available),
            register::AVAILABLE_HIGH => (set_high, &mut layout.available),
            register::USED_LOW => (set_low, &mut layout.used),
            register::USED_HIGH => (set_high, &mut layout.used),
            _ => return,
        };
        let (set_half, gpa) = set;
        set_half(&mut gpa.0, value);
    }

    fn reset(&mut self) {
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.status = Status::empty();
        self.interrupt = Interrupt::empty();
        for slot in &mut self.slots {
            slot.layout = QueueLayout::default();
            slot.queue = None;
        }
    }
}

fn read_config(offset: u64, width: Width, config: &[u8]) -> u64 {
    let mut value = [0; 8];
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = config.get(start..).unwrap_or(&[]);
    for (to, from) in value.iter_mut().zip(bytes).take(width.bytes()) {
        *to = *from;
    }
    u64::from_le_bytes(value)
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(word: &mut u64, value: u32) {
    *word = (*word & !0xffff_ffff) | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = (*word & 0xffff_ffff) | (u64::from(value) << 32);
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

    fn transport() -> Transport {
        Transport::new(3, 1 << 1, &[16, 8])
    }

    fn get(transport: &Transport, offset: u64) -> u64 {
        transport.read(offset, Width::Dword, &CONFIG)
    }

    fn set(transport: &mut Transport, offset: u64, value: u64) {
        let effect = transport.write(offset, Width::Dword, value);
        assert_eq!(effect, TransportEffect::None);
    }

    /// Goes through the start of a driver that accepts `features`.
    fn negotiate(transport: &mut Transport, features: u64) {
        set(transport, 0x70, 1);
        set(transport, 0x70, 3);
        set(transport, 0x24, 1);
        set(transport, 0x20, features >> 32);
        set(transport, 0x24, 0);
        set(transport, 0x20, features & 0xffff_ffff);
        set(transport, 0x70, 0xb);
    }

    fn start_queue(transport: &mut Transport, index: u64) {
        set(transport, 0x30, index);
        set(transport, 0x38, 8);
        for (register, address) in [(0x80, 0x1_0000_1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            set(transport, register, address & 0xffff_ffff);
            set(transport, register + 4, address >> 32);
        }
        set(transport, 0x44, 1);
    }

    #[test]
    fn a_driver_recognises_the_device() {
        let mut transport = transport();
        assert_eq!(get(&transport, 0x00), 0x7472_6976);
        assert_eq!(get(&transport, 0x04), 2);
        assert_eq!(get(&transport, 0x08), 3);
        assert_eq!(get(&transport, 0x10), 1 << 29 | 1 << 1);
        set(&mut transport, 0x14, 1);
        assert_eq!(get(&transport, 0x10), 1, "version 1");
        set(&mut transport, 0x14, 2);
        assert_eq!(get(&transport, 0x10), 0);
        assert_eq!(get(&transport, 0xb0), 0xffff_ffff, "no shared memory");
    }

    #[test]
    fn features_are_accepted_only_if_offered_and_of_version_1() {
        let cases = [
            (F_VERSION_1, 0xb),
            (F_VERSION_1 | 1 << 1, 0xb),
            (1 << 1, 0x3),
            (F_VERSION_1 | 1 << 5, 0x3),
        ];
        for (features, status) in cases {
            let mut transport = transport();
            negotiate(&mut transport, features);
            assert_eq!(get(&transport, 0x70), status, "features {features:#x}");
        }
        let mut transport = transport();
        negotiate(&mut transport, F_VERSION_1);
        set(&mut transport, 0x20, 1 << 1);
        assert_eq!(transport.features(), F_VERSION_1, "too late");
    }

    #[test]
    fn a_queue_runs_from_driver_ok_until_it_is_stopped() {
        let mut transport = transport();
        negotiate(&mut transport, F_VERSION_1);
        set(&mut transport, 0x30, 1);
        assert_eq!((get(&transport, 0x34), get(&transport, 0x44)), (8, 0));
        start_queue(&mut transport, 1);
        assert_eq!(get(&transport, 0x44), 1);
        assert!(transport.queue(1).is_none());
        set(&mut transport, 0x70, 0xf);
        assert!(transport.queue(1).is_some());
        assert!(transport.queue(0).is_none());
        assert!(transport.queue(2).is_none());
        assert_eq!(
            transport.write(0x50, Width::Dword, 1),
            TransportEffect::Kick(1)
        );
        assert_eq!(
            transport.write(0x44, Width::Dword, 0),
            TransportEffect::QueueStopped(1)
        );
        assert_eq!(get(&transport, 0x44), 0);
        assert!(transport.queue(1).is_none());
    }

    #[test]
    fn queues_that_do_not_exist_have_no_size_and_take_no_writes() {
        let mut transport = transport();
        for index in [2, 0xffff, 0xffff_ffff] {
            set(&mut transport, 0x30, index);
            assert_eq!(get(&transport, 0x34), 0);
            set(&mut transport, 0x38, 8);
            set(&mut transport, 0x44, 1);
            assert_eq!(get(&transport, 0x44), 0);
        }
        assert!(!transport.is_broken());
        set(&mut transport, 0x50, 0x1_0000);
    }

    #[test]
    fn a_bad_layout_breaks_the_device_until_reset() {
        let mut transport = transport();
        negotiate(&mut transport, F_VERSION_1);
        set(&mut transport, 0x30, 0);
        set(&mut transport, 0x38, 7);
        set(&mut transport, 0x44, 1);
        assert_eq!(get(&transport, 0x44), 0);
        assert_eq!(get(&transport, 0x70), 0x4b);
        set(&mut transport, 0x70, 0xf);
        assert_eq!(get(&transport, 0x70), 0x4f, "only a reset clears it");
        assert_eq!(
            transport.write(0x70, Width::Dword, 0),
            TransportEffect::Reset
        );
        assert_eq!(get(&transport, 0x70), 0);
    }

    #[test]
    fn interrupts_stay_until_acknowledged_bit_by_bit() {
        let mut transport = transport();
        negotiate(&mut transport, F_VERSION_1);
        set(&mut transport, 0x70, 0xf);
        assert_eq!(transport.irq_level(), IrqLevel::Deasserted);
        transport.raise();
        transport.fail();
        assert_eq!(get(&transport, 0x60), 3);
        set(&mut transport, 0x64, 1);
        assert_eq!(get(&transport, 0x60), 2);
        assert_eq!(transport.irq_level(), IrqLevel::Asserted);
        set(&mut transport, 0x64, 2);
        assert_eq!(transport.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn reset_forgets_everything_the_driver_set() {
        let mut transport = transport();
        negotiate(&mut transport, F_VERSION_1);
        start_queue(&mut transport, 1);
        set(&mut transport, 0x70, 0xf);
        transport.raise();
        assert_eq!(
            transport.write(0x70, Width::Dword, 0),
            TransportEffect::Reset
        );
        assert_eq!(transport.irq_level(), IrqLevel::Deasserted);
        assert_eq!((transport.features(), get(&transport, 0x44)), (0, 0));
        set(&mut transport, 0x30, 1);
        assert_eq!(get(&transport, 0x44), 0);
    }

    #[test]
    fn configuration_reads_have_any_width_and_end_with_zeros() {
        let transport = transport();
        let read = |offset, width| transport.read(offset, width, &CONFIG);
        assert_eq!(read(0x100, Width::Byte), 1);
        assert_eq!(read(0x102, Width::Word), 0x0403);
        assert_eq!(read(0x104, Width::Dword), 0x0605);
        assert_eq!(read(0x100, Width::Qword), 0x0605_0403_0201);
        assert_eq!(read(0x106, Width::Dword), 0);
        assert_eq!(read(u64::MAX, Width::Qword), 0);
        assert_eq!(read(0x000, Width::Byte), 0, "registers are 32 bits wide");
    }
}
