//! An 8254 interval timer, without BCD counting.
//!
//! A counter is a reload value and the time at which it was loaded; what it
//! holds now follows. Channel 0 drives interrupt 0. Modes 1 and 5 want a gate
//! that only channel 2 has and never start here otherwise; mode 4 counts as
//! mode 0. Source: Intel 8254 data sheet (231164).

use crate::devices::IrqLevel;

/// Input clock.
const HZ: u128 = 1_193_182;
const NS: u128 = 1_000_000_000;
const CONTROL: u16 = 0x43;
const GATE: u16 = 0x61;

/// Which bytes of a counter are accessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    #[default]
    Both,
}

/// How a counter goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// Once to zero; the output rises there.
    #[default]
    Once,
    /// Again and again; the output is low for the last tick.
    Rate,
    /// Again and again; the output is low for the second half.
    Square,
}

#[derive(Clone, Copy, Debug, Default)]
struct Channel {
    mode: Mode,
    mode_bits: u8,
    bytes: Bytes,
    /// 1 to 65,536; 0 until it has been loaded.
    reload: u32,
    loaded_ns: u64,
    low_written: Option<u8>,
    latch: Option<u16>,
    status: Option<u8>,
    read_high: bool,
}

impl Channel {
    fn ticks(&self, now_ns: u64) -> u64 {
        let passed = u128::from(now_ns.saturating_sub(self.loaded_ns));
        u64::try_from(passed * HZ / NS).unwrap_or(u64::MAX)
    }

    fn count(&self, now_ns: u64) -> u16 {
        let ticks = self.ticks(now_ns);
        let reload = u64::from(self.reload);
        if reload == 0 {
            return 0;
        }
        let count = match self.mode {
            Mode::Once => reload.wrapping_sub(ticks),
            Mode::Rate => reload - ticks % reload,
            Mode::Square => reload - ticks * 2 % reload,
        };
        let [low, high, ..] = count.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    fn output(&self, now_ns: u64) -> bool {
        let ticks = self.ticks(now_ns);
        let reload = u64::from(self.reload);
        match (self.mode, reload) {
            (Mode::Once, 0) => false,
            (_, 0) => true,
            (Mode::Once, _) => ticks >= reload,
            (Mode::Rate, _) => ticks % reload != reload - 1,
            (Mode::Square, _) => ticks % reload < reload.div_ceil(2),
        }
    }

    fn load(&mut self, value: u16, now_ns: u64) {
        self.reload = match value {
            0 => 1 << 16,
            value => value.into(),
        };
        self.loaded_ns = now_ns;
    }

    fn write(&mut self, byte: u8, now_ns: u64) -> bool {
        let value = match (self.bytes, self.low_written.take()) {
            (Bytes::Low, _) => u16::from(byte),
            (Bytes::High, _) => u16::from(byte) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Bytes::Both, None) => {
                self.low_written = Some(byte);
                return false;
            }
        };
        self.load(value, now_ns);
        true
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self
            .latch
            .unwrap_or_else(|| self.count(now_ns))
            .to_le_bytes();
        let is_high = match self.bytes {
            Bytes::Low => false,
            Bytes::High => true,
            Bytes::Both => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if is_high || self.bytes == Bytes::Low {
            self.latch = None;
        }
        if is_high { high } else { low }
    }

    fn latch_status(&mut self, now_ns: u64) {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        let output = u8::from(self.output(now_ns)) << 7;
        self.status = Some(output | bytes << 4 | self.mode_bits << 1);
    }
}

/// The timer.
#[derive(Clone, Debug, Default)]
pub struct Pit {
    channels: [Channel; 3],
    gate: u8,
    /// Until when channel 0's ticks have been taken.
    taken_ns: u64,
}

impl Pit {
    /// Reads a port.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            GATE => {
                let output = u8::from(self.channels[2].output(now_ns)) << 5;
                // A refresh signal that changes with every look at it.
                self.gate ^= 1 << 4;
                self.gate | output
            }
            CONTROL => 0xff,
            _ => self.channels[usize::from(port & 3)].read(now_ns),
        }
    }

    /// Writes a port. Whether channel 0's next tick may have moved.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) -> bool {
        match port {
            GATE => {
                let opens = value & !self.gate & 1 != 0;
                self.gate = self.gate & !3 | value & 3;
                if opens {
                    self.channels[2].loaded_ns = now_ns;
                }
                false
            }
            CONTROL => self.control(value, now_ns),
            _ => {
                let channel = usize::from(port & 3);
                let loaded = self.channels[channel].write(value, now_ns);
                if channel == 0 && loaded {
                    self.taken_ns = now_ns;
                }
                channel == 0 && loaded
            }
        }
    }

    fn control(&mut self, value: u8, now_ns: u64) -> bool {
        let number = usize::from(value >> 6);
        let Some(channel) = self.channels.get_mut(number) else {
            // Read-back: latches of several channels.
            for (bit, channel) in self.channels.iter_mut().enumerate() {
                if value & 2 << bit == 0 {
                    continue;
                }
                if value & 1 << 5 == 0 {
                    channel.latch = channel.latch.or(Some(channel.count(now_ns)));
                }
                if value & 1 << 4 == 0 {
                    channel.latch_status(now_ns);
                }
            }
            return false;
        };
        let bytes = match value >> 4 & 3 {
            0 => {
                channel.latch = channel.latch.or(Some(channel.count(now_ns)));
                return false;
            }
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        let mode_bits = value >> 1 & 7;
        *channel = Channel {
            mode: match mode_bits & 3 {
                2 => Mode::Rate,
                3 => Mode::Square,
                _ => Mode::Once,
            },
            mode_bits,
            bytes,
            ..Channel::default()
        };
        number == 0
    }

    /// When interrupt 0 is due next.
    #[must_use]
    pub fn next_tick(&self) -> Option<u64> {
        let channel = &self.channels[0];
        let reload = u128::from(channel.reload);
        if reload == 0 {
            return None;
        }
        let done = u128::from(channel.ticks(self.taken_ns)) / reload;
        if channel.mode == Mode::Once && done > 0 {
            return None;
        }
        let after = ((done + 1) * reload * NS).div_ceil(HZ);
        let after = u64::try_from(after).ok()?;
        channel.loaded_ns.checked_add(after)
    }

    /// Takes the ticks until now: whether there was one. Several that were
    /// missed are one.
    pub fn take_tick(&mut self, now_ns: u64) -> bool {
        let ticked = self.next_tick().is_some_and(|due| due <= now_ns);
        if ticked {
            self.taken_ns = now_ns;
        }
        ticked
    }

    /// The level of channel 0's output.
    #[must_use]
    pub fn level(&self, now_ns: u64) -> IrqLevel {
        match self.channels[0].output(now_ns) {
            true => IrqLevel::Asserted,
            false => IrqLevel::Deasserted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn started(mode: u8, reload: u16) -> Pit {
        let mut pit = Pit::default();
        let _ = pit.write(CONTROL, 0x30 | mode << 1, 0);
        let [low, high] = reload.to_le_bytes();
        assert!(!pit.write(0x40, low, 0));
        assert!(pit.write(0x40, high, 0));
        pit
    }

    fn latched(pit: &mut Pit, now_ns: u64) -> u16 {
        let _ = pit.write(CONTROL, 0, now_ns);
        let later = now_ns + MS;
        u16::from_le_bytes([pit.read(0x40, later), pit.read(0x40, later)])
    }

    #[test]
    fn a_rate_generator_ticks_again_and_again() {
        // 1,193 ticks are a millisecond, nearly.
        let mut pit = started(2, 1193);
        let first = pit.next_tick().expect("it runs");
        assert!((999_000..1_001_000).contains(&first), "{first}");
        assert!(!pit.take_tick(first - 1));
        assert!(pit.take_tick(first));
        assert!(!pit.take_tick(first));
        assert!(pit.take_tick(10 * MS), "missed ones are one");
        let next = pit.next_tick().expect("it runs");
        assert!(next > 10 * MS && next < 11 * MS);
    }

    #[test]
    fn a_one_shot_ticks_once() {
        let mut pit = started(0, 1193);
        assert!(pit.take_tick(2 * MS));
        assert_eq!(pit.next_tick(), None);
        assert_eq!(Pit::default().next_tick(), None, "nothing loaded");
    }

    #[test]
    fn a_latched_count_stays_until_it_is_read() {
        let mut pit = started(2, 0);
        assert_eq!(latched(&mut pit, 0), 0, "65,536 in 16 bits");
        let count = latched(&mut pit, MS);
        assert!((0x1_0000 - 1195..0x1_0000 - 1190).contains(&u32::from(count)));
    }

    #[test]
    fn the_status_tells_mode_and_output() {
        let mut pit = started(0, 1193);
        let _ = pit.write(CONTROL, 0xe2, 0);
        assert_eq!(pit.read(0x40, 0), 0x30);
        let _ = pit.write(CONTROL, 0xe2, 2 * MS);
        assert_eq!(pit.read(0x40, 2 * MS), 0xb0);
    }

    #[test]
    fn the_gate_starts_channel_2_and_shows_its_output() {
        let mut pit = Pit::default();
        let _ = pit.write(CONTROL, 0xb0, 0);
        let _ = pit.write(0x42, 0xa9, 0);
        let _ = pit.write(0x42, 0x04, 0);
        let _ = pit.write(GATE, 1, 5 * MS);
        assert_eq!(pit.read(GATE, 5 * MS) & 0x20, 0);
        assert_eq!(pit.read(GATE, 7 * MS) & 0x20, 0x20);
    }
}
