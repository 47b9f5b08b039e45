//! Terminals: making, opening and controlling them.

use linux_raw_sys::general::{O_NONBLOCK, O_RDWR};
use linux_raw_sys::general::{SIGCONT, SIGHUP, SIGWINCH};
use linux_raw_sys::ioctl::{
    FIOCLEX, FIONBIO, FIONCLEX, FIONREAD, TCFLSH, TCGETS, TCSBRK, TCSETS, TCSETSF, TCSETSW, TCXONC,
    TIOCGPGRP, TIOCGPTN, TIOCGPTPEER, TIOCGSID, TIOCGWINSZ, TIOCNOTTY, TIOCSCTTY, TIOCSPGRP,
    TIOCSPTLCK, TIOCSWINSZ,
};

use super::low;
use crate::errno::{Errno, Outcome, Result};
use crate::fs::Place;
use crate::kernel::Kernel;
use crate::process::files::{Device, FileId, Object, OpenFile};
use crate::process::signal::Info;
use crate::streams::terminal::{Modes, Terminal};
use crate::wait::{Key, Tid};

impl Kernel {
    /// Makes a terminal; its other side is given a name.
    pub(crate) fn make_terminal(&mut self, tid: Tid) -> Result<Object> {
        let number = self.terminals.insert(Terminal::new());
        if let Err(errno) = self.add_terminal(tid, number) {
            self.terminals.remove(number);
            return Err(errno);
        }
        Ok(Object::Master(number))
    }

    /// Opens a program's side; it may become the process's own terminal.
    pub(crate) fn open_terminal(&mut self, tid: Tid, number: u32, takes: bool) -> Result<Object> {
        let pid = self.pid_of(tid);
        let leads = self.process_of(tid).session == pid && self.process_of(tid).terminal.is_none();
        let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
        if terminal.locked || terminal.masters == 0 {
            return Err(Errno::EIO);
        }
        terminal.slaves += 1;
        terminal.used = true;
        if takes && leads && terminal.session.is_none() {
            self.take_terminal(tid, number);
        }
        Ok(Object::Terminal(number))
    }

    fn take_terminal(&mut self, tid: Tid, number: u32) {
        let process = self.process_of(tid);
        process.terminal = Some(number);
        let (session, group) = (process.session, process.group);
        if let Some(terminal) = self.terminals.get_mut(number) {
            terminal.session = Some(session);
            terminal.foreground = group;
        }
    }

    /// One side has been closed for good.
    pub(crate) fn close_terminal(&mut self, number: u32, master: bool) {
        let Some(terminal) = self.terminals.get_mut(number) else {
            return;
        };
        if master {
            terminal.masters -= 1;
        } else {
            terminal.slaves -= 1;
        }
        let (masters, slaves) = (terminal.masters, terminal.slaves);
        let (session, foreground) = (terminal.session, terminal.foreground);
        if master && masters == 0 {
            self.remove_terminal(number);
            if let Some(session) = session {
                for signal in [SIGHUP, SIGCONT] {
                    let info = Info::from_kernel(u8::try_from(signal).expect("a small number"));
                    self.send_to_process(session, info);
                    self.send_to_group(foreground, info);
                }
            }
        }
        if masters == 0 && slaves == 0 {
            self.terminals.remove(number);
            for process in self.processes.values_mut() {
                if process.terminal == Some(number) {
                    process.terminal = None;
                }
            }
        }
        self.wake(Key::Terminal(number));
    }

    pub(crate) fn ioctl(&mut self, tid: Tid, number: u32, request: u32, argument: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        match request {
            FIONBIO => {
                let on: u32 = self.get(tid, argument)?;
                let file = self.file(id);
                file.flags &= !O_NONBLOCK;
                if on != 0 {
                    file.flags |= O_NONBLOCK;
                }
                Ok(0)
            }
            FIOCLEX | FIONCLEX => {
                let descriptor = self.process_of(tid).files.get_mut(number)?;
                descriptor.close_on_exec = request == FIOCLEX;
                Ok(0)
            }
            FIONREAD => {
                let waiting = self.waiting(id)?;
                self.put(tid, argument, &waiting)?;
                Ok(0)
            }
            _ => match self.file(id).object {
                Object::Master(terminal) => self.master_ioctl(tid, terminal, request, argument),
                Object::Terminal(terminal) => self.terminal_ioctl(tid, terminal, request, argument),
                Object::Device(Device::Console) => Err(Errno::EINVAL.into()),
                _ => Err(Errno::ENOTTY.into()),
            },
        }
    }

    /// Bytes that can be read at once.
    fn waiting(&mut self, id: FileId) -> Result<u32> {
        let offset = self.file(id).offset;
        let bytes = match self.file(id).object {
            Object::Socket(socket) => self.sockets.get(socket)?.available(),
            Object::PipeReader(pipe) | Object::PipeBoth(pipe) => {
                self.pipes.get(pipe).map_or(0, |pipe| pipe.len())
            }
            Object::Terminal(number) => {
                let terminal = self.terminals.get(number);
                terminal.map_or(0, Terminal::waiting)
            }
            Object::Master(number) => {
                let terminal = self.terminals.get(number);
                terminal.map_or(0, Terminal::printed)
            }
            Object::File => {
                let node = self.file(id).node().ok_or(Errno::EBADF)?;
                let left = self.objects.node(node).size().saturating_sub(offset);
                usize::try_from(left).unwrap_or(usize::MAX)
            }
            _ => return Err(Errno::ENOTTY),
        };
        Ok(u32::try_from(bytes).unwrap_or(i32::MAX.unsigned_abs()))
    }

    fn master_ioctl(&mut self, tid: Tid, number: u32, request: u32, argument: u64) -> Outcome {
        match request {
            TIOCGPTN => {
                self.put(tid, argument, &number)?;
                Ok(0)
            }
            TIOCSPTLCK => {
                let locked: u32 = self.get(tid, argument)?;
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                terminal.locked = locked != 0;
                Ok(0)
            }
            TIOCGPTPEER => {
                let object = self.open_terminal(tid, number, false)?;
                let flags = low(argument);
                let place = self.terminal_node(number).map(Place::Node);
                if let Some(place) = place {
                    self.hold_place(place);
                }
                let mut file = OpenFile::new(object, place, O_RDWR | flags & O_NONBLOCK);
                file.path = Some(alloc::format!("/dev/pts/{number}").into_bytes().into());
                Ok(self.add_file(tid, file, flags)?.into())
            }
            // The session that the other side belongs to.
            TIOCGPGRP | TIOCGSID => self.terminal_group(tid, number, request, argument),
            _ => self.terminal_ioctl(tid, number, request, argument),
        }
    }

    fn terminal_group(&mut self, tid: Tid, number: u32, request: u32, argument: u64) -> Outcome {
        let terminal = self.terminals.get(number).ok_or(Errno::EIO)?;
        let value = match request {
            TIOCGSID => terminal.session.ok_or(Errno::ENOTTY)?,
            _ => terminal.foreground,
        };
        self.put(tid, argument, &value)?;
        Ok(0)
    }

    fn terminal_ioctl(&mut self, tid: Tid, number: u32, request: u32, argument: u64) -> Outcome {
        const SIGTTOU: u8 = 22;
        let own = self.process_of(tid).terminal == Some(number);
        match request {
            TCGETS => {
                let modes = self.terminals.get(number).ok_or(Errno::EIO)?.modes;
                self.put(tid, argument, &modes)?;
            }
            TCSETS | TCSETSW | TCSETSF => {
                let modes: Modes = self.get(tid, argument)?;
                if own {
                    self.check_background(tid, number, SIGTTOU)?;
                }
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                if request == TCSETSF {
                    terminal.flush_input();
                }
                terminal.set_modes(modes);
                self.wake(Key::Terminal(number));
            }
            TIOCGWINSZ => {
                let size = self.terminals.get(number).ok_or(Errno::EIO)?.size;
                self.put(tid, argument, &size)?;
            }
            TIOCSWINSZ => {
                let size: [u16; 4] = self.get(tid, argument)?;
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                let changed = terminal.size != size;
                terminal.size = size;
                let group = terminal.foreground;
                if changed && group != 0 {
                    let signal = u8::try_from(SIGWINCH).expect("a small number");
                    self.send_to_group(group, Info::from_kernel(signal));
                }
            }
            TIOCSCTTY => {
                let pid = self.pid_of(tid);
                let process = self.process_of(tid);
                if process.session != pid || process.terminal.is_some() && !own {
                    return Err(Errno::EPERM.into());
                }
                let terminal = self.terminals.get(number).ok_or(Errno::EIO)?;
                if terminal.session.is_some_and(|session| session != pid) {
                    return Err(Errno::EPERM.into());
                }
                self.take_terminal(tid, number);
            }
            TIOCNOTTY if own => {
                let pid = self.pid_of(tid);
                if self.process_of(tid).session == pid {
                    self.leave_terminal(number, pid);
                }
                self.process_of(tid).terminal = None;
            }
            TIOCGPGRP | TIOCGSID if own => {
                return self.terminal_group(tid, number, request, argument);
            }
            TIOCSPGRP => {
                let group: u32 = self.get(tid, argument)?;
                if !own {
                    return Err(Errno::ENOTTY.into());
                }
                self.check_background(tid, number, SIGTTOU)?;
                let session = self.process_of(tid).session;
                let mut members = self.processes.values();
                if !members.any(|other| other.group == group && other.session == session) {
                    return Err(Errno::EPERM.into());
                }
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                terminal.foreground = group;
            }
            TCFLSH => {
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                if argument != 1 {
                    terminal.flush_input();
                }
            }
            // Output is never held back, so there is nothing to wait for.
            TCSBRK | TCXONC => {}
            _ => return Err(Errno::ENOTTY.into()),
        }
        Ok(0)
    }
}
