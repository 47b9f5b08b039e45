//! Two 8259 interrupt controllers, one behind the other.
//!
//! Fully nested, with automatic and commanded ends of interrupt; rotating
//! priorities and the special mask mode are accepted and not acted on. Source:
//! Intel 8259A data sheet (231468).

use crate::devices::IrqLevel;

const CASCADE: u8 = 2;
const SPURIOUS: u8 = 7;
const ELCR: u16 = 0x4d0;

/// What the next write to a chip's data port sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expects {
    #[default]
    Mask,
    Vector,
    Cascade,
    Mode,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chip {
    requested: u8,
    in_service: u8,
    mask: u8,
    lines: u8,
    level_triggered: u8,
    vector: u8,
    expects: Expects,
    wants_mode: bool,
    ends_itself: bool,
    reads_in_service: bool,
    polled: bool,
}

impl Chip {
    fn set_line(&mut self, line: u8, level: IrqLevel) {
        let bit = 1 << line;
        match level {
            IrqLevel::Asserted if self.lines & bit == 0 || self.level_triggered & bit != 0 => {
                self.requested |= bit;
            }
            IrqLevel::Deasserted if self.level_triggered & bit != 0 => self.requested &= !bit,
            _ => {}
        }
        match level {
            IrqLevel::Asserted => self.lines |= bit,
            IrqLevel::Deasserted => self.lines &= !bit,
        }
    }

    /// The line to be served next: a higher one than any that is.
    fn pending(&self) -> Option<u8> {
        let line = lowest(self.requested & !self.mask)?;
        let allowed = lowest(self.in_service).is_none_or(|served| line < served);
        allowed.then_some(line)
    }

    /// Starts to serve what is pending; a spurious line if nothing is.
    fn acknowledge(&mut self) -> u8 {
        let Some(line) = self.pending() else {
            return SPURIOUS;
        };
        let bit = 1 << line;
        if self.level_triggered & bit == 0 || self.lines & bit == 0 {
            self.requested &= !bit;
        }
        if !self.ends_itself {
            self.in_service |= bit;
        }
        line
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self {
                expects: Expects::Vector,
                wants_mode: value & 1 != 0,
                lines: self.lines,
                level_triggered: self.level_triggered,
                ..Self::default()
            };
        } else if value & 8 != 0 {
            self.polled = value & 4 != 0;
            if value & 2 != 0 {
                self.reads_in_service = value & 1 != 0;
            }
        } else {
            match value >> 5 {
                1 | 5 => {
                    if let Some(line) = lowest(self.in_service) {
                        self.in_service &= !(1 << line);
                    }
                }
                3 | 7 => self.in_service &= !(1 << (value & 7)),
                _ => {}
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expects = match self.expects {
            Expects::Mask => {
                self.mask = value;
                Expects::Mask
            }
            Expects::Vector => {
                self.vector = value & 0xf8;
                Expects::Cascade
            }
            Expects::Cascade if self.wants_mode => Expects::Mode,
            Expects::Cascade => Expects::Mask,
            Expects::Mode => {
                self.ends_itself = value & 2 != 0;
                Expects::Mask
            }
        };
    }

    fn read_command(&mut self) -> u8 {
        if core::mem::take(&mut self.polled) {
            return match self.pending() {
                Some(_) => 0x80 | self.acknowledge(),
                None => 0,
            };
        }
        match self.reads_in_service {
            true => self.in_service,
            false => self.requested,
        }
    }
}

fn lowest(set: u8) -> Option<u8> {
    let line = set.trailing_zeros();
    u8::try_from(line).ok().filter(|line| *line < 8)
}

/// Both controllers.
#[derive(Clone, Debug)]
pub struct Pic {
    first: Chip,
    second: Chip,
}

impl Default for Pic {
    /// As firmware leaves them: set up for real mode, open for what PCI
    /// devices use.
    fn default() -> Self {
        Self {
            first: Chip {
                vector: 0x08,
                mask: !(1 << CASCADE),
                ..Chip::default()
            },
            second: Chip {
                vector: 0x70,
                mask: !(1 << 1 | 1 << 2 | 1 << 3),
                ..Chip::default()
            },
        }
    }
}

impl Pic {
    /// Sets the level of an interrupt line, 0 to 15.
    pub fn set_line(&mut self, irq: u8, level: IrqLevel) {
        match irq {
            0..=7 => self.first.set_line(irq, level),
            8..=15 => self.second.set_line(irq - 8, level),
            _ => {}
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let level = match self.second.pending() {
            Some(_) => IrqLevel::Asserted,
            None => IrqLevel::Deasserted,
        };
        if level == IrqLevel::Deasserted {
            self.first.requested &= !(1 << CASCADE);
        }
        self.first.set_line(CASCADE, level);
    }

    /// The vector that the processor would get now, if there is one.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        match self.first.pending()? {
            CASCADE => Some(self.second.vector | self.second.pending().unwrap_or(SPURIOUS)),
            line => Some(self.first.vector | line),
        }
    }

    /// Gives the processor its vector.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.first.acknowledge() {
            CASCADE => self.second.vector | self.second.acknowledge(),
            line => self.first.vector | line,
        };
        self.cascade();
        vector
    }

    /// Reads a port.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            0x20 => self.first.read_command(),
            0x21 => self.first.mask,
            0xa0 => self.second.read_command(),
            0xa1 => self.second.mask,
            ELCR => self.first.level_triggered,
            _ => self.second.level_triggered,
        }
    }

    /// Writes a port.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.first.write_command(value),
            0x21 => self.first.write_data(value),
            0xa0 => self.second.write_command(value),
            0xa1 => self.second.write_data(value),
            // The timer, the keyboard, the cascade, the clock and the
            // coprocessor are always edge-triggered.
            ELCR => self.first.level_triggered = value & 0xf8,
            _ => self.second.level_triggered = value & 0xde,
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use IrqLevel::{Asserted, Deasserted};

    fn set_up() -> Pic {
        let mut pic = Pic::default();
        for (port, values) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
            pic.write(port, values[0]);
            for value in &values[1..] {
                pic.write(port + 1, *value);
            }
        }
        pic
    }

    #[test]
    fn a_line_is_served_once_for_each_edge() {
        let mut pic = set_up();
        pic.set_line(4, Asserted);
        assert_eq!(pic.pending(), Some(0x24));
        assert_eq!(pic.acknowledge(), 0x24);
        pic.set_line(4, Asserted);
        assert_eq!(pic.pending(), None);
        pic.set_line(4, Deasserted);
        pic.set_line(4, Asserted);
        assert_eq!(pic.pending(), None, "still in service");
        pic.write(0x20, 0x20);
        assert_eq!(pic.pending(), Some(0x24));
    }

    #[test]
    fn the_second_controller_interrupts_through_the_first() {
        let mut pic = set_up();
        pic.set_line(11, Asserted);
        assert_eq!(pic.acknowledge(), 0x2b);
        assert_eq!(pic.pending(), None);
        pic.write(0xa0, 0x0b);
        pic.write(0x20, 0x0b);
        assert_eq!((pic.read(0xa0), pic.read(0x20)), (8, 4));
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        pic.set_line(11, Deasserted);
        pic.set_line(11, Asserted);
        assert_eq!(pic.pending(), Some(0x2b));
    }

    #[test]
    fn masks_and_priorities_hold_lines_back() {
        let mut pic = set_up();
        pic.write(0x21, 1 << 3);
        pic.set_line(3, Asserted);
        assert_eq!(pic.pending(), None);
        pic.set_line(5, Asserted);
        pic.set_line(1, Asserted);
        assert_eq!(pic.acknowledge(), 0x21);
        assert_eq!(pic.pending(), None, "5 waits for the end of 1");
        pic.write(0x20, 0x61);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn a_level_line_is_requested_as_long_as_it_is_asserted() {
        let mut pic = set_up();
        pic.write(0x4d0, 1 << 5);
        pic.set_line(5, Asserted);
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0x20, 0x20);
        assert_eq!(pic.pending(), Some(0x25));
        pic.set_line(5, Deasserted);
        assert_eq!(pic.pending(), None);
        assert_eq!(pic.acknowledge(), 0x27, "spurious");
    }
}
