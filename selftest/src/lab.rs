//! A micro-guest, and everything about it that a case may change.
//!
//! It has 4 MiB of memory at 0, mapped to themselves by its own tables and to
//! the lab's memory by the nested ones: small pages up to 2 MiB, then a large
//! one. It starts in 64-bit mode at [`CODE`].
//!
//! ```text
//!   0x01000  descriptor table, task segment
//!   0x02000  interrupt descriptor table
//!   0x03000  page tables, one of each level
//!   0x08000  code, and behind it a VMMCALL: the end
//!   0x09000  handlers: a VMMCALL and an IRET for each vector
//!   0x0e000  stack; another for what comes from user mode
//!   0x20000  data
//! ```
//!
//! The guest's VMMCALL, VMRUN and shutdown are always intercepted; whatever
//! else a case wants, it sets. By default everything is flushed at each entry.
#![expect(unsafe_code, reason = "memory for guests, and running them")]

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;

use hypervisor::arch::apic;
use hypervisor::arch::svm::switch;
use hypervisor::arch::svm::vmcb::{
    Misc1, Misc2, NESTED_PAGING, Segment, TLB_FLUSH_ALL, VIntr, Vmcb,
};
use hypervisor::vcpu::registers::Registers;
use vmm_shared::shm::SharedMem;
use zerocopy::FromZeros;

use crate::host;
use crate::suite::{Verdict, equal};
use crate::tables::{self, Tables};

const MEMORY: u64 = 4 << 20;
const GDT: u64 = 0x1000;
pub(crate) const TSS: u64 = 0x1800;
const IDT: u64 = 0x2000;
const TABLES: u64 = 0x3000;
pub(crate) const CODE: u64 = 0x8000;
pub(crate) const HANDLERS: u64 = 0x9000;
const HANDLER_LEN: usize = 16;
const HANDLER_SIZE: u64 = HANDLER_LEN as u64;
pub(crate) const STACK: u64 = 0xf000;
const PRIVILEGED_STACK: u64 = 0x11000;
/// Eight pages for cases.
pub(crate) const DATA: u64 = 0x20000;
const DATA_SIZE: u64 = 8 << 12;
/// The vector of virtual interrupts.
pub(crate) const VECTOR: u8 = 0x51;
/// The large page.
pub(crate) const LARGE_PAGE: u64 = 0x20_0000;

const VMMCALL_LENGTH: u64 = 3;
const ENTER: [u8; 3] = [0x0f, 0x01, 0xd9];

/// Selectors.
pub(crate) const KERNEL_CODE: u16 = 0x08;
pub(crate) const KERNEL_DATA: u16 = 0x10;
pub(crate) const USER_CODE: u16 = 0x1b;
pub(crate) const USER_DATA: u16 = 0x23;
pub(crate) const TASK: u16 = 0x28;
/// A free place in the table.
pub(crate) const SPARE: u16 = 0x38;

pub(crate) const CR0: u64 = 0x8000_0033;
pub(crate) const CR4: u64 = 0x620;
pub(crate) const EFER: u64 = 0x1d01;
pub(crate) const RFLAGS: u64 = 2;
pub(crate) const RFLAGS_TF: u64 = 1 << 8;
pub(crate) const RFLAGS_IF: u64 = 1 << 9;
pub(crate) const RFLAGS_RF: u64 = 1 << 16;
const PAT: u64 = 0x0007_0406_0007_0406;

/// Why a micro-guest has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It came to the end of its code.
    End,
    /// It took an interrupt or exception.
    Vector(u8),
    /// Another exit: its code.
    Exit(u64),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("the end of the guest's code"),
            Self::Vector(vector) => write!(f, "vector {vector:#x} delivered in the guest"),
            Self::Exit(code) => write!(f, "exit {code:#x}"),
        }
    }
}

/// The exit codes that cases name.
pub(crate) mod exit {
    pub(crate) const INTR: u64 = 0x60;
    pub(crate) const NMI: u64 = 0x61;
    pub(crate) const SMI: u64 = 0x62;
    pub(crate) const INIT: u64 = 0x63;
    pub(crate) const VINTR: u64 = 0x64;
    pub(crate) const CR0_SELECTIVE: u64 = 0x65;
    pub(crate) const CPUID: u64 = 0x72;
    pub(crate) const HLT: u64 = 0x78;
    pub(crate) const IOIO: u64 = 0x7b;
    pub(crate) const MSR: u64 = 0x7c;
    pub(crate) const TASK_SWITCH: u64 = 0x7d;
    pub(crate) const FERR_FREEZE: u64 = 0x7e;
    pub(crate) const SHUTDOWN: u64 = 0x7f;
    pub(crate) const VMMCALL: u64 = 0x81;
    pub(crate) const NPF: u64 = 0x400;
    pub(crate) const INVALID: u64 = u64::MAX;
    pub(crate) const EXCEPTIONS: u64 = 0x40;
}

/// A micro-guest.
pub(crate) struct Lab {
    pub vmcb: Box<Vmcb>,
    pub registers: Registers,
    /// The guest's memory.
    pub memory: SharedMem,
    /// The guest's own tables.
    pub tables: Tables,
    pub nested: Tables,
    /// I/O permission map, all clear.
    pub ports: SharedMem,
    /// MSR permission map, all clear.
    pub msrs: SharedMem,
    /// Host address of the guest's memory.
    pub memory_at: u64,
    code_len: u64,
    apic_id: u8,
}

/// An address of the guest as a place in its memory.
fn place(at: u64) -> usize {
    usize::try_from(at).expect("64-bit")
}

/// Zeroed memory, never given back, and its address.
fn memory(len: usize, align: usize) -> (SharedMem, u64) {
    let layout = Layout::from_size_align(len, align).expect("legal");
    // SAFETY: the layout is not empty.
    let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("the node's memory suffices");
    let at = base.as_ptr().expose_provenance() as u64;
    // SAFETY: fresh, aligned, never given back, and reached through this and
    // by the processor only.
    (unsafe { SharedMem::new(base, len) }, at)
}

impl Lab {
    pub(crate) fn new() -> Self {
        const PAGE: usize = 4096;
        let (memory_, memory_at) = memory(place(MEMORY), place(LARGE_PAGE));
        let (nested, nested_at) = memory(tables::SIZE, PAGE);
        let own = memory_
            .window(place(TABLES), tables::SIZE)
            .expect("within the memory");
        let (ports, _) = memory(3 * PAGE, PAGE);
        let (msrs, _) = memory(2 * PAGE, PAGE);
        Self {
            vmcb: Vmcb::new_box_zeroed().expect("the node's memory suffices"),
            registers: Registers::default(),
            memory: memory_,
            tables: Tables::new(own, TABLES, 0),
            nested: Tables::new(nested, nested_at, memory_at),
            ports,
            msrs,
            memory_at,
            code_len: 0,
            apic_id: apic::id(),
        }
    }

    /// Everything as a case finds it.
    pub(crate) fn reset(&mut self) {
        self.tables.reset();
        self.nested.reset();
        for map in [&self.ports, &self.msrs] {
            clear(map, 0, map.len());
        }
        clear(&self.memory, place(DATA), place(DATA_SIZE));
        self.write_descriptors();
        self.write_handlers();
        self.set_control();
        self.set_state();
        self.registers = Registers {
            rip: CODE,
            rflags: RFLAGS,
            ..Registers::default()
        };
        self.registers.gpr[4] = STACK;
        self.code(&[]);
    }

    fn write_descriptors(&self) {
        let task_low = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
        let gdt = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            task_low,
            0,
        ];
        for (index, descriptor) in gdt.into_iter().enumerate() {
            self.set(GDT + index as u64 * 8, descriptor);
        }
        self.memory
            .write(place(TSS + 4), &PRIVILEGED_STACK)
            .expect("within the memory");
        // The I/O map's offset lies behind the limit.
        self.memory
            .write(place(TSS + 0x66), &0x68_u16)
            .expect("within the memory");
        for vector in 0..256 {
            const USER_VECTORS: [u64; 3] = [3, 4, 0x80];
            let handler = HANDLERS + vector * HANDLER_SIZE;
            let kind = if USER_VECTORS.contains(&vector) {
                0xee
            } else {
                0x8e
            };
            let low = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | kind << 40;
            self.set(IDT + vector * 16, low);
            self.set(IDT + vector * 16 + 8, 0);
        }
    }

    fn write_handlers(&self) {
        const WITH_ERROR: [u64; 8] = [8, 10, 11, 12, 13, 14, 17, 21];
        for vector in 0..256 {
            let mut stub = [0x90; HANDLER_LEN];
            stub[..3].copy_from_slice(&ENTER);
            let rest: &[u8] = match WITH_ERROR.contains(&vector) {
                true => &[0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf],
                false => &[0x48, 0xcf],
            };
            stub[3..3 + rest.len()].copy_from_slice(rest);
            self.put(HANDLERS + vector * HANDLER_SIZE, &stub);
        }
    }

    fn set_control(&mut self) {
        *self.vmcb = Vmcb::new_zeroed();
        let control = &mut self.vmcb.control;
        control.intercept_misc1 = Misc1::SHUTDOWN.bits();
        control.intercept_misc2 = (Misc2::VMRUN | Misc2::VMMCALL).bits();
        control.iopm_base = self.ports.as_ptr().addr() as u64;
        control.msrpm_base = self.msrs.as_ptr().addr() as u64;
        control.asid = 1;
        control.tlb_control = TLB_FLUSH_ALL;
        control.v_intr = VIntr::V_INTR_MASKING.bits();
        control.nested_control = NESTED_PAGING;
        control.nested_cr3 = self.nested.root();
    }

    fn set_state(&mut self) {
        let segment = |selector, attributes| Segment {
            selector,
            attributes,
            limit: u32::MAX,
            base: 0,
        };
        let table = |base, limit| Segment {
            limit,
            base,
            ..Segment::default()
        };
        let save = &mut self.vmcb.save;
        save.cs = segment(KERNEL_CODE, 0xa9b);
        let data = segment(KERNEL_DATA, 0xc93);
        (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
        save.gdtr = table(GDT, 0x7f);
        save.idtr = table(IDT, 0xfff);
        save.ldtr = segment(0, 0x82);
        save.tr = Segment {
            selector: TASK,
            attributes: 0x8b,
            limit: 0x67,
            base: TSS,
        };
        (save.cr0, save.cr3, save.cr4) = (CR0, self.tables.root(), CR4);
        save.efer = EFER;
        (save.dr6, save.dr7) = (0xffff_0ff0, 0x400);
        save.g_pat = PAT;
    }

    /// Makes user mode the state at entry.
    pub(crate) fn in_user_mode(&mut self) {
        let save = &mut self.vmcb.save;
        save.cpl = 3;
        (save.cs.selector, save.cs.attributes) = (USER_CODE, 0xafb);
        let data = Segment {
            selector: USER_DATA,
            attributes: 0xcf3,
            ..save.ss
        };
        (save.ds, save.es, save.ss) = (data, data, data);
    }

    /// Makes 32-bit protected mode without paging the state at entry.
    pub(crate) fn in_32_bit_mode(&mut self) {
        let save = &mut self.vmcb.save;
        save.cs.attributes = 0xc9b;
        save.cr0 &= !(1 << 31);
        save.efer = 1 << 12;
    }

    /// Makes real mode the state at entry.
    pub(crate) fn in_real_mode(&mut self) {
        self.in_32_bit_mode();
        let save = &mut self.vmcb.save;
        save.cr0 &= !1;
        let data = Segment {
            selector: 0,
            attributes: 0x93,
            limit: 0xffff,
            base: 0,
        };
        (save.ds, save.es, save.ss) = (data, data, data);
        save.cs = Segment {
            attributes: 0x9b,
            ..data
        };
        (save.idtr.base, save.idtr.limit) = (0, 0x3ff);
    }

    /// What the guest runs.
    pub(crate) fn code(&mut self, code: &[u8]) {
        self.put(CODE, code);
        self.put(CODE + code.len() as u64, &ENTER);
        self.code_len = code.len() as u64;
    }

    /// Bytes into the guest's memory.
    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory
            .write_bytes(place(at), bytes)
            .expect("within the memory");
    }

    /// A word into it.
    pub(crate) fn set(&self, at: u64, value: u64) {
        self.memory
            .write(place(at), &value)
            .expect("within the memory");
    }

    /// A word of it.
    pub(crate) fn get(&self, at: u64) -> u64 {
        self.memory.read(place(at)).expect("within the memory")
    }

    /// Runs the guest until it stops.
    pub(crate) fn run(&mut self) -> Stop {
        self.run_with(|_| {}, || {})
    }

    /// The same, with something to do while everything is held back (GIF = 0):
    /// right before the entry, with this core's APIC id, and right after.
    pub(crate) fn run_with(&mut self, before: impl FnOnce(u8), after: impl FnOnce()) -> Stop {
        switch::hold_interrupts();
        before(self.apic_id);
        switch::load(&self.vmcb);
        // SAFETY: 1. whatever is wrong with the block is what the case tries;
        // 2. its tables and maps lead to the lab's memory only. A platform that
        // does not keep to that ends the node, which the launcher reports.
        unsafe { switch::run(&mut self.vmcb, &mut self.registers) };
        switch::save(&mut self.vmcb);
        after();
        host::disarm();
        switch::release_interrupts();
        self.stop()
    }

    fn stop(&self) -> Stop {
        let rip = self.vmcb.save.rip;
        let handler = rip.wrapping_sub(HANDLERS);
        match self.vmcb.control.exit_code {
            exit::VMMCALL if rip == CODE + self.code_len => Stop::End,
            exit::VMMCALL
                if handler.is_multiple_of(HANDLER_SIZE) && handler < 256 * HANDLER_SIZE =>
            {
                Stop::Vector(u8::try_from(handler / HANDLER_SIZE).expect("checked"))
            }
            // Some store 32 bits; a case of its own looks at that.
            0xffff_ffff => Stop::Exit(exit::INVALID),
            code => Stop::Exit(code),
        }
    }

    /// Lets the guest go on behind a VMMCALL, like that of a handler.
    pub(crate) fn go_on(&mut self) {
        self.registers.rip += VMMCALL_LENGTH;
    }

    /// Runs the guest, which must stop so.
    pub(crate) fn expect(&mut self, stop: Stop) -> Verdict {
        let seen = self.run();
        equal(stop, seen)
    }

    /// Runs the guest, which must exit so at its first instruction.
    pub(crate) fn expect_exit_at_start(&mut self, code: u64) -> Verdict {
        self.expect(Stop::Exit(code))?;
        crate::suite::same("exit at", CODE, self.registers.rip)
    }

    /// The error code, or RIP, on top of the guest's stack.
    pub(crate) fn top_of_stack(&self) -> u64 {
        self.get(self.registers.gpr[4])
    }

    /// Intercepts exceptions.
    pub(crate) fn intercept_exception(&mut self, vector: u8) {
        self.vmcb.control.intercept_exceptions |= 1 << vector;
    }

    /// Makes a virtual interrupt pending, with [`VECTOR`].
    pub(crate) fn offer_interrupt(&mut self, priority: u64) {
        let offer = VIntr::V_IRQ.bits() | priority << 16 | u64::from(VECTOR) << 32;
        self.vmcb.control.v_intr |= offer;
    }

    /// Intercepts.
    pub(crate) fn intercept(&mut self, what: Misc1) {
        self.vmcb.control.intercept_misc1 |= what.bits();
    }
}

fn clear(memory: &SharedMem, from: usize, len: usize) {
    for at in (from..from + len).step_by(8) {
        memory.write(at, &0_u64).expect("within the memory");
    }
}
