//! Guests of a few dozen instructions, each to do one thing that no sane
//! kernel does.
//!
//! A guest is assembled on the host and wrapped as a bzImage, so that it is
//! loaded like any other kernel: in 64-bit mode, with the first 4 GiB mapped
//! to themselves. It gets descriptor tables of its own, catches its own
//! exceptions, prints a verdict on the serial port and switches itself off.
//!
//! ```text
//!   0x0020000  code for a second vCPU, in real mode
//!   0x1000000  the image: code from 0x200 on, then tables
//!   0x2000000  what the handlers leave: see [`STATE`]
//!   0x2e00000  top of the stack that exceptions in user mode get
//!   0x2f00000  top of the stack
//!   0x3000000  free for cases: see [`SCRATCH`]
//! ```
//!
//! R13 holds [`STATE`], R14 the number of a failed check, and R15 is changed
//! by [`Guest::attempt`]. The other registers are the case's.

mod boot;
mod image;

use std::ops::{Deref, DerefMut};

use iced_x86::code_asm::{
    AsmMemoryOperand, CodeAssembler, CodeLabel, al, dword_ptr, dx, eax, ecx, edx, ptr, qword_ptr,
    r13, r14, r15, rax, rbx, rcx, rdi, rdx, rsi, rsp,
};
use iced_x86::{BlockEncoderOptions, IcedError};

pub use boot::{Expect, Machine, check};

/// What assembling leads to; a case passes errors on.
pub type Assembled = Result<(), IcedError>;

/// Where the image is loaded.
const LOAD: u64 = 0x100_0000;
/// Where the code starts in the image.
const ENTRY: u64 = 0x200;
/// Where the tables are in the image.
const TABLES: u64 = 0x1_0000;
const IDT: u64 = LOAD + TABLES;
const GDT: u64 = IDT + 0x1000;
const TSS: u64 = GDT + 0x80;
const IDT_REGISTER: u64 = GDT + 0x100;
const GDT_REGISTER: u64 = GDT + 0x110;
/// The second vCPU's code in the image.
const SECOND_CODE: u64 = GDT + 0x200;
const SECOND_CODE_ROOM: usize = 0x800;
/// Where the second vCPU starts: a real-mode page.
const SECOND_START: u64 = 0x2_0000;
const IMAGE_SIZE: usize = 0x1_2000;

/// What the handlers leave behind, by offset: [`state`].
pub const STATE: u64 = 0x200_0000;
/// Memory that nothing else uses, up to 64 MiB.
pub const SCRATCH: u64 = 0x300_0000;
const STACK: u64 = 0x2f0_0000;
const PRIVILEGED_STACK: u64 = 0x2e0_0000;
/// The page tables that the guest is entered with.
pub const PAGE_TABLES: u64 = 0x9000;

/// What [`Guest::map_window`] maps, 2 MiB.
pub const WINDOW: u64 = 0xc000_0000;

/// Kernel code, kernel data, user code, user data and task segments.
pub mod selector {
    #![expect(missing_docs, reason = "named for what they are")]
    pub const CODE: u16 = 0x10;
    pub const DATA: u16 = 0x18;
    pub const USER_CODE: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2b;
    pub const TASK: u16 = 0x30;
}

/// Offsets from [`STATE`].
pub mod state {
    /// The last exception's vector, or [`NO_EXCEPTION`](super::NO_EXCEPTION).
    pub const VECTOR: i32 = 0;
    /// Its error code.
    pub const ERROR: i32 = 8;
    /// Where execution goes on after an exception; 0 if none is expected, 1
    /// for where it was.
    pub const RECOVERY: i32 = 0x10;
    /// Exceptions so far.
    pub const COUNT: i32 = 0x18;
    /// CR2 at the last.
    pub const CR2: i32 = 0x20;
    /// RIP at the last.
    pub const RIP: i32 = 0x28;
    /// Interrupts so far, eight bytes for each vector.
    pub const INTERRUPTS: i32 = 0x800;
}

/// What [`state::VECTOR`] holds if there was no exception.
pub const NO_EXCEPTION: i32 = 0x100;

/// Vectors of exceptions.
pub mod vector {
    #![expect(missing_docs, reason = "the manual's names")]
    pub const DB: i32 = 1;
    pub const UD: i32 = 6;
    pub const DF: i32 = 8;
    pub const GP: i32 = 13;
    pub const PF: i32 = 14;
    pub const AC: i32 = 17;
}

/// Exceptions that push an error code.
const WITH_ERROR: [u32; 8] = [8, 10, 11, 12, 13, 14, 17, 21];

/// A guest being written. It is an assembler, with words for what guests do
/// all the time.
pub struct Guest {
    code: CodeAssembler,
    fail: CodeLabel,
    print: CodeLabel,
    power_off: CodeLabel,
    handlers: Vec<CodeLabel>,
    checks: Vec<String>,
    second: Vec<u8>,
}

impl Deref for Guest {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.code
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.code
    }
}

/// A place in [`STATE`].
#[must_use]
pub fn at(offset: i32) -> AsmMemoryOperand {
    qword_ptr(r13 + offset)
}

impl Guest {
    fn new() -> Result<Self, IcedError> {
        let mut code = CodeAssembler::new(64)?;
        let labels = (0..3).map(|_| code.create_label()).collect::<Vec<_>>();
        let handlers = (0..256).map(|_| code.create_label()).collect();
        let mut guest = Self {
            fail: labels[0],
            print: labels[1],
            power_off: labels[2],
            code,
            handlers,
            checks: vec!["an exception that nobody expected".into()],
            second: Vec::new(),
        };
        guest.enter()?;
        Ok(guest)
    }

    /// The first instructions.
    fn enter(&mut self) -> Assembled {
        self.mov(rsp, STACK)?;
        self.mov(r13, STATE)?;
        self.mov(rax, IDT_REGISTER)?;
        self.lidt(ptr(rax))?;
        self.mov(rax, GDT_REGISTER)?;
        self.lgdt(ptr(rax))?;
        self.mov(eax, u32::from(selector::TASK))?;
        self.ltr(iced_x86::code_asm::ax)?;
        self.mov(at(state::VECTOR), NO_EXCEPTION)
    }

    /// Puts a label here.
    ///
    /// # Errors
    /// If it has been put somewhere.
    pub fn place(&mut self, label: &mut CodeLabel) -> Assembled {
        self.set_label(label)?;
        // An instruction has one label at most.
        self.nop()
    }

    /// Runs code that may raise an exception; either way it goes on behind.
    ///
    /// # Errors
    /// The assembler's.
    pub fn attempt(&mut self, code: impl FnOnce(&mut Self) -> Assembled) -> Assembled {
        let mut behind = self.create_label();
        self.mov(at(state::VECTOR), NO_EXCEPTION)?;
        self.lea(r15, ptr(behind))?;
        self.mov(at(state::RECOVERY), r15)?;
        code(self)?;
        self.place(&mut behind)?;
        self.mov(at(state::RECOVERY), 0)
    }

    /// Code that must raise this exception.
    ///
    /// # Errors
    /// The assembler's.
    pub fn faults(
        &mut self,
        what: &str,
        vector: i32,
        code: impl FnOnce(&mut Self) -> Assembled,
    ) -> Assembled {
        self.attempt(code)?;
        self.require(what, |guest, ok| {
            guest.cmp(at(state::VECTOR), vector)?;
            guest.je(ok)
        })
    }

    /// Code that must not raise any exception.
    ///
    /// # Errors
    /// The assembler's.
    pub fn runs(&mut self, what: &str, code: impl FnOnce(&mut Self) -> Assembled) -> Assembled {
        self.faults(what, NO_EXCEPTION, code)
    }

    /// A check: `code` jumps to the label it gets if all is well.
    ///
    /// # Errors
    /// The assembler's.
    pub fn require(
        &mut self,
        what: &str,
        code: impl FnOnce(&mut Self, CodeLabel) -> Assembled,
    ) -> Assembled {
        let mut ok = self.create_label();
        code(self, ok)?;
        let number = u64::try_from(self.checks.len()).expect("a small number");
        self.checks.push(what.to_owned());
        self.mov(r14, number)?;
        let fail = self.fail;
        self.jmp(fail)?;
        self.place(&mut ok)
    }

    /// RAX must hold this.
    ///
    /// # Errors
    /// The assembler's.
    pub fn require_rax(&mut self, what: &str, value: u64) -> Assembled {
        self.require(what, |guest, ok| {
            guest.mov(r15, value)?;
            guest.cmp(rax, r15)?;
            guest.je(ok)
        })
    }

    /// RDMSR, the whole value into RAX.
    ///
    /// # Errors
    /// The assembler's.
    pub fn read_msr(&mut self, number: u32) -> Assembled {
        self.mov(ecx, number)?;
        self.rdmsr()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    /// WRMSR.
    ///
    /// # Errors
    /// The assembler's.
    pub fn write_msr(&mut self, number: u32, value: u64) -> Assembled {
        self.mov(ecx, number)?;
        self.mov(rax, value)?;
        self.mov(rdx, value >> 32)?;
        self.wrmsr()
    }

    /// OUT of a byte.
    ///
    /// # Errors
    /// The assembler's.
    pub fn out_byte(&mut self, port: u16, value: u8) -> Assembled {
        self.mov(edx, u32::from(port))?;
        self.mov(eax, u32::from(value))?;
        self.out(dx, al)
    }

    /// VMMCALL with this in RAX.
    ///
    /// # Errors
    /// The assembler's.
    pub fn hypercall(&mut self, number: u64) -> Assembled {
        self.mov(rax, number)?;
        self.db(&[0x0f, 0x01, 0xd9])
    }

    /// CPUID, for its exit; changes RAX, RCX and RDX.
    ///
    /// # Errors
    /// The assembler's.
    pub fn cpuid_keeping_rbx(&mut self) -> Assembled {
        self.push(rbx)?;
        self.xor(eax, eax)?;
        self.cpuid()?;
        self.pop(rbx)
    }

    /// Repeats code; RBX counts down from `times`.
    ///
    /// # Errors
    /// The assembler's.
    pub fn repeat(&mut self, times: u64, code: impl FnOnce(&mut Self) -> Assembled) -> Assembled {
        self.mov(rbx, times)?;
        let mut again = self.create_label();
        self.place(&mut again)?;
        code(self)?;
        self.dec(rbx)?;
        self.jnz(again)
    }

    /// Stores a doubleword at an address below 4 GiB; changes RDI.
    ///
    /// # Errors
    /// The assembler's.
    pub fn store(&mut self, address: u64, value: u32) -> Assembled {
        self.mov(rdi, address)?;
        self.mov(eax, value)?;
        self.mov(dword_ptr(rdi), eax)
    }

    /// Loads a doubleword from an address into EAX; changes RDI.
    ///
    /// # Errors
    /// The assembler's.
    pub fn load(&mut self, address: u64) -> Assembled {
        self.mov(rdi, address)?;
        self.mov(eax, dword_ptr(rdi))
    }

    /// Software-enables the local APIC.
    ///
    /// # Errors
    /// The assembler's.
    pub fn enable_apic(&mut self) -> Assembled {
        self.write_msr(0x80f, 0x1ff)
    }

    /// At least so many interrupts of a vector must have come.
    ///
    /// # Errors
    /// The assembler's.
    pub fn require_interrupts(&mut self, what: &str, vector: u8, count: i32) -> Assembled {
        self.require(what, |guest, ok| {
            let counter = at(state::INTERRUPTS + i32::from(vector) * 8);
            guest.mov(rax, counter)?;
            guest.cmp(rax, count)?;
            guest.jae(ok)
        })
    }

    /// Goes on in user mode, on the same stack. All memory is opened to it.
    ///
    /// # Errors
    /// The assembler's.
    pub fn enter_user_mode(&mut self) -> Assembled {
        // The tables of all levels lie behind each other.
        self.mov(rdi, PAGE_TABLES)?;
        self.repeat(6 * 512, |guest| {
            guest.or(qword_ptr(rdi), 4)?;
            guest.add(rdi, 8)
        })?;
        // Entries that were empty stay absent: only bit 2 is set.
        self.mov(rax, iced_x86::code_asm::cr3)?;
        self.mov(iced_x86::code_asm::cr3, rax)?;
        let mut user = self.create_label();
        self.mov(rax, rsp)?;
        self.push(i32::from(selector::USER_DATA))?;
        self.push(rax)?;
        self.push(2)?;
        self.push(i32::from(selector::USER_CODE))?;
        self.lea(rax, ptr(user))?;
        self.push(rax)?;
        self.iretq()?;
        self.place(&mut user)
    }

    /// What the second vCPU executes, in 16-bit code, when it is started.
    ///
    /// # Errors
    /// The assembler's.
    pub fn second_vcpu(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Assembled {
        let mut second = CodeAssembler::new(16)?;
        code(&mut second)?;
        self.second = second.assemble(0)?;
        assert!(self.second.len() <= SECOND_CODE_ROOM, "too much code");
        Ok(())
    }

    /// Lets the second vCPU end the VM well, a while after it is started:
    /// whatever the first does meanwhile, the hypervisor goes on.
    ///
    /// # Errors
    /// The assembler's.
    pub fn let_second_vcpu_end_it(&mut self) -> Assembled {
        self.second_vcpu(|code| {
            use iced_x86::code_asm::{ax, cx, dx};
            code.mov(cx, 2000)?;
            let mut again = code.create_label();
            code.set_label(&mut again)?;
            code.in_(al, 0x80)?;
            code.dec(cx)?;
            code.jnz(again)?;
            code.mov(dx, 0x3f8)?;
            for byte in *b"PASS\r\n" {
                code.mov(al, u32::from(byte))?;
                code.out(dx, al)?;
            }
            code.mov(dx, 0x600)?;
            code.mov(ax, 0x34)?;
            code.out(dx, al)
        })?;
        self.start_second_vcpu()
    }

    /// Maps the 2 MiB from [`WINDOW`] to another guest physical address.
    ///
    /// # Errors
    /// The assembler's.
    pub fn map_window(&mut self, gpa: u64) -> Assembled {
        const WINDOW_ENTRY: u64 = PAGE_TABLES + 5 * 4096;
        self.mov(rdi, WINDOW_ENTRY)?;
        self.mov(rax, gpa | 0x83)?;
        self.mov(qword_ptr(rdi), rax)?;
        self.mov(rdi, WINDOW)?;
        self.invlpg(ptr(rdi))
    }

    /// Sends the second vCPU INIT and its start-up page.
    ///
    /// # Errors
    /// The assembler's.
    pub fn start_second_vcpu(&mut self) -> Assembled {
        self.mov(rsi, SECOND_CODE)?;
        self.mov(rdi, SECOND_START)?;
        self.mov(rcx, SECOND_CODE_ROOM as u64)?;
        self.rep().movsb()?;
        self.write_msr(0x830, 1 << 32 | 0x4500)?;
        self.write_msr(0x830, 1 << 32 | 0x4600 | SECOND_START >> 12)
    }

    /// Prints a line.
    ///
    /// # Errors
    /// The assembler's.
    pub fn say(&mut self, line: &str) -> Assembled {
        for byte in line.bytes().chain(*b"\r\n") {
            self.out_byte(0x3f8, byte)?;
        }
        Ok(())
    }

    /// Says that all is well, and switches off.
    ///
    /// # Errors
    /// The assembler's.
    pub fn pass(&mut self) -> Assembled {
        self.say("PASS")?;
        let power_off = self.power_off;
        self.jmp(power_off)
    }

    /// The shared code behind the case's own.
    fn finish(mut self) -> Result<Finished, IcedError> {
        self.pass()?;
        self.emit_verdicts()?;
        self.emit_handlers()?;
        let done = self.code.assemble_options(
            LOAD + ENTRY,
            BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
        )?;
        let handlers = self
            .handlers
            .iter()
            .map(|label| done.label_ip(label))
            .collect::<Result<Vec<u64>, _>>()?;
        Ok(Finished {
            image: image::bzimage(&done.inner.code_buffer, &handlers, &self.second),
            checks: self.checks,
        })
    }

    fn emit_verdicts(&mut self) -> Assembled {
        let (mut fail, mut print, mut power_off) = (self.fail, self.print, self.power_off);
        // FAIL number vector error RIP RAX, all in hexadecimal.
        self.place(&mut fail)?;
        self.mov(rsp, STACK)?;
        self.push(rax)?;
        for byte in *b"FAIL" {
            self.out_byte(0x3f8, byte)?;
        }
        self.mov(rax, r14)?;
        self.call(print)?;
        self.mov(r13, STATE)?;
        for offset in [state::VECTOR, state::ERROR, state::RIP] {
            self.mov(rax, at(offset))?;
            self.call(print)?;
        }
        self.pop(rax)?;
        self.call(print)?;
        self.say("")?;
        self.place(&mut power_off)?;
        self.out_byte(0x600, 0x34)?;
        let mut stay = self.create_label();
        self.place(&mut stay)?;
        self.hlt()?;
        self.jmp(stay)?;

        // A space and RAX.
        self.place(&mut print)?;
        self.mov(rsi, rax)?;
        self.out_byte(0x3f8, b' ')?;
        self.repeat(16, |guest| {
            guest.rol(rsi, 4)?;
            guest.mov(eax, iced_x86::code_asm::esi)?;
            guest.and(eax, 15)?;
            guest.cmp(eax, 10)?;
            let mut digit = guest.create_label();
            guest.jb(digit)?;
            guest.add(eax, i32::from(b'a' - b'0' - 10))?;
            guest.place(&mut digit)?;
            guest.add(eax, i32::from(b'0'))?;
            guest.mov(edx, 0x3f8)?;
            guest.out(dx, al)
        })?;
        self.ret()
    }

    fn emit_handlers(&mut self) -> Assembled {
        let mut common = self.create_label();
        for number in 0..256_u32 {
            let mut label = self.handlers[usize::try_from(number).expect("small")];
            self.set_label(&mut label)?;
            self.handlers[usize::try_from(number).expect("small")] = label;
            if !WITH_ERROR.contains(&number) {
                self.push(0)?;
            }
            self.push(i32::try_from(number).expect("small"))?;
            self.jmp(common)?;
        }
        // Stack: RBX, RAX, vector, error, RIP, CS, RFLAGS, RSP, SS.
        let saved = |slot: i32| qword_ptr(rsp + slot * 8);
        self.place(&mut common)?;
        self.push(rax)?;
        self.push(rbx)?;
        let kept = |offset| qword_ptr(rbx + offset);
        self.mov(rbx, STATE)?;
        self.mov(rax, saved(2))?;
        self.cmp(rax, 32)?;
        let mut interrupt = self.create_label();
        self.jae(interrupt)?;
        for (slot, offset) in [(2, state::VECTOR), (3, state::ERROR), (4, state::RIP)] {
            self.mov(rax, saved(slot))?;
            self.mov(kept(offset), rax)?;
        }
        self.mov(rax, iced_x86::code_asm::cr2)?;
        self.mov(kept(state::CR2), rax)?;
        self.inc(kept(state::COUNT))?;
        let (mut leave, mut unexpected) = (self.create_label(), self.create_label());
        self.mov(rax, kept(state::RECOVERY))?;
        self.cmp(rax, 1)?;
        self.jb(unexpected)?;
        self.je(leave)?;
        self.mov(saved(4), rax)?;
        self.mov(saved(5), i32::from(selector::CODE))?;
        self.mov(saved(6), 2)?;
        self.mov(saved(8), i32::from(selector::DATA))?;
        self.place(&mut leave)?;
        self.pop(rbx)?;
        self.pop(rax)?;
        self.add(rsp, 16)?;
        self.iretq()?;
        self.place(&mut unexpected)?;
        self.xor(r14, r14)?;
        let fail = self.fail;
        self.jmp(fail)?;

        self.place(&mut interrupt)?;
        self.inc(qword_ptr(rbx + rax * 8 + state::INTERRUPTS))?;
        self.push(rcx)?;
        self.push(rdx)?;
        self.write_msr(0x80b, 0)?;
        self.pop(rdx)?;
        self.pop(rcx)?;
        self.jmp(leave)
    }
}

/// A guest ready to be booted.
struct Finished {
    image: Vec<u8>,
    /// What the numbers of failed checks stand for.
    checks: Vec<String>,
}
