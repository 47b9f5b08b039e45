//! Terminals: the line discipline between a program and who types.
//!
//! A terminal is a pair: what is written to the *master* has been typed, what
//! is read from it has been printed. In between lines are edited, keys become
//! signals and characters are echoed, as termios(3) describes.

use alloc::collections::VecDeque;

use linux_raw_sys::general::{
    B38400, CREAD, CS8, ECHO, ECHOCTL, ECHOE, ECHOK, ECHOKE, ECHONL, ICANON, ICRNL, IEXTEN, IGNCR,
    INLCR, ISIG, ISTRIP, IXON, NOFLSH, OCRNL, ONLCR, ONLRET, ONOCR, OPOST, VEOF, VEOL, VEOL2,
    VERASE, VINTR, VKILL, VLNEXT, VMIN, VQUIT, VSUSP, VTIME, VWERASE,
};
use linux_raw_sys::general::{SIGINT, SIGQUIT, SIGTSTP};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Characters in each direction.
const CAPACITY: usize = 4096;

/// The kernel's `termios`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Modes {
    pub(crate) input: u32,
    pub(crate) output: u32,
    pub(crate) control: u32,
    pub(crate) local: u32,
    pub(crate) line: u8,
    pub(crate) keys: [u8; 19],
}

impl Default for Modes {
    fn default() -> Self {
        let mut keys = [0; 19];
        for (key, value) in [
            (VINTR, 3),
            (VQUIT, 28),
            (VERASE, 127),
            (VKILL, 21),
            (VEOF, 4),
            (VMIN, 1),
            (linux_raw_sys::general::VSTART, 17),
            (linux_raw_sys::general::VSTOP, 19),
            (VSUSP, 26),
            (linux_raw_sys::general::VREPRINT, 18),
            (linux_raw_sys::general::VDISCARD, 15),
            (VWERASE, 23),
            (VLNEXT, 22),
        ] {
            keys[key as usize] = value;
        }
        Self {
            input: ICRNL | IXON,
            output: OPOST | ONLCR,
            control: B38400 | CS8 | CREAD,
            local: ISIG | ICANON | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE | IEXTEN,
            line: 0,
            keys,
        }
    }
}

/// A terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    pub(crate) modes: Modes,
    /// Rows, columns, and two numbers of pixels.
    pub(crate) size: [u16; 4],
    /// Characters that programs can read.
    input: VecDeque<u8>,
    /// Ends of lines within `input`: how many characters are before each.
    lines: VecDeque<usize>,
    /// The line being edited.
    edited: VecDeque<u8>,
    /// The next key is a character, whatever it is.
    literal: bool,
    column: usize,
    /// What has been printed.
    output: VecDeque<u8>,
    pub(crate) masters: u32,
    pub(crate) slaves: u32,
    /// It has been opened by a program once.
    pub(crate) used: bool,
    pub(crate) locked: bool,
    pub(crate) session: Option<u32>,
    pub(crate) foreground: u32,
}

/// What a read finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Bytes(usize),
    Wait,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        Self {
            modes: Modes::default(),
            size: [0; 4],
            input: VecDeque::new(),
            lines: VecDeque::new(),
            edited: VecDeque::new(),
            literal: false,
            column: 0,
            output: VecDeque::new(),
            masters: 1,
            slaves: 0,
            used: false,
            locked: true,
            session: None,
            foreground: 0,
        }
    }

    fn has(&self, local: u32) -> bool {
        self.modes.local & local != 0
    }

    fn is_key(&self, key: u32, byte: u8) -> bool {
        let value = self.modes.keys[key as usize];
        value != 0 && value == byte
    }

    /// Takes what was typed; returns how much of it, and calls `signal` for
    /// keys that stand for one.
    pub(crate) fn type_in(&mut self, bytes: &[u8], mut signal: impl FnMut(u8)) -> usize {
        for (done, byte) in bytes.iter().enumerate() {
            if self.input.len() + self.edited.len() >= CAPACITY && !self.has(ICANON)
                || self.output.len() >= 2 * CAPACITY
            {
                return done;
            }
            if let Some(number) = self.key(*byte) {
                signal(number);
            }
        }
        bytes.len()
    }

    /// One key; the signal that it stands for, if it does.
    fn key(&mut self, byte: u8) -> Option<u8> {
        let mut byte = byte;
        if self.modes.input & ISTRIP != 0 {
            byte &= 0x7f;
        }
        if core::mem::take(&mut self.literal) {
            self.accept(byte);
            return None;
        }
        match byte {
            b'\r' if self.modes.input & IGNCR != 0 => return None,
            b'\r' if self.modes.input & ICRNL != 0 => byte = b'\n',
            b'\n' if self.modes.input & INLCR != 0 => byte = b'\r',
            _ => {}
        }
        if self.has(ISIG) {
            let keys = [(VINTR, SIGINT), (VQUIT, SIGQUIT), (VSUSP, SIGTSTP)];
            let hit = keys.into_iter().find(|(key, _)| self.is_key(*key, byte));
            if let Some((_, number)) = hit {
                if !self.has(NOFLSH) {
                    self.flush_input();
                }
                self.echo(byte);
                return u8::try_from(number).ok();
            }
        }
        if self.has(ICANON) {
            self.edit(byte);
        } else {
            self.accept(byte);
        }
        None
    }

    /// A key in line mode.
    fn edit(&mut self, byte: u8) {
        if self.is_key(VERASE, byte) {
            self.erase_one();
        } else if self.is_key(VKILL, byte) {
            while !self.edited.is_empty() {
                self.erase_one();
            }
        } else if self.has(IEXTEN) && self.is_key(VWERASE, byte) {
            while self.edited.back() == Some(&b' ') {
                self.erase_one();
            }
            while self.edited.back().is_some_and(|last| *last != b' ') {
                self.erase_one();
            }
        } else if self.has(IEXTEN) && self.is_key(VLNEXT, byte) {
            self.literal = true;
        } else if self.is_key(VEOF, byte) {
            self.end_line();
        } else if byte == b'\n' || self.is_key(VEOL, byte) || self.is_key(VEOL2, byte) {
            if self.has(ECHO) || byte == b'\n' && self.has(ECHONL) {
                self.print(byte);
            }
            self.edited.push_back(byte);
            self.end_line();
        } else if self.edited.len() < CAPACITY - 1 {
            self.accept(byte);
        }
    }

    fn end_line(&mut self) {
        self.input.append(&mut self.edited);
        self.lines.push_back(self.input.len());
    }

    fn accept(&mut self, byte: u8) {
        self.echo(byte);
        match self.has(ICANON) {
            true => self.edited.push_back(byte),
            false => self.input.push_back(byte),
        }
    }

    fn erase_one(&mut self) {
        // A character of several bytes goes as a whole.
        let mut last = self.edited.pop_back();
        while last.is_some_and(|byte| byte & 0xc0 == 0x80) {
            last = self.edited.pop_back();
        }
        let Some(last) = last else { return };
        if self.has(ECHO) && self.has(ECHOE) {
            let width = if last < 0x20 && self.has(ECHOCTL) {
                2
            } else {
                1
            };
            for _ in 0..width {
                self.output.extend(b"\x08 \x08");
                self.column = self.column.saturating_sub(1);
            }
        }
    }

    fn echo(&mut self, byte: u8) {
        if !self.has(ECHO) {
            return;
        }
        let control = byte < 0x20 && byte != b'\n' && byte != b'\t' || byte == 0x7f;
        if control && self.has(ECHOCTL) {
            self.output.extend([b'^', byte ^ 0x40]);
            self.column += 2;
        } else {
            self.print(byte);
        }
    }

    /// One character of output.
    fn print(&mut self, byte: u8) {
        let modes = self.modes.output;
        if modes & OPOST == 0 {
            self.output.push_back(byte);
            return;
        }
        match byte {
            b'\n' if modes & ONLCR != 0 => {
                self.output.extend(b"\r\n");
                self.column = 0;
            }
            b'\r' if modes & ONOCR != 0 && self.column == 0 => {}
            b'\r' if modes & OCRNL != 0 => self.output.push_back(b'\n'),
            _ => {
                if byte == b'\r' || byte == b'\n' && modes & ONLRET != 0 {
                    self.column = 0;
                } else if byte >= 0x20 {
                    self.column += 1;
                }
                self.output.push_back(byte);
            }
        }
    }

    /// Prints as much as there is room for; returns how much.
    pub(crate) fn print_all(&mut self, bytes: &[u8]) -> usize {
        for (done, byte) in bytes.iter().enumerate() {
            if self.output.len() >= CAPACITY {
                return done;
            }
            self.print(*byte);
        }
        bytes.len()
    }

    /// Takes what has been printed.
    pub(crate) fn take_output(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.output.len());
        for (place, byte) in into.iter_mut().zip(self.output.drain(..len)) {
            *place = byte;
        }
        len
    }

    /// What a program reads: a line, or what VMIN asks for.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Read {
        if self.has(ICANON) {
            let Some(end) = self.lines.front().copied() else {
                return Read::Wait;
            };
            let len = into.len().min(end);
            self.take_input(&mut into[..len]);
            if len == end {
                self.lines.pop_front();
            }
            return Read::Bytes(len);
        }
        let least = usize::from(self.modes.keys[VMIN as usize]).min(into.len());
        if self.input.len() < least.max(1) {
            let polls = least == 0 && self.modes.keys[VTIME as usize] == 0;
            return if polls { Read::Bytes(0) } else { Read::Wait };
        }
        let len = into.len().min(self.input.len());
        self.take_input(&mut into[..len]);
        Read::Bytes(len)
    }

    fn take_input(&mut self, into: &mut [u8]) {
        let len = into.len();
        for (place, byte) in into.iter_mut().zip(self.input.drain(..len)) {
            *place = byte;
        }
        for end in &mut self.lines {
            *end -= len.min(*end);
        }
    }

    /// Whether a program's read would not wait.
    pub(crate) fn is_readable(&self) -> bool {
        match self.has(ICANON) {
            true => !self.lines.is_empty(),
            false => !self.input.is_empty(),
        }
    }

    /// Characters that a program can read.
    pub(crate) fn waiting(&self) -> usize {
        match self.has(ICANON) {
            true => self.lines.back().copied().unwrap_or(0),
            false => self.input.len(),
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        self.output.len() < CAPACITY
    }

    pub(crate) fn printed(&self) -> usize {
        self.output.len()
    }

    pub(crate) fn flush_input(&mut self) {
        self.input.clear();
        self.lines.clear();
        self.edited.clear();
    }

    /// Changes the modes; what was typed stays readable.
    pub(crate) fn set_modes(&mut self, modes: Modes) {
        let was_lines = self.has(ICANON);
        self.modes = modes;
        if was_lines && !self.has(ICANON) {
            self.input.append(&mut self.edited);
            self.lines.clear();
        } else if !was_lines && self.has(ICANON) && !self.input.is_empty() {
            self.lines.push_back(self.input.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(terminal: &mut Terminal, bytes: &[u8]) -> Vec<u8> {
        let mut signals = Vec::new();
        assert_eq!(
            terminal.type_in(bytes, |signal| signals.push(signal)),
            bytes.len()
        );
        signals
    }

    fn read(terminal: &mut Terminal) -> Option<Vec<u8>> {
        let mut buffer = [0; 64];
        match terminal.read(&mut buffer) {
            Read::Bytes(len) => Some(buffer[..len].to_vec()),
            Read::Wait => None,
        }
    }

    fn printed(terminal: &mut Terminal) -> String {
        let mut buffer = [0; 256];
        let len = terminal.take_output(&mut buffer);
        String::from_utf8(buffer[..len].to_vec()).expect("text")
    }

    #[test]
    fn a_line_is_edited_before_it_is_read() {
        let mut terminal = Terminal::new();
        assert!(typed(&mut terminal, b"helo\x7flo w\x17x").is_empty());
        assert_eq!(read(&mut terminal), None);
        typed(&mut terminal, b"\rnext\n");
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"hello x\n"[..]));
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"next\n"[..]));
        assert_eq!(read(&mut terminal), None);
        assert_eq!(
            printed(&mut terminal),
            "helo\x08 \x08lo w\x08 \x08x\r\nnext\r\n"
        );
    }

    #[test]
    fn the_end_key_ends_a_read_and_only_on_an_empty_line_the_file() {
        let mut terminal = Terminal::new();
        typed(&mut terminal, b"ab\x04\x04");
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"ab"[..]));
        assert_eq!(read(&mut terminal).as_deref(), Some(&b""[..]));
        assert_eq!(read(&mut terminal), None);
    }

    #[test]
    fn keys_become_signals_and_drop_what_was_typed() {
        let mut terminal = Terminal::new();
        assert_eq!(typed(&mut terminal, b"ab\x03c\x1a\x1c"), [2, 20, 3]);
        assert_eq!(printed(&mut terminal), "ab^Cc^Z^\\");
        typed(&mut terminal, b"d\n");
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"d\n"[..]));
        terminal.modes.local &= !ISIG;
        assert!(typed(&mut terminal, b"\x16\x03\n").is_empty());
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"\x03\n"[..]));
    }

    #[test]
    fn raw_mode_gives_every_key_at_once() {
        let mut terminal = Terminal::new();
        typed(&mut terminal, b"ab");
        let mut modes = terminal.modes;
        modes.local &= !(ICANON | ECHO);
        terminal.set_modes(modes);
        typed(&mut terminal, b"\x7f");
        assert_eq!(read(&mut terminal).as_deref(), Some(&b"ab\x7f"[..]));
        assert_eq!(read(&mut terminal), None);
        terminal.modes.keys[VMIN as usize] = 0;
        assert_eq!(read(&mut terminal).as_deref(), Some(&b""[..]));
    }

    #[test]
    fn queues_are_bounded() {
        let mut terminal = Terminal::new();
        let line = [b'x'; 3 * CAPACITY];
        let taken = terminal.type_in(&line, |_| {});
        assert!(terminal.edited.len() < CAPACITY && taken <= line.len());
        assert!(terminal.print_all(&line) < line.len());
        assert!(terminal.output.len() <= 2 * CAPACITY + 2);
    }
}
