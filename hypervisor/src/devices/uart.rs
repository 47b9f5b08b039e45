//! A 16550A serial port.
//!
//! The wire is infinitely fast: a byte written to the transmitter is on its
//! way at once, so the transmitter is always empty and only its interrupt has
//! state. Received bytes wait in the 16-byte FIFO; the character time-out is
//! over at once as well. Register numbers and the interrupt priorities are
//! those of the PC16550D data sheet, section 8.

use alloc::collections::VecDeque;

use bitflags::bitflags;

use super::IrqLevel;

/// Bytes in the receive FIFO.
const FIFO_LEN: usize = 16;

bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct InterruptEnable: u8 {
        const RECEIVED = 1 << 0;
        const TRANSMIT_EMPTY = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    /// FIFO control register (write only).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct FifoControl: u8 {
        const ENABLE = 1 << 0;
        const CLEAR_RECEIVER = 1 << 1;
    }

    /// Line control register; the framing bits are kept but mean nothing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct LineControl: u8 {
        const DIVISOR_ACCESS = 1 << 7;
        const _ = !0;
    }

    /// Modem control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct ModemControl: u8 {
        const TERMINAL_READY = 1 << 0;
        const REQUEST_TO_SEND = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOPBACK = 1 << 4;
    }

    /// Line status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct LineStatus: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const TRANSMIT_HOLDING_EMPTY = 1 << 5;
        const TRANSMITTER_EMPTY = 1 << 6;
    }

    /// Modem status register: the low half says what changed since its last
    /// read, the high half what is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct ModemStatus: u8 {
        const CLEAR_TO_SEND_CHANGED = 1 << 0;
        const DATA_SET_READY_CHANGED = 1 << 1;
        const RING_ENDED = 1 << 2;
        const CARRIER_CHANGED = 1 << 3;
        const CLEAR_TO_SEND = 1 << 4;
        const DATA_SET_READY = 1 << 5;
        const RING = 1 << 6;
        const CARRIER = 1 << 7;
    }
}

/// What the interrupt identification register names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Interrupt {
    ModemStatus = 0x0,
    None = 0x1,
    TransmitEmpty = 0x2,
    Received = 0x4,
    LineStatus = 0x6,
    ReceiveTimeout = 0xc,
}

/// What a register write does beyond the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum UartEffect {
    /// Nothing.
    None,
    /// This byte goes out on the line.
    Transmit(u8),
}

/// The state of one serial port.
///
/// After any call, [`irq_level`](Self::irq_level) says what its interrupt
/// line shows now.
#[derive(Clone, Debug)]
pub struct Uart {
    interrupt_enable: InterruptEnable,
    line_control: LineControl,
    modem_control: ModemControl,
    modem_status: ModemStatus,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    trigger: usize,
    received: VecDeque<u8>,
    overrun: bool,
    transmit_empty_pending: bool,
}

impl Default for Uart {
    fn default() -> Self {
        Self::new()
    }
}

impl Uart {
    /// A port after reset, with a peer that is always ready.
    #[must_use]
    pub fn new() -> Self {
        Self {
            interrupt_enable: InterruptEnable::empty(),
            line_control: LineControl::empty(),
            modem_control: ModemControl::empty(),
            modem_status: lines(ModemControl::empty()),
            scratch: 0,
            // 9600 baud from the usual 1.8432 MHz.
            divisor: [12, 0],
            fifo_enabled: false,
            trigger: 1,
            received: VecDeque::with_capacity(FIFO_LEN),
            overrun: false,
            transmit_empty_pending: false,
        }
    }

    /// Reads the register at `offset`, which counts modulo 8.
    pub fn read(&mut self, offset: u8) -> u8 {
        match (offset & 7, self.divisor_access()) {
            (0, true) => self.divisor[0],
            (1, true) => self.divisor[1],
            (0, false) => self.received.pop_front().unwrap_or(0),
            (1, false) => self.interrupt_enable.bits(),
            (2, _) => self.read_identification(),
            (3, _) => self.line_control.bits(),
            (4, _) => self.modem_control.bits(),
            (5, _) => {
                let status = self.line_status();
                self.overrun = false;
                status.bits()
            }
            (6, _) => {
                let status = self.modem_status;
                self.modem_status &= !changes();
                status.bits()
            }
            _ => self.scratch,
        }
    }

    /// Writes the register at `offset`, which counts modulo 8.
    pub fn write(&mut self, offset: u8, value: u8) -> UartEffect {
        match (offset & 7, self.divisor_access()) {
            (0, true) => self.divisor[0] = value,
            (1, true) => self.divisor[1] = value,
            (0, false) => return self.transmit(value),
            (1, false) => {
                let new = InterruptEnable::from_bits_truncate(value);
                let enabled = new - self.interrupt_enable;
                // The transmitter is always empty, so enabling its interrupt
                // raises it, also when an earlier read had taken it back.
                if enabled.contains(InterruptEnable::TRANSMIT_EMPTY) {
                    self.transmit_empty_pending = true;
                }
                self.interrupt_enable = new;
            }
            (2, _) => self.write_fifo_control(value),
            (3, _) => self.line_control = LineControl::from_bits_retain(value),
            (4, _) => {
                self.modem_control = ModemControl::from_bits_truncate(value);
                self.update_modem_status();
            }
            // The status registers are read-only outside factory tests.
            (5 | 6, _) => {}
            _ => self.scratch = value,
        }
        UartEffect::None
    }

    /// Takes bytes from the line into the FIFO; returns how many. The rest
    /// should be offered again when the guest has read.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.receive_space());
        self.received.extend(&bytes[..count]);
        count
    }

    /// Bytes that [`receive`](Self::receive) would take now: none in loopback
    /// mode, which cuts the receiver off from the line.
    #[must_use]
    pub fn receive_space(&self) -> usize {
        if self.modem_control.contains(ModemControl::LOOPBACK) {
            0
        } else {
            self.fifo_space()
        }
    }

    /// The level of the interrupt line.
    ///
    /// On a PC the line passes a gate that OUT2 opens; loopback mode cuts
    /// OUT2 off from its pin and so closes the gate.
    #[must_use]
    pub fn irq_level(&self) -> IrqLevel {
        let gate = ModemControl::OUT2 | ModemControl::LOOPBACK;
        let gate_open = self.modem_control & gate == ModemControl::OUT2;
        if gate_open && self.interrupt() != Interrupt::None {
            IrqLevel::Asserted
        } else {
            IrqLevel::Deasserted
        }
    }

    fn divisor_access(&self) -> bool {
        self.line_control.contains(LineControl::DIVISOR_ACCESS)
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled { FIFO_LEN } else { 1 }
    }

    fn fifo_space(&self) -> usize {
        self.capacity().saturating_sub(self.received.len())
    }

    fn line_status(&self) -> LineStatus {
        let mut status = LineStatus::TRANSMIT_HOLDING_EMPTY | LineStatus::TRANSMITTER_EMPTY;
        status.set(LineStatus::DATA_READY, !self.received.is_empty());
        status.set(LineStatus::OVERRUN, self.overrun);
        status
    }

    /// The pending interrupt of the highest priority.
    fn interrupt(&self) -> Interrupt {
        let enabled = self.interrupt_enable;
        if enabled.contains(InterruptEnable::LINE_STATUS) && self.overrun {
            Interrupt::LineStatus
        } else if enabled.contains(InterruptEnable::RECEIVED) && !self.received.is_empty() {
            if !self.fifo_enabled || self.received.len() >= self.trigger {
                Interrupt::Received
            } else {
                Interrupt::ReceiveTimeout
            }
        } else if enabled.contains(InterruptEnable::TRANSMIT_EMPTY) && self.transmit_empty_pending {
            Interrupt::TransmitEmpty
        } else if enabled.contains(InterruptEnable::MODEM_STATUS)
            && self.modem_status.intersects(changes())
        {
            Interrupt::ModemStatus
        } else {
            Interrupt::None
        }
    }

    fn read_identification(&mut self) -> u8 {
        let interrupt = self.interrupt();
        if interrupt == Interrupt::TransmitEmpty {
            self.transmit_empty_pending = false;
        }
        // Both bits together: FIFOs are on and, unlike the 16550's, usable.
        let fifo = if self.fifo_enabled { 0xc0 } else { 0 };
        interrupt as u8 | fifo
    }

    fn write_fifo_control(&mut self, value: u8) {
        let control = FifoControl::from_bits_truncate(value);
        let enable = control.contains(FifoControl::ENABLE);
        if enable != self.fifo_enabled || control.contains(FifoControl::CLEAR_RECEIVER) {
            self.received.clear();
        }
        self.fifo_enabled = enable;
        self.trigger = match value >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
    }

    fn transmit(&mut self, byte: u8) -> UartEffect {
        self.transmit_empty_pending = true;
        if !self.modem_control.contains(ModemControl::LOOPBACK) {
            return UartEffect::Transmit(byte);
        }
        if self.fifo_space() > 0 {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
            if !self.fifo_enabled {
                // Without a FIFO the newest byte wins.
                self.received.clear();
                self.received.push_back(byte);
            }
        }
        UartEffect::None
    }

    fn update_modem_status(&mut self) {
        let old = self.modem_status;
        let new = lines(self.modem_control);
        let flipped = (old ^ new) - changes();
        let mut status = (old & changes()) | new;
        for (line, change) in [
            (
                ModemStatus::CLEAR_TO_SEND,
                ModemStatus::CLEAR_TO_SEND_CHANGED,
            ),
            (
                ModemStatus::DATA_SET_READY,
                ModemStatus::DATA_SET_READY_CHANGED,
            ),
            (ModemStatus::CARRIER, ModemStatus::CARRIER_CHANGED),
        ] {
            if flipped.contains(line) {
                status |= change;
            }
        }
        if old.contains(ModemStatus::RING) && !new.contains(ModemStatus::RING) {
            status |= ModemStatus::RING_ENDED;
        }
        self.modem_status = status;
    }
}

/// The change bits of the modem status.
fn changes() -> ModemStatus {
    ModemStatus::CLEAR_TO_SEND_CHANGED
        | ModemStatus::DATA_SET_READY_CHANGED
        | ModemStatus::RING_ENDED
        | ModemStatus::CARRIER_CHANGED
}

/// The modem lines: a peer that is always there, or, in loopback mode, our
/// own outputs.
fn lines(control: ModemControl) -> ModemStatus {
    if !control.contains(ModemControl::LOOPBACK) {
        return ModemStatus::CLEAR_TO_SEND | ModemStatus::DATA_SET_READY | ModemStatus::CARRIER;
    }
    let mut status = ModemStatus::empty();
    for (output, input) in [
        (ModemControl::REQUEST_TO_SEND, ModemStatus::CLEAR_TO_SEND),
        (ModemControl::TERMINAL_READY, ModemStatus::DATA_SET_READY),
        (ModemControl::OUT1, ModemStatus::RING),
        (ModemControl::OUT2, ModemStatus::CARRIER),
    ] {
        status.set(input, control.contains(output));
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    const RBR: u8 = 0;
    const THR: u8 = 0;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const FCR: u8 = 2;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const LSR: u8 = 5;
    const MSR: u8 = 6;
    const SCR: u8 = 7;
    const OUT2: u8 = 0x08;
    const LOOPBACK: u8 = 0x10;

    /// A port with its FIFO on and its interrupt gate open.
    fn running() -> Uart {
        let mut uart = Uart::new();
        set(&mut uart, FCR, 0x01);
        set(&mut uart, MCR, OUT2);
        uart
    }

    /// A write that must not transmit.
    fn set(uart: &mut Uart, offset: u8, value: u8) {
        assert_eq!(uart.write(offset, value), UartEffect::None);
    }

    #[test]
    fn written_bytes_go_out_and_the_transmitter_stays_empty() {
        let mut uart = running();
        assert_eq!(uart.write(THR, b'v'), UartEffect::Transmit(b'v'));
        assert_eq!(uart.read(LSR), 0x60);
        assert_eq!(uart.write(THR, 0), UartEffect::Transmit(0));
    }

    #[test]
    fn interrupt_enable_has_four_bits_as_the_existence_test_wants() {
        let mut uart = Uart::new();
        set(&mut uart, IER, 0);
        assert_eq!(uart.read(IER), 0);
        set(&mut uart, IER, 0xff);
        assert_eq!(uart.read(IER), 0x0f);
    }

    #[test]
    fn loopback_shows_the_outputs_as_modem_lines() {
        let mut uart = Uart::new();
        assert_eq!(uart.read(MSR), 0xb0);
        set(&mut uart, MCR, LOOPBACK | 0x0a);
        assert_eq!(uart.read(MSR) & 0xf0, 0x90);
        set(&mut uart, MCR, LOOPBACK | 0x05);
        assert_eq!(uart.read(MSR) & 0xf0, 0x60);
        // Every line has changed; the ring line's rise does not count.
        set(&mut uart, MCR, LOOPBACK | 0x0a);
        assert_eq!(uart.read(MSR), 0x9f);
        assert_eq!(uart.read(MSR), 0x90, "a read clears the changes");
    }

    /// The steps by which Linux's driver tells a 16550A from its relatives.
    #[test]
    fn detection_finds_a_16550a_and_none_of_its_relatives() {
        let mut uart = Uart::new();
        set(&mut uart, LCR, 0xbf);
        set(&mut uart, FCR, 0);
        set(&mut uart, LCR, 0);
        set(&mut uart, FCR, 0x01);
        assert_eq!(uart.read(IIR) >> 6, 3, "16550A or better");
        for lcr in [0x80, 0xbf] {
            set(&mut uart, LCR, lcr);
            assert_ne!(uart.read(2), 0, "no extended features register");
        }
        // A National Super I/O chip mirrors the loopback bit at offset 2.
        set(&mut uart, LCR, 0);
        set(&mut uart, MCR, LOOPBACK);
        set(&mut uart, LCR, 0xe0);
        assert_eq!(uart.read(2) & LOOPBACK, 0);
        set(&mut uart, LCR, 0);
        set(&mut uart, MCR, 0);
        // A 16750 shows bit 5 when asked for 64 bytes under DLAB.
        set(&mut uart, LCR, 0x80);
        set(&mut uart, FCR, 0x21);
        assert_eq!(uart.read(IIR) >> 5, 6);
    }

    #[test]
    fn the_fifo_is_measured_as_16_bytes_in_loopback() {
        let mut uart = Uart::new();
        set(&mut uart, FCR, 0x07);
        set(&mut uart, MCR, LOOPBACK);
        for byte in 0..=255 {
            set(&mut uart, THR, byte);
        }
        assert_eq!(uart.read(LSR) & 0x03, 0x03, "data and an overrun");
        let mut count = 0;
        while uart.read(LSR) & 1 != 0 {
            assert_eq!(uart.read(RBR), count);
            count += 1;
        }
        assert_eq!(count, 16);
    }

    #[test]
    fn enabling_the_transmit_interrupt_raises_it_each_time() {
        let mut uart = running();
        for _ in 0..2 {
            set(&mut uart, IER, 0x02);
            assert_eq!(uart.irq_level(), IrqLevel::Asserted);
            assert_eq!(uart.read(IIR), 0xc2);
            assert_eq!(uart.irq_level(), IrqLevel::Deasserted, "the read acks it");
            assert_eq!(uart.read(IIR), 0xc1);
            set(&mut uart, IER, 0);
        }
    }

    #[test]
    fn each_transmitted_byte_raises_the_transmit_interrupt_again() {
        let mut uart = running();
        set(&mut uart, IER, 0x02);
        uart.read(IIR);
        assert_eq!(uart.write(THR, b'a'), UartEffect::Transmit(b'a'));
        assert_eq!(uart.irq_level(), IrqLevel::Asserted);
        set(&mut uart, IER, 0);
        assert_eq!(uart.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn a_read_of_the_identification_keeps_a_hidden_transmit_interrupt() {
        let mut uart = running();
        set(&mut uart, IER, 0x03);
        assert_eq!(uart.receive(b"x"), 1);
        assert_eq!(uart.read(IIR), 0xc4);
        assert_eq!(uart.read(RBR), b'x');
        assert_eq!(uart.read(IIR), 0xc2);
    }

    #[test]
    fn out2_gates_the_line_but_not_the_identification() {
        let mut uart = running();
        set(&mut uart, IER, 0x02);
        set(&mut uart, MCR, 0);
        assert_eq!(uart.irq_level(), IrqLevel::Deasserted);
        set(&mut uart, MCR, OUT2 | LOOPBACK);
        assert_eq!(uart.irq_level(), IrqLevel::Deasserted);
        set(&mut uart, MCR, OUT2);
        assert_eq!(uart.irq_level(), IrqLevel::Asserted);
    }

    #[test]
    fn reception_takes_a_fifo_full_and_interrupts_until_read() {
        let mut uart = running();
        set(&mut uart, FCR, 0x81);
        set(&mut uart, IER, 0x01);
        let bytes: Vec<u8> = (0..20).collect();
        assert_eq!(uart.receive(&bytes), 16);
        assert_eq!(uart.receive(&bytes[16..]), 0);
        for byte in 0..16 {
            assert_eq!(uart.irq_level(), IrqLevel::Asserted);
            // At 8 bytes the trigger, below it the time-out.
            let expected = if byte <= 8 { 0xc4 } else { 0xcc };
            assert_eq!(uart.read(IIR), expected, "before byte {byte}");
            assert_eq!(uart.read(RBR), byte);
        }
        assert_eq!(uart.irq_level(), IrqLevel::Deasserted);
        assert_eq!(uart.read(LSR), 0x60);
        assert_eq!(uart.read(RBR), 0, "an empty FIFO reads as zero");
    }

    #[test]
    fn without_fifo_one_byte_waits() {
        let mut uart = Uart::new();
        assert_eq!(uart.receive(b"ab"), 1);
        assert_eq!(uart.read(IIR), 0x01);
        assert_eq!(uart.read(RBR), b'a');
        assert_eq!(uart.receive(b"b"), 1);
    }

    #[test]
    fn loopback_takes_nothing_from_the_line() {
        let mut uart = running();
        set(&mut uart, MCR, OUT2 | LOOPBACK);
        assert_eq!((uart.receive_space(), uart.receive(b"a")), (0, 0));
        set(&mut uart, MCR, OUT2);
        assert_eq!((uart.receive_space(), uart.receive(b"a")), (16, 1));
    }

    #[test]
    fn clearing_or_toggling_the_fifo_drops_its_bytes() {
        let mut uart = running();
        for control in [0x03, 0x00, 0x01] {
            assert!(uart.receive(b"a") > 0);
            set(&mut uart, FCR, control);
            assert_eq!(uart.read(LSR) & 1, 0);
        }
    }

    #[test]
    fn divisor_and_scratch_keep_what_is_written() {
        let mut uart = Uart::new();
        set(&mut uart, LCR, 0x83);
        set(&mut uart, 0, 0x34);
        set(&mut uart, 1, 0x12);
        assert_eq!((uart.read(0), uart.read(1)), (0x34, 0x12));
        set(&mut uart, LCR, 0x03);
        assert_eq!((uart.read(0), uart.read(1)), (0, 0));
        set(&mut uart, SCR, 0xa5);
        assert_eq!(uart.read(SCR), 0xa5);
        assert_eq!(uart.read(LCR), 0x03);
    }

    #[test]
    fn modem_status_changes_interrupt_until_read() {
        let mut uart = running();
        set(&mut uart, IER, 0x08);
        set(&mut uart, MCR, OUT2 | LOOPBACK);
        set(&mut uart, MCR, OUT2);
        assert_eq!(uart.irq_level(), IrqLevel::Asserted);
        assert_eq!(uart.read(IIR), 0xc0);
        uart.read(MSR);
        assert_eq!(uart.irq_level(), IrqLevel::Deasserted);
    }
}
