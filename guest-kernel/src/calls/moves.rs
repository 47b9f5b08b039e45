//! Moving some bytes to an open file or from it, by what it is.

use alloc::vec;

use linux_raw_sys::general::SIGPIPE;

use crate::errno::{Errno, Result, Stop};
use crate::kernel::Kernel;
use crate::process::files::{Device, FileId, Object};
use crate::process::signal::Info;
use crate::streams::pipe::{ATOMIC, Transfer};
use crate::streams::terminal;
use crate::wait::{Key, Tid};

/// What moving some bytes came to.
pub(super) enum Moved {
    Bytes(usize),
    /// Nothing now; what to wait for.
    Wait(Key),
    End,
}

impl Kernel {
    pub(super) fn is_stream(&mut self, id: FileId) -> bool {
        !matches!(
            self.file(id).object,
            Object::File
                | Object::Text(_)
                | Object::Device(Device::Zero | Device::Random | Device::Full)
        )
    }

    /// Whether a stream has nothing to read now.
    pub(super) fn has_nothing(&mut self, id: FileId) -> bool {
        match self.file(id).object {
            Object::PipeReader(pipe) | Object::PipeBoth(pipe) => {
                let pipe = self.pipes.get(pipe);
                pipe.is_none_or(|pipe| pipe.len() == 0)
            }
            Object::Device(Device::Launcher) => self.from_launcher.is_empty(),
            Object::Master(number) => {
                let terminal = self.terminals.get(number);
                terminal.is_none_or(|terminal| terminal.printed() == 0)
            }
            // A read takes one line at most.
            _ => true,
        }
    }

    pub(super) fn read_some(
        &mut self,
        tid: Tid,
        id: FileId,
        into: &mut [u8],
    ) -> Result<Moved, Stop> {
        let offset = self.file(id).offset;
        match &self.file(id).object {
            Object::File => {
                let node = self.file(id).node().ok_or(Errno::EBADF)?;
                let count = self.objects.read(node, offset, into)?;
                self.file(id).offset += count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Text(text) => {
                let rest = usize::try_from(offset).ok().and_then(|at| text.get(at..));
                let rest = rest.unwrap_or_default();
                let count = rest.len().min(into.len());
                into[..count].copy_from_slice(&rest[..count]);
                self.file(id).offset += count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Device(device) => {
                let device = *device;
                self.read_device(device, into)
            }
            Object::PipeReader(pipe) | Object::PipeBoth(pipe) => {
                let pipe = *pipe;
                let ends = self.pipes.get_mut(pipe).ok_or(Errno::EBADF)?;
                Ok(match ends.read(into) {
                    Transfer::Moved(count) => {
                        self.wake(Key::Pipe(pipe));
                        Moved::Bytes(count)
                    }
                    Transfer::Wait => Moved::Wait(Key::Pipe(pipe)),
                    Transfer::Closed => Moved::End,
                })
            }
            Object::Terminal(number) => {
                let number = *number;
                self.read_terminal(tid, number, into)
            }
            Object::Master(number) => {
                let number = *number;
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                let count = terminal.take_output(into);
                if count > 0 {
                    self.wake(Key::Terminal(number));
                    return Ok(Moved::Bytes(count));
                }
                match terminal.used && terminal.slaves == 0 {
                    true => Err(Errno::EIO.into()),
                    false => Ok(Moved::Wait(Key::Terminal(number))),
                }
            }
            Object::Event(number) => {
                let number = *number;
                self.read_event(number, into)
            }
            Object::Timer(number) => {
                let number = *number;
                let timer = self.timer_files.get_mut(number).ok_or(Errno::EBADF)?;
                let place = into.first_chunk_mut().ok_or(Errno::EINVAL)?;
                if timer.expired == 0 {
                    return Ok(Moved::Wait(Key::Timer(number)));
                }
                *place = core::mem::take(&mut timer.expired).to_le_bytes();
                Ok(Moved::Bytes(8))
            }
            Object::Signals(_) => {
                if into.len() < 128 {
                    return Err(Errno::EINVAL.into());
                }
                let mut done = 0;
                for place in into.chunks_exact_mut(128) {
                    let Some(signal) = self.take_signal(tid, id) else {
                        break;
                    };
                    place.copy_from_slice(&signal);
                    done += place.len();
                }
                let pid = self.pid_of(tid);
                Ok(match done {
                    0 => Moved::Wait(Key::Signals(pid)),
                    done => Moved::Bytes(done),
                })
            }
            Object::Epoll(_) | Object::Process { .. } => Err(Errno::EINVAL.into()),
            Object::PipeWriter(_) | Object::PathOnly => Err(Errno::EBADF.into()),
            // They have calls of their own: see `messages`.
            Object::Socket(_) => Err(Errno::EBADF.into()),
            Object::Directory { .. } | Object::ProcDirectory { .. } => Err(Errno::EISDIR.into()),
        }
    }

    fn read_event(&mut self, number: u32, into: &mut [u8]) -> Result<Moved, Stop> {
        let counter = self.events.get_mut(number).ok_or(Errno::EBADF)?;
        let place = into.first_chunk_mut().ok_or(Errno::EINVAL)?;
        let Some(count) = counter.take() else {
            return Ok(Moved::Wait(Key::Event(number)));
        };
        *place = count.to_le_bytes();
        self.wake(Key::Event(number));
        Ok(Moved::Bytes(8))
    }

    fn read_device(&mut self, device: Device, into: &mut [u8]) -> Result<Moved, Stop> {
        match device {
            Device::Null => Ok(Moved::End),
            Device::Zero | Device::Full => {
                into.fill(0);
                Ok(Moved::Bytes(into.len()))
            }
            Device::Random => {
                self.fill_random(into);
                Ok(Moved::Bytes(into.len()))
            }
            // Nobody can type there.
            Device::Console => Ok(Moved::Wait(Key::Time)),
            Device::Launcher => {
                let count = self.from_launcher.read(into);
                if count > 0 {
                    if self.from_launcher.must_wake_producer() {
                        self.machine.ring_launcher();
                    }
                    return Ok(Moved::Bytes(count));
                }
                Ok(match self.from_launcher.arm_consumer() {
                    true => Moved::Wait(Key::Launcher),
                    false => Moved::Bytes(self.from_launcher.read(into)),
                })
            }
        }
    }

    fn read_terminal(&mut self, tid: Tid, number: u32, into: &mut [u8]) -> Result<Moved, Stop> {
        const SIGTTIN: u8 = 21;
        self.check_background(tid, number, SIGTTIN)?;
        let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
        match terminal.read(into) {
            terminal::Read::Bytes(0) => Ok(Moved::End),
            terminal::Read::Bytes(count) => {
                self.wake(Key::Terminal(number));
                Ok(Moved::Bytes(count))
            }
            terminal::Read::Wait if terminal.masters == 0 => Ok(Moved::End),
            terminal::Read::Wait => Ok(Moved::Wait(Key::Terminal(number))),
        }
    }

    pub(super) fn write_some(
        &mut self,
        tid: Tid,
        id: FileId,
        from: &[u8],
        left: u64,
    ) -> Result<Moved, Stop> {
        match self.file(id).object {
            Object::File => {
                let node = self.file(id).node().ok_or(Errno::EBADF)?;
                let offset = match self.file(id).appends() {
                    true => self.objects.node(node).size(),
                    false => self.file(id).offset,
                };
                let count = self.write_node(node, offset, from)?;
                self.file(id).offset = offset + count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Device(device) => self.write_device(device, from),
            Object::PipeWriter(pipe) | Object::PipeBoth(pipe) => {
                let left = usize::try_from(left).unwrap_or(usize::MAX);
                // Nothing was written of it yet, or it may be taken apart.
                let started = self.thread(tid).call.is_some_and(|call| call.done > 0);
                let left = if started { left.max(ATOMIC + 1) } else { left };
                let ends = self.pipes.get_mut(pipe).ok_or(Errno::EBADF)?;
                match ends.write(from, left) {
                    Transfer::Moved(count) => {
                        self.wake(Key::Pipe(pipe));
                        Ok(Moved::Bytes(count))
                    }
                    Transfer::Wait => Ok(Moved::Wait(Key::Pipe(pipe))),
                    Transfer::Closed => {
                        let pid = self.pid_of(tid);
                        let signal = u8::try_from(SIGPIPE).expect("a small number");
                        let info = Info::from_process(signal, 0, pid, 0);
                        self.send_to_thread(tid, info);
                        Err(Errno::EPIPE.into())
                    }
                }
            }
            Object::Terminal(number) => {
                const TOSTOP: u32 = 0o400;
                const SIGTTOU: u8 = 22;
                let stops = |terminal: &terminal::Terminal| terminal.modes.local & TOSTOP != 0;
                if self.terminals.get(number).is_some_and(stops) {
                    self.check_background(tid, number, SIGTTOU)?;
                }
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                if terminal.masters == 0 {
                    return Err(Errno::EIO.into());
                }
                let count = terminal.print_all(from);
                if count == 0 {
                    return Ok(Moved::Wait(Key::Terminal(number)));
                }
                self.wake(Key::Terminal(number));
                Ok(Moved::Bytes(count))
            }
            Object::Master(number) => self.type_in(number, from),
            // From a file: programs' bytes have calls of their own.
            Object::Socket(socket) => self.feed_socket(tid, socket, from),
            Object::Event(number) => {
                let counter = self.events.get_mut(number).ok_or(Errno::EBADF)?;
                let value = u64::from_le_bytes(*from.first_chunk().ok_or(Errno::EINVAL)?);
                if value == u64::MAX {
                    return Err(Errno::EINVAL.into());
                }
                if !counter.add(value) {
                    return Ok(Moved::Wait(Key::Event(number)));
                }
                self.wake(Key::Event(number));
                Ok(Moved::Bytes(8))
            }
            Object::Timer(_) | Object::Signals(_) | Object::Epoll(_) | Object::Process { .. } => {
                Err(Errno::EINVAL.into())
            }
            _ => Err(Errno::EBADF.into()),
        }
    }

    fn type_in(&mut self, number: u32, from: &[u8]) -> Result<Moved, Stop> {
        let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
        let group = terminal.foreground;
        let mut signals = vec![];
        let count = terminal.type_in(from, |signal| signals.push(signal));
        for signal in signals {
            self.send_to_group(group, Info::from_kernel(signal));
        }
        if count == 0 {
            return Ok(Moved::Wait(Key::Terminal(number)));
        }
        self.wake(Key::Terminal(number));
        Ok(Moved::Bytes(count))
    }

    fn write_device(&mut self, device: Device, from: &[u8]) -> Result<Moved, Stop> {
        match device {
            Device::Null | Device::Zero | Device::Random => Ok(Moved::Bytes(from.len())),
            Device::Full => Err(Errno::ENOSPC.into()),
            Device::Console => {
                self.print(from);
                Ok(Moved::Bytes(from.len()))
            }
            Device::Launcher => {
                let mut count = self.to_launcher.write(from);
                if count == 0 && !self.to_launcher.arm_producer() {
                    count = self.to_launcher.write(from);
                }
                if self.to_launcher.must_wake_consumer() {
                    self.machine.ring_launcher();
                }
                Ok(match count {
                    0 => Moved::Wait(Key::Launcher),
                    count => Moved::Bytes(count),
                })
            }
        }
    }

    /// Writes to a regular file, which changes its times.
    fn write_node(&mut self, node: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.check_memory().map_err(|_| Errno::ENOSPC)?;
        let count = self.objects.write(node, offset, from)?;
        let now = self.wall();
        let meta = &mut self.objects.node_mut(node).meta;
        (meta.mtime, meta.ctime) = (now, now);
        Ok(count)
    }
}
