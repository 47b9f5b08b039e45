//! Starting a program in a process.

use alloc::vec;
use alloc::vec::Vec;

use linux_raw_sys::auxvec::{
    AT_BASE, AT_CLKTCK, AT_EGID, AT_ENTRY, AT_EUID, AT_EXECFN, AT_FLAGS, AT_GID, AT_HWCAP, AT_NULL,
    AT_PAGESZ, AT_PHDR, AT_PHENT, AT_PHNUM, AT_PLATFORM, AT_RANDOM, AT_SECURE, AT_SYSINFO_EHDR,
    AT_UID,
};
use linux_raw_sys::general::S_ISUID;
use vmm_shared::addr::PAGE_SIZE;
use zerocopy::IntoBytes;

use super::elf::Image;
use super::life::INIT;
use super::{Program, SignalStack};
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::fs::Place;
use crate::fs::node::{Kind, NodeId, Objects};
use crate::fs::walk::{Last, may, right};
use crate::kernel::Kernel;
use crate::machine::{Fpu, Registers};
use crate::mem::frames::For;
use crate::mem::regions::{Backing, Prot, Purpose, Region, Sharing};
use crate::mem::space::{STACK_TOP, Space};
use crate::mem::{index, page_down, page_up};
use crate::vdso;
use crate::wait::Tid;

/// Where a program goes that can be anywhere.
const PROGRAM_BASE: u64 = 0x5555_5555_4000;
/// Stack that is there from the start.
const FIRST_STACK: u64 = 128 << 10;
/// Most bytes of arguments and environment.
pub(crate) const MOST_ARGUMENTS: usize = 2 << 20;
/// Most interpreters of scripts that are interpreters of scripts.
const DEEPEST_SCRIPT: u32 = 4;
/// Longest first line of a script.
const SCRIPT_LINE: usize = 256;

/// A program in memory.
struct Loaded {
    base: u64,
    entry: u64,
    image: Image,
    /// First address behind it.
    end: u64,
}

impl Kernel {
    /// Replaces a thread's program; the other threads of its process end.
    pub(crate) fn exec(
        &mut self,
        tid: Tid,
        path: &[u8],
        arguments: Vec<Vec<u8>>,
        environment: Vec<Vec<u8>>,
    ) -> Outcome {
        let called = path;
        let (node, path, arguments) = self.find_program(tid, path, arguments)?;
        self.check_memory()?;
        let image = parse(&self.objects, node)?;
        let interpreter = match image.interpreter {
            None => None,
            Some((offset, len)) => {
                let mut text = vec![0; len];
                self.objects.read(node, offset, &mut text)?;
                if text.pop() != Some(0) {
                    return Err(Errno::ENOEXEC.into());
                }
                let loader = self.program_node(tid, &text)?;
                Some((loader, parse(&self.objects, loader)?))
            }
        };
        let what = match self.pid_of(tid) {
            INIT => For::Machine,
            _ => For::Data,
        };
        let mut space = Space::new(&self.objects.frames, self.model, what)?;
        let loaded = self.load(
            &mut space,
            node,
            image,
            interpreter,
            &arguments,
            &environment,
            called,
        );
        let registers = match loaded {
            Ok(registers) => registers,
            Err(errno) => {
                space.free(&mut self.objects);
                return Err(errno.into());
            }
        };
        // From here on nothing can fail.
        self.replace_memory(tid, space);
        self.change_owner(tid, node);
        self.settle(tid, &path, &arguments, &environment);
        // A script's name, not that of what interprets it.
        let name = called.rsplit(|byte| *byte == b'/').next();
        let name = name.unwrap_or(called);
        let thread = self.thread(tid);
        thread.name = [0; 16];
        let len = name.len().min(15);
        thread.name[..len].copy_from_slice(&name[..len]);
        thread.registers = registers;
        Err(Stop::Done)
    }

    /// A regular file that may be executed.
    fn program_node(&mut self, tid: Tid, path: &[u8]) -> Result<NodeId> {
        let slot = self.resolve(tid, path, Last::Follow)?;
        let Place::Node(node) = slot.found.ok_or(Errno::ENOENT)? else {
            return Err(Errno::EACCES);
        };
        let viewer = self.viewer(tid);
        let regular = matches!(self.objects.node(node).kind, Kind::File(_));
        if !regular || !may(&self.objects, node, &viewer, right::EXECUTE) {
            return Err(Errno::EACCES);
        }
        Ok(node)
    }

    /// The program behind a path, through scripts to what interprets them.
    fn find_program(
        &mut self,
        tid: Tid,
        path: &[u8],
        mut arguments: Vec<Vec<u8>>,
    ) -> Result<(NodeId, Vec<u8>, Vec<Vec<u8>>)> {
        let mut path = path.to_vec();
        for _ in 0..=DEEPEST_SCRIPT {
            let node = self.program_node(tid, &path)?;
            let mut line = [0; SCRIPT_LINE];
            let len = self.objects.read(node, 0, &mut line)?;
            let Some(rest) = line[..len].strip_prefix(b"#!") else {
                return Ok((node, path, arguments));
            };
            let (interpreter, argument) = script_line(rest).ok_or(Errno::ENOEXEC)?;
            let mut all = vec![interpreter.to_vec()];
            all.extend(argument.map(<[u8]>::to_vec));
            all.push(path);
            all.extend(arguments.into_iter().skip(1));
            arguments = all;
            path = interpreter.to_vec();
        }
        Err(Errno::ELOOP)
    }

    /// Fills a new address space; returns the registers to start with.
    #[expect(clippy::too_many_arguments, reason = "all that makes up a program")]
    fn load(
        &mut self,
        space: &mut Space,
        node: NodeId,
        image: Image,
        interpreter: Option<(NodeId, Image)>,
        arguments: &[Vec<u8>],
        environment: &[Vec<u8>],
        path: &[u8],
    ) -> Result<Registers> {
        let base = if image.relocatable { PROGRAM_BASE } else { 0 };
        let executable = image.executable_stack;
        let program = map_image(space, &mut self.objects, node, image, Some(base))?;
        let heap = page_up(program.end).ok_or(Errno::ENOMEM)?;
        space.set_heap(heap);
        let loader = match interpreter {
            None => None,
            Some((node, image)) => Some(map_image(space, &mut self.objects, node, image, None)?),
        };
        self.vdso.map(space, &mut self.objects)?;
        let stack_prot = match executable {
            true => Prot::READ | Prot::WRITE | Prot::EXECUTE,
            false => Prot::READ | Prot::WRITE,
        };
        let stack = Region {
            end: STACK_TOP,
            prot: stack_prot,
            sharing: Sharing::Private,
            backing: Backing::Zeros,
            purpose: Purpose::Stack,
        };
        let bytes: usize = arguments
            .iter()
            .chain(environment)
            .map(|text| text.len() + 9)
            .sum();
        let len = page_up(FIRST_STACK + bytes as u64).ok_or(Errno::E2BIG)?;
        space.map(&mut self.objects, Some(STACK_TOP - len), true, len, stack)?;
        let sp = self.write_stack(
            space,
            arguments,
            environment,
            path,
            &program,
            loader.as_ref(),
        )?;
        let entry = loader.map_or(program.entry, |loader| loader.entry);
        Ok(Registers::start(entry, sp))
    }

    /// Writes arguments, environment and auxiliary vector; returns the stack
    /// pointer.
    fn write_stack(
        &mut self,
        space: &mut Space,
        arguments: &[Vec<u8>],
        environment: &[Vec<u8>],
        path: &[u8],
        program: &Loaded,
        loader: Option<&Loaded>,
    ) -> Result<u64> {
        let mut at = STACK_TOP - 8;
        let objects = &mut self.objects;
        let mut push = |space: &mut Space, bytes: &[u8]| -> Result<u64> {
            at -= bytes.len() as u64;
            space.write(objects, at, bytes)?;
            Ok(at)
        };
        let zero_ended = |text: &[u8]| {
            let mut bytes = text.to_vec();
            bytes.push(0);
            bytes
        };
        let name = push(space, &zero_ended(path))?;
        let mut pointers = |space: &mut Space, all: &[Vec<u8>]| -> Result<Vec<u64>> {
            let mut found = Vec::new();
            for text in all.iter().rev() {
                found.push(push(space, &zero_ended(text))?);
            }
            found.reverse();
            Ok(found)
        };
        let environment = pointers(space, environment)?;
        let arguments = pointers(space, arguments)?;
        let platform = push(space, b"x86_64\0")?;
        let random = [self.machine.random(), self.machine.random()];
        let random = push(space, random.as_bytes())?;

        let mut words = vec![arguments.len() as u64];
        words.extend(&arguments);
        words.push(0);
        words.extend(&environment);
        words.push(0);
        let pairs = [
            (AT_SYSINFO_EHDR, vdso::IMAGE_AT),
            (AT_HWCAP, self.machine.hardware()),
            (AT_PAGESZ, PAGE_SIZE),
            (AT_CLKTCK, 100),
            (AT_PHDR, program.base + program.image.headers.0),
            (AT_PHENT, 56),
            (AT_PHNUM, program.image.headers.1.into()),
            (AT_BASE, loader.map_or(0, |loader| loader.base)),
            (AT_FLAGS, 0),
            (AT_ENTRY, program.entry),
            (AT_UID, 0),
            (AT_EUID, 0),
            (AT_GID, 0),
            (AT_EGID, 0),
            (AT_SECURE, 0),
            (AT_RANDOM, random),
            (AT_EXECFN, name),
            (AT_PLATFORM, platform),
            (AT_NULL, 0),
        ];
        words.extend(
            pairs
                .iter()
                .flat_map(|(key, value)| [u64::from(*key), *value]),
        );
        let sp = random.wrapping_sub(words.len() as u64 * 8) & !15;
        space.write(&mut self.objects, sp, words.as_bytes())?;
        Ok(sp)
    }

    /// The process's memory is the new program's; other threads end.
    fn replace_memory(&mut self, tid: Tid, space: Space) {
        let pid = self.pid_of(tid);
        let others: Vec<_> = self.process_of(tid).threads.clone();
        for other in others.into_iter().filter(|other| *other != tid) {
            self.end_thread(other, super::Ending::Exit(0));
        }
        let id = self.spaces.insert(space);
        let old = self.process_of(tid).space.replace(id);
        if let Some(old) = old {
            self.release_space(old);
        }
        self.give_memory_back(pid);
    }

    /// What a new program keeps of its process, and what not.
    fn settle(&mut self, tid: Tid, path: &[u8], arguments: &[Vec<u8>], environment: &[Vec<u8>]) {
        let joined = |all: &[Vec<u8>]| {
            let texts = all.iter().flat_map(|text| text.iter().copied().chain([0]));
            texts.collect()
        };
        let absolute = self.absolute_path(tid, path);
        let pid = self.pid_of(tid);
        self.drop_timers(pid, false);
        let closing: Vec<_> = {
            let process = self.process_of(tid);
            process.actions.exec();
            process.executed = true;
            process.program = Program {
                path: absolute,
                arguments: joined(arguments),
                environment: joined(environment),
            };
            let files = process.files.iter();
            files
                .filter(|(_, descriptor)| descriptor.close_on_exec)
                .map(|(number, _)| number)
                .collect()
        };
        for number in closing {
            // It was there a moment ago.
            let _ = self.close(tid, number);
        }
        self.machine.forget_fpu(tid);
        let len = self.machine.fpu_len();
        let thread = self.thread(tid);
        thread.fpu = Fpu::new(len);
        (thread.fs_base, thread.gs_base) = (0, 0);
        (thread.clear_tid, thread.robust_list) = (0, 0);
        thread.rseq = None;
        thread.stack = SignalStack::default();
    }

    /// A program that is set to run as its owner does.
    fn change_owner(&mut self, tid: Tid, node: NodeId) {
        let meta = self.objects.node(node).meta;
        let owner = &mut self.process_of(tid).owner;
        if meta.mode & S_ISUID != 0 {
            owner.user.effective = meta.uid;
        }
        owner.user.saved = owner.user.effective;
        owner.group.saved = owner.group.effective;
    }
}

fn parse(objects: &Objects, node: NodeId) -> Result<Image> {
    Image::parse(|offset, into| objects.read(node, offset, into).unwrap_or(0))
}

/// The interpreter and its argument in a script's first line.
fn script_line(rest: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let line = rest[..end].trim_ascii();
    let split = line.iter().position(u8::is_ascii_whitespace);
    let (interpreter, argument) = match split {
        Some(at) => (&line[..at], Some(line[at..].trim_ascii())),
        None => (line, None),
    };
    (!interpreter.is_empty()).then_some((interpreter, argument))
}

/// Maps a program: at `base` if there is one, else where there is room.
fn map_image(
    space: &mut Space,
    objects: &mut Objects,
    node: NodeId,
    image: Image,
    base: Option<u64>,
) -> Result<Loaded> {
    let (start, len) = image.extent()?;
    let base = match base {
        Some(base) => base,
        None => {
            // A hole is found for all of it, then its parts are put there.
            let hole = Region {
                end: 0,
                prot: Prot::empty(),
                sharing: Sharing::Private,
                backing: Backing::Zeros,
                purpose: Purpose::Mapping,
            };
            let at = space.map(objects, None, false, len, hole)?;
            space.unmap(objects, at, len)?;
            at.wrapping_sub(start)
        }
    };
    for segment in &image.segments {
        let address = base.wrapping_add(segment.address);
        let first = page_down(address);
        let file_end = address.checked_add(segment.file).ok_or(Errno::ENOEXEC)?;
        let end = address
            .checked_add(segment.memory)
            .and_then(page_up)
            .ok_or(Errno::ENOEXEC)?;
        let file_pages = page_up(file_end).ok_or(Errno::ENOEXEC)?;
        let region = |backing| Region {
            end: 0,
            prot: segment.prot,
            sharing: Sharing::Private,
            backing,
            purpose: Purpose::Mapping,
        };
        if segment.file > 0 {
            let backing = Backing::File(node, page_down(segment.offset));
            objects.hold(node);
            let mapped = space.map(
                objects,
                Some(first),
                true,
                file_pages - first,
                region(backing),
            );
            if let Err(errno) = mapped {
                objects.release(node);
                return Err(errno);
            }
            let rest = index(file_pages - file_end);
            if segment.memory > segment.file && rest > 0 && segment.prot.contains(Prot::WRITE) {
                space.write(objects, file_end, &vec![0; rest])?;
            }
        }
        let zeros = if segment.file > 0 { file_pages } else { first };
        if end > zeros {
            space.map(
                objects,
                Some(zeros),
                true,
                end - zeros,
                region(Backing::Zeros),
            )?;
        }
    }
    Ok(Loaded {
        base,
        entry: base.wrapping_add(image.entry),
        end: base.wrapping_add(start).wrapping_add(len),
        image,
    })
}

#[cfg(test)]
mod tests {
    use super::script_line;

    #[test]
    fn the_first_line_names_interpreter_and_one_argument() {
        let sh = &b"/bin/sh"[..];
        assert_eq!(script_line(b"/bin/sh\n"), Some((sh, None)));
        assert_eq!(script_line(b" /bin/sh \nx"), Some((sh, None)));
        let two = script_line(b" /bin/sh  -e -u \n");
        assert_eq!(two, Some((sh, Some(&b"-e -u"[..]))));
        assert_eq!(script_line(b"\n"), None);
        assert_eq!(script_line(b"/no/end/of/line"), None);
    }
}
