//! Typing on a terminal and watching it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::{Bench, LIMIT, text, viaduct};

/// Lines of the terminal.
pub const ROWS: u16 = 24;
/// Characters in each line.
pub const COLUMNS: u16 = 80;

/// A console on a terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    /// What came and has not been asked for.
    seen: Vec<u8>,
}

impl Terminal {
    /// Starts `viaduct WORDS…` on a terminal.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(bench: &Bench, words: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("ours");
        unlockpt(&master).expect("ours");
        let size = Winsize {
            ws_row: ROWS,
            ws_col: COLUMNS,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).expect("ours");
        let name = ptsname(&master, Vec::new()).expect("it has a name");
        let side = || {
            let name = name.to_str().expect("digits");
            let file = File::options().read(true).write(true).open(name);
            Stdio::from(OwnedFd::from(file.expect("ours")))
        };
        // Makes the terminal the controlling one, as a login would.
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", "--wait"])
            .arg(viaduct())
            .args(words);
        bench.settle(&mut command);
        command
            .env("TERM", "vt100")
            .process_group(0)
            .stdin(side())
            .stdout(side())
            .stderr(side());
        let child = command.spawn().expect("setsid starts");
        // Its copies of the other side go, so that its end is seen.
        drop(command);
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().expect("a descriptor");
        let (send, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if send.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            keyboard,
            screen,
            seen: Vec::new(),
        }
    }

    /// Types.
    ///
    /// # Panics
    /// If nobody can read it any more.
    pub fn type_in(&mut self, keys: &str) {
        self.keyboard
            .write_all(keys.as_bytes())
            .expect("it is open");
    }

    /// Waits until `what` appears; returns what came before it.
    ///
    /// # Panics
    /// If it never appears.
    #[track_caller]
    pub fn expect(&mut self, what: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = self
                .seen
                .windows(what.len())
                .position(|window| window == what.as_bytes());
            if let Some(at) = found {
                let rest = self.seen.split_off(at + what.len());
                let before = std::mem::replace(&mut self.seen, rest);
                return text(&before[..at]);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(why) => panic!("no {what:?} ({why}) in {:?}", text(&self.seen)),
            }
        }
    }

    /// Waits until the screen, as a person sees it, is as it should be; its
    /// lines.
    ///
    /// # Panics
    /// If it never is.
    #[track_caller]
    pub fn expect_screen(
        &mut self,
        screen: &mut vt100::Parser,
        is_so: impl Fn(&str) -> bool,
    ) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            screen.process(&std::mem::take(&mut self.seen));
            let shown = screen.screen().contents();
            if is_so(&shown) {
                return shown;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(why) => panic!("not as it should be ({why}):\n{shown}"),
            }
        }
    }

    /// Waits for the end; returns it and what came last.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn finish(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            if start.elapsed() > LIMIT {
                let _ = self.child.kill();
                panic!("it hangs: {:?}", text(&self.seen));
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        while let Ok(bytes) = self.screen.recv() {
            self.seen.extend(bytes);
        }
        (status, text(&self.seen))
    }
}
