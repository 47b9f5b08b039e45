//! An MC146818 real-time clock with its memory.
//!
//! It tells the time of the host; setting it changes nothing. There are no
//! alarms and no periodic interrupts. Source: MC146818A data sheet.

const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Time base running, the usual rate.
const STATUS_A: u8 = 0x26;
/// Power is good.
const STATUS_D: u8 = 0x80;
const NMI_OFF: u8 = 0x80;

/// The clock.
#[derive(Clone, Debug)]
pub struct Clock {
    selected: u8,
    memory: [u8; 128],
}

impl Default for Clock {
    fn default() -> Self {
        let mut memory = [0; 128];
        memory[0xa] = STATUS_A;
        memory[0xb] = HOURS_24;
        memory[0xd] = STATUS_D;
        Self {
            selected: 0,
            memory,
        }
    }
}

impl Clock {
    /// Selects a register; bit 7 would hold NMIs back.
    pub fn select(&mut self, register: u8) {
        self.selected = register & !NMI_OFF;
    }

    /// Reads the selected register; `wall_ns` is the time since 1970.
    #[must_use]
    pub fn read(&self, wall_ns: u64) -> u8 {
        let seconds = wall_ns / 1_000_000_000;
        let days = seconds / 86_400;
        let (year, month, day) = date(days);
        let value = match self.selected {
            0 => seconds % 60,
            2 => seconds / 60 % 60,
            4 => return self.hours(seconds / 3600 % 24),
            // The first of January 1970 was a Thursday, day 5.
            6 => (days + 4) % 7 + 1,
            7 => day,
            8 => month,
            9 => year % 100,
            0x32 => return bcd(year / 100),
            other => return self.memory[usize::from(other)],
        };
        self.form(value)
    }

    /// Writes the selected register. Those of the time are not written.
    pub fn write(&mut self, value: u8) {
        if !matches!(self.selected, 0 | 2 | 4 | 6..=9 | 0xc | 0xd | 0x32) {
            self.memory[usize::from(self.selected)] = value;
        }
    }

    fn hours(&self, hours: u64) -> u8 {
        if self.memory[0xb] & HOURS_24 != 0 {
            return self.form(hours);
        }
        let afternoon = if hours >= 12 { 0x80 } else { 0 };
        self.form((hours + 11) % 12 + 1) | afternoon
    }

    fn form(&self, value: u64) -> u8 {
        match self.memory[0xb] & BINARY {
            0 => bcd(value),
            _ => value.to_le_bytes()[0],
        }
    }
}

/// Two decimal digits.
fn bcd(value: u64) -> u8 {
    let [digits, ..] = (value / 10 % 10 * 16 + value % 10).to_le_bytes();
    digits
}

/// Year, month and day of a day since 1970, by counting in eras of 400 years
/// that begin with March.
fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097;
    let days = days + 719_468;
    let (era, day) = (days / ERA, days % ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(clock: &mut Clock, register: u8, seconds: u64) -> u8 {
        clock.select(register);
        clock.read(seconds * 1_000_000_000)
    }

    #[test]
    fn days_have_their_dates() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(20_088), (2024, 12, 31));
        assert_eq!(date(20_089), (2025, 1, 1));
    }

    #[test]
    fn the_time_is_told_in_decimal_digits_or_in_binary() {
        // 2024-12-31 23:59:58, a Tuesday.
        let time = 20_088 * 86_400 + 86_398;
        let mut clock = Clock::default();
        let expected = [
            (0, 0x58),
            (2, 0x59),
            (4, 0x23),
            (6, 3),
            (7, 0x31),
            (8, 0x12),
        ];
        for (register, value) in expected {
            assert_eq!(read(&mut clock, register, time), value, "{register:#x}");
        }
        assert_eq!(read(&mut clock, 9, time), 0x24);
        assert_eq!(read(&mut clock, 0x32, time), 0x20);
        clock.select(0xb);
        clock.write(BINARY);
        assert_eq!(read(&mut clock, 0, time), 58);
        assert_eq!(read(&mut clock, 4, time), 0x80 | 11, "in twelve hours");
        assert_eq!(read(&mut clock, 4, 0), 12, "midnight");
    }

    #[test]
    fn memory_reads_back_and_the_time_cannot_be_set() {
        let mut clock = Clock::default();
        for register in [0xf, 0x40, 0x7f] {
            clock.select(register | NMI_OFF);
            clock.write(0x5a);
            assert_eq!(read(&mut clock, register, 0), 0x5a);
        }
        clock.select(9);
        clock.write(0x99);
        assert_eq!(read(&mut clock, 9, 0), 0x70);
        assert_eq!(read(&mut clock, 0xd, 0), STATUS_D);
    }
}
